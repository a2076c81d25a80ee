"""``nextn bench ops``: every kernel that does an op, ours and others', side by side on the same tensors.

Hides the order of things: a result is checked first, and of the very graph that is then timed; the candidates of a
shape take turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nextn.bench.op_calls import Verdict
from nextn.bench.peers import add_peers_folder, peer_candidates
from nextn.bench.rows import Row, collect_rows, describe_run, open_device, read_clocks
from nextn.bench.shapes import choose_shapes
from nextn.bench.workloads import Candidate, make_workload, our_candidates
from nextn.errors import InputError
from nextn.ops._kernel import OPS, choose
from nextn.testing.timing import Clock, CpuClock, Run, Timing, make_clock, measure_overhead, time_in_turns

FILE_NAME = "ops.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpsOptions:
    """What to measure and where to keep it.

    Attributes:
        ops: ops to measure; all if empty.
        grid: ``targets``, ``small`` or ``full``; by default ``targets``, and ``small`` on a CPU.
        only: measure shapes whose name contains this.
        device: ``cuda`` or ``cpu``.
        out: folder whose ``ops.jsonl`` rows are appended to, and whose shapes of the same commit are not measured
            again; nothing is stored if None.
        peers_dir: folder with further peers.
        commit: the commit these files are of, where git cannot say.
        rounds: turns per candidate and protocol.
        seconds: start no shape after this long.
    """

    ops: tuple[str, ...] = ()
    grid: str | None = None
    only: str = ""
    device: str = "cuda"
    out: Path | None = None
    peers_dir: Path | None = None
    commit: str | None = None
    rounds: int = 30
    seconds: float = 500.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A candidate, its verdict, and what to time if that is good."""

    candidate: Candidate
    verdict: Verdict
    run: Run | None


def bench_ops(options: OpsOptions, *, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Measure every candidate of every shape asked for.

    Args:
        options: what to measure.
        on_row: called with each row as it is ready.

    Returns:
        The rows, those found in ``out`` not among them. A row whose check failed has no times.

    Raises:
        InputError: an unknown op, grid, device or folder.
        UnsupportedError: there is no GPU here.
    """
    shapes = _choose_shapes(options)
    device = open_device(options.device, instead="try it with --device cpu, which times the references")
    if options.peers_dir is not None:
        add_peers_folder(options.peers_dir)
    run, clock = open_clock(device, options.commit)
    return collect_rows(
        [((shape.op, shape.name), shape) for shape in shapes],
        lambda shape: bench_shape(shape, device, clock, rounds=options.rounds),
        run=run,
        keys=("op", "shape"),
        file=options.out / FILE_NAME if options.out else None,
        seconds=options.seconds,
        on_row=on_row,
    )


def open_clock(device: torch.device, commit: str | None) -> tuple[Row, Clock]:
    """What the rows of one timed run have in common, overhead_us among it, and the device's clock."""
    clock = make_clock(device)
    return {**describe_run(device, commit), "overhead_us": round(measure_overhead(clock), 2)}, clock


def bench_shape(shape: Any, device: torch.device, clock: Clock, *, rounds: int) -> Iterator[Row]:
    """Check and time every candidate of one shape.

    Yields:
        One row per candidate: op, shape, its sizes, kernel, kind, passed, diff, error, note; bytes, flops, floor_us;
        cold_us and warm_us with their fifths (low, high), num_runs and ratio (cold over floor), None if not timed.
    """
    workload = make_workload(shape, device)
    (ours, refusals), (peers, absent) = our_candidates(workload), peer_candidates(workload)
    chosen = choose(shape.op, workload.call.problem).kernel.name
    common = {**describe_shape(shape), "absent": {**refusals, **absent}}
    for candidate, row in time_candidates([*ours, *peers], clock, rounds=rounds, floor_us=shape.cost.floor_us):
        is_chosen = candidate.kind != "peer" and candidate.name == chosen
        yield {**common, "kernel": candidate.name, "kind": candidate.kind, "chosen": is_chosen, **row}


def describe_shape(shape: Any) -> Row:
    """What all rows of a shape have in common: stage, op, shape, sizes, bytes, flops and floor_us."""
    cost = shape.cost
    return {
        "stage": "bench",
        "op": shape.op,
        "shape": shape.name,
        "sizes": {name: value for name, value in dataclasses.asdict(shape).items() if name != "op"},
        "bytes": cost.num_bytes,
        "flops": cost.num_flops,
        "floor_us": round(cost.floor_us, 2),
    }


def time_candidates(
    candidates: Sequence[Candidate], clock: Clock, *, rounds: int, floor_us: float
) -> Iterator[tuple[Candidate, Row]]:
    """Check every candidate of a shape, then time in turns those that are right.

    Yields:
        Each candidate with passed, diff, error and note; its times, or None; and the GPU's clocks just after.
    """
    checked = [check_candidate(candidate, clock) for candidate in candidates]
    runs = [one.run for one in checked if one.run is not None]
    cold = iter(time_in_turns(runs, clock, is_warm=False, num_rounds=rounds))
    warm = iter(time_in_turns(runs, clock, is_warm=True, num_rounds=rounds))
    clocks = {} if isinstance(clock, CpuClock) else read_clocks()
    for one in checked:
        timings = (None, None) if one.run is None else (next(cold), next(warm))
        verdict = dataclasses.asdict(one.verdict)
        yield one.candidate, {**clocks, **verdict, **_time_fields(*timings, floor_us=floor_us)}


def check_rounds(rounds: int) -> None:
    """Raise InputError unless there is at least one turn per candidate."""
    if rounds < 1:
        raise InputError(f"rounds {rounds} is below 1; a median needs at least one run")


def _choose_shapes(options: OpsOptions) -> Sequence[Any]:
    check_rounds(options.rounds)
    unknown = sorted(set(options.ops) - set(OPS))
    if unknown:
        raise InputError(f"unknown ops {unknown}; use some of {list(OPS)}")
    grid = options.grid or ("small" if options.device == "cpu" else "targets")
    return choose_shapes(grid, options.ops or OPS, options.only)


def check_candidate(candidate: Candidate, clock: Clock) -> Checked:
    """Capture a candidate, replay it over spoilt memory and judge what it wrote; one that breaks stops no other."""
    try:
        captured = clock.capture(candidate.build())
        candidate.poison(captured.result())
        captured.replay()
        clock.wait()
        verdict = candidate.judge(candidate.read(captured.result()))
    except Exception as error:  # a kernel or a library may fail in any way
        note = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Checked(candidate=candidate, verdict=Verdict(passed=False, note=note), run=None)
    return Checked(candidate=candidate, verdict=verdict, run=captured.replay if verdict.passed else None)


def _time_fields(cold: Timing | None, warm: Timing | None, *, floor_us: float) -> Row:
    if cold is None or warm is None:
        names = ("cold_us", "cold_low_us", "cold_high_us", "warm_us", "warm_low_us", "warm_high_us")
        return {**dict.fromkeys(names), "num_runs": 0, "ratio": None}
    fields = {}
    for name, timing in (("cold", cold), ("warm", warm)):
        fields[f"{name}_us"] = round(timing.median_us, 2)
        fields[f"{name}_low_us"] = round(timing.low_us, 2)
        fields[f"{name}_high_us"] = round(timing.high_us, 2)
    return {**fields, "num_runs": cold.num_runs, "ratio": round(cold.median_us / floor_us, 3)}
