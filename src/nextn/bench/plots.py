"""Pictures of results: time against next_n, ours beside others and the floor.

Hides matplotlib, which comes with the ``bench`` extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextn.bench.rows import read_rows
from nextn.errors import InputError, UnsupportedError
from nextn.hardware import has_module

Row = Mapping[str, Any]

_PANELS_PER_LINE = 3


def require_matplotlib() -> None:
    """Raise UnsupportedError, naming the extra, unless matplotlib is installed."""
    if not has_module("matplotlib"):
        raise UnsupportedError("--plot needs matplotlib, which is not installed; pip install 'nextn[bench]'")


def plot_rows(rows: Sequence[Row], file: Path, *, stored: Path | None = None) -> None:
    """Draw one panel per group of shapes that differ in next_n alone, and one per op whose shapes have none.

    Args:
        rows: of ``bench ops`` or ``bench verify-layer``; those without a time are left out.
        file: the picture to write; its ending says the format.
        stored: JSON lines the rows were appended to, if any; the last row of each shape and kernel there is drawn too.

    Raises:
        UnsupportedError: matplotlib is not installed.
        InputError: no row has a time, or the picture cannot be written there.
    """
    require_matplotlib()
    panels = group_rows(keep_last([*(read_rows(stored) if stored else ()), *rows]))
    if not panels:
        raise InputError("there is nothing to plot: no row has a time")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    lines = -(-len(panels) // _PANELS_PER_LINE)
    figure = Figure(figsize=(5.2 * min(len(panels), _PANELS_PER_LINE), 3.8 * lines), layout="constrained")
    for place, (title, panel) in enumerate(panels.items(), start=1):
        _draw(figure.add_subplot(lines, min(len(panels), _PANELS_PER_LINE), place), title, panel)
    try:
        figure.savefig(file, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write --plot {file}: {error}; give a .png in a folder that exists") from None


def keep_last(rows: Sequence[Row]) -> list[Row]:
    """The last row of each op, shape and kernel, where the first of them stood."""
    return list({(row.get("op"), row["shape"], row["kernel"]): row for row in rows}.values())


def group_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The timed rows of each panel by its title; the reference's only where there are no others."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("cold_us") is not None:
            panels.setdefault(_title(row), []).append(row)
    return {title: [row for row in panel if row["kernel"] != "reference"] or panel for title, panel in panels.items()}


def _title(row: Row) -> str:
    sizes = row["sizes"]
    name = row.get("op", "verify layer")
    if "next_n" not in sizes:
        return name
    others = {key: value for key, value in sizes.items() if key not in ("next_n", "requests", "context", "topk")}
    details = ", ".join(f"{key} {value}" for key, value in others.items())
    return f"{name}\n{sizes['requests']} x {sizes['context']}, {details}"


def _draw(axes: Any, title: str, rows: Sequence[Row]) -> None:
    has_depths = "next_n" in rows[0]["sizes"]
    labels = list(dict.fromkeys(_label(row) for row in rows))
    if has_depths:
        labels.sort(key=lambda label: (label == "ragged", label))
    kernels: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        kernels.setdefault((row["kernel"], row["kind"]), {})[labels.index(_label(row))] = row["cold_us"]
    for number, ((name, kind), times) in enumerate(kernels.items()):
        places = sorted(times)
        if has_depths:
            style = "-o" if kind == "ours" else "--s"
            axes.plot(places, [times[place] for place in places], style, label=name, markersize=4)
        else:  # no line leads from one shape to another
            left = [place + 0.8 * ((number + 0.5) / len(kernels) - 0.5) for place in places]
            hatch = None if kind == "ours" else "///"
            axes.bar(left, [times[place] for place in places], 0.8 / len(kernels), label=name, hatch=hatch, alpha=0.8)
    floors = {_label(row): row["floor_us"] for row in rows}
    if has_depths:
        axes.plot(range(len(labels)), [floors[label] for label in labels], ":k", label="floor")
    else:
        starts = [place - 0.4 for place in range(len(labels))]
        axes.hlines([floors[label] for label in labels], starts, [start + 0.8 for start in starts], "k", label="floor")
    axes.set_xticks(range(len(labels)), labels, rotation=0 if has_depths else 30)
    axes.set_xlabel("next_n" if has_depths else "shape")
    axes.set_ylabel("us, L2 flushed")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)


def _label(row: Row) -> str:
    if "next_n" not in row["sizes"]:
        return row["shape"]
    depth = row["sizes"]["next_n"]
    return "ragged" if depth is None else str(depth)
