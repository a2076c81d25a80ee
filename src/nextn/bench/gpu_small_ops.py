"""Checks and times the Triton kernels around the attention on a GPU: ``python -m nextn.bench.gpu_small_ops``.

Hides which shapes and configurations are tried and how results are compared. A time is printed only for a configuration
whose result, on the very inputs that are timed, agrees with the reference's on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nextn.hardware import describe_device
from nextn.ops._kernel import Kernel, Launch, discover
from nextn.ops.accept_drafts import SamplingTensors
from nextn.ops.accept_drafts.cases import CASES as ACCEPT_DRAFTS_CASES
from nextn.ops.accept_drafts.cases import AcceptDraftsCase, Setting
from nextn.ops.prepare_query.cases import CASES as PREPARE_QUERY_CASES
from nextn.ops.prepare_query.cases import PrepareQueryCase
from nextn.ops.write_cache.cases import CASES as WRITE_CACHE_CASES
from nextn.ops.write_cache.cases import WriteCacheCase
from nextn.testing.timing import Run, make_clock, time_in_turns

REPEATS = 20
BANDWIDTH = 3.0e12  # bytes per second, measured on an H100 80GB HBM3
MAX_CODES_APART = 1e-4  # share of e4m3 codes that another order of float32 additions may round the other way

QUERY_ROWS = (4, 64, 256, 1024, 4096)
QUERY_CONFIGS: tuple[Mapping[str, Any], ...] = (
    {"heads": 16, "width": 32, "num_warps": 1},
    {"heads": 8, "width": 32, "num_warps": 1},
    {"heads": 32, "width": 16, "num_warps": 1},
)
CACHE_ROWS = (4, 64, 256, 1024, 4096)
CACHE_CONFIGS: tuple[Mapping[str, Any], ...] = (
    {"latent_rows": 1, "index_rows": 4, "width": 16, "num_warps": 1},
    {"latent_rows": 1, "index_rows": 2, "width": 32, "num_warps": 1},
    {"latent_rows": 2, "index_rows": 8, "width": 16, "num_warps": 2},
)
VOCAB = 129280
ACCEPT_SIZES = ((1, 4), (16, 4), (64, 4), (64, 8))
ACCEPT_CONFIGS: tuple[Mapping[str, Any], ...] = (
    {"chunk": 8192, "block": 8192, "num_warps": 8},
    {"chunk": 8192, "block": 8192, "num_warps": 16},
)


def check(device: str, ops: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compare every case with the reference on the CPU, ``REPEATS`` times, and a replayed CUDA graph with that.

    Yields:
        One row per case: ``op, case, passed, note``.
    """
    for op in ops:
        for case in _CASES[op]:
            yield {"op": op, "stage": "check", "case": case.name, **_attempt(_check_case, op, case, device)}


def bench(device: str, ops: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Median times of every size and configuration, with the L2 cache flushed and warm.

    Yields:
        One row each: ``op, case, config, floor_us, cold_us, warm_us``, or a ``note``. The configurations of a size take
        turns; the reference is timed on the same device, but run eagerly.
    """
    for op in ops:
        for case in _BENCHED[op]():
            yield from _bench_case(op, case, device)


def _attempt(function: Any, *arguments: Any) -> dict[str, Any]:
    """The row a check returns, or what stopped it: one broken variant must not hide the others."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"passed": False, "note": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _kernel(op: str, name: str) -> Kernel:
    return next(kernel for kernel in discover(op) if kernel.name == name)


def _check_case(op: str, case: Any, device: str) -> dict[str, Any]:
    expected = _run_reference(op, case)
    tensors = _INPUTS[op](case, device)
    launch = _prepare(op, case, tensors, device)
    first: list[torch.Tensor] = []
    for repeat in range(REPEATS):
        _POISON[op](tensors)
        launch()
        results = _results(op, tensors)
        if repeat == 0:
            first = results
        elif not all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(results, first)):
            return {"passed": False, "note": f"repeat {repeat} differs from the first"}
    note, share = _COMPARE[op](first, expected)
    if not note and case.problem(describe_device(device)).num_rows:
        note = _compare_replay(op, tensors, launch, first)
    return {"passed": not note, "note": note, "apart": share}


