"""The work list of the Triton index-logits kernels: which program scores which tiles of which rows.

Hides how ragged requests become equal shares. Rows of one request form groups of at most ``rows_per_group``; the tiles
of all groups, weighted by what a tile costs, form one line that is cut into equal slices, one per program.

Everything is computed on the device in one launch, so a CUDA graph can capture it: one program lists the groups, and
after a barrier looks up where each share begins. A list that does not fit the lengths or the page table of a later call
gives wrong logits, but neither hangs nor leaves a tensor: kernels hold every entry within the call's sizes and read the
lengths themselves. Floor: a few KB, so it takes as long as its chains of dependent loads.
"""

# Triton's types describe host values; device code is checked by the compile gate.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nextn.ops._kernel import Launch
from nextn.ops._triton_rows import find_request

RECORD = 8  # int32 per program: group, first tile, the group's record, first page; a power of two, for aligned loads
GROUP_RECORD = 4  # int32 per group: first row, rows, request, tiles
# Time of a tile by the rows of its group, in halves of a row's matrix work: up to three rows hide behind the loads.
TILE_COSTS = (3, 3, 4, 4, 6, 6, 8, 8)
# Keys between the starts of neighbouring rows from which on they do not share a group, whose tiles cover both.
START_JUMP = tl.constexpr(256)
_FEW = 256  # requests or rows that a small launch lists at once
# Few or not: lanes to list groups with, lanes to share out with, warps. On an H100, of 14 cuts, a whole plan among
# captured ones: 64 requests of 4 rows 5.3 us (with 512 lanes to share out 5.9), 1024 requests 9.1 us (with 256 lanes
# and 8 warps 9.3).
_BLOCKS = {True: (256, 256, 8), False: (1024, 512, 16)}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkSchedule:
    """Work of one forward, for every layer's call alike.

    Attributes:
        programs: int32 ``[num_programs + 1, 8]``: where each program starts (group, tile, then that group's record of
            first row, rows, request and tiles, its first page if a page table was given, one spare); it ends where the
            next one starts.
        groups: int32 ``[max_groups, 4]``: first row, rows, request, tiles; groups without a tile are left out.
        rows_per_group: the most rows of one group.
        num_programs: programs the work is cut for.
        tile_costs: time of a tile of a group of 1, 2, ... rows, in any unit; at least ``rows_per_group`` of them.
    """

    programs: torch.Tensor
    groups: torch.Tensor
    rows_per_group: int
    num_programs: int
    tile_costs: tuple[int, ...]


@triton.jit
def _bound_by_request(offsets_ptr, request, num_requests, num_rows):
    """First row of each request, one past its last, and whether there is one; every request is one group."""
    mask = request < num_requests
    row = tl.load(offsets_ptr + request, mask=mask, other=0)
    stop = tl.minimum(tl.load(offsets_ptr + request + 1, mask=mask, other=0), num_rows)
    return row, stop, mask & (row >= 0) & (row < stop)


@triton.jit
def _bound_by_row(offsets_ptr, row, num_requests, num_rows, search_steps, ROWS_PER_GROUP: tl.constexpr):
    """Request of each row, one past its group's last row, and whether the row is its group's first."""
    request = find_request(offsets_ptr, row, num_requests, search_steps)
    mask = (row < num_rows) & (request < num_requests)
    start = tl.load(offsets_ptr + request, mask=mask, other=0)
    stop = tl.minimum(tl.load(offsets_ptr + request + 1, mask=mask, other=0), num_rows)
    is_first = mask & (start >= 0) & (start <= row) & ((row - start) % ROWS_PER_GROUP == 0)
    return request, tl.minimum(row + ROWS_PER_GROUP, stop), is_first


@triton.jit
def _begins_span(starts_ptr, row, num_rows, num_keys, ROWS_PER_GROUP: tl.constexpr):
    """Whether a group of contiguous keys begins at each row: every ROWS_PER_GROUP rows, and where the start jumps."""
    mask = (row > 0) & (row < num_rows)
    start = tl.load(starts_ptr + row, mask=mask, other=0)
    before = tl.load(starts_ptr + row - 1, mask=mask, other=0)
    step = tl.minimum(tl.maximum(start, 0), num_keys) - tl.minimum(tl.maximum(before, 0), num_keys)
    return (row % ROWS_PER_GROUP == 0) | (tl.abs(step) > START_JUMP)


