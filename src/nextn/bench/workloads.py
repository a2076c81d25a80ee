"""Shapes made into tensors: random inputs on a device, what is expected of them, and our kernels on them.

Hides how inputs of megabytes are drawn quickly, so that a bench spends its time on what it times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from nextn.bench import op_calls
from nextn.bench.op_calls import OpCall, Results, Verdict
from nextn.bench.shapes import IndexLogitsShape, SelectTopkShape, SmallOpShape, SparseMlaShape
from nextn.cache_format import LATENT_DIM, LATENT_ROW_DIM, ROPE_DIM, IndexCacheFormat, LatentCacheFormat
from nextn.hardware import describe_device
from nextn.ops._kernel import Kernel, discover
from nextn.ops.accept_drafts import SamplingTensors
from nextn.ops.accept_drafts.problem import AcceptDraftsProblem
from nextn.ops.index_logits.problem import problem_of as index_logits_problem
from nextn.ops.prepare_query.problem import problem_of as prepare_query_problem
from nextn.ops.select_topk.problem import problem_of as select_topk_problem
from nextn.ops.sparse_mla.problem import problem_of as sparse_mla_problem
from nextn.ops.write_cache.problem import problem_of as write_cache_problem

PAGE = 64
_PAGES_AT_ONCE = 4096
_LATENT_SCALE = 2.0**-7  # of standard normal values: their largest of 128 lies between 1.75 and 3.5, 448 codes away
_LARGEST_REFERENCE_US = 4.0  # floor above which the reference takes too long to be timed
_VOCAB = 129280


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to do a workload.

    Attributes:
        name: of the kernel or the peer.
        kind: ``ours``, ``wrapped`` (someone's library as one of our kernels), ``peer`` or ``reference``.
        build: plans and prepares; what it returns launches, and returns what ``read`` and ``poison`` take.
        read: the results from what a launch returned.
        poison: spoils the memory that a launch returned.
        judge: whether results are right.
    """

    name: str
    kind: str
    build: Callable[[], Callable[[], Any]]
    read: Callable[[Any], Results]
    poison: Callable[[Any], None]
    judge: Callable[[Results], Verdict]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A shape's tensors on a device.

    Attributes:
        shape: the sizes.
        call: the op on them.
        expected: the reference's results.
    """

    shape: Any
    call: OpCall
    expected: Results

    def judge(self, results: Results) -> Verdict:
        """Compare results with the reference's."""
        return self.call.compare(results, self.expected)


def make_workload(shape: Any, device: torch.device, *, seed: int = 0) -> Workload:
    """Draw a shape's inputs on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    call = _MAKERS[shape.op](shape, device, generator)
    reference = op_calls.find_kernel(shape.op, "reference")
    return Workload(shape=shape, call=call, expected=call.run(reference))


def our_candidates(workload: Workload) -> tuple[list[Candidate], dict[str, str]]:
    """Our kernels that take the workload, the reference if it is small, and why each of the others is absent."""
    call, present, absent = workload.call, [], {}
    for kernel in discover(call.op):
        reason = _refusal(kernel, workload)
        if reason is not None:
            absent[kernel.name] = reason
        else:
            present.append(candidate_of(kernel, workload))
    return present, absent


def make_index_cache(num_pages: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """An FP8 index cache of random keys, scales between 0.5 and 1.5: uint8 ``[num_pages, 8448]``."""
    cache_format = IndexCacheFormat(name="fp8", page_size=PAGE)
    cache = cache_format.allocate(num_pages, device)
    for part in cache.split(_PAGES_AT_ONCE):
        keys = torch.randn(part.shape[0], cache_format.scale_offset, device=device, generator=generator)
        part[:, : cache_format.scale_offset] = keys.to(torch.float8_e4m3fn).view(torch.uint8)
        scales = torch.rand(part.shape[0], PAGE, device=device, generator=generator) + 0.5
        part[:, cache_format.scale_offset :] = scales.view(torch.uint8)
    return cache


def make_latent_cache(num_pages: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """An FP8 latent cache of standard normal rows: uint8 ``[num_pages, 64, 656]``."""
    cache = LatentCacheFormat(name="fp8", page_size=PAGE).allocate(num_pages, device)
    for part in cache.split(_PAGES_AT_ONCE):
        values = torch.randn(*part.shape[:2], LATENT_ROW_DIM, device=device, generator=generator)
        codes = (values[..., :LATENT_DIM] / _LATENT_SCALE).clamp(-448, 448).to(torch.float8_e4m3fn)
        part[..., :LATENT_DIM] = codes.view(torch.uint8)
        scales = torch.full((*part.shape[:2], 4), _LATENT_SCALE, device=device)
        part[..., LATENT_DIM : LATENT_DIM + 16] = scales.view(torch.uint8)
        rope = values[..., LATENT_DIM:].to(torch.bfloat16).contiguous()
        part[..., LATENT_DIM + 16 :] = rope.view(torch.uint8)
    return cache


def make_page_table(requests: int, pages: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """int32 ``[requests, pages]``, every page once, in random order."""
    order = torch.randperm(requests * pages, device=device, generator=generator)
    return order.to(torch.int32).view(requests, pages)


def visible_lens_of(row_counts: tuple[int, ...], context: int, device: torch.device) -> torch.Tensor:
    """int32 ``[R]``: the last row of each request sees ``context`` tokens, each row before it one less."""
    parts = [torch.arange(context - count + 1, context + 1, dtype=torch.int32) for count in row_counts]
    return torch.cat(parts).to(device)


def offsets_of(row_counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 ``[B + 1]``, the running sum of row counts."""
    return torch.tensor([0, *accumulate(row_counts)], dtype=torch.int32, device=device)


