"""What a comparison of kernels says: who took least, and how far what runs is from the floor and from the best peer."""

from __future__ import annotations

from nextn.bench.tables import compare_kernels, format_cell, print_comparison


def make_row(kernel, kind, cold_us: float | None, shape="64 x 8192 n 4"):
    row = {"stage": "bench", "op": "index_logits", "shape": shape, "kernel": kernel, "kind": kind, "floor_us": 20.0}
    row["chosen"] = kernel in ("fast", "broken", "ours")
    return {**row, "cold_us": cold_us, "note": "" if cold_us else "logits: diff 1"}


def test_ratios_are_of_the_kernel_that_runs_and_the_best_peer():
    rows = [
        make_row("portable", "ours", 50.0),
        make_row("fast", "ours", 30.0),
        make_row("theirs", "peer", 40.0),
        make_row("slow", "peer", 90.0),
        make_row("reference", "reference", 10.0),
    ]
    titles, [line] = compare_kernels(rows)
    assert titles == ["shape", "floor", "portable", "fast", "theirs", "slow", "reference", "runs", "x floor", "x peer"]
    assert line == ["64 x 8192 n 4", "20.0", "50.0", "30.0", "40.0", "90.0", "10.0*", "fast", "1.50", "0.75"]


def test_a_kernel_that_failed_wins_nothing():
    _, [line] = compare_kernels([make_row("broken", "ours", None), make_row("theirs", "peer", 40.0)])
    assert line == ["64 x 8192 n 4", "20.0", "FAILED", "40.0*", "broken", "", ""]


def test_a_shape_that_a_kernel_does_not_take_is_blank():
    rows = [make_row("ours", "ours", 30.0), make_row("theirs", "peer", 60.0, shape="64 x 8192 n 2")]
    _, lines = compare_kernels(rows)
    assert [line[2:4] for line in lines] == [["30.0*", ""], ["", "60.0*"]]


def test_notes_stand_below_the_table(capsys):
    print_comparison([make_row("broken", "ours", None), make_row("theirs", "peer", 40.0)])
    assert "  64 x 8192 n 4, broken: logits: diff 1" in capsys.readouterr().out.splitlines()


def test_cells():
    row = {"passed": False, "diff": 1.234e-7, "ratio": 1.2345, "cold_us": 12.34, "note": None}
    assert [format_cell(row, name) for name in row] == ["NO", "1.2e-07", "1.23", "12.3", ""]
