"""Rows of results as tables on a terminal, or as plain text.

Hides rich, which may be absent: on a GPU machine with PyTorch alone a table is columns of text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nextn.hardware import has_module

Columns = Mapping[str, str]
Row = Mapping[str, Any]

TIMED_COLUMNS: Columns = {
    "op": "op",
    "shape": "shape",
    "kernel": "kernel",
    "cold_us": "cold us",
    "spread": "20-80 %",
    "warm_us": "warm us",
    "ratio": "x floor",
    "note": "note",
}
TUNED_COLUMNS: Columns = {
    "shape": "shape",
    "config": "config",
    "cold_us": "cold us",
    "spread": "20-80 %",
    "warm_us": "warm us",
    "ratio": "x floor",
    "note": "note",
}
CHECK_COLUMNS: Columns = {
    "op": "op",
    "kernel": "kernel",
    "case": "case",
    "passed": "passed",
    "diff": "diff",
    "error": "error",
    "note": "note",
}
PROFILE_COLUMNS: Columns = {
    "shape": "shape",
    "kernel": "kernel",
    "launch": "launch",
    "time_us": "us",
    "dram_pct": "DRAM %",
    "l2_pct": "L2 %",
    "tensor_pct": "tensor %",
    "issue_pct": "issue %",
    "warps_per_scheduler": "warps",
    "registers": "registers",
    "stalls": "stalls",
    "note": "note",
}
SANITIZE_COLUMNS: Columns = {"op": "op", "tool": "tool", "passed": "passed", "note": "note"}


def format_cell(row: Row, name: str) -> str:
    """One field as text; a time that was not taken because the check failed reads FAILED."""
    if name == "spread":
        has_times = row.get("cold_low_us") is not None
        return f"{row['cold_low_us']:.1f}-{row['cold_high_us']:.1f}" if has_times else ""
    value = row.get(name)
    if name == "cold_us" and value is None:
        return "FAILED"
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_cell(value, key)}" for key in value)
    if isinstance(value, float):
        return f"{value:.1e}" if name in ("diff", "error") else f"{value:.2f}" if name == "ratio" else f"{value:.1f}"
    return str(value)


def print_comparison(rows: Sequence[Row]) -> None:
    """Print timed rows to stdout, one table per op: a line per shape, a column per kernel, microseconds from a cold L2.

    Below each table stand the notes of the rows that have one.
    """
    for op in dict.fromkeys(row.get("op", row["stage"]) for row in rows):
        own = [row for row in rows if row.get("op", row["stage"]) == op]
        titles, lines = compare_kernels(own)
        print(f"{op}: us, L2 flushed; * took least")
        _print(lines, titles)
        for row in own:
            if row["note"]:
                print(f"  {row['shape']}, {row['kernel']}: {row['note']}")


def compare_kernels(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of one op's table, with ratios of what the op runs here to the floor and to the best peer.

    Example:
        >>> own = {"shape": "64 x 8192", "kernel": "own", "kind": "ours", "chosen": True, "cold_us": 30.0}
        >>> other = {**own, "kernel": "other", "kind": "peer", "chosen": False, "cold_us": 60.0}
        >>> titles, [line] = compare_kernels([{**row, "floor_us": 20.0} for row in (own, other)])
        >>> dict(zip(titles[1:], line[1:]))
        {'floor': '20.0', 'own': '30.0*', 'other': '60.0', 'runs': 'own', 'x floor': '1.50', 'x peer': '0.50'}
    """
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = {row["kernel"]: row for row in rows if row["shape"] == shape}
        times = {kernel: row["cold_us"] for kernel, row in own.items() if row["cold_us"] is not None}
        floor, least = next(iter(own.values()))["floor_us"], min(times.values(), default=None)
        chosen = next((kernel for kernel, row in own.items() if row["chosen"]), "")
        best_peer = min((times[kernel] for kernel in times if own[kernel]["kind"] == "peer"), default=None)
        cells = [_mark_least(own[kernel], least) if kernel in own else "" for kernel in kernels]
        ratios = [_divide(times.get(chosen), floor), _divide(times.get(chosen), best_peer)]
        lines.append([shape, f"{floor:.1f}", *cells, chosen, *ratios])
    return ["shape", "floor", *kernels, "runs", "x floor", "x peer"], lines


def print_rows(rows: Sequence[Row], columns: Columns) -> None:
    """Print rows to stdout as they are, a line each."""
    _print([[format_cell(row, name) for name in columns] for row in rows], list(columns.values()))


def format_lines(cells: Sequence[Sequence[str]], titles: Sequence[str]) -> Iterator[str]:
    """Lines of left-aligned columns, the titles first.

    Example:
        >>> list(format_lines([["a", "10"], ["bcd", "7"]], ["name", "us"]))
        ['name  us', 'a     10', 'bcd   7']
    """
    table = [titles, *cells]
    widths = [max(len(line[column]) for line in table) for column in range(len(titles))]
    for line in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()


def _mark_least(row: Row, least: float | None) -> str:
    return format_cell(row, "cold_us") + ("*" if row["cold_us"] is not None and row["cold_us"] == least else "")


def _divide(time: float | None, other: float | None) -> str:
    return f"{time / other:.2f}" if time is not None and other else ""


def _print(cells: Sequence[Sequence[str]], titles: Sequence[str]) -> None:
    if sys.stdout.isatty() and has_module("rich"):
        _print_rich(cells, titles)
    else:
        print("\n".join(format_lines(cells, titles)))


def _print_rich(cells: Sequence[Sequence[str]], titles: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles)
    for line in cells:
        table.add_row(*line)
    Console().print(table)
