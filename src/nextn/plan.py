"""DSAMetadata and its one builder: everything a forward needs that does not depend on the layer.

Hides how lengths, positions, slots and schedules follow from a batch. The builder is one pure function of device
operations, used alike for eager runs, graph capture and replay, so lengths and schedule cannot diverge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from nextn.batch import ForwardBatch
from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.env import Environment, read_environment
from nextn.errors import InputError
from nextn.hardware import Arch, DeviceInfo
from nextn.ops._kernel import Choice, OpPlan, choose
from nextn.ops._rows import Fills, RowArrays, locate_rows
from nextn.ops.index_logits._schedule import PagedSchedule
from nextn.ops.index_logits.problem import IndexLogitsProblem
from nextn.ops.prepare_query.problem import PrepareQueryProblem
from nextn.ops.select_topk.problem import SelectTopkProblem
from nextn.ops.sparse_mla.problem import SparseMlaProblem
from nextn.ops.write_cache.problem import WriteCacheProblem

__all__ = ["DSAMetadata", "DSASpec", "OpPlan", "RowChunk", "list_problems", "plan_forward"]

_LOGITS_ALIGNMENT = 256  # columns that kernels pad a row of logits to, at most
_ROWS_PER_GROUP = 8  # rows that may share one reading of the keys; chunks are cut between such groups


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
class RowChunk:
    """Rows whose logits are in memory at a time, and the two ops that make and read them.

    Attributes:
        rows: which rows of the batch.
        query_offsets: int32 ``[B + 1]``, offsets into these rows; requests outside have none.
        visible_lens: int32, these rows' part.
        index_logits: the chosen kernel of the scores and what it planned.
        select_topk: the same for the selection.
    """

    rows: slice
    query_offsets: torch.Tensor
    visible_lens: torch.Tensor
    index_logits: OpPlan
    select_topk: OpPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class DSAMetadata:
    """One forward's plan, read by every layer.

    Attributes:
        batch: what was planned.
        positions: int64 ``[R]``, each row's position in its request; 0 for the rows of a padding request.
        visible_lens: int32 ``[R]``, cached tokens each row may see, itself included; 0 for a padding request.
        request_of_row: int64 ``[R]``.
        slots: int64 ``[R]``, where each row's keys are written; -1 writes nothing.
        write_cache: the chosen kernel of the cache writes, in layers with an indexer.
        write_latents: the same for layers that share another's selection and write no index keys.
        prepare_query: the same for the index queries.
        sparse_mla: the same for the attention, and its workspace.
        chunks: the rows in order, in as many parts as the budget of the logits asks for; most often one.
    """

    batch: ForwardBatch
    positions: torch.Tensor
    visible_lens: torch.Tensor
    request_of_row: torch.Tensor
    slots: torch.Tensor
    write_cache: OpPlan
    write_latents: OpPlan
    prepare_query: OpPlan
    sparse_mla: OpPlan
    chunks: tuple[RowChunk, ...]

    @property
    def index_logits(self) -> OpPlan:
        """The scores' plan: of the whole forward, or of its first chunk."""
        return self.chunks[0].index_logits

    @property
    def select_topk(self) -> OpPlan:
        """The selection's plan: of the whole forward, or of its first chunk."""
        return self.chunks[0].select_topk

    @property
    def kernels(self) -> Mapping[str, Choice]:
        """Op name to what was chosen for it, and why not the others, in the order of a layer's calls."""
        ops = ("write_cache", "prepare_query", "index_logits", "select_topk", "sparse_mla")
        return {op: getattr(self, op).choice for op in ops}

    @property
    def paged_mqa_ctx_lens_2d(self) -> torch.Tensor | None:
        """int32 ``[B, next_n]`` (native) or ``[R, 1]`` (flattened), the tensor the schedule was built from.

        None if the kernel has no schedule of DeepGEMM's kind.
        """
        schedule = self._paged_schedule()
        return None if schedule is None else schedule.context_lens

    @property
    def paged_mqa_schedule_metadata(self) -> torch.Tensor | None:
        """int32 ``[slots + 1, 2]``, or None."""
        schedule = self._paged_schedule()
        return None if schedule is None else schedule.metadata

    @property
    def use_dg_native(self) -> bool:
        """Whether the scores run as ``[B, next_n, H, D]`` with one page-table row per request in DeepGEMM."""
        schedule = self._paged_schedule()
        return schedule is not None and schedule.is_native

    def _paged_schedule(self) -> PagedSchedule | None:
        return self.index_logits.data if isinstance(self.index_logits.data, PagedSchedule) else None


