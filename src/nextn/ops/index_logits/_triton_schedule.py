"""The work list of the Triton index-logits kernels: which program scores which tiles of which rows.

Hides how ragged requests become equal shares. Rows of one request form groups of at most ``rows_per_group``; the tiles
of all groups, weighted by what a tile costs, form one line that is cut into equal slices, one per program.

Everything is computed on the device in two launches, so a CUDA graph can capture it. A list that does not fit the
lengths of a later call gives wrong logits, but neither hangs nor leaves a tensor: kernels hold every entry within the
call's sizes and read the lengths themselves.
"""

# Triton's types describe host values; device code is checked by the compile gate.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nextn.ops._kernel import Launch

RECORD = 8  # int32 per program: group, first tile, and the group's record; a power of two, for aligned loads
GROUP_RECORD = 4  # int32 per group: first row, rows, request, tiles
_ROW_BLOCK = 512
_PROGRAM_BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkSchedule:
    """Work of one forward, for every layer's call alike.

    Attributes:
        programs: int32 ``[num_programs + 1, 8]``: where each program starts (group, tile, then that group's record of
            first row, rows, request and tiles; two spare); it ends where the next one starts.
        groups: int32 ``[max_groups, 4]``: first row, rows, request, tiles; groups without a tile are left out.
        rows_per_group: the most rows of one group.
        num_programs: programs the work is cut for.
    """

    programs: torch.Tensor
    groups: torch.Tensor
    rows_per_group: int
    num_programs: int


