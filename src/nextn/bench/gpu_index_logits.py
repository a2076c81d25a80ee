"""Checks and times of the Triton index-logits kernels on a GPU: ``python -m nextn.bench.gpu_index_logits``.

Hides inputs, clocks and the tuning grid. Every shape is checked against the reference before its time is taken, and
every result is one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from nextn.batch import ForwardBatch, ForwardMode
from nextn.cache_format import IndexCacheFormat
from nextn.hardware import describe_device
from nextn.ops._kernel import Choice, Kernel, OpPlan, discover
from nextn.ops.index_logits import reference
from nextn.ops.index_logits.cases import CASES
from nextn.ops.index_logits.problem import IndexLogitsProblem, problem_of
from nextn.testing.numerics import MAX_ERROR, QUANTISED_MAX_DIFF, compare_rows

REPEATS = 20
PAGE = 64
BYTES_PER_SECOND = 3.0e12  # an H100's reads and FP8 products, as the targets take them
FLOPS_PER_SECOND = 1.5e15
# (requests, context, rows per request): the shapes of the targets.
SHAPES = (
    *((1, 8192, n) for n in (1, 4, 8)),
    *((1, 131072, n) for n in (1, 2, 4, 8)),
    *((4, 65536, n) for n in (1, 3, 4, 8)),
    *((16, 32768, n) for n in (1, 3, 4, 6, 8)),
    *((64, 8192, n) for n in (1, 2, 4, 8)),
    *((64, 32768, n) for n in (1, 2, 3, 4, 5, 6, 7, 8)),
    *((128, 16384, n) for n in (1, 2, 4, 8)),
)
TUNED = tuple((64, 32768, n) for n in (4, 8, 6, 2, 1, 3, 5))


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A batch on the GPU; lengths may differ between requests."""

    arguments: dict[str, torch.Tensor]
    row_counts: tuple[int, ...]
    max_context: int

    def problem(self) -> IndexLogitsProblem:
        counts = set(self.row_counts)
        return problem_of(
            describe_device(self.arguments["q"].device),
            q=self.arguments["q"],
            index_cache=self.arguments["index_cache"],
            page_table=self.arguments["page_table"],
            max_context=self.max_context,
            next_n=self.row_counts[0] if len(counts) == 1 and 0 not in counts else None,
            max_rows=max(self.row_counts),
        )

    @property
    def floor_us(self) -> float:
        """The larger of the time of the bytes (keys once, logits once) and of the products."""
        rows, heads, dim = self.arguments["q"].shape
        tokens = sum(self.max_context for count in self.row_counts if count)
        num_bytes = tokens * (dim + 4) + rows * self.max_context * 4
        flops = 2 * rows * self.max_context * heads * dim
        return max(num_bytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND) * 1e6


