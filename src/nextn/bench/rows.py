"""Rows of results: what every one carries, where they are stored, and which are there already.

Hides the machine: its GPU, clocks and versions are asked for here and nowhere else in the benchmarks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import nextn
from nextn.errors import InputError, UnsupportedError
from nextn.hardware import describe_device, module_version

Row = dict[str, Any]

_CLOCKS = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def open_device(name: str, *, instead: str) -> torch.device:
    """The device called ``cuda`` or ``cpu``.

    Raises:
        InputError: it is called something else.
        UnsupportedError: there is no GPU here; the message says what to run instead.
    """
    if name not in ("cuda", "cpu"):
        raise InputError(f"device {name!r} is neither cuda nor cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"PyTorch finds no GPU here; run this on a machine with one, or {instead}")
    return torch.device(name)


def describe_run(device: torch.device, commit: str | None = None) -> Row:
    """What every row of one run has in common: GPU, versions, commit and time (UTC)."""
    return {
        "gpu": describe_device(device).name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": module_version("triton"),
        "python": sys.version.split()[0],
        "nextn": nextn.__version__,
        "commit": commit or find_commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def find_commit() -> str:
    """The commit git says the working directory is of, or ``unknown``."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def read_clocks() -> Row:
    """Clocks, power and temperature of the first GPU as nvidia-smi shows them now; empty where there is none."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_CLOCKS.values())}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        values = [float(value) for value in found.stdout.strip().split(",")]
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return dict(zip(_CLOCKS, values))


def append_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines, making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(file: Path) -> list[Row]:
    """The rows of a file; none if there is no file. A line cut short by an interrupted run is passed over."""
    if not file.exists():
        return []
    return [row for line in file.read_text(encoding="utf-8").splitlines() if (row := _parse(line)) is not None]


def _parse(line: str) -> Row | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def find_done(file: Path, run: Mapping[str, Any], keys: tuple[str, ...]) -> set[tuple[Any, ...]]:
    """What a file already holds of this commit, GPU, torch and triton: the values of ``keys`` of its rows.

    A commit that is unknown never counts as done.
    """
    same = ("commit", "gpu", "torch", "triton")
    if run["commit"] == "unknown":
        return set()
    rows = [row for row in read_rows(file) if all(row.get(name) == run[name] for name in same)]
    return {tuple(row.get(key) for key in keys) for row in rows}


def collect_rows(
    items: Iterable[tuple[tuple[Any, ...], Any]],
    measure: Callable[[Any], Iterable[Row]],
    *,
    run: Row,
    keys: tuple[str, ...],
    file: Path | None,
    seconds: float,
    on_row: Callable[[Row], None] | None,
) -> list[Row]:
    """Measure what a file does not hold yet; store and show the rows of each item as soon as it is done.

    Args:
        items: pairs of the values of ``keys`` that a row of the item has, and what ``measure`` takes.
        measure: an item's rows, without what they have in common.
        run: what they have in common.
        keys: fields that tell items apart.
        file: JSON lines to look up and append to, or None.
        seconds: start no item after this long.
        on_row: called with each row.

    Returns:
        The rows measured now.
    """
    done = find_done(file, run, keys) if file else set()
    begin, rows = time.monotonic(), []
    for key, item in items:
        if key in done:
            continue
        if time.monotonic() - begin > seconds:
            break
        found = [{**run, **row} for row in measure(item)]
        rows += found
        if file:
            append_rows(file, found)
        if on_row is not None:
            for row in found:
                on_row(row)
    return rows


def print_rows(rows: Iterable[Row], file: Path | None = None) -> int:
    """Print each row as one line of JSON as soon as it is there, and append it to a file too.

    Returns:
        An exit code: 1 if any row has not passed.
    """
    failed = 0
    for row in rows:
        failed += not row.get("passed", False)
        print(json.dumps(row), flush=True)
        if file is not None:
            append_rows(file, [row])
    print(f"{failed} rows failed", file=sys.stderr)
    return int(failed > 0)
