"""Host side of attention over lists of cache slots: how launches are cut, and the scratch memory of split lists.

Hides pointers, strides and the way a list is split; the kernel files say which rows share a list.
"""

# Triton's types describe device values.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from nextn.cache_format import LATENT_DIM
from nextn.hardware import Arch
from nextn.ops._kernel import Launch, require
from nextn.ops._rows import Fills
from nextn.ops.sparse_mla._triton_attend import _attend_kernel, _combine_kernel
from nextn.ops.sparse_mla._triton_union import _bid_kernel, _list_kernel
from nextn.ops.sparse_mla.problem import SparseMlaProblem

IS_INTERPRETED = knobs.runtime.interpret
GPU_ARCHES = frozenset(arch for arch in Arch if arch.is_cuda or arch.is_rocm)

LOG_BUCKETS = 13
MAX_SHARED_TOPK = 2048
MAX_SPLITS = 16
# (Row, head) pairs, slots and warps of a program that keep its output in registers, by what compilers report.
_SMALL_PRODUCT = (16, 16, 4)
_LARGE_PRODUCT = (64, 64, 8)
PRODUCTS = {
    arch: _LARGE_PRODUCT if arch in (Arch.SM90, Arch.SM100, Arch.SM103) else _SMALL_PRODUCT for arch in GPU_ARCHES
}
_NEW_PER_TOKEN = 0.15  # share of its slots that a row adds to a list; neighbours have 70 to 90 % in common
_EMPTY = 2**63 - 1  # beyond every bid for a cell


@dataclass(frozen=True, kw_only=True, slots=True)
class AttendConfig:
    """How one launch of the attention is cut.

    Attributes:
        tokens: rows that share a list of slots, at most.
        depth: rows of a request; a list never spans two of as many.
        group: heads of each of those rows that a program takes.
        least_pairs: (row, head) pairs that a product takes at least.
        tile: slots of one product.
        transposed: whether (row, head) pairs are the columns of the products rather than their rows.
        splits: programs that share a list.
        split_len: slots of a split if it is the same in every batch, else None.
        num_warps: warps of a program.
        num_stages: depth of the loads' pipeline.
        max_registers: registers of a thread; None leaves them to the compiler. NVIDIA only.
    """

    tokens: int = 1
    depth: int = 1
    group: int = 64
    least_pairs: int = 16
    tile: int = 64
    transposed: bool = False
    splits: int = 1
    split_len: int | None = None
    num_warps: int = 8
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def pairs(self) -> int:
        """(Row, head) pairs of a program, padding included."""
        return max(self.least_pairs, triton.next_power_of_2(self.tokens * self.group))

    def num_lists(self, num_rows: int) -> int:
        """Lists of slots for so many rows."""
        return triton.cdiv(num_rows, self.depth) * triton.cdiv(self.depth, self.tokens)


@dataclass(frozen=True, kw_only=True)
class AttendWorkspace:
    """Scratch memory of one forward, shared by its layers.

    Attributes:
        config: what it was sized for.
        parts: float32 or bfloat16 ``[R, Hq, splits, 512]``, the splits' outputs; None if lists are not split.
        part_lse: float32 ``[R, Hq, splits]``, or None.
    """

    config: AttendConfig
    parts: torch.Tensor | None
    part_lse: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class SlotLists:
    """Lists of slots to attend to, one per ``config.tokens`` rows.

    Attributes:
        slots: int32 ``[groups, L]``.
        masks: int32 ``[groups, L]``, bit t set if the list's token t selected the slot; None if all did.
        counts: int32 ``[groups, tokens]``, valid entries of each of a list's equal parts; None if any may be valid.
        age: int32 ``[1]``, to be increased by one; None without masks.
    """

    slots: torch.Tensor
    masks: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    age: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class UnionWorkspace:
    """Scratch memory of one forward whose rows may share lists.

    Attributes:
        attend: that of the attention.
        cells: int64 ``[lists, 2, buckets, tokens]``, the hash tables; None if no rows share.
        age: int32 ``[1]``, how often the tables were used; the attention adds one.
        slots: int32 ``[lists, tokens * k]``, what each row adds to its list in a part of its own, or all of it as if
            it were the first part; or None.
        masks: as ``slots``.
        counts: int32 ``[lists, tokens]``, valid entries of the parts; or None.
    """

    attend: AttendWorkspace
    cells: torch.Tensor | None = None
    age: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    counts: torch.Tensor | None = None