def make_inputs(row_counts: Sequence[int], context: int, *, heads: int = 64, seed: int = 0) -> Inputs:
    """Random quantised inputs, every request ``context`` long, pages in random order."""
    generator = torch.Generator("cuda").manual_seed(seed)
    requests, rows, pages = len(row_counts), sum(row_counts), -(-context // PAGE)
    cache_format = IndexCacheFormat(name="fp8", page_size=PAGE)
    cache = cache_format.allocate(requests * pages, "cuda")
    for part in cache.split(4096):
        keys = torch.randn(part.shape[0], cache_format.scale_offset, device="cuda", generator=generator)
        part[:, : cache_format.scale_offset] = keys.to(torch.float8_e4m3fn).view(torch.uint8)
        scales = torch.rand(part.shape[0], PAGE, device="cuda", generator=generator) + 0.5
        part[:, cache_format.scale_offset :] = scales.view(torch.uint8)
    table = torch.randperm(requests * pages, device="cuda", generator=generator).to(torch.int32).view(requests, pages)
    batch = ForwardBatch.build(
        ForwardMode.TARGET_VERIFY, row_counts=row_counts, context_lens=[context] * requests, page_table=table
    )
    lens = torch.cat([torch.arange(context - n + 1, context + 1, dtype=torch.int32) for n in row_counts]).cuda()
    arguments = {
        "q": torch.randn(rows, heads, 128, device="cuda", generator=generator).to(torch.float8_e4m3fn),
        "weights": torch.randn(rows, heads, device="cuda", generator=generator),
        "index_cache": cache,
        "query_offsets": batch.query_offsets,
        "visible_lens": lens,
        "page_table": table,
    }
    return Inputs(arguments=arguments, row_counts=tuple(row_counts), max_context=context)


def run_kernel(kernel: Kernel, inputs: Inputs, out: torch.Tensor, **options: Any) -> Callable[[], object]:
    """Plan once and return the launch of one layer."""
    problem = inputs.problem()
    names = ("query_offsets", "visible_lens", "page_table")
    assert kernel.plan is not None
    data = kernel.plan(problem, **{name: inputs.arguments[name] for name in names}, **options)
    plan = OpPlan(choice=Choice(kernel=kernel, form="", refusals=(), others=()), problem=problem, data=data)
    return kernel.prepare(problem, **inputs.arguments, out=out, plan=plan, **options)


def score(kernel: Kernel, inputs: Inputs, **options: Any) -> torch.Tensor:
    """Logits, 0 where a row may hold anything; the output is poisoned first."""
    rows = inputs.arguments["q"].shape[0]
    out = torch.full((rows, inputs.max_context), float("nan"), device="cuda")
    run_kernel(kernel, inputs, out, **options)()
    hidden = torch.arange(inputs.max_context, device="cuda") >= inputs.arguments["visible_lens"][:, None]
    return out.masked_fill_(hidden, 0)


def compare_with_reference(inputs: Inputs, logits: torch.Tensor, requests: Sequence[int]) -> tuple[float, float]:
    """Worst row's diff and error over some of the requests."""
    offsets = list(itertools.accumulate(inputs.row_counts, initial=0))
    worst_diff = worst_error = 0.0
    for request in requests:
        rows = slice(offsets[request], offsets[request + 1])
        part = {name: inputs.arguments[name][rows] for name in ("q", "weights", "visible_lens")}
        part["query_offsets"] = torch.tensor([0, inputs.row_counts[request]], dtype=torch.int32, device="cuda")
        part["page_table"] = inputs.arguments["page_table"][request : request + 1]
        alone = Inputs(
            arguments={**inputs.arguments, **part},
            row_counts=(inputs.row_counts[request],),
            max_context=inputs.max_context,
        )
        expected = torch.zeros(inputs.row_counts[request], inputs.max_context, device="cuda")
        reference.KERNEL.prepare(alone.problem(), **alone.arguments, out=expected)()
        hidden = torch.arange(inputs.max_context, device="cuda") >= part["visible_lens"][:, None]
        comparison = compare_rows(logits[rows], expected.masked_fill_(hidden, 0))
        worst_diff, worst_error = max(worst_diff, comparison.max_diff), max(worst_error, comparison.max_error)
    return worst_diff, worst_error


def check_cases(kernel: Kernel) -> Iterator[dict[str, Any]]:
    """Every case of the op, hostile ones included, against the reference on the same tensors; twenty equal repeats."""
    for case in CASES:
        problem = case.problem(describe_device("cuda"))
        if kernel.rejects(problem) is not None or problem.num_rows == 0:
            continue
        inputs = case.inputs("cuda")
        outputs = []
        for run in range(REPEATS + 1):
            out = torch.full((problem.num_rows, case.max_context), float("nan"), device="cuda")
            out = out.to(getattr(torch, case.out_dtype))
            prepare = reference.KERNEL.prepare if run == REPEATS else kernel.prepare
            prepare(problem, **inputs.arguments, out=out)()
            outputs.append(out.masked_fill_(~inputs.defined, 0))
        comparison = compare_rows(outputs[0], outputs[-1])
        limits = (QUANTISED_MAX_DIFF, MAX_ERROR) if case.out_dtype == "float32" else (3e-5, 2**-7)
        is_close = comparison.max_diff < limits[0] and comparison.max_error <= limits[1]
        repeats = sum(torch.equal(out, outputs[0]) for out in outputs[:REPEATS])
        yield {
            "check": f"case {case.name}",
            "passed": is_close and repeats == REPEATS,
            "diff": comparison.max_diff,
            "error": comparison.max_error,
            "equal_repeats": repeats,
        }


def check_depths(kernel: Kernel, heads: int, num_rows: int) -> dict[str, Any]:
    """Row-for-row equal bits at every depth that divides a request's rows, and ragged; the first rows are checked too.

    The rows of two requests are cut into shorter requests over the same pages.
    """
    tokens = make_inputs([num_rows] * 2, 5000, heads=heads)
    whole = score(kernel, tokens)
    ragged = [8, 3, 0, 5, 1, 7, num_rows - 24]
    different = []
    for counts in (*([n] * (num_rows // n) for n in range(1, 9) if num_rows % n == 0), ragged):
        splits = list(itertools.accumulate(counts * 2, initial=0))
        owners = [min(start // num_rows, 1) for start in splits[:-1]]
        arguments = dict(tokens.arguments)
        arguments["query_offsets"] = torch.tensor(splits, dtype=torch.int32, device="cuda")
        arguments["page_table"] = tokens.arguments["page_table"][owners]
        part = Inputs(arguments=arguments, row_counts=tuple(counts * 2), max_context=tokens.max_context)
        if not torch.equal(score(kernel, part), whole):
            different.append(str(counts))
    diff, error = compare_with_reference(tokens, whole, range(2))
    passed = not different and diff < QUANTISED_MAX_DIFF and error <= MAX_ERROR
    name = f"depths of {num_rows} rows, {heads} heads"
    return {"check": name, "passed": passed, "diff": diff, "error": error, "differ": different}


def time_us(launch: Callable[[], object], *, repeats: int = 30) -> float:
    """Median time of a launch with cold L2, between events, in microseconds; replayed as a CUDA graph."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in times) * 1e3


def measure(kernel: Kernel, inputs: Inputs, **options: Any) -> dict[str, Any]:
    """One shape under one configuration: its error on two requests, its time and the ratio to the floor."""
    logits = score(kernel, inputs, **options)
    diff, error = compare_with_reference(inputs, logits, sorted({0, len(inputs.row_counts) - 1}))
    row: dict[str, Any] = {"diff": diff, "error": error, "floor_us": round(inputs.floor_us, 1)}
    if not (diff < QUANTISED_MAX_DIFF and error <= MAX_ERROR):
        return {**row, "passed": False}
    out = torch.empty(logits.shape, device="cuda")
    microseconds = time_us(run_kernel(kernel, inputs, out, **options))
    return {**row, "passed": True, "us": round(microseconds, 1), "ratio": round(microseconds / inputs.floor_us, 2)}


def bench(kernel: Kernel) -> Iterator[dict[str, Any]]:
    """Every shape of the targets, ragged ones beside the uniform batch of as many tokens, and planning."""
    for requests, context, next_n in SHAPES:
        inputs = make_inputs([next_n] * requests, context)
        yield {"shape": f"{requests} x {context} n {next_n}", **measure(kernel, inputs)}
    ragged = [0, 8, 4, 3, 5, 2, 6, 4] * 8
    yield {"shape": "64 x 32768 ragged 0..8, mean 4", **measure(kernel, make_inputs(ragged, 32768))}
    inputs = make_inputs([4] * 64, 32768)
    assert kernel.plan is not None
    names = ("query_offsets", "visible_lens", "page_table")
    plan = functools.partial(kernel.plan, inputs.problem(), **{name: inputs.arguments[name] for name in names})
    yield {"shape": "plan of 64 x 32768 n 4", "us": round(time_us(plan), 1)}


def tune(kernel: Kernel, limit_s: float) -> Iterator[dict[str, Any]]:
    """Configurations around the chosen one, until the time is up."""
    from nextn.ops.index_logits.triton_portable import choose_config

    begin = time.monotonic()
    for requests, context, next_n in TUNED:
        inputs = make_inputs([next_n] * requests, context)
        chosen = choose_config(inputs.problem())
        grid = [(key_tiles, programs, chosen.columns) for key_tiles in (3, 4, 5) for programs in (2, 3, 4)]
        if next_n > 1:
            grid.append((chosen.key_tiles, chosen.programs_per_sm, 64))  # a product per row
        for key_tiles, programs, columns in grid:
            if time.monotonic() - begin > limit_s:
                return
            limit = min(65536 // (programs * 128) // 8 * 8, 255)
            config = dataclasses.replace(
                chosen, key_tiles=key_tiles, programs_per_sm=programs, columns=columns, max_registers=limit
            )
            row = {"shape": f"{requests} x {context} n {next_n}", "config": dataclasses.asdict(config)}
            try:
                yield {**row, **measure(kernel, inputs, config=config)}
            except Exception as error:  # a configuration that does not fit must not stop the others
                yield {**row, "passed": False, "note": f"{type(error).__name__}: {error}"[:300]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages asked for, print a line per result and append JSON lines; 1 if a check failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_index_logits", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stage", choices=("check", "bench", "tune"), nargs="+", default=["check", "bench"])
    kernels = {
        kernel.name: kernel for kernel in discover("index_logits") if kernel.name.startswith(("triton", "gluon"))
    }
    parser.add_argument("--kernel", choices=sorted(kernels), default="triton_portable")
    parser.add_argument("--tune-seconds", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON lines")
    parser.add_argument("--commit", default="unknown", help="the commit these files are of")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_index_logits: PyTorch finds no GPU here; run it on a machine with one", file=sys.stderr)
        return 2
    import triton

    kernel = kernels[arguments.kernel]
    if "tune" in arguments.stage and kernel.name != "triton_portable":
        parser.error(f"--stage tune tries configurations of triton_portable alone, not of {kernel.name}")
    run = {
        "op": "index_logits",
        "kernel": kernel.name,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": arguments.commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    depth_shapes = [(64, 24), (64, 35), (32, 24)] + [(8, 24)] * (kernel.name == "triton_portable")
    depth_checks = (check_depths(kernel, heads, rows) for heads, rows in depth_shapes)
    stages = {
        "check": itertools.chain(depth_checks, check_cases(kernel)),
        "bench": bench(kernel),
        "tune": tune(kernel, arguments.tune_seconds),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "gpu_index_logits.jsonl").open("a", encoding="utf-8") as lines:
        failed = sum(_run_stage(stage, stages[stage], run, lines) for stage in arguments.stage)
    print(f"{failed} failed")
    return 1 if failed else 0


def _run_stage(stage: str, rows: Iterator[dict[str, Any]], run: dict[str, Any], lines: TextIO) -> int:
    """Print and store a stage's results; returns how many checks failed. A crash counts as one and ends the stage."""
    failed = 0
    try:
        for row in rows:
            failed += stage != "tune" and not row.get("passed", True)
            print(json.dumps(row), flush=True)
            lines.write(json.dumps({**run, "stage": stage, **row}) + "\n")
    except Exception:
        traceback.print_exc()
        return failed + 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
