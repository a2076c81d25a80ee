"""The picture of a bench: which rows share a panel, and that it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextn.bench import plots
from nextn.bench.plots import group_rows, keep_last, plot_rows
from nextn.bench.tables import TIMED_COLUMNS, format_cell
from nextn.errors import InputError, UnsupportedError


def make_row(next_n, kernel="ours", cold_us: float | None = 10.0, context=8192):
    sizes = {"requests": 64, "context": context, "next_n": next_n, "heads": 64}
    shape = f"64 x {context} n {next_n}"
    row = {"op": "index_logits", "shape": shape, "sizes": sizes, "kernel": kernel, "kind": "ours", "passed": True}
    return {**row, "cold_us": cold_us, "cold_low_us": cold_us, "cold_high_us": cold_us, "floor_us": 5.0}


def test_shapes_that_differ_in_depth_alone_share_a_panel():
    rows = [make_row(1), make_row(4), make_row(None), make_row(4, context=32768)]
    panels = group_rows(rows)
    assert [len(panel) for panel in panels.values()] == [3, 1]


def test_a_row_without_a_time_is_left_out():
    assert group_rows([make_row(1, cold_us=None)]) == {}
    with pytest.raises(InputError, match="no row has a time"):
        plot_rows([make_row(1, cold_us=None)], Path("unused.png"))


def test_the_reference_is_drawn_only_where_nothing_else_was_timed():
    reference = make_row(4, kernel="reference", context=32768)
    panels = group_rows([make_row(1, kernel="reference"), make_row(1), make_row(4, cold_us=None), reference])
    assert list(panels.values()) == [[make_row(1)], [reference]]


def test_shapes_without_a_depth_get_bars_and_floors(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {**make_row(1, kernel=kernel), "op": "select_topk", "sizes": {"rows": rows}, "shape": f"{rows} x 8192"}
        for kernel, rows in (("ours", 1), ("ours", 64), ("theirs", 64))
    ]
    plot_rows(rows, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_shape_measured_twice_the_last_row_counts():
    assert keep_last([make_row(1, cold_us=9.0), make_row(2), make_row(1, cold_us=7.0)]) == [
        make_row(1, cold_us=7.0),
        make_row(2),
    ]


def test_the_picture_has_stored_rows_too_and_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    stored = tmp_path / "ops.jsonl"
    stored.write_text(json.dumps(make_row(1)) + "\n")
    plot_rows([make_row(2, kernel="theirs")], tmp_path / "out.png", stored=stored)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="nowhere"):
        plot_rows([make_row(1)], tmp_path / "nowhere" / "out.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "has_module", lambda name: False)
    with pytest.raises(UnsupportedError, match=r"nextn\[bench\]"):
        plot_rows([make_row(1)], tmp_path / "out.png")


def test_a_failed_row_reads_failed_in_the_table():
    cells = [format_cell(make_row(1, cold_us=None) | {"cold_low_us": None}, name) for name in TIMED_COLUMNS]
    assert "FAILED" in cells
    assert format_cell(make_row(1), "spread") == "10.0-10.0"