def _compare_replay(op: str, tensors: dict[str, Any], launch: Launch, first: list[torch.Tensor]) -> str:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    _POISON[op](tensors)
    graph.replay()
    same = all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(_results(op, tensors), first))
    return "" if same else "a replayed graph differs"


def _bench_case(op: str, case: Any, device: str) -> Iterator[dict[str, Any]]:
    tensors = _INPUTS[op](case, device)
    reference = _kernel(op, "reference").prepare(case.problem(describe_device("cpu")), **tensors)
    reference()
    expected = _results(op, tensors)
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    for config in _CONFIGS[op]:
        shown = ",".join(str(value) for value in config.values())
        rows[shown] = _attempt(_check_config, op, case, tensors, expected, config, device)
        if rows[shown]["passed"]:
            runs[shown] = _prepare(op, case, tensors, device, config)
    times = _attempt(_time_runs, runs, device)
    floor = round(_FLOOR_BYTES[op](case) / BANDWIDTH * 1e6, 2)
    shared = {"op": op, "stage": "bench", "case": case.name}
    yield {**shared, "config": "reference", "floor_us": floor, "passed": True, **_time_eagerly(reference, device)}
    for shown, row in rows.items():
        timed = times.get(shown, {"note": row.get("note") or times.get("note", "")})
        yield {**shared, "config": shown, "floor_us": floor, **row, **timed}


def _time_eagerly(run: Run, device: str) -> dict[str, Any]:
    """One time of the reference, launch gaps included."""
    [timing] = time_in_turns([run], make_clock(torch.device(device)), is_warm=False, num_rounds=5, max_seconds=0.5)
    return {"cold_us": round(timing.median_us, 2)}


def _time_runs(runs: Mapping[str, Run], device: str) -> dict[str, Any]:
    clock = make_clock(torch.device(device))
    replays = [clock.capture(run).replay for run in runs.values()]
    cold, warm = (time_in_turns(replays, clock, is_warm=is_warm, max_seconds=1.0) for is_warm in (False, True))
    return {
        name: {"cold_us": round(before.median_us, 2), "warm_us": round(after.median_us, 2)}
        for name, before, after in zip(runs, cold, warm)
    }


def _check_config(
    op: str, case: Any, tensors: dict[str, Any], expected: list[torch.Tensor], config: Mapping[str, Any], device: str
) -> dict[str, Any]:
    launch = _prepare(op, case, tensors, device, config)
    _POISON[op](tensors)
    launch()
    note, _ = _COMPARE[op](_results(op, tensors), expected)
    return {"passed": not note, "note": note}


def _prepare(
    op: str, case: Any, tensors: dict[str, Any], device: str, config: Mapping[str, Any] | None = None
) -> Launch:
    options = {} if config is None else {"config": _config_class(op)(**config)}
    return _kernel(op, "triton_portable").prepare(case.problem(describe_device(device)), **tensors, **options)


def _config_class(op: str) -> Callable[..., Any]:
    if op == "prepare_query":
        from nextn.ops.prepare_query.triton_portable import PrepareQueryConfig

        return PrepareQueryConfig
    if op == "accept_drafts":
        from nextn.ops.accept_drafts.triton_portable import AcceptDraftsConfig

        return AcceptDraftsConfig
    from nextn.ops.write_cache.triton_portable import WriteCacheConfig

    return WriteCacheConfig


def _run_reference(op: str, case: Any) -> list[torch.Tensor]:
    tensors = _INPUTS[op](case, "cpu")
    _kernel(op, "reference").prepare(case.problem(describe_device("cpu")), **tensors)()
    return _results(op, tensors)


def _results(op: str, tensors: dict[str, Any]) -> list[torch.Tensor]:
    """What a call left behind, on the CPU."""
    if op == "write_cache":
        caches = [tensors[name] for name in ("kv_cache", "index_cache")]
        return [_memory(cache).cpu().clone() for cache in caches if cache is not None]
    return [tensor.cpu().clone() for tensor in tensors["out"]]


def _memory(cache: torch.Tensor) -> torch.Tensor:
    """All of a cache's storage, gaps included."""
    return torch.empty(0, dtype=cache.dtype, device=cache.device).set_(cache.untyped_storage())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _query_inputs(case: PrepareQueryCase, device: str) -> dict[str, Any]:
    inputs = case.inputs(device, seed=1)
    if case.name.startswith("bench"):
        inputs["q"] = inputs["q"].contiguous()
    dtype = torch.float8_e4m3fn if case.quantise else torch.float32
    q = torch.empty(case.num_rows, case.heads, case.dim, dtype=dtype, device=device)
    return {**inputs, "out": (q, torch.empty(case.num_rows, case.heads, device=device))}


