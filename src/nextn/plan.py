"""DSAMetadata and its one builder: everything a forward needs that does not depend on the layer.

Hides how lengths, positions, slots and schedules follow from a batch. The builder is one pure function of device
operations, used alike for eager runs, graph capture and replay, so lengths and schedule cannot diverge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nextn.batch import ForwardBatch
from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.env import Environment, read_environment
from nextn.errors import InputError
from nextn.hardware import Arch, DeviceInfo
from nextn.ops._kernel import Choice, OpPlan, choose
from nextn.ops._pages import request_of_row, translate_positions
from nextn.ops.index_logits._schedule import PagedSchedule
from nextn.ops.index_logits.problem import IndexLogitsProblem
from nextn.ops.prepare_query.problem import PrepareQueryProblem
from nextn.ops.select_topk.problem import SelectTopkProblem
from nextn.ops.sparse_mla.problem import SparseMlaProblem
from nextn.ops.write_cache.problem import WriteCacheProblem

__all__ = ["DSAMetadata", "DSASpec", "OpPlan", "list_problems", "plan_forward"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DSASpec:
    """What the attention of one model looks like, sizes only.

    Attributes:
        num_heads: query heads of the sparse attention (on this rank).
        index_heads: heads of the lightning indexer.
        index_dim: dimensions of an index key.
        index_topk: tokens each row selects.
        softmax_scale: factor on the attention scores, YaRN's included.
        page_size: tokens per page of both caches.
        index_format: bytes of the index cache.
        latent_format: bytes of the latent cache.
        index_rope_interleaved: whether the indexer rotates pairs (2i, 2i+1) rather than (i, i+32).
        hadamard: whether index queries and keys are Hadamard-rotated before they are quantised.
    """

    num_heads: int
    index_heads: int
    index_dim: int = 128
    index_topk: int = 2048
    softmax_scale: float
    page_size: int = 64
    index_format: IndexCacheFormat
    latent_format: LatentCacheFormat
    index_rope_interleaved: bool = False
    hadamard: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class DSAMetadata:
    """One forward's plan, read by every layer.

    Attributes:
        batch: what was planned.
        positions: int64 ``[R]``, each row's position in its request; 0 for the rows of a padding request.
        visible_lens: int32 ``[R]``, cached tokens each row may see, itself included; 0 for a padding request.
        request_of_row: int64 ``[R]``.
        slots: int64 ``[R]``, where each row's keys are written; -1 writes nothing.
        index_logits: the chosen kernel of the scores and what it planned.
        select_topk: the same for the selection.
        kernels: op name to what was chosen for it, and why not the others; of the ops planned here.
        paged_mqa_ctx_lens_2d: int32 ``[B, next_n]`` (native) or ``[R, 1]`` (flattened), the tensor the schedule was
            built from; None if the kernel has no schedule.
        paged_mqa_schedule_metadata: int32 ``[slots + 1, 2]``, or None.
        use_dg_native: whether the scores run as ``[B, next_n, H, D]`` with one page-table row per request in a kernel
            that needs a schedule.
    """

    batch: ForwardBatch
    positions: torch.Tensor
    visible_lens: torch.Tensor
    request_of_row: torch.Tensor
    slots: torch.Tensor
    index_logits: OpPlan
    select_topk: OpPlan
    kernels: Mapping[str, Choice]
    paged_mqa_ctx_lens_2d: torch.Tensor | None
    paged_mqa_schedule_metadata: torch.Tensor | None
    use_dg_native: bool


def plan_forward(
    batch: ForwardBatch,
    spec: DSASpec,
    device: DeviceInfo,
    *,
    deterministic: bool = False,
    environment: Environment | None = None,
) -> DSAMetadata:
    """Plan one forward.

    Reads no device tensor on the host, so a CUDA graph can capture it together with the layers.

    Args:
        batch: the rows.
        spec: the model's attention.
        device: what the kernels are chosen for; need not be where the tensors lie.
        deterministic: choose only kernels whose rows do not depend on the batch; on a CPU always so.
        environment: settings; read from the process environment if None.

    Returns:
        The plan. ``positions`` of row ``j`` of request ``b`` is ``context_lens[b] - rows_b + j``.

    Raises:
        InputError: the context does not fit the page table.
        UnsupportedError: a kernel forced by NEXTN_KERNELS does not take this batch.
    """
    _check_batch(batch, spec)
    environment = read_environment() if environment is None else environment
    requests = request_of_row(batch.query_offsets, batch.num_rows)
    unclamped = _find_positions(batch, requests)
    visible_lens = batch.visible_lens
    if visible_lens is None:
        visible_lens = (unclamped + 1).clamp(min=0).to(torch.int32)
    index_logits = _plan_index_logits(
        batch, _index_logits_problem(batch, spec, device, deterministic), visible_lens, environment
    )
    select_topk = _plan_select_topk(batch, _select_topk_problem(batch, spec, device), environment)
    schedule = index_logits.data if isinstance(index_logits.data, PagedSchedule) else None
    return DSAMetadata(
        batch=batch,
        positions=unclamped.clamp(min=0),
        visible_lens=visible_lens,
        request_of_row=requests,
        slots=_find_slots(batch, requests, unclamped, spec.page_size),
        index_logits=index_logits,
        select_topk=select_topk,
        kernels={"index_logits": index_logits.choice, "select_topk": select_topk.choice},
        paged_mqa_ctx_lens_2d=schedule.context_lens if schedule else None,
        paged_mqa_schedule_metadata=schedule.metadata if schedule else None,
        use_dg_native=schedule is not None and schedule.is_native,
    )


def _check_batch(batch: ForwardBatch, spec: DSASpec) -> None:
    num_pages = batch.page_table.shape[1]
    if batch.max_context > num_pages * spec.page_size:
        raise InputError(
            f"max_context {batch.max_context} does not fit a page table of {num_pages} pages of {spec.page_size}; "
            f"pass at most {num_pages * spec.page_size} or a wider table"
        )
    if batch.page_table.shape[0] != batch.num_requests:
        raise InputError(
            f"page_table has {batch.page_table.shape[0]} rows for {batch.num_requests} requests; pass one row each"
        )


def _find_positions(batch: ForwardBatch, requests: torch.Tensor) -> torch.Tensor:
    """Position of each row, int64 [R]; negative where a request has fewer cached tokens than rows (padding)."""
    rows = torch.arange(batch.num_rows, device=batch.query_offsets.device)
    position_of_row_zero = batch.context_lens.to(torch.int64) - batch.query_offsets[1:]
    return rows + position_of_row_zero.index_select(0, requests)


def _find_slots(batch: ForwardBatch, requests: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """Write slot of each row, int64 [R]; -1 where the table has no page for it."""
    is_inside = positions < batch.page_table.shape[1] * page_size
    inside = torch.where(is_inside, positions, -1)
    return translate_positions(inside[:, None], requests, batch.page_table, page_size).squeeze(1)


def list_problems(
    batch: ForwardBatch, spec: DSASpec, device: DeviceInfo, *, deterministic: bool = False, dtype: str = "float32"
) -> dict[str, Any]:
    """The problem of each op of one layer, in the order they run, for showing what would be chosen.

    Args:
        batch: the rows.
        spec: the model's attention.
        device: what the ops are to run on.
        deterministic: as in :func:`plan_forward`.
        dtype: of the model's activations.
    """
    shared = {"arch": device.arch, "num_rows": batch.num_rows}
    return {
        "write_cache": WriteCacheProblem(
            **shared,
            page_size=spec.page_size,
            latent_format=spec.latent_format.name,
            index_format=spec.index_format.name,
            index_dim=spec.index_dim,
            has_latent_norm=True,
            has_index_norm=True,
            has_slots=True,
            interleaved=spec.index_rope_interleaved,
            hadamard=spec.hadamard,
        ),
        "prepare_query": PrepareQueryProblem(
            **shared,
            heads=spec.index_heads,
            dim=spec.index_dim,
            dtype=dtype,
            interleaved=spec.index_rope_interleaved,
            hadamard=spec.hadamard,
            quantise=spec.index_format.is_quantised,
        ),
        "index_logits": _index_logits_problem(batch, spec, device, deterministic),
        "select_topk": _select_topk_problem(batch, spec, device),
        "sparse_mla": SparseMlaProblem(
            **shared,
            num_sms=device.num_sms,
            num_requests=batch.num_requests,
            next_n=batch.next_n,
            heads=spec.num_heads,
            topk=spec.index_topk,
            page_size=spec.page_size,
            cache=spec.latent_format.name,
            dtype=dtype,
            deterministic=deterministic or device.arch is Arch.CPU,
        ),
    }


def _index_logits_problem(
    batch: ForwardBatch, spec: DSASpec, device: DeviceInfo, deterministic: bool
) -> IndexLogitsProblem:
    return IndexLogitsProblem(
        arch=device.arch,
        num_sms=device.num_sms,
        num_requests=batch.num_requests,
        num_rows=batch.num_rows,
        next_n=batch.next_n,
        max_rows=batch.max_rows,
        heads=spec.index_heads,
        dim=spec.index_dim,
        page_size=spec.page_size,
        max_pages=batch.page_table.shape[1],
        max_context=batch.max_context,
        cache=spec.index_format.name,
        out_dtype="float32",
        deterministic=deterministic or device.arch is Arch.CPU,
    )


def _select_topk_problem(batch: ForwardBatch, spec: DSASpec, device: DeviceInfo) -> SelectTopkProblem:
    return SelectTopkProblem(
        arch=device.arch,
        num_sms=device.num_sms,
        num_rows=batch.num_rows,
        num_columns=batch.max_context,
        topk=spec.index_topk,
        returns_slots=True,
        page_size=spec.page_size,
        max_pages=batch.page_table.shape[1],
    )


def _plan_index_logits(
    batch: ForwardBatch, problem: IndexLogitsProblem, visible_lens: torch.Tensor, environment: Environment
) -> OpPlan:
    choice = choose("index_logits", problem, environment=environment)
    data = None
    if choice.kernel.plan is not None:
        data = choice.kernel.plan(
            problem, query_offsets=batch.query_offsets, visible_lens=visible_lens, page_table=batch.page_table
        )
    return OpPlan(choice=choice, problem=problem, data=data)


def _plan_select_topk(batch: ForwardBatch, problem: SelectTopkProblem, environment: Environment) -> OpPlan:
    choice = choose("select_topk", problem, environment=environment)
    data = choice.kernel.plan(problem, device=batch.page_table.device) if choice.kernel.plan is not None else None
    return OpPlan(choice=choice, problem=problem, data=data)