def _refusal(kernel: Kernel, workload: Workload) -> str | None:
    problem = workload.call.problem
    if kernel.name == "reference" and workload.shape.cost.floor_us > _LARGEST_REFERENCE_US:
        return "not timed at this size"
    if problem.arch not in kernel.arches:
        return f"not written for {problem.arch}"
    return kernel.rejects(problem)


def candidate_of(kernel: Kernel, workload: Workload) -> Candidate:
    """One of our kernels on a workload, planned as it would plan for itself."""
    call = workload.call
    if kernel.allocates_output:
        own = replace(call, outputs={**call.outputs, "out": None})
        return Candidate(
            name=kernel.name,
            kind="wrapped",
            build=lambda: own.launcher(kernel),
            read=lambda result: _read_into(call, result),
            poison=lambda result: _poison_with(call, result),
            judge=workload.judge,
        )
    return Candidate(
        name=kernel.name,
        kind="reference" if kernel.name == "reference" else "ours",
        build=lambda: call.launcher(kernel),
        read=lambda _: call.read(),
        poison=lambda _: call.poison(),
        judge=workload.judge,
    )


def _poison_with(call: OpCall, result: torch.Tensor) -> None:
    call.poison()
    op_calls.poison(result)


def _read_into(call: OpCall, result: torch.Tensor) -> Results:
    call.outputs["out"].copy_(result)
    return call.read()