@triton.jit
def _bound_by_span(starts_ptr, row, num_rows, num_keys, ROWS_PER_GROUP: tl.constexpr):
    """One past the last row of the group that begins at each row, and whether one does."""
    is_first = (row < num_rows) & _begins_span(starts_ptr, row, num_rows, num_keys, ROWS_PER_GROUP)
    stop = row + 1
    for i in tl.static_range(1, ROWS_PER_GROUP):
        goes_on = (stop == row + i) & (row + i < num_rows)
        goes_on &= ~_begins_span(starts_ptr, row + i, num_rows, num_keys, ROWS_PER_GROUP)
        stop = tl.where(goes_on, row + i + 1, stop)
    return stop, is_first


@triton.jit
def find_span(lens_ptr, starts_ptr, row, is_row, num_keys, HAS_STARTS: tl.constexpr):
    """First key each row sees and one past its last, within the keys there are; both 0 for a row that sees none."""
    stop = tl.minimum(tl.load(lens_ptr + row, mask=is_row, other=0), num_keys)
    start = tl.zeros_like(stop)
    if HAS_STARTS:
        start = tl.maximum(tl.load(starts_ptr + row, mask=is_row, other=0), 0)
    return tl.where(start < stop, start, 0), tl.where(start < stop, stop, 0)


