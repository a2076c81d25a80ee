"""``python -m nextn.bench``: the benchmarks and GPU checks, needing torch and the standard library alone.

Hides argparse. ``nextn bench`` offers the same options where the command line's packages are installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nextn.bench.check import CheckOptions, check_ops
from nextn.bench.ops import FILE_NAME as OPS_FILE
from nextn.bench.ops import OpsOptions, bench_ops
from nextn.bench.plots import plot_rows, require_matplotlib
from nextn.bench.profile import ProfileOptions, profile_ops, run_shapes
from nextn.bench.sanitize import TOOLS, SanitizeOptions, run_cases, sanitize_ops
from nextn.bench.shapes import GRIDS
from nextn.bench.tables import (
    CHECK_COLUMNS,
    PROFILE_COLUMNS,
    SANITIZE_COLUMNS,
    TIMED_COLUMNS,
    TUNED_COLUMNS,
    Columns,
    format_cell,
    print_comparison,
    print_rows,
)
from nextn.bench.tune import TuneOptions, tune_kernel
from nextn.bench.verify_layer import FILE_NAME as LAYER_FILE
from nextn.bench.verify_layer import VerifyLayerOptions, bench_verify_layer
from nextn.errors import NextnError
from nextn.ops._kernel import OPS

_STAGES: dict[str, tuple[type, Callable[..., list[dict[str, Any]]], Columns]] = {
    "ops": (OpsOptions, bench_ops, TIMED_COLUMNS),
    "verify-layer": (VerifyLayerOptions, bench_verify_layer, TIMED_COLUMNS),
    "check": (CheckOptions, check_ops, CHECK_COLUMNS),
    "sanitize": (SanitizeOptions, sanitize_ops, SANITIZE_COLUMNS),
    "profile": (ProfileOptions, profile_ops, PROFILE_COLUMNS),
    "tune": (TuneOptions, tune_kernel, TUNED_COLUMNS),
}
_STAGE_FILES = {"ops": OPS_FILE, "verify-layer": LAYER_FILE}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage and print its table, or JSON; returns 1 if a check failed, 2 if the input was wrong."""
    options = vars(_make_parser().parse_args(arguments))
    stage, as_json, plot = options.pop("stage"), options.pop("json", False), options.pop("plot", None)
    if stage == "run-cases":
        launches, failures = run_cases(options["op"], options["only"])
        print("".join(f"failed: {failure}\n" for failure in failures) + f"{launches} launches, {len(failures)} failed")
        return 1 if failures else 0
    if stage == "run-shapes":
        print(f"{run_shapes(options['op'], options['only'], options['kernel'], options['peers_dir'])} launches")
        return 0
    kind, function, columns = _STAGES[stage]
    try:
        if plot is not None:
            require_matplotlib()
        rows = function(kind(**_given(options)), on_row=lambda row: _report(row, columns))
        if plot is not None:
            out = options["out"]
            plot_rows(rows, plot, stored=out and out / _STAGE_FILES[stage])
    except NextnError as error:
        print(f"nextn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    failed = sum(not row["passed"] for row in rows)
    if as_json:
        print(json.dumps({"rows": rows}))
    elif stage == "check":
        print(f"{len(rows)} checked, {failed} failed")
    elif stage in ("sanitize", "profile", "tune"):
        print_rows(rows, columns)
    else:
        print_comparison(rows)
    return 1 if failed else 0


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Options by the names of the fields, lists as tuples; what was not given keeps its default."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return {name: value for name, value in given.items() if value is not None}


def _report(row: dict[str, Any], columns: Columns) -> None:
    """One line on stderr, as a row is ready."""
    print("  ".join(format_cell(row, name) for name in columns), file=sys.stderr, flush=True)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nextn.bench", description=(__doc__ or "").splitlines()[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, help="folder of the JSON lines; rows already there are not made again")
    shared.add_argument("--commit", help="the commit these files are of, where git cannot say")
    shared.add_argument("--seconds", type=float, help="start nothing new after this long")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    on_ops = argparse.ArgumentParser(add_help=False)
    on_ops.add_argument("--op", dest="ops", action="append", choices=OPS, help="may be given several times")
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--device", choices=("cuda", "cpu"))
    timed.add_argument("--peers-dir", type=Path, help="folder with deep_gemm, flash_mla or vLLM's library")
    timed.add_argument("--rounds", type=int, help="turns per candidate")

    bench = stages.add_parser("ops", parents=[shared, on_ops, timed], help="every kernel of every op side by side")
    bench.add_argument("--grid", choices=GRIDS)
    bench.add_argument("--only", help="shapes whose name contains this")
    bench.add_argument("--plot", type=Path, help="a PNG of time against next_n")
    layer = stages.add_parser("verify-layer", parents=[shared, timed], help="one layer's attention as one graph")
    layer.add_argument("--plot", type=Path, help="a PNG of time against next_n")
    for name in ("batch", "context", "next-n", "heads"):
        layer.add_argument(f"--{name}", type=int, action="append", help="may be given several times")
    layer.add_argument("--topk", type=int)
    layer.add_argument("--drift", type=float, help="how far drafts' index queries lie apart; 0 is not at all")
    check = stages.add_parser("check", parents=[shared, on_ops], help="every kernel against the reference")
    check.add_argument("--device", choices=("cuda", "cpu"))
    sanitize = stages.add_parser("sanitize", parents=[shared, on_ops], help="every kernel under compute-sanitizer")
    sanitize.add_argument("--tool", dest="tools", action="append", choices=TOOLS)
    sanitize.add_argument("--only", help="kernels whose name contains this")
    profile = stages.add_parser("profile", parents=[shared, on_ops], help="every kernel's counters, by ncu")
    profile.add_argument("--only", help="shapes whose name contains this")
    profile.add_argument("--kernel", help="kernels whose name contains this")
    profile.add_argument("--peers-dir", type=Path, help="folder with deep_gemm, flash_mla or vLLM's library")
    tune = stages.add_parser("tune", parents=[shared], help="one kernel under other configurations, side by side")
    tune.add_argument("--op", required=True, choices=OPS)
    tune.add_argument("--kernel", required=True)
    tune.add_argument("--config", dest="configs", action="append", help="as in 'stages=4|8 turns=2'; several times")
    tune.add_argument("--grid", choices=GRIDS)
    tune.add_argument("--only", help="shapes whose name contains this")
    tune.add_argument("--rounds", type=int, help="turns per configuration")
    watched = argparse.ArgumentParser(add_help=False)
    watched.add_argument("--op", required=True, choices=OPS)
    watched.add_argument("--only", default="")
    stages.add_parser(
        "run-cases", parents=[watched], help="launch every kernel of an op once per case, for a sanitizer"
    )
    shapes = stages.add_parser("run-shapes", parents=[watched], help="the same once per shape, for a profiler")
    shapes.add_argument("--kernel", default="")
    shapes.add_argument("--peers-dir", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
