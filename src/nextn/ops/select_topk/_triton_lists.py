"""Lists of the logits of a long row that may be among its best: device functions in Triton.

Hides how programs share a row: each lists what reaches a bound in its part, in order of position, as pairs of logit and
position; the last to arrive reads all lists as if they were one.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from nextn.ops.select_topk._triton_search import first_of, load_block, rank_block
from nextn.ops.select_topk._triton_shared import count_reaching, list_tile, load_listed

_NAN_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def keep(
    values, logits, start, end, bound, pairs, BY_PTX: tl.constexpr, ALIGNED: tl.constexpr, LIST_LEN: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """List the logits from ``start`` to ``end`` that reach ``bound``; returns how many do.

    All are listed if they are at most ``LIST_LEN - 4``. ``values`` is the first block. The list is filled up to a
    multiple of 4 with NaN.
    """
    CAPACITY: tl.constexpr = TILES * WARPS * 128
    num_listed = start * 0
    while start < end:
        live_tiles = tl.cdiv(tl.minimum(end - start, CAPACITY), WARPS * 128)
        numbers = ()
        for tile in tl.static_range(TILES):
            number = count_reaching(
                values[4 * tile], values[4 * tile + 1], values[4 * tile + 2], values[4 * tile + 3], bound, BY_PTX
            )
            numbers = numbers + (number,)  # noqa: RUF005
        ranks, num_passing = rank_block(numbers, TILES, WARPS)
        for tile in tl.static_range(TILES):
            if tile < live_tiles:
                rank = num_listed + ranks[tile]
                list_tile(
                    pairs, rank,
                    values[4 * tile], values[4 * tile + 1], values[4 * tile + 2], values[4 * tile + 3],
                    tl.where(rank <= LIST_LEN - 4, bound, float("nan")), start + first_of(tile, live_tiles, WARPS),
                    BY_PTX,
                )  # fmt: skip
        num_listed += num_passing
        start += CAPACITY
        if start < end:
            block_len = tl.minimum(end - start, CAPACITY)
            live_tiles = tl.cdiv(block_len, WARPS * 128)
            values = load_block(logits + start, block_len, live_tiles, ALIGNED, TILES, WARPS, BY_PTX)
    rest = num_listed + tl.arange(0, 4)
    tl.store(pairs + 2 * rest, _NAN_BITS, mask=(rest < tl.cdiv(num_listed, 4) * 4) & (rest < LIST_LEN))
    return num_listed


@triton.jit
def arrive(counts_ptr, arrivals_ptr, part, num_listed, num_parts, PARTS: tl.constexpr):
    """Publish a part's list; True for the last of the row, which also zeroes the counter for the next launch."""
    is_last = num_parts > 0
    if PARTS > 1:
        tl.store(counts_ptr + part, num_listed)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == num_parts - 1
        if is_last:
            tl.store(arrivals_ptr, 0)
    else:
        tl.debug_barrier()
    return is_last


@triton.jit
def read_sizes(
    counts_ptr, num_listed, num_parts, TOPK: tl.constexpr, CAPACITY: tl.constexpr, LIST_LEN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Sizes of the parts' lists, each filled up to a multiple of 4, and whether together they hold the best."""
    sizes = ()
    num_real = num_listed * 0
    num_filled = num_listed * 0
    is_complete = num_parts > 0
    for part in tl.static_range(PARTS):
        if PARTS > 1:
            count = tl.load(counts_ptr + part, mask=part < num_parts, other=0, cache_modifier=".cg")
        else:
            count = num_listed
        is_complete = is_complete & (count <= LIST_LEN - 4)
        num_real += count
        size = (count + 3) // 4 * 4
        num_filled += size
        sizes = sizes + (size,)  # noqa: RUF005
    return sizes, is_complete & (num_real >= TOPK) & (num_filled <= CAPACITY)


@triton.jit
def in_lists(index, sizes, LIST_LEN: tl.constexpr, PARTS: tl.constexpr):
    """Where pair ``index`` of all lists together is, the lists being LIST_LEN apart."""
    place = index
    end = sizes[0] * 0
    for part in tl.static_range(PARTS - 1):
        end += sizes[part]
        place += tl.where(index >= end, LIST_LEN - sizes[part], 0)
    return place


@triton.jit
def load_lists(
    pairs, sizes, LIST_LEN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    BY_PTX: tl.constexpr,
):  # fmt: skip
    """The logits of all lists together, the pairs that each thread's fours begin with, and the tiles they take."""
    num_listed = sizes[0]
    for part in tl.static_range(1, PARTS):
        num_listed += sizes[part]
    live_tiles = tl.cdiv(num_listed, WARPS * 128)
    values = ()
    places = ()
    for tile in tl.static_range(TILES):
        first = first_of(tile, live_tiles, WARPS)
        place = first
        if tile < live_tiles:
            place = in_lists(first, sizes, LIST_LEN, PARTS)
        bound = num_listed if tile == 0 else tl.where(tile < live_tiles, num_listed, 0)
        values = values + load_listed(pairs + 2 * place, first < bound, BY_PTX)
        places = places + (place,)  # noqa: RUF005
    return values, places, live_tiles
