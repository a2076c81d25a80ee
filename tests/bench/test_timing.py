"""The timing protocol, on a clock that keeps a diary."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref

import pytest
import torch

from nextn.testing.timing import Captured, CpuClock, CudaClock, measure_overhead, time_in_turns


class DiaryClock:
    """Time passes only inside runs; everything asked of the clock is written down."""

    def __init__(self):
        self.diary: list[str] = []
        self.now = 0.0

    def make_run(self, name, times):
        """A run that takes the given times in turn."""
        left = iter(times)

        def run():
            self.diary.append(name)
            self.now += next(left)

        return run

    def capture(self, run):
        return Captured(replay=run, result=lambda: None)

    def flush(self):
        self.diary.append("flush")
        self.now += 1000.0

    def spin(self):
        self.diary.append("spin")
        self.now += 1000.0

    def mark(self):
        self.diary.append("mark")
        return self.now

    def wait(self):
        self.diary.append("wait")

    def microseconds(self, start, stop):
        return stop - start


def test_cold_runs_take_turns_and_each_follows_a_flush():
    clock = DiaryClock()
    runs = [clock.make_run("a", [1.0] * 2), clock.make_run("b", [2.0] * 2)]
    time_in_turns(runs, clock, is_warm=False, num_rounds=2)
    one_round = ["flush", "mark", "a", "mark", "flush", "mark", "b", "mark", "wait"]
    assert clock.diary == one_round * 2


def test_a_warm_run_follows_itself_and_never_a_flush():
    clock = DiaryClock()
    time_in_turns([clock.make_run("a", [1.0] * 2)], clock, is_warm=True, num_rounds=1)
    assert clock.diary == ["a", "spin", "mark", "a", "mark", "wait"]


def test_neither_the_flush_nor_the_untimed_run_is_in_the_number():
    clock = DiaryClock()
    [cold] = time_in_turns([clock.make_run("a", [7.0] * 3)], clock, is_warm=False, num_rounds=3)
    [warm] = time_in_turns([clock.make_run("a", [90.0, 5.0] * 3)], clock, is_warm=True, num_rounds=3)
    assert (cold.median_us, warm.median_us) == (7.0, 5.0)


def test_median_and_fifths_of_known_times():
    clock = DiaryClock()
    times = [6.0, 1.0, 100.0, 3.0, 4.0, 5.0]
    [timing] = time_in_turns([clock.make_run("a", times)], clock, is_warm=False, num_rounds=6)
    assert timing.median_us == 4.5
    assert (timing.low_us, timing.high_us) == (3.0, 6.0)
    assert timing.num_runs == 6


def test_a_slow_comparison_stops_after_three_rounds(monkeypatch):
    clock = DiaryClock()
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr("nextn.testing.timing.time.monotonic", lambda: next(seconds))
    timings = time_in_turns([clock.make_run("a", [1.0] * 30)], clock, is_warm=False, num_rounds=30, max_seconds=1.0)
    assert timings[0].num_runs == 3


def test_nothing_to_time_is_no_timing():
    clock = DiaryClock()
    assert time_in_turns([], clock, is_warm=False) == []
    assert clock.diary == []


def test_a_replay_on_a_cpu_returns_anew():
    returned = iter([1, 2, 3])
    captured = CpuClock().capture(lambda: next(returned))
    assert captured.result() == 1
    captured.replay()
    assert captured.result() == 2


def test_the_host_s_clock_measures_time_and_has_no_overhead():
    import time

    [timing] = time_in_turns([lambda: time.sleep(0.003)], CpuClock(), is_warm=False, num_rounds=3)
    assert 3000 <= timing.low_us <= timing.median_us <= timing.high_us
    assert measure_overhead(CpuClock()) == 0.0


@pytest.mark.parametrize("is_warm", [False, True])
def test_every_run_of_a_comparison_has_as_many_times(is_warm):
    clock = DiaryClock()
    runs = [clock.make_run(name, [1.0] * 20) for name in "abc"]
    timings = time_in_turns(runs, clock, is_warm=is_warm, num_rounds=5)
    assert [timing.num_runs for timing in timings] == [5, 5, 5]


class Workspace:
    """Memory that a graph writes to."""


def test_a_captured_graph_keeps_the_run_s_workspaces(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            pass

    for name, stand_in in (("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    workspace = Workspace()
    alive = weakref.ref(workspace)
    replay = CudaClock.capture(CudaClock.__new__(CudaClock), functools.partial(id, workspace)).replay
    del workspace
    gc.collect()
    assert alive() is not None
    replay()
    del replay
    gc.collect()
    assert alive() is None