@triton.jit
def _count_tiles(
    lens_ptr, starts_ptr, row, stop, is_first, num_keys, ROWS_PER_GROUP: tl.constexpr, TILE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Tiles from the first key that a row of each group sees to the last."""
    first_key = tl.zeros_like(row) + 2147483647
    last_key = tl.zeros_like(row)
    for i in tl.static_range(ROWS_PER_GROUP):
        start, end = find_span(lens_ptr, starts_ptr, row + i, is_first & (row + i < stop), num_keys, HAS_STARTS)
        first_key = tl.where(end > 0, tl.minimum(first_key, start), first_key)
        last_key = tl.maximum(last_key, end)
    return tl.where(last_key > 0, tl.cdiv(last_key - tl.minimum(first_key, last_key), TILE), 0)


@triton.jit
def _list_groups(
    offsets_ptr, lens_ptr, starts_ptr, groups_ptr, cost_offsets_ptr, num_requests, num_rows, num_keys, max_groups,
    search_steps, ROWS_PER_GROUP: tl.constexpr, TILE: tl.constexpr, COSTS: tl.constexpr, LISTED_BY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write every group that has a tile and the cost of all before it; return their number and the cost of all."""
    HAS_STARTS: tl.constexpr = LISTED_BY == "span"
    num_groups = tl.zeros((), tl.int32)
    total = tl.zeros((), tl.int64)
    num_units = num_requests if LISTED_BY == "request" else num_rows
    for first in range(0, num_units, BLOCK):
        unit = first + tl.arange(0, BLOCK)
        if LISTED_BY == "request":
            request = unit
            row, stop, is_first = _bound_by_request(offsets_ptr, request, num_requests, num_rows)
        elif LISTED_BY == "row":
            row = unit
            request, stop, is_first = _bound_by_row(
                offsets_ptr, row, num_requests, num_rows, search_steps, ROWS_PER_GROUP
            )
        else:
            row = unit
            request = tl.zeros_like(row)
            stop, is_first = _bound_by_span(starts_ptr, row, num_rows, num_keys, ROWS_PER_GROUP)
        tiles = _count_tiles(lens_ptr, starts_ptr, row, stop, is_first, num_keys, ROWS_PER_GROUP, TILE, HAS_STARTS)
        rows = tl.minimum(stop - row, ROWS_PER_GROUP)
        is_group = is_first & (tiles > 0)
        costs = tl.where(is_group, tiles.to(tl.int64) * _tile_cost(rows, COSTS, ROWS_PER_GROUP), 0)
        # One scan for both sums: a block counts at most 1024 groups, in 11 bits, and its costs fit the other 52.
        both = costs * 2048 + is_group.to(tl.int64)
        up_to_here = tl.cumsum(both, 0)
        group = num_groups + (up_to_here % 2048).to(tl.int32) - 1
        mask_group = is_group & (group < max_groups)
        tl.store(groups_ptr + group * 4, row, mask=mask_group)
        tl.store(groups_ptr + group * 4 + 1, rows, mask=mask_group)
        tl.store(groups_ptr + group * 4 + 2, request, mask=mask_group)
        tl.store(groups_ptr + group * 4 + 3, tiles, mask=mask_group)
        tl.store(cost_offsets_ptr + group, total + up_to_here // 2048 - costs, mask=mask_group)
        all_of_block = tl.sum(both, 0)
        num_groups += (all_of_block % 2048).to(tl.int32)
        total += all_of_block // 2048
    return tl.minimum(num_groups, max_groups), total


@triton.jit
def _tile_cost(rows, COSTS: tl.constexpr, ROWS_PER_GROUP: tl.constexpr):
    cost = tl.zeros_like(rows) + COSTS[0]
    for i in tl.static_range(1, ROWS_PER_GROUP):
        cost = tl.where(rows == i + 1, COSTS[i], cost)
    return cost


@triton.jit
def _share_out(
    groups_ptr, cost_offsets_ptr, programs_ptr, program, num_groups, total, num_programs, search_steps,
    table_ptr, table_row_stride, num_requests, max_pages,
    COSTS: tl.constexpr, ROWS_PER_GROUP: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Write where each program's share begins, and its first page."""
    target = program.to(tl.int64) * total // num_programs
    low = tl.zeros_like(program)  # groups that start at or before the target
    high = tl.zeros_like(program) + num_groups
    for _ in range(search_steps):
        middle = (low + high) // 2
        starts_before = tl.load(cost_offsets_ptr + middle, mask=low < high, other=0) <= target
        low, high = tl.where((low < high) & starts_before, middle + 1, low), tl.where(starts_before, high, middle)
    group = tl.maximum(low - 1, 0)
    mask_group = group < num_groups
    rows = tl.load(groups_ptr + group * 4 + 1, mask=mask_group, other=1)
    tiles = tl.load(groups_ptr + group * 4 + 3, mask=mask_group, other=0)
    cost = _tile_cost(rows, COSTS, ROWS_PER_GROUP)
    offset = tl.load(cost_offsets_ptr + group, mask=mask_group, other=0)
    tile = ((target - offset + cost - 1) // cost).to(tl.int32)
    is_past = tile >= tiles
    group = tl.where(is_past, group + 1, group)
    tile = tl.where(is_past, 0, tile)
    mask_program = program <= num_programs
    record_ptr = programs_ptr + program * 8
    tl.store(record_ptr, group, mask=mask_program)
    tl.store(record_ptr + 1, tile, mask=mask_program)
    for i in tl.static_range(4):
        field = tl.load(groups_ptr + group * 4 + i, mask=group < num_groups, other=0)
        tl.store(record_ptr + 2 + i, field, mask=mask_program)
        if HAS_TABLE and i == 2:
            mask_page = mask_program & (group < num_groups) & (field >= 0) & (field < num_requests) & (tile < max_pages)
            page = tl.load(table_ptr + field.to(tl.int64) * table_row_stride + tile, mask=mask_page, other=0)
            tl.store(record_ptr + 6, page, mask=mask_program)


@triton.jit(
    do_not_specialize=[
        "num_requests", "num_rows", "num_keys", "max_groups", "num_programs", "request_steps", "group_steps",
        "table_row_stride", "max_pages",
    ]
)  # fmt: skip
def _fill_schedule_kernel(
    offsets_ptr,
    lens_ptr,
    starts_ptr,
    groups_ptr,
    cost_offsets_ptr,
    programs_ptr,
    table_ptr,
    table_row_stride,
    max_pages,
    num_requests,
    num_rows,
    num_keys,
    max_groups,
    num_programs,
    request_steps,
    group_steps,
    ROWS_PER_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    COSTS: tl.constexpr,
    LISTED_BY: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAM_BLOCK: tl.constexpr,
):
    num_groups, total = _list_groups(
        offsets_ptr, lens_ptr, starts_ptr, groups_ptr, cost_offsets_ptr, num_requests, num_rows, num_keys, max_groups,
        request_steps, ROWS_PER_GROUP, TILE, COSTS, LISTED_BY, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()  # the groups are read by other threads than wrote them
    for first in range(0, num_programs + 1, PROGRAM_BLOCK):
        _share_out(
            groups_ptr, cost_offsets_ptr, programs_ptr, first + tl.arange(0, PROGRAM_BLOCK), num_groups, total,
            num_programs, group_steps, table_ptr, table_row_stride, num_requests, max_pages, COSTS, ROWS_PER_GROUP,
            HAS_TABLE,
        )  # fmt: skip


def allocate_schedule(
    device: torch.device,
    *,
    max_groups: int,
    rows_per_group: int,
    num_programs: int,
    tile_costs: tuple[int, ...] = TILE_COSTS,
) -> WorkSchedule:
    """An unfilled work list for any batch of these sizes; see :class:`WorkSchedule` for the sizes."""
    assert len(tile_costs) >= rows_per_group, "a group of any size needs the cost of its tiles"
    return WorkSchedule(
        programs=torch.empty(num_programs + 1, RECORD, dtype=torch.int32, device=device),
        groups=torch.empty(max(max_groups, 1), GROUP_RECORD, dtype=torch.int32, device=device),
        rows_per_group=rows_per_group,
        num_programs=num_programs,
        tile_costs=tile_costs,
    )


def describe_fill(
    schedule: WorkSchedule,
    *,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    max_context: int,
    tile: int,
    row_starts: torch.Tensor | None = None,
    has_one_group_each: bool = False,
    page_table: torch.Tensor | None = None,
) -> tuple[Launch, ...]:
    """The launches that fill ``schedule`` for a batch, in order: one.

    Args:
        schedule: from :func:`allocate_schedule`, for this batch's sizes.
        query_offsets: int32 ``[B + 1]``; not read with ``row_starts``.
        visible_lens: int32 ``[R]``; with ``row_starts`` one past the last key each row sees.
        max_context: columns of the logits, or keys there are; longer lengths count as this.
        tile: tokens of one tile.
        row_starts: int32 ``[R]``, the first of the contiguous keys each row sees. Groups then begin every
            ``rows_per_group`` rows and wherever the start jumps by more than 256, and their tiles at their least start.
        has_one_group_each: whether no request has more rows than a group; its rows beyond that are not scored.
        page_table: int32 ``[B, P]`` of pages as long as a tile, to note the first page of each share; else none is.
    """
    max_groups = schedule.groups.shape[0]
    num_requests, num_rows = query_offsets.shape[0] - 1, visible_lens.shape[0]
    listed_by = "span" if row_starts is not None else "request" if has_one_group_each else "row"
    block, program_block, num_warps = _BLOCKS[(num_requests if has_one_group_each else num_rows) <= _FEW]
    fill = Launch(
        function=_fill_schedule_kernel,
        arguments={
            "offsets_ptr": query_offsets,
            "lens_ptr": visible_lens,
            "starts_ptr": visible_lens if row_starts is None else row_starts,
            "groups_ptr": schedule.groups,
            "cost_offsets_ptr": torch.empty(max_groups, dtype=torch.int64, device=visible_lens.device),
            "programs_ptr": schedule.programs,
            "table_ptr": visible_lens if page_table is None else page_table,
            "table_row_stride": 0 if page_table is None else page_table.stride(0),
            "max_pages": 0 if page_table is None else page_table.shape[1],
            "num_requests": num_requests,
            "num_rows": num_rows,
            "num_keys": max_context,
            "max_groups": max_groups,
            "num_programs": schedule.num_programs,
            "request_steps": num_requests.bit_length(),
            "group_steps": max_groups.bit_length(),
            "ROWS_PER_GROUP": schedule.rows_per_group,
            "TILE": tile,
            "COSTS": schedule.tile_costs,
            "LISTED_BY": listed_by,
            "HAS_TABLE": page_table is not None,
            "BLOCK": block,
            "PROGRAM_BLOCK": program_block,
        },
        grid=(1,),
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )
    return (fill,)