def plan_forward(
    batch: ForwardBatch,
    spec: DSASpec,
    device: DeviceInfo,
    *,
    deterministic: bool = False,
    dtype: str | None = None,
    environment: Environment | None = None,
    choose_kernel: Callable[..., Choice] = choose,
) -> DSAMetadata:
    """Plan one forward.

    Reads no device tensor on the host, so a CUDA graph can capture it together with the layers. On a GPU with Triton it
    takes two launches, one for the rows and one for the schedule of the scores; DeepGEMM, where it is chosen, prepares
    its lengths and its schedule in launches of its own.

    Args:
        batch: the rows.
        spec: the model's attention.
        device: what the kernels are chosen for; need not be where the tensors lie.
        deterministic: choose only kernels whose rows do not depend on the batch; on a CPU always so.
        dtype: of the model's activations, such as ``bfloat16``; if None ``float32`` on a CPU and ``bfloat16`` on a GPU.
        environment: settings; read from the process environment if None.
        choose_kernel: ``choose``, or a cache of it.

    Returns:
        The plan. ``positions`` of row ``j`` of request ``b`` is ``context_lens[b] - rows_b + j``.

    Raises:
        InputError: the context does not fit the page table.
        UnsupportedError: a kernel forced by NEXTN_KERNELS does not take this batch.
    """
    _check_batch(batch, spec)
    environment = read_environment() if environment is None else environment
    fills = Fills(device=batch.page_table.device)

    def plan_op(op: str, problem: Any, **inputs: Any) -> OpPlan:
        choice = choose_kernel(op, problem, environment=environment)
        if choice.kernel.takes_fills:
            inputs["fills"] = fills
        data = None if choice.kernel.plan is None else choice.kernel.plan(problem, **inputs)
        return OpPlan(choice=choice, problem=problem, data=data)

    problems = list_problems(batch, spec, device, deterministic=deterministic, dtype=dtype)
    place = {"device": batch.page_table.device}
    latents_only = replace(problems["write_cache"], index_format=None, index_dim=0, has_index_norm=False)
    write_cache = plan_op("write_cache", problems["write_cache"], **place)
    write_latents = plan_op("write_cache", latents_only, **place)
    prepare_query = plan_op("prepare_query", problems["prepare_query"], **place)
    sparse_mla = plan_op("sparse_mla", problems["sparse_mla"], **place)
    spans = _cut_rows(batch, environment.logits_budget_bytes)
    selections = [plan_op("select_topk", _in_span(problems["select_topk"], batch, rows), **place) for rows in spans]
    located = locate_rows(
        query_offsets=batch.query_offsets,
        context_lens=batch.context_lens,
        page_table=batch.page_table,
        num_rows=batch.num_rows,
        page_size=spec.page_size,
        visible_lens=batch.visible_lens,
        fills=fills,
    )
    return DSAMetadata(
        batch=batch,
        positions=located.positions,
        visible_lens=located.visible_lens,
        request_of_row=located.request_of_row,
        slots=located.slots,
        write_cache=write_cache,
        write_latents=write_latents,
        prepare_query=prepare_query,
        sparse_mla=sparse_mla,
        chunks=tuple(
            _plan_chunk(batch, located, rows, select_topk, problems["index_logits"], plan_op)
            for rows, select_topk in zip(spans, selections)
        ),
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


def _cut_rows(batch: ForwardBatch, budget_bytes: int) -> list[slice]:
    """The rows in one part if their logits fit the budget, else in parts that do."""
    step = max(_rows_within(budget_bytes, batch), 1)
    return [slice(top, min(top + step, batch.num_rows)) for top in range(0, max(batch.num_rows, 1), step)]


def _in_span(problem: Any, batch: ForwardBatch, rows: slice) -> Any:
    """The problem of ``index_logits`` or ``select_topk`` for a part of the rows."""
    num_rows = rows.stop - rows.start
    if num_rows == batch.num_rows:
        return problem
    if isinstance(problem, IndexLogitsProblem):
        return replace(problem, num_rows=num_rows, next_n=None, max_rows=min(batch.max_rows, num_rows))
    return replace(problem, num_rows=num_rows)


def _plan_chunk(
    batch: ForwardBatch,
    located: RowArrays,
    rows: slice,
    select_topk: OpPlan,
    problem: IndexLogitsProblem,
    plan_op: Callable[..., OpPlan],
) -> RowChunk:
    """A chunk with a schedule of its own; the whole forward's tensors themselves if it is the only one."""
    query_offsets, visible_lens = batch.query_offsets, located.visible_lens
    if rows.stop - rows.start < batch.num_rows:
        query_offsets = (query_offsets - rows.start).clamp_(0, rows.stop - rows.start)
        visible_lens = visible_lens[rows]
    index_logits = plan_op(
        "index_logits",
        _in_span(problem, batch, rows),
        query_offsets=query_offsets,
        visible_lens=visible_lens,
        page_table=batch.page_table,
    )
    return RowChunk(
        rows=rows,
        query_offsets=query_offsets,
        visible_lens=visible_lens,
        index_logits=index_logits,
        select_topk=select_topk,
    )


def _rows_within(budget_bytes: int, batch: ForwardBatch) -> int:
    """Rows whose float32 logits fit the budget, at least 1; whole groups or requests of them where that many fit."""
    row_bytes = 4 * -(-max(batch.max_context, 1) // _LOGITS_ALIGNMENT) * _LOGITS_ALIGNMENT
    rows = max(budget_bytes // row_bytes, 1)
    unit = batch.next_n or _ROWS_PER_GROUP
    return rows - rows % unit if rows >= unit else rows


def list_problems(
    batch: ForwardBatch, spec: DSASpec, device: DeviceInfo, *, deterministic: bool = False, dtype: str | None = None
) -> dict[str, Any]:
    """The problem of each op of one layer, in the order they run, for showing what would be chosen.

    Args:
        batch: the rows.
        spec: the model's attention.
        device: what the ops are to run on.
        deterministic: as in :func:`plan_forward`.
        dtype: of the model's activations; as in :func:`plan_forward`.
    """
    dtype = dtype or ("float32" if device.arch is Arch.CPU else "bfloat16")
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