def share_lists(problem: SparseMlaProblem, pairs: int, most_tokens: int = 8) -> Iterator[tuple[int, int, int]]:
    """Ways to fill products of ``pairs`` (row, head) pairs: rows that share a list, rows of a request, heads.

    The first is every row on its own. Rows are taken to share where the call says that some request has several; in a
    ragged batch four follow each other, whosesoever they are.
    """
    has_requests = problem.num_requests is not None and problem.num_rows > problem.num_requests
    is_shareable = has_requests and problem.topk <= MAX_SHARED_TOPK and not problem.deterministic
    most = min(problem.next_n or 4, most_tokens, pairs) if is_shareable else 1
    for tokens in range(1, most + 1):
        depth = 1 if tokens == 1 else problem.next_n or tokens
        head_groups = triton.cdiv(problem.heads, pairs // tokens)
        yield tokens, depth, triton.cdiv(problem.heads, head_groups)


def expect_len(problem: SparseMlaProblem, tokens: int) -> float:
    """Slots of a list that so many rows share."""
    return problem.topk * (1 + _NEW_PER_TOKEN * (tokens - 1))


def count_gathers(problem: SparseMlaProblem, config: AttendConfig) -> float:
    """Latent rows that all programs gather together."""
    programs = config.num_lists(problem.num_rows) * triton.cdiv(problem.heads, config.group)
    return programs * expect_len(problem, config.tokens)


def allocate_workspace(
    problem: SparseMlaProblem,
    config: AttendConfig,
    device: torch.device | str,
    part_dtype: torch.dtype = torch.float32,
) -> AttendWorkspace:
    """Scratch memory for ``config``: ``R * Hq * splits * 2052`` bytes if lists are split, else none."""
    if config.splits == 1:
        return AttendWorkspace(config=config, parts=None, part_lse=None)
    shape = (problem.num_rows, problem.heads, config.splits)
    return AttendWorkspace(
        config=config,
        parts=torch.empty(*shape, LATENT_DIM, dtype=part_dtype, device=device),
        part_lse=torch.empty(shape, dtype=torch.float32, device=device),
    )


def describe_launches(
    problem: SparseMlaProblem,
    workspace: AttendWorkspace,
    lists: SlotLists,
    *,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[Launch, ...]:
    """The attention, and what puts split lists together."""
    config = workspace.config
    num_groups = config.num_lists(problem.num_rows)
    rows = _bytes_of(kv_cache)
    arguments = {
        "q_ptr": q,
        "codes_ptr": rows,
        "scales_ptr": rows.view(torch.float32),
        "rope_ptr": rows.view(torch.bfloat16),
        "list_ptr": lists.slots,
        "masks_ptr": lists.slots if lists.masks is None else lists.masks,
        "counts_ptr": lists.slots if lists.counts is None else lists.counts,
        "age_ptr": lists.slots if lists.age is None else lists.age,
        "out_ptr": out,
        "lse_ptr": lse,
        "parts_ptr": out if workspace.parts is None else workspace.parts,
        "part_lse_ptr": lse if workspace.part_lse is None else workspace.part_lse,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "page_stride": rows.stride(0),
        "list_stride": lists.slots.stride(0),
        "out_row_stride": out.stride(0),
        "out_head_stride": out.stride(1),
        "num_rows": problem.num_rows,
        "heads": problem.heads,
        "num_slots": rows.shape[0] * problem.page_size,
        "list_len": problem.topk,
        "split_len": config.split_len or _round_up(triton.cdiv(problem.topk, config.splits), config.tile),
        "score_scale": scale * 1.4426950408889634,
        "TOKENS": config.tokens,
        "DEPTH": config.depth,
        "GROUP": config.group,
        "PAIRS": config.pairs,
        "TILE": config.tile,
        "PAGE": problem.page_size,
        "SPLITS": config.splits,
        "IS_FP8": problem.cache == "fp8",
        "IS_UNION": lists.masks is not None,
        "TRANSPOSED": config.transposed,
        "BY_PTX": problem.arch.is_cuda and not IS_INTERPRETED,
        "DOT_DTYPE": tl.float32 if IS_INTERPRETED else tl.bfloat16,
        "LIST_BLOCK": min(triton.next_power_of_2(problem.topk), 2048),
        "NUM_STAGES": config.num_stages,
    }
    attend = Launch(
        function=_attend_kernel,
        arguments=arguments,
        grid=(num_groups, triton.cdiv(problem.heads, config.group), config.splits),
        options=_options(config),
    )
    return (attend,) if config.splits == 1 else (attend, _describe_combine(problem, workspace, out, lse))


def allocate_union(
    problem: SparseMlaProblem,
    config: AttendConfig,
    device: torch.device | str,
    *,
    has_tables: bool = True,
    part_dtype: torch.dtype = torch.float32,
    fills: Fills | None = None,
) -> UnionWorkspace:
    """Scratch memory of one forward: where rows share lists, 128 KB of hash tables and ``8 * k`` bytes for each."""
    attend = allocate_workspace(problem, config, device, part_dtype)
    if config.tokens == 1:
        return UnionWorkspace(attend=attend)
    num_lists = config.num_lists(problem.num_rows)
    shape = (num_lists, config.tokens * problem.topk)
    cells = (num_lists, 2, 2**LOG_BUCKETS, triton.next_power_of_2(config.tokens))
    empty = age = None
    if has_tables and fills is None:
        empty = torch.full(cells, _EMPTY, dtype=torch.int64, device=device)
        age = torch.ones(1, dtype=torch.int32, device=device)
    elif has_tables and fills is not None:
        empty, age = fills.ask(cells, torch.int64, _EMPTY), fills.ask((1,), torch.int32, 1)
    return UnionWorkspace(
        attend=attend,
        cells=empty,
        age=age,
        slots=torch.empty(shape, dtype=torch.int32, device=device),
        masks=torch.empty(shape, dtype=torch.int32, device=device),
        counts=torch.empty(num_lists, config.tokens, dtype=torch.int32, device=device),
    )


def describe_union(
    problem: SparseMlaProblem,
    workspace: UnionWorkspace,
    indices: torch.Tensor,
    kv_cache: torch.Tensor,
) -> tuple[SlotLists, tuple[Launch, ...]]:
    """The lists to attend to, and the launch that makes them if rows share them."""
    if workspace.slots is None or workspace.counts is None:
        return SlotLists(slots=indices), ()
    config = workspace.attend.config
    token_block = triton.next_power_of_2(config.tokens)
    topk_block = triton.next_power_of_2(problem.topk)
    shared = {
        "indices_ptr": indices,
        "age_ptr": workspace.age,
        "cells_ptr": workspace.cells,
        "indices_stride": indices.stride(0),
        "num_rows": problem.num_rows,
        "topk": problem.topk,
        "num_slots": kv_cache.shape[0] * problem.page_size,
        "TOKENS": config.tokens,
        "DEPTH": config.depth,
        "TOKEN_BLOCK": token_block,
        "TOPK_BLOCK": topk_block,
        "LOG_TOPK": topk_block.bit_length() - 1,
        "LOG_BUCKETS": LOG_BUCKETS,
    }
    lists = {
        "slots_ptr": workspace.slots,
        "masks_ptr": workspace.masks,
        "counts_ptr": workspace.counts,
    }
    options = {"num_warps": max(1, min(8, topk_block // 256)), "enable_fp_fusion": True}
    list_options = {
        **options,
        "num_warps": max(1, min(32, topk_block * token_block // 512)),
    }
    if problem.arch.is_cuda:
        list_options["maxnreg"] = 64  # two programs of 16 warps on a multiprocessor, at four tokens
    grid = (workspace.counts.shape[0], config.tokens)
    bid = Launch(function=_bid_kernel, arguments=shared, grid=grid, options=options)
    make_lists = Launch(
        function=_list_kernel,
        arguments={**shared, **lists},
        grid=grid,
        options=list_options,
    )
    return SlotLists(
        slots=workspace.slots,
        masks=workspace.masks,
        counts=workspace.counts,
        age=workspace.age,
    ), (
        bid,
        make_lists,
    )


def chain(launches: Sequence[Launch]) -> Launch:
    """Several launches as one."""
    if len(launches) == 1:
        return launches[0]
    return Launch(function=_launch_all, arguments={"launches": tuple(launches)})


def _launch_all(*, launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch()


def _describe_combine(
    problem: SparseMlaProblem,
    workspace: AttendWorkspace,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Launch:
    splits = workspace.config.splits
    num_pairs = problem.num_rows * problem.heads
    pairs, num_warps = (2, 2) if splits <= 4 else (1, 4)  # by splits alone: deterministic bits depend on no batch
    arguments = {
        "parts_ptr": workspace.parts,
        "part_lse_ptr": workspace.part_lse,
        "out_ptr": out,
        "lse_ptr": lse,
        "num_pairs": num_pairs,
        "heads": problem.heads,
        "out_row_stride": out.stride(0),
        "out_head_stride": out.stride(1),
        "SPLITS": splits,
        "PAIRS": pairs,
        "IS_DEPENDENT": False,
        "IS_INTERPRETED": IS_INTERPRETED,
    }
    return Launch(
        function=_combine_kernel,
        arguments=arguments,
        grid=(triton.cdiv(num_pairs, pairs),),
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )


def _options(config: AttendConfig) -> dict[str, Any]:
    limit = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    return {"num_warps": config.num_warps, "enable_fp_fusion": True, **limit}


def _bytes_of(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache as uint8 ``[num_pages, bytes]``, pages at their own distance."""
    if kv_cache.ndim == 4:
        kv_cache = kv_cache.squeeze(2)
    pages = kv_cache.as_strided((kv_cache.shape[0], kv_cache[0].numel()), (kv_cache.stride(0), 1)).view(torch.uint8)
    require(
        pages.stride(0) % 16 == 0,
        f"kv_cache has pages {pages.stride(0)} bytes apart; GPU kernels need a multiple of 16",
    )
    return pages


def _round_up(value: int, multiple: int) -> int:
    return triton.cdiv(value, multiple) * multiple