def _make_index_logits(shape: IndexLogitsShape, device: torch.device, generator: torch.Generator) -> OpCall:
    counts, pages = shape.row_counts, -(-shape.context // PAGE)
    rows = sum(counts)
    lens = visible_lens_of(counts, shape.context, device)
    q = torch.randn(rows, shape.heads, 128, device=device, generator=generator).to(torch.float8_e4m3fn)
    arguments = {
        "q": q,
        "weights": torch.randn(rows, shape.heads, device=device, generator=generator),
        "index_cache": make_index_cache(shape.requests * pages, device, generator),
        "query_offsets": offsets_of(counts, device),
        "visible_lens": lens,
        "page_table": make_page_table(shape.requests, pages, device, generator),
    }
    problem = index_logits_problem(
        describe_device(device),
        q=q,
        index_cache=arguments["index_cache"],
        page_table=arguments["page_table"],
        max_context=shape.context,
        next_n=shape.next_n,
        max_rows=max(counts),
    )
    defined = torch.arange(shape.context, device=device) < lens[:, None]
    return op_calls.index_logits_call(problem, arguments, defined)


def _make_select_topk(shape: SelectTopkShape, device: torch.device, generator: torch.Generator) -> OpCall:
    logits = torch.randn(shape.rows, shape.length, device=device, generator=generator)
    arguments = {
        "logits": logits,
        "visible_lens": torch.full((shape.rows,), shape.length, dtype=torch.int32, device=device),
        "query_offsets": None,
        "page_table": None,
    }
    return op_calls.select_topk_call(
        select_topk_problem(describe_device(device), logits=logits, k=shape.topk), arguments
    )


def _make_sparse_mla(shape: SparseMlaShape, device: torch.device, generator: torch.Generator) -> OpCall:
    pages = shape.context // PAGE
    table = make_page_table(shape.requests, pages, device, generator).to(torch.int64)
    num_shared = round(shape.topk * shape.overlap)
    rows = []
    for request in range(shape.requests):
        order = torch.randperm(shape.context, device=device, generator=generator)
        shared, others = order[:num_shared], order[num_shared:]
        for _ in range(shape.next_n):
            picked = torch.randperm(others.shape[0], device=device, generator=generator)[: shape.topk - num_shared]
            positions = torch.cat([shared, others[picked]]).sort().values
            rows.append(table[request, positions // PAGE] * PAGE + positions % PAGE)
    q = torch.randn(len(rows), shape.heads, LATENT_ROW_DIM, device=device, generator=generator)
    arguments = {
        "q": q.to(torch.bfloat16),
        "kv_cache": make_latent_cache(shape.requests * pages, device, generator),
        "indices": torch.stack(rows).to(torch.int32),
        "scale": LATENT_ROW_DIM**-0.5,
        "query_offsets": offsets_of((shape.next_n,) * shape.requests, device),
    }
    tensors = {name: arguments[name] for name in ("q", "kv_cache", "indices", "query_offsets")}
    problem = sparse_mla_problem(describe_device(device), **tensors, next_n=shape.next_n)
    return op_calls.sparse_mla_call(problem, arguments)


def _make_prepare_query(shape: SmallOpShape, device: torch.device, generator: torch.Generator) -> OpCall:
    q = torch.randn(shape.rows, 64, 128, device=device, generator=generator).to(torch.bfloat16)
    problem = prepare_query_problem(describe_device(device), q=q, interleaved=False)
    arguments = {
        "q": q,
        "weights": torch.randn(shape.rows, 64, device=device, generator=generator),
        "positions": torch.randint(0, 4096, (shape.rows,), device=device, generator=generator),
        "rope_table": _rope_table(4096, device),
    }
    return op_calls.prepare_query_call(problem, arguments)


def _make_write_cache(shape: SmallOpShape, device: torch.device, generator: torch.Generator) -> OpCall:
    pages = -(-shape.rows // PAGE) * 2
    slots = torch.randperm(pages * PAGE, device=device, generator=generator)[: shape.rows]
    arguments: dict[str, Any] = {
        "positions": torch.randint(0, 4096, (shape.rows,), device=device, generator=generator),
        "rope_table": _rope_table(4096, device),
        "query_offsets": None,
        "page_table": None,
        "slots": slots,
        "kv": torch.randn(shape.rows, LATENT_ROW_DIM, device=device, generator=generator).to(torch.bfloat16),
        "kv_cache": LatentCacheFormat(name="fp8").allocate(pages, device),
        "kv_norm_weight": torch.ones(LATENT_DIM, device=device),
        "kv_norm_eps": 1e-6,
        "index_k": torch.randn(shape.rows, 128, device=device, generator=generator).to(torch.bfloat16),
        "index_cache": IndexCacheFormat(name="fp8").allocate(pages, device),
        "index_norm_weight": torch.ones(128, device=device),
        "index_norm_bias": torch.zeros(128, device=device),
        "index_norm_eps": 1e-6,
    }
    names = ("positions", "kv_cache", "index_k", "index_cache")
    problem = write_cache_problem(
        describe_device(device),
        **{name: arguments[name] for name in names},
        has_latent_norm=True,
        has_index_norm=True,
        has_slots=True,
        interleaved=False,
        hadamard=True,
    )
    return op_calls.write_cache_call(problem, arguments)


def _make_accept_drafts(shape: SmallOpShape, device: torch.device, generator: torch.Generator) -> OpCall:
    logits = torch.randn(shape.rows, _VOCAB, device=device, generator=generator)
    drafts = logits.roll(1, dims=0).argmax(dim=1)
    drafts[::5] = 0
    requests = shape.rows // 4
    arguments = {
        "logits": logits,
        "draft_ids": drafts,
        "query_offsets": offsets_of((4,) * requests, device),
        "sampling": _make_sampling(requests, device) if shape.is_sampled else None,
        "draft_probs": None,
        "positions": torch.arange(shape.rows, device=device) if shape.is_sampled else None,
    }
    problem = AcceptDraftsProblem(
        arch=describe_device(device).arch,
        num_requests=requests,
        num_rows=shape.rows,
        vocab=_VOCAB,
        is_greedy=not shape.is_sampled,
        has_draft_probs=False,
    )
    return op_calls.accept_drafts_call(problem, arguments)


def _make_sampling(requests: int, device: torch.device) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.full((requests,), 0.8, device=device),
        top_k=torch.zeros(requests, dtype=torch.int32, device=device),
        top_p=torch.full((requests,), 0.95, device=device),
        seed=torch.arange(requests, device=device),
    )


def _rope_table(positions: int, device: torch.device) -> torch.Tensor:
    angles = torch.arange(positions, device=device)[:, None] * torch.logspace(0, -4, ROPE_DIM // 2, device=device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


_MAKERS: dict[str, Callable[[Any, torch.device, torch.Generator], OpCall]] = {
    "index_logits": _make_index_logits,
    "select_topk": _make_select_topk,
    "sparse_mla": _make_sparse_mla,
    "prepare_query": _make_prepare_query,
    "write_cache": _make_write_cache,
    "accept_drafts": _make_accept_drafts,
}
