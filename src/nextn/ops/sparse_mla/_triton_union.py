"""Device code that finds what the slot lists of several rows share, so that a slot is listed once, with a bit per row.

Hides how equal slots find each other: the least of those that meet in a hash table's cell wins it, in any order.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _hash(slots, LOG_BUCKETS: tl.constexpr, WHICH: tl.constexpr):
    """Buckets of slots in one of two tables; a bucket and the bits above LOG_BUCKETS name one slot."""
    MASK: tl.constexpr = (1 << LOG_BUCKETS) - 1
    if WHICH == 0:
        return slots & MASK
    return ((slots ^ ((slots >> LOG_BUCKETS) * 0x9E5)) & MASK) + (1 << LOG_BUCKETS)


@triton.jit
def _load_entries(
    indices_ptr, age_ptr, list_id, token, indices_stride, num_rows, topk, num_slots,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, TOPK_BLOCK: tl.constexpr, LOG_TOPK: tl.constexpr,
    LOG_BUCKETS: tl.constexpr,
):  # fmt: skip
    """Slots of one row, which of them count, and what each bids for a cell: [TOPK_BLOCK] each.

    Of two bids the later launch's is the lesser, so that what earlier launches left need not be cleared; of one launch,
    the lesser slot's; of one slot, its first mention's.
    """
    SUBGROUPS: tl.constexpr = (DEPTH + TOKENS - 1) // TOKENS
    first_row = (list_id // SUBGROUPS) * DEPTH + (list_id % SUBGROUPS) * TOKENS
    row = first_row + token
    length = tl.where(row < tl.minimum((list_id // SUBGROUPS + 1) * DEPTH, num_rows), topk, 0)
    place = tl.arange(0, TOPK_BLOCK)
    slots = tl.load(
        indices_ptr + row.to(tl.int64) * indices_stride + place,
        mask=place < length,
        other=-1,
    )
    valid = (slots >= 0) & (slots < num_slots)
    slots = tl.where(valid, slots, 0)
    bids = ((slots >> LOG_BUCKETS) << LOG_TOPK) | place
    return slots, valid, bids.to(tl.int64) - (tl.load(age_ptr).to(tl.int64) << 32)


@triton.jit
def _bid_kernel(
    indices_ptr, age_ptr, cells_ptr, indices_stride, num_rows, topk, num_slots,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, TOKEN_BLOCK: tl.constexpr, TOPK_BLOCK: tl.constexpr,
    LOG_TOPK: tl.constexpr, LOG_BUCKETS: tl.constexpr,
):  # fmt: skip
    """Each of a row's slots bids for the row's cell of its bucket in two tables."""
    list_id, token = tl.program_id(0), tl.program_id(1)
    slots, valid, bids = _load_entries(
        indices_ptr, age_ptr, list_id, token, indices_stride, num_rows, topk, num_slots,
        TOKENS, DEPTH, TOPK_BLOCK, LOG_TOPK, LOG_BUCKETS,
    )  # fmt: skip
    cells = cells_ptr + list_id.to(tl.int64) * (2 * TOKEN_BLOCK << LOG_BUCKETS) + token
    tl.atomic_min(
        cells + _hash(slots, LOG_BUCKETS, 0) * TOKEN_BLOCK,
        bids,
        mask=valid,
        sem="relaxed",
    )
    tl.atomic_min(
        cells + _hash(slots, LOG_BUCKETS, 1) * TOKEN_BLOCK,
        bids,
        mask=valid,
        sem="relaxed",
    )


@triton.jit
def _find_equals(cells, bids, token, valid, TOKEN_BLOCK: tl.constexpr, LOG_TOPK: tl.constexpr):
    """Bits of the tokens whose cell names the same slot, and whether the row's own cell holds this very entry."""
    tokens = tl.arange(0, TOKEN_BLOCK)
    winners = tl.load(cells[:, None] + tokens[None, :], mask=valid[:, None], other=0)  # [TOPK_BLOCK, TOKEN_BLOCK]
    is_equal = (winners >> LOG_TOPK) == (bids >> LOG_TOPK)[:, None]
    equals = tl.sum(tl.where(is_equal, 1 << tokens[None, :], 0), axis=1)
    is_own = (winners == bids[:, None]) & (tokens == token)[None, :]
    return equals, valid & (tl.sum(is_own.to(tl.int32), axis=1) != 0)


@triton.jit
def _list_kernel(
    indices_ptr, age_ptr, cells_ptr, slots_ptr, masks_ptr, counts_ptr, indices_stride, num_rows, topk, num_slots,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, TOKEN_BLOCK: tl.constexpr, TOPK_BLOCK: tl.constexpr,
    LOG_TOPK: tl.constexpr, LOG_BUCKETS: tl.constexpr,
):  # fmt: skip
    """List the slots of one row that no earlier row of its list names, in their order.

    A slot is shared by the rows whose cells in one bucket it won, and listed by the first of them. What won neither
    of its two cells, a second mention of a slot included, is listed alone.
    """
    list_id, token = tl.program_id(0), tl.program_id(1)
    slots, valid, bids = _load_entries(
        indices_ptr, age_ptr, list_id, token, indices_stride, num_rows, topk, num_slots,
        TOKENS, DEPTH, TOPK_BLOCK, LOG_TOPK, LOG_BUCKETS,
    )  # fmt: skip
    cells = cells_ptr + list_id.to(tl.int64) * (2 * TOKEN_BLOCK << LOG_BUCKETS)
    first_cells = cells + _hash(slots, LOG_BUCKETS, 0) * TOKEN_BLOCK
    equals, has_won = _find_equals(first_cells, bids, token, valid, TOKEN_BLOCK, LOG_TOPK)
    second_cells = cells + _hash(slots, LOG_BUCKETS, 1) * TOKEN_BLOCK
    lost = valid & (has_won == 0)
    late_equals, has_won_late = _find_equals(second_cells, bids, token, lost, TOKEN_BLOCK, LOG_TOPK)
    sharers = tl.where(has_won, equals, tl.where(has_won_late, late_equals & ~equals, 1 << token))
    is_listed = valid & ((sharers & ((1 << token) - 1)) == 0)
    rank = tl.cumsum(is_listed.to(tl.int32), 0)
    part = list_id.to(tl.int64) * TOKENS + token
    target = part * topk + rank - 1
    tl.store(slots_ptr + target, slots, mask=is_listed)
    tl.store(masks_ptr + target, sharers, mask=is_listed)
    tl.store(counts_ptr + part, tl.max(rank, 0))


@triton.jit
def _locate_tile(tile, counts_ptr, topk, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Where in a list a tile begins and its part ends; a list has a part per row, cut into tiles on its own."""
    start, stop, first_tile = tile * 0, tile * 0, tile * 0
    for token in tl.static_range(TOKENS):
        count = tl.load(counts_ptr + token)
        stop_tile = first_tile + tl.cdiv(count, TILE)
        is_here = (tile >= first_tile) & (tile < stop_tile)
        start = tl.where(is_here, token * topk + (tile - first_tile) * TILE, start)
        stop = tl.where(is_here, token * topk + count, stop)
        first_tile = stop_tile
    return start, stop
