"""Draws the loss curves of a run: ``python -m training.plot LOG.jsonl OUT.png``.

Hides how the stages' separate step counts are laid end to end on one axis.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

STAGES = ("dense", "dense_long", "warm_up", "sparse", "draft")


def _series(records: list[dict[str, Any]], stage: str, key: str, offset: int) -> tuple[list[int], list[float]]:
    chosen = [record for record in records if record["stage"] == stage and key in record]
    return [offset + record["step"] for record in chosen], [record[key] for record in chosen]


def _stage_offsets(records: list[dict[str, Any]]) -> dict[str, int]:
    offsets, total = {}, 0
    for stage in STAGES:
        offsets[stage] = total
        total += max(record["step"] for record in records if record["stage"] == stage)
    return offsets


def _draw(axes: Axes, records: list[dict[str, Any]], curves: list[tuple[str, str, str]], title: str) -> None:
    offsets, labels = _stage_offsets(records), set()
    for key, label, colour in curves:
        for stage in STAGES:
            steps, values = _series(records, stage, key, offsets[stage])
            if steps:
                axes.plot(steps, values, color=colour, label=None if label in labels else label, linewidth=1.2)
                labels.add(label)
    for stage in STAGES[1:]:
        axes.axvline(offsets[stage], color="0.85", linewidth=0.8, zorder=0)
    axes.set_title(title)
    axes.set_xlabel("step, stages end to end")
    axes.legend(frameon=False)


def main() -> None:
    """Read the log named first and write the picture named second."""
    records = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2))
    language = [
        ("lm", "next token, training (dropout)", "C0"),
        ("draft", "NextN layer, training", "C1"),
        ("held_out", "next token, held-out files", "C3"),
    ]
    _draw(left, records, language, "dense, dense at 4096, sparse")
    left.set_ylim(1.0, 3.0)
    _draw(middle, records, [("kl", "mean KL per layer (draft: NextN layer)", "C2")], "indexer")
    middle.set_yscale("log")
    for depth in (1, 2, 4, 7):
        steps, values = _series(records, "draft", f"depth{depth}", 0)
        right.plot(steps, values, label=f"depth {depth}", linewidth=1.2)
    right.set_title("draft stage: cross-entropy to the target")
    right.set_xlabel("step")
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
