"""Timing several ways of doing one thing side by side, on a GPU or a CPU.

Hides how a run is bracketed: what lies in the cache before it, and how the host's own time stays out of the number.

Protocol. Every run is a captured CUDA graph between two events, and the runs of a comparison take turns (A B C, A B C,
...), so that clocks and temperature are the same for all. Cold: 256 MB are zeroed before each run, as
``triton.testing.do_bench`` does, five times the L2 cache of an H100; the GPU is busy with it for about 100 us, while
the host queues the events and the run, so no launch waits for the host. Warm: the run itself goes before, untimed, and
a spinning kernel that touches no memory keeps the GPU busy meanwhile. What the smallest graph takes between two events
(:func:`measure_overhead`) is in every number, as it is in those of ``do_bench``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Run = Callable[[], Any]

FLUSH_BYTES = 256 * 2**20
_SPIN_CYCLES = 150_000  # 80 us at 1.9 GHz, more than the host takes to queue an event and a graph
_CPU_FLUSH_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Times of one run under one protocol, in microseconds.

    Attributes:
        median_us: the middle of them.
        low_us: a fifth of them are shorter.
        high_us: a fifth of them are longer.
        num_runs: how many were taken.
    """

    median_us: float
    low_us: float
    high_us: float
    num_runs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """A run in the form that is timed.

    Attributes:
        replay: does it again.
        result: what the last replay returned, or the run before the first; on a GPU always the same memory.
    """

    replay: Run
    result: Run


class Clock(Protocol):
    """A device that can be timed."""

    def capture(self, run: Run) -> Captured:
        """Run once, and make what is to be timed in place of ``run``."""
        ...

    def flush(self) -> None:
        """Empty the caches."""
        ...

    def spin(self) -> None:
        """Keep the device busy without touching its caches, until the host has queued the next run."""
        ...

    def mark(self) -> Any:
        """A point in the device's time."""
        ...

    def wait(self) -> None:
        """Wait until everything queued has run."""
        ...

    def microseconds(self, start: Any, stop: Any) -> float:
        """From one mark to another, both of which have been reached."""
        ...


class CudaClock:
    """Events and captured graphs on the current CUDA device."""

    def __init__(self) -> None:
        self._memory = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def capture(self, run: Run) -> Captured:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles, and initialises what libraries initialise once, outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

        def replay(kept: Run = run) -> None:  # with the run go its workspaces, which the graph writes to
            graph.replay()

        return Captured(replay=replay, result=lambda: result)

    def flush(self) -> None:
        self._memory.zero_()

    def spin(self) -> None:
        torch.cuda._sleep(_SPIN_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def microseconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop) * 1e3


class CpuClock:
    """The host's clock, for trying a benchmark where there is no GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(_CPU_FLUSH_BYTES, dtype=torch.uint8)

    def capture(self, run: Run) -> Captured:
        results = [run()]

        def replay() -> None:
            results[0] = run()

        return Captured(replay=replay, result=lambda: results[0])

    def flush(self) -> None:
        self._memory.zero_()

    def spin(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        pass

    def microseconds(self, start: float, stop: float) -> float:
        return (stop - start) * 1e6


def make_clock(device: torch.device) -> Clock:
    """The clock of a device: events on a GPU, the host's on a CPU."""
    return CudaClock() if device.type == "cuda" else CpuClock()


def time_in_turns(
    runs: Sequence[Run], clock: Clock, *, is_warm: bool, num_rounds: int = 30, max_seconds: float = 5.0
) -> list[Timing]:
    """Time several runs that take turns.

    Args:
        runs: the replays of what :meth:`Clock.capture` gave.
        clock: of the device they run on.
        is_warm: whether a run finds in the caches what it left there, rather than nothing of its own.
        num_rounds: turns per run.
        max_seconds: no further round is started after this long, but three always are.

    Returns:
        One timing per run, in order.

    Example:
        >>> [timing] = time_in_turns([lambda: sum(range(100))], CpuClock(), is_warm=True, num_rounds=4)
        >>> timing.num_runs, timing.low_us <= timing.median_us <= timing.high_us
        (4, True)
    """
    times: list[list[float]] = [[] for _ in runs]
    begin = time.monotonic()
    for round_number in range(num_rounds if runs else 0):
        if round_number >= 3 and time.monotonic() - begin > max_seconds:
            break
        marks = [_time_once(run, clock, is_warm) for run in runs]
        clock.wait()
        for one, (start, stop) in zip(times, marks):
            one.append(clock.microseconds(start, stop))
    return [_summarise(one) for one in times]


def measure_overhead(clock: Clock) -> float:
    """Median microseconds between two events around a graph of the smallest kernel there is; 0 on a CPU."""
    if isinstance(clock, CpuClock):
        return 0.0
    cell = torch.zeros(1, device="cuda")
    [timing] = time_in_turns([clock.capture(cell.zero_).replay], clock, is_warm=False, num_rounds=15)
    return timing.median_us


def _time_once(run: Run, clock: Clock, is_warm: bool) -> tuple[Any, Any]:
    if is_warm:
        run()
        clock.spin()
    else:
        clock.flush()
    start = clock.mark()
    run()
    return start, clock.mark()


def _summarise(times: Sequence[float]) -> Timing:
    ordered = sorted(times)
    fifth = (len(ordered) - 1) / 5
    return Timing(
        median_us=statistics.median(ordered),
        low_us=ordered[int(fifth)],
        high_us=ordered[len(ordered) - 1 - int(fifth)],
        num_runs=len(ordered),
    )