@triton.jit
def tile_cost(num_rows):
    """Time of one tile of a group, in units of half a row's matrix work: up to three rows hide behind the loads."""
    return tl.maximum((num_rows + 1) // 2 * 2, 3)


@triton.jit(do_not_specialize=["num_requests", "num_rows", "max_context", "max_groups", "search_steps"])
def _list_groups_kernel(
    query_offsets_ptr,
    visible_lens_ptr,
    groups_ptr,
    cost_offsets_ptr,
    totals_ptr,
    num_requests,
    num_rows,
    max_context,
    max_groups,
    search_steps,
    ROWS_PER_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    num_groups = tl.zeros((), tl.int32)
    cost = tl.zeros((), tl.int64)
    for first_row in range(0, num_rows, BLOCK):
        row = first_row + offs
        low = tl.zeros((BLOCK,), tl.int32)  # requests that end at or before the row
        high = tl.zeros((BLOCK,), tl.int32) + num_requests
        for _ in range(search_steps):
            middle = (low + high) // 2
            ends_before = tl.load(query_offsets_ptr + middle + 1, mask=low < high, other=0) <= row
            low, high = tl.where((low < high) & ends_before, middle + 1, low), tl.where(ends_before, high, middle)
        mask_row = (row < num_rows) & (low < num_requests)
        start = tl.load(query_offsets_ptr + low, mask=mask_row, other=0)
        stop = tl.minimum(tl.load(query_offsets_ptr + low + 1, mask=mask_row, other=0), num_rows)
        is_first = mask_row & (start >= 0) & (start <= row) & ((row - start) % ROWS_PER_GROUP == 0)
        length = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(ROWS_PER_GROUP):
            visible = tl.load(visible_lens_ptr + row + i, mask=is_first & (row + i < stop), other=0)
            length = tl.maximum(length, visible)
        num_tiles = tl.cdiv(tl.minimum(length, max_context), TILE)
        is_group = is_first & (num_tiles > 0)
        rows = tl.minimum(stop - row, ROWS_PER_GROUP)
        costs = tl.where(is_group, num_tiles.to(tl.int64) * tile_cost(rows), 0)
        is_group = is_group.to(tl.int32)
        group = num_groups + tl.cumsum(is_group, 0) - 1
        mask_group = (is_group > 0) & (group < max_groups)
        tl.store(groups_ptr + group * 4, row, mask=mask_group)
        tl.store(groups_ptr + group * 4 + 1, rows, mask=mask_group)
        tl.store(groups_ptr + group * 4 + 2, low, mask=mask_group)
        tl.store(groups_ptr + group * 4 + 3, num_tiles, mask=mask_group)
        tl.store(cost_offsets_ptr + group, cost + tl.cumsum(costs, 0) - costs, mask=mask_group)
        num_groups += tl.sum(is_group, 0)
        cost += tl.sum(costs, 0)
    tl.store(totals_ptr, num_groups.to(tl.int64))
    tl.store(totals_ptr + 1, cost)


@triton.jit(do_not_specialize=["num_programs", "max_groups", "search_steps"])
def _share_out_kernel(
    groups_ptr,
    cost_offsets_ptr,
    totals_ptr,
    programs_ptr,
    num_programs,
    max_groups,
    search_steps,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_groups = tl.minimum(tl.load(totals_ptr).to(tl.int32), max_groups)
    total = tl.load(totals_ptr + 1)
    target = program.to(tl.int64) * total // num_programs
    low = tl.zeros((BLOCK,), tl.int32)  # groups that start at or before the target
    high = tl.zeros((BLOCK,), tl.int32) + num_groups
    for _ in range(search_steps):
        middle = (low + high) // 2
        starts_before = tl.load(cost_offsets_ptr + middle, mask=low < high, other=0) <= target
        low, high = tl.where((low < high) & starts_before, middle + 1, low), tl.where(starts_before, high, middle)
    group = tl.maximum(low - 1, 0)
    mask_group = group < num_groups
    rows = tl.load(groups_ptr + group * 4 + 1, mask=mask_group, other=1)
    num_tiles = tl.load(groups_ptr + group * 4 + 3, mask=mask_group, other=0)
    cost = tile_cost(rows)
    offset = tl.load(cost_offsets_ptr + group, mask=mask_group, other=0)
    tile = ((target - offset + cost - 1) // cost).to(tl.int32)
    is_past = tile >= num_tiles
    group = tl.where(is_past, group + 1, group)
    tile = tl.where(is_past, 0, tile)
    mask_program = program <= num_programs
    record_ptr = programs_ptr + program * 8
    tl.store(record_ptr, group, mask=mask_program)
    tl.store(record_ptr + 1, tile, mask=mask_program)
    for i in tl.static_range(4):
        field = tl.load(groups_ptr + group * 4 + i, mask=group < num_groups, other=0)
        tl.store(record_ptr + 2 + i, field, mask=mask_program)


def allocate_schedule(device: torch.device, *, max_groups: int, rows_per_group: int, num_programs: int) -> WorkSchedule:
    """An unfilled work list for any batch of these sizes."""
    return WorkSchedule(
        programs=torch.empty(num_programs + 1, RECORD, dtype=torch.int32, device=device),
        groups=torch.empty(max(max_groups, 1), GROUP_RECORD, dtype=torch.int32, device=device),
        rows_per_group=rows_per_group,
        num_programs=num_programs,
    )


def describe_fill(
    schedule: WorkSchedule,
    *,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    max_context: int,
    tile: int,
) -> tuple[Launch, Launch]:
    """The two launches that fill ``schedule`` for a batch, in order.

    Args:
        schedule: from :func:`allocate_schedule`, for this batch's sizes.
        query_offsets: int32 ``[B + 1]``.
        visible_lens: int32 ``[R]``.
        max_context: columns of the logits; longer lengths count as this.
        tile: tokens of one tile.
    """
    max_groups = schedule.groups.shape[0]
    cost_offsets = torch.empty(max_groups, dtype=torch.int64, device=visible_lens.device)
    totals = torch.empty(2, dtype=torch.int64, device=visible_lens.device)
    num_requests = query_offsets.shape[0] - 1
    list_groups = Launch(
        function=_list_groups_kernel,
        arguments={
            "query_offsets_ptr": query_offsets,
            "visible_lens_ptr": visible_lens,
            "groups_ptr": schedule.groups,
            "cost_offsets_ptr": cost_offsets,
            "totals_ptr": totals,
            "num_requests": num_requests,
            "num_rows": visible_lens.shape[0],
            "max_context": max_context,
            "max_groups": max_groups,
            "search_steps": num_requests.bit_length(),
            "ROWS_PER_GROUP": schedule.rows_per_group,
            "TILE": tile,
            "BLOCK": _ROW_BLOCK,
        },
        grid=(1,),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    share_out = Launch(
        function=_share_out_kernel,
        arguments={
            "groups_ptr": schedule.groups,
            "cost_offsets_ptr": cost_offsets,
            "totals_ptr": totals,
            "programs_ptr": schedule.programs,
            "num_programs": schedule.num_programs,
            "max_groups": max_groups,
            "search_steps": max_groups.bit_length(),
            "BLOCK": _PROGRAM_BLOCK,
        },
        grid=(triton.cdiv(schedule.num_programs + 1, _PROGRAM_BLOCK),),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    return list_groups, share_out