def _poison_outputs(tensors: dict[str, Any]) -> None:
    for tensor in tensors["out"]:
        tensor.view(torch.uint8).fill_(0xEE)


def _poison_caches(tensors: dict[str, Any]) -> None:
    for name in ("kv_cache", "index_cache"):
        if tensors[name] is not None:
            _memory(tensors[name]).view(torch.uint8).fill_(0xFF)


def _compare_queries(results: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[str, float]:
    note, share = _compare_values(results[0], expected[0])
    scales = (results[1] - expected[1]).abs() > expected[1].abs() * 1e-6
    if not note and scales.float().sum() > max(1.0, 1e-5 * scales.numel()):
        note = f"{int(scales.sum())} of {scales.numel()} folded weights differ"
    return note, share


def _compare_values(result: torch.Tensor, expected: torch.Tensor) -> tuple[str, float]:
    """What is wrong with values, in words, and which share of their codes differs."""
    if result.dtype == torch.float32:
        largest = expected.abs().amax(-1, keepdim=True)
        is_off = ~((result - expected).abs() <= largest * 1e-6) & ~(result.isnan() & expected.isnan())
        return (f"{int(is_off.sum())} values differ" if is_off.any() else ""), float(is_off.float().mean())
    return _compare_bytes(_bytes(result).flatten(), _bytes(expected).flatten())


def _compare_bytes(result: torch.Tensor, expected: torch.Tensor) -> tuple[str, float]:
    apart = (result.int() - expected.int()).abs()
    share = float((apart > 0).float().mean()) if apart.numel() else 0.0
    is_zero = (result | expected) == 0x80  # 0 and -0
    if ((apart > 1) & ~is_zero).any() or (apart > 0).sum() > max(4.0, MAX_CODES_APART * apart.numel()):
        return f"{int((apart > 0).sum())} of {apart.numel()} bytes differ, by up to {int(apart.max())}", share
    return "", share


def _compare_caches(results: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[str, float]:
    notes, shares = [], [0.0]
    for result, wanted in zip(results, expected):
        if result.dtype == torch.float32:
            is_off = ~torch.isclose(result, wanted, rtol=1e-5, atol=2e-6, equal_nan=True)
            note, share = (f"{int(is_off.sum())} values differ" if is_off.any() else ""), float(is_off.float().mean())
        else:
            note, share = _compare_bytes(_bytes(result), _bytes(wanted))
        notes.append(note)
        shares.append(share)
    return "; ".join(note for note in notes if note), max(shares)


def _query_cases() -> Iterator[PrepareQueryCase]:
    for rows in QUERY_ROWS:
        yield PrepareQueryCase(name=f"bench {rows}", num_rows=rows, heads=64, dtype=torch.bfloat16)


def _cache_cases() -> Iterator[WriteCacheCase]:
    for rows, has_slots in ((rows, has_slots) for has_slots in (True, False) for rows in CACHE_ROWS):
        rows_each = min(rows, 1024) if has_slots else 4  # as many positions as the cases' rope table has
        counts = (rows_each,) * (rows // rows_each)
        yield WriteCacheCase(
            name=f"bench {rows} {'slots' if has_slots else 'table'}",
            row_counts=counts,
            context_lens=counts,
            has_slots=has_slots,
            dtype=torch.bfloat16,
        )


def _query_bytes(case: PrepareQueryCase) -> int:
    return case.num_rows * (case.heads * (case.dim * (case.dtype.itemsize + 1) + 8) + 264)


def _cache_bytes(case: WriteCacheCase) -> int:
    return sum(case.row_counts) * ((576 + 128) * case.dtype.itemsize + 656 + 132 + 256 + 16)


def _accept_cases() -> Iterator[AcceptDraftsCase]:
    greedy: tuple[Setting, ...] = ()
    sampled, truncated = (Setting(temperature=0.8),), (Setting(temperature=0.8, top_k=50, top_p=0.9),)
    for requests, rows in ACCEPT_SIZES:
        for name, settings, has_probs in (
            ("greedy", greedy, False),
            ("sampled", sampled, False),
            ("drawn", sampled, True),
            ("truncated", truncated, False),
        ):
            yield AcceptDraftsCase(
                name=f"bench {requests}x{rows} {name}",
                row_counts=(rows,) * requests,
                vocab=VOCAB,
                settings=settings,
                has_draft_probs=has_probs,
            )


def _accept_inputs(case: AcceptDraftsCase, device: str) -> dict[str, Any]:
    problem = case.problem(describe_device(device))
    outputs = (
        torch.empty(problem.num_requests, dtype=torch.int32, device=device),
        torch.empty(problem.num_rows, dtype=torch.int64, device=device),
    )
    if not case.name.startswith("bench"):
        return {**case.inputs(device, seed=1), "out": outputs}
    generator = torch.Generator(device=device).manual_seed(problem.num_rows)
    logits = torch.randn(problem.num_rows, case.vocab, generator=generator, device=device) * 3.0
    drafted = (logits + 0.2 * torch.randn(logits.shape, generator=generator, device=device)).roll(1, dims=0)
    sampling = case.sampling(1)
    return {
        "logits": logits,
        "draft_ids": drafted.argmax(dim=1),
        "query_offsets": torch.tensor([0, *itertools.accumulate(case.row_counts)], dtype=torch.int32, device=device),
        "sampling": None if sampling is None else _move_sampling(sampling, device, case.settings[0].top_k > 0),
        "draft_probs": drafted.softmax(dim=1) if case.has_draft_probs else None,
        "positions": torch.arange(problem.num_rows, device=device),
        "out": outputs,
    }


def _move_sampling(sampling: SamplingTensors, device: str, is_truncated: bool) -> SamplingTensors:
    moved = {name: getattr(sampling, name).to(device) for name in ("temperature", "top_k", "top_p", "seed")}
    return SamplingTensors(**moved, is_truncated=is_truncated)


def _compare_ids(results: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[str, float]:
    """Equal but where a coin falls on an edge: one request in a hundred at most, and none of a few."""
    differs = results[0] != expected[0]
    num_ids = int((results[1] != expected[1]).sum())
    is_off = int(differs.sum()) > len(differs) // 64 or num_ids > len(results[1]) // 64
    note = f"{int(differs.sum())} lengths and {num_ids} ids differ"
    return note if is_off else "", num_ids / max(len(results[1]), 1)


def _accept_bytes(case: AcceptDraftsCase) -> int:
    return case.num_rows * case.vocab * 4


_CASES: dict[str, tuple[Any, ...]] = {
    "prepare_query": PREPARE_QUERY_CASES,
    "write_cache": WRITE_CACHE_CASES,
    "accept_drafts": ACCEPT_DRAFTS_CASES,
}
_BENCHED: dict[str, Callable[[], Iterator[Any]]] = {
    "prepare_query": _query_cases,
    "write_cache": _cache_cases,
    "accept_drafts": _accept_cases,
}
_CONFIGS = {"prepare_query": QUERY_CONFIGS, "write_cache": CACHE_CONFIGS, "accept_drafts": ACCEPT_CONFIGS}
_INPUTS: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "prepare_query": _query_inputs,
    "write_cache": lambda case, device: case.inputs(device, seed=1),
    "accept_drafts": _accept_inputs,
}
_POISON = {"prepare_query": _poison_outputs, "write_cache": _poison_caches, "accept_drafts": _poison_outputs}
_COMPARE = {"prepare_query": _compare_queries, "write_cache": _compare_caches, "accept_drafts": _compare_ids}
_FLOOR_BYTES: dict[str, Callable[[Any], int]] = {
    "prepare_query": _query_bytes,
    "write_cache": _cache_bytes,
    "accept_drafts": _accept_bytes,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage and print a line per row; 1 if any check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("check", "bench"), default="check")
    parser.add_argument("--op", action="append", choices=sorted(_CASES), help="all of them if left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="file the rows are appended to as JSON lines")
    arguments = parser.parse_args(argv)
    failed = 0
    for row in (check if arguments.stage == "check" else bench)(arguments.device, arguments.op or sorted(_CASES)):
        failed += not row.get("passed", False)
        print(" ".join(str(value) for value in row.values()), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(f"{failed} rows failed", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
