"""Checks and times ``sparse_mla``'s GPU kernels: ``python -m nextn.bench.gpu_sparse_mla --stage check``.

Hides which shapes and configurations are tried. A time is printed only for a configuration whose result, on the very
inputs that are timed, is within FlashMLA's own tolerances of the reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextn.bench.rows import print_rows
from nextn.hardware import describe_device
from nextn.ops._kernel import Choice, Launch, OpPlan
from nextn.ops.sparse_mla.cases import CASES, SparseMlaCase, SparseMlaInputs
from nextn.ops.sparse_mla.problem import SparseMlaProblem

REPEATS = 20
TOPK = 2048
CONTEXT = 32768
SCALE = 0.1352
READ_BANDWIDTH = 3.0e12  # bytes per second, measured on an H100 80GB HBM3
PRODUCT_RATE = 750e12  # bfloat16 operations per second, measured on the same
REFERENCE_ROWS = 64  # rows compared with the reference where there are more

# What FlashMLA's own decode test allows: an element passes by its absolute or its relative error. It allows an absolute
# error of 1e-3 for latents that are normal times a tenth; these are of magnitude one.
OUT_ABSOLUTE, OUT_RELATIVE, OUT_DIFF = 1e-2, 2.01 / 128, 5e-6
LSE_ABSOLUTE, LSE_RELATIVE = 1e-6, 8.01 / 65536


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One measured batch.

    Attributes:
        requests: requests of the batch.
        next_n: rows of each.
        heads: query heads.
        overlap: share of a row's slots that all rows of its request select.
        flash_mla_us: what FlashMLA took on SM90, from the feasibility study; None if it was not measured.
    """

    requests: int
    next_n: int
    heads: int
    overlap: float = 0.9
    flash_mla_us: float | None = None

    def __str__(self) -> str:
        return f"{self.requests} x {self.next_n} x {self.heads} at {self.overlap:.0%}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A kernel and the fields of its configuration that differ from what it would choose; None takes its choice."""

    kernel: str
    config: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return self.kernel + ("" if self.config is None else " " + " ".join(f"{k}={v}" for k, v in self.config.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Runner:
    """One variant on one set of inputs."""

    launch: Launch
    out: torch.Tensor
    lse: torch.Tensor

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.out.fill_(float("nan"))
        self.lse.fill_(float("nan"))
        self.launch()
        return self.out, self.lse


SHAPES = (
    Shape(requests=64, next_n=4, heads=16, flash_mla_us=239),
    Shape(requests=64, next_n=4, heads=16, overlap=0.7, flash_mla_us=239),
    Shape(requests=64, next_n=1, heads=128, flash_mla_us=98.3),
    Shape(requests=64, next_n=4, heads=128, flash_mla_us=358),
    Shape(requests=64, next_n=4, heads=64, flash_mla_us=239),
    Shape(requests=256, next_n=1, heads=64, flash_mla_us=240),
    Shape(requests=16, next_n=4, heads=128, flash_mla_us=97.9),
    Shape(requests=1, next_n=4, heads=128, flash_mla_us=24.7),
    Shape(requests=256, next_n=1, heads=16, flash_mla_us=240),
)

# Cases whose several requests, rows, heads and contexts beyond k meet, beside those the op's tests share.
CHECKED = (
    SparseMlaCase(name="gpu_tp8_next4", row_counts=(4,) * 5, context_len=3000, topk=TOPK),
    SparseMlaCase(name="gpu_tp8_next3", row_counts=(3,) * 5, context_len=3000, topk=TOPK, overlap=0.7),
    SparseMlaCase(name="gpu_tp16_next8", row_counts=(8,) * 3, context_len=3000, heads=8, topk=TOPK),
    SparseMlaCase(name="gpu_tp8_next2", row_counts=(2,) * 5, context_len=2500, heads=32, topk=TOPK),
    SparseMlaCase(name="gpu_ragged", row_counts=(3, 0, 1, 6, 2, 8, 4), context_len=3000, topk=TOPK),
    SparseMlaCase(name="gpu_128_heads", row_counts=(4,) * 3, context_len=3000, heads=128, topk=TOPK),
    SparseMlaCase(name="gpu_64_heads", row_counts=(4,) * 3, context_len=3000, heads=64, topk=TOPK),
    SparseMlaCase(name="gpu_40_heads", row_counts=(2,) * 3, context_len=500, heads=40, topk=300),
    SparseMlaCase(name="gpu_few_heads", row_counts=(4,) * 3, context_len=500, heads=3, topk=99),
    SparseMlaCase(
        name="gpu_hostile",
        row_counts=(4, 4, 3, 4),
        context_len=3000,
        topk=TOPK,
        hostile=frozenset({"holes", "wild_slots", "empty_rows", "strided_pages", "duplicates"}),
    ),
)


def check(device: torch.device | str, variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """Compare variants on every case with the reference, with ``REPEATS`` bitwise repeats and in a CUDA graph.

    Yields:
        One row per variant and case: ``op, case, variant, passed, note``.
    """
    for case in (*CASES, *CHECKED):
        for variant in variants:
            row = _attempt(_check_case, case, variant, device)
            yield {"op": "sparse_mla", "stage": "check", "case": case.name, "variant": str(variant), **row}


def bench(
    device: torch.device | str, variants: Sequence[Variant], shapes: Sequence[Shape] = SHAPES
) -> Iterator[dict[str, Any]]:
    """Median times of every shape and variant, with the L2 cache flushed.

    Yields:
        One row per shape and variant: ``shape, variant, cold_us, launches_us, floor_us``, or a ``note``.
    """
    for shape in shapes:
        inputs = make_inputs(shape, device)
        expected = _expected(inputs, slice(0, REFERENCE_ROWS))
        floor = _floor_us(shape, inputs)
        for variant in variants:
            row = _attempt(_bench_variant, variant, shape, inputs, expected)
            facts = {
                "shape": str(shape),
                "variant": str(variant),
                "floor_us": floor,
                "flash_mla_us": shape.flash_mla_us,
            }
            yield {"op": "sparse_mla", "stage": "bench", **facts, **row}


def make_inputs(shape: Shape, device: torch.device | str, *, seed: int = 0) -> SparseMlaInputs:
    """Random queries, an FP8 cache, and slots whose rows share what the shape says, in ascending position."""
    generator = torch.Generator(device=device).manual_seed(seed)
    num_pages = shape.requests * CONTEXT // 64
    cache = torch.randint(0, 127, (num_pages, 64, 656), generator=generator, device=device, dtype=torch.uint8)
    signs = torch.randint(0, 2, (num_pages, 64, 512), generator=generator, device=device, dtype=torch.uint8)
    cache[..., :512] = cache[..., :512] % 64 + signs * 128  # magnitudes up to 1.9
    rope = torch.randn(num_pages, 64, 64, generator=generator, device=device).to(torch.bfloat16)
    cache[..., 528:] = rope.view(torch.uint8)
    exponents = torch.randint(-3, 1, (num_pages, 64, 4), generator=generator, device=device)
    cache[..., 512:528] = torch.exp2(exponents.float()).view(torch.uint8)
    table = torch.randperm(num_pages, generator=generator, device=device).view(shape.requests, -1)
    indices = torch.cat([_select(shape, row, generator, device) for row in table]).to(torch.int32)
    rows = shape.requests * shape.next_n
    q = torch.randn(rows, shape.heads, 576, generator=generator, device=device) * 0.5
    return SparseMlaInputs(
        q=q.to(torch.bfloat16),
        kv_cache=cache,
        indices=indices,
        query_offsets=torch.arange(shape.requests + 1, dtype=torch.int32, device=device) * shape.next_n,
        scale=SCALE,
        exact_kv=torch.empty(0),
    )


def _select(shape: Shape, pages: torch.Tensor, generator: torch.Generator, device: torch.device | str) -> torch.Tensor:
    """Slots of one request's rows, int64 ``[next_n, k]``."""
    num_shared = round(TOPK * shape.overlap)
    order = torch.randperm(CONTEXT, generator=generator, device=device)
    rows = []
    for row in range(shape.next_n):
        own = order[num_shared + row * (TOPK - num_shared) :][: TOPK - num_shared]
        positions = torch.cat([order[:num_shared], own]).sort().values
        rows.append(pages[positions // 64] * 64 + positions % 64)
    return torch.stack(rows)


def _floor_us(shape: Shape, inputs: SparseMlaInputs) -> float:
    """The larger of distinct latent rows, queries and outputs over the bandwidth, and of the products over the rate."""
    num_latents = inputs.indices.unique().numel()
    rows = shape.requests * shape.next_n
    num_bytes = num_latents * 656 + inputs.indices.numel() * 4 + rows * shape.heads * (576 + 512) * 2
    operations = 2 * rows * TOPK * shape.heads * (576 + 512)
    return round(max(num_bytes / READ_BANDWIDTH, operations / PRODUCT_RATE) * 1e6, 1)


def _attempt(function: Any, *arguments: Any) -> dict[str, Any]:
    """The row a check returns, or what stopped it: one broken variant must not hide the others."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"passed": False, "note": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _refusal(variant: Variant, problem: SparseMlaProblem) -> str | None:
    kernel = importlib.import_module(f"nextn.ops.sparse_mla.{variant.kernel}").KERNEL
    return kernel.rejects(problem) if problem.arch in kernel.arches else f"not written for {problem.arch}"


def _make_runner(problem: SparseMlaProblem, inputs: SparseMlaInputs, variant: Variant) -> _Runner:
    module = importlib.import_module(f"nextn.ops.sparse_mla.{variant.kernel}")
    kernel = module.KERNEL
    config = None
    if variant.config is not None:
        config = dataclasses.replace(module.choose_config(problem), **variant.config)
    device = inputs.q.device
    data = kernel.plan(problem, device=device, config=config)
    choice = Choice(kernel=kernel, form="", refusals=(), others=())
    out = torch.empty(*inputs.q.shape[:2], 512, dtype=inputs.q.dtype, device=device)
    lse = torch.empty(inputs.q.shape[:2], device=device)
    launch = kernel.prepare(
        problem, **_tensors(inputs), out=out, lse=lse, plan=OpPlan(choice=choice, problem=problem, data=data)
    )
    return _Runner(launch=launch, out=out, lse=lse)


def _tensors(inputs: SparseMlaInputs) -> dict[str, Any]:
    return {name: getattr(inputs, name) for name in ("q", "kv_cache", "indices", "query_offsets", "scale")}


def _expected(inputs: SparseMlaInputs, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's output and lse of some rows, from FP32 queries, so that its output is not rounded."""
    reference = importlib.import_module("nextn.ops.sparse_mla.reference")
    q, indices = inputs.q[rows].float(), inputs.indices[rows]
    out = torch.empty(*q.shape[:2], 512, device=q.device)
    lse = torch.empty(q.shape[:2], device=q.device)
    arguments: Any = {"q": q, "kv_cache": inputs.kv_cache, "indices": indices, "scale": inputs.scale}
    reference.prepare(None, **arguments, query_offsets=None, out=out, lse=lse)()
    return out, lse


def _compare(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> str:
    """What is beyond FlashMLA's tolerances, in words; empty if nothing."""
    (out, lse), (wanted, wanted_lse) = actual, expected
    out = out[: wanted.shape[0]].float()
    lse = lse[: wanted.shape[0]]
    if not torch.equal(lse == -torch.inf, wanted_lse == -torch.inf):
        return "empty rows differ"
    error = (out - wanted).abs()
    bad = ~((error <= OUT_ABSOLUTE) | (error <= OUT_RELATIVE * wanted.abs()))
    if bad.any():
        return f"{int(bad.sum())} of {bad.numel()} outputs differ, largest error {float(error.max()):.3g}"
    lse_error = torch.where(wanted_lse == -torch.inf, 0.0, (lse - wanted_lse).abs())
    bad = ~((lse_error <= LSE_ABSOLUTE) | (lse_error <= LSE_RELATIVE * wanted_lse.abs()))
    if bad.any():
        return f"{int(bad.sum())} of {bad.numel()} lse differ, largest error {float(lse_error.max()):.3g}"
    norm = (out.double() ** 2 + wanted.double() ** 2).sum()
    diff = 1 - 2 * float((out.double() * wanted.double()).sum() / norm) if float(norm) else 0.0
    return f"diff {diff:.2e}" if diff > OUT_DIFF else ""


def _check_case(case: SparseMlaCase, variant: Variant, device: torch.device | str) -> dict[str, Any]:
    problem = case.problem(describe_device(device))
    reason = _refusal(variant, problem)
    if reason is not None:
        return {"passed": True, "note": f"refused: {reason}"}
    inputs = case.inputs(device)
    runner = _make_runner(problem, inputs, variant)
    first = [tensor.clone() for tensor in runner.run()]
    note = _compare((first[0], first[1]), _expected(inputs))
    note = note or _compare_repeats(runner, first) or _compare_replay(inputs, runner)
    return {"passed": not note, "note": note}


def _compare_repeats(runner: _Runner, first: Sequence[torch.Tensor]) -> str:
    for repeat in range(REPEATS):
        if not all(torch.equal(a, b) for a, b in zip(runner.run(), first)):
            return f"repeat {repeat} differs in bits"
    return ""


def _compare_replay(inputs: SparseMlaInputs, runner: _Runner) -> str:
    """Whether a captured graph replayed with other slots still gives what the reference does."""
    if not inputs.indices.numel():
        return ""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runner.launch()
    inputs.indices.copy_(inputs.indices.flip(0).roll(7, 1))
    inputs.indices[:, ::5] = -1
    runner.out.fill_(float("nan"))
    graph.replay()
    note = _compare((runner.out, runner.lse), _expected(inputs))
    return note and f"replay with other slots: {note}"


def _bench_variant(
    variant: Variant, shape: Shape, inputs: SparseMlaInputs, expected: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, Any]:
    device = describe_device(inputs.q.device)
    problem = SparseMlaProblem(
        arch=device.arch,
        num_sms=device.num_sms,
        num_rows=inputs.q.shape[0],
        num_requests=shape.requests,
        next_n=shape.next_n,
        heads=shape.heads,
        topk=TOPK,
    )
    reason = _refusal(variant, problem)
    if reason is not None:
        return {"passed": True, "note": f"refused: {reason}"}
    runner = _make_runner(problem, inputs, variant)
    note = _compare(runner.run(), expected)
    if note:
        return {"passed": False, "note": note}
    launches = runner.launch.arguments.get("launches", ())
    return {
        "passed": True,
        "cold_us": _time_cold(runner.launch),
        "launches_us": [_time_cold(launch) for launch in launches],
    }


def _time_cold(function: Any) -> float:
    """Median microseconds of a captured graph with the L2 cache flushed before every replay."""
    from triton.testing import do_bench

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    milliseconds: Any = do_bench(graph.replay, warmup=10, rep=40, return_mode="median")
    return round(milliseconds * 1e3, 1)


def main() -> int:
    """Run a stage and print its rows as JSON lines; 1 if any check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("check", "bench"), default="check")
    parser.add_argument("--out", type=Path, help="file the rows are appended to as well")
    arguments = parser.parse_args()
    variants = [Variant(kernel=name) for name in ("gluon_sm90", "triton_portable", "triton_union")]
    return print_rows((check if arguments.stage == "check" else bench)("cuda", variants), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
