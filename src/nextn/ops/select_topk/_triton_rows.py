"""What every kernel does with a row, whatever it found before: device functions in Triton.

Hides how a call's tensors reach a kernel, the exact search over what registers hold or over a whole row block by block,
how what it selects is written, and what becomes of rows that need no search.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nextn.ops.select_topk._triton_search import (
    BEST_KEY,
    WORST_KEY,
    count_block,
    drop_surplus,
    find_bin,
    first_of,
    keys_of,
    load_block,
    shift_for,
    stage_block,
)
from nextn.ops.select_topk._triton_shared import no_counts, read_staged
from nextn.ops.select_topk.problem import SelectTopkProblem

_INT32_MAX = tl.constexpr(0x7FFFFFFF)
_MAX_PASSES = tl.constexpr(8)  # five are enough; bounds the loop whatever other programs leave in memory


def describe_tensors(
    problem: SelectTopkProblem,
    *,
    logits: torch.Tensor,
    visible_lens: torch.Tensor,
    query_offsets: torch.Tensor | None,
    page_table: torch.Tensor | None,
    out: torch.Tensor,
) -> dict[str, Any]:
    """A call's tensors and sizes as every kernel names them."""
    return {
        "logits_ptr": logits,
        "visible_lens_ptr": visible_lens,
        "offsets_ptr": visible_lens if query_offsets is None else query_offsets,
        "table_ptr": visible_lens if page_table is None else page_table,
        "out_ptr": out,
        "num_requests": 0 if page_table is None else page_table.shape[0],
        "max_len": problem.visible_columns,
        "stride_logits": logits.stride(0),
        "stride_table": 0 if page_table is None else page_table.stride(0),
        "stride_out": out.stride(0),
        "TOPK": problem.topk,
        "PAGE_SIZE": problem.page_size,
        "RETURNS_SLOTS": problem.returns_slots,
        "ALIGNED": problem.has_aligned_fours(logits),
    }


@triton.jit
def slots_of(positions, mask, table_row, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr):
    """Positions, or their cache slots."""
    if RETURNS_SLOTS:
        pages = tl.load(table_row + positions // PAGE_SIZE, mask=mask, other=-1)
        return slots_on(pages, positions, PAGE_SIZE)
    else:
        return positions


@triton.jit
def slots_on(pages, positions, PAGE_SIZE: tl.constexpr):
    """Cache slots of positions on pages; -1 for a page that is none, or whose slots exceed 32 bits."""
    if PAGE_SIZE & (PAGE_SIZE - 1) == 0:
        is_page = pages.to(tl.uint32, bitcast=True) < (1 << 31) // PAGE_SIZE
        return tl.where(is_page, pages * PAGE_SIZE + (positions & (PAGE_SIZE - 1)), -1)
    pages = pages.to(tl.int64)
    slots = pages * PAGE_SIZE + positions % PAGE_SIZE
    return tl.where((pages >= 0) & (slots <= _INT32_MAX), slots, -1).to(tl.int32)


@triton.jit
def write_short_row(
    out, visible_len, table_row, TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every position of a row that sees at most TOPK, then -1."""
    for start in tl.static_range(0, TOPK, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        slots = slots_of(columns, columns < visible_len, table_row, PAGE_SIZE, RETURNS_SLOTS)
        tl.store(out + columns, tl.where(columns < visible_len, slots, -1), mask=columns < TOPK)


@triton.jit
def find_request(offsets_ptr, row, num_requests, BLOCK: tl.constexpr):
    """The request of a row: how many requests end at or before it, in one load for up to BLOCK requests."""
    num_ended = tl.zeros((), tl.int32)
    for start in range(0, num_requests, BLOCK):
        requests = start + tl.arange(0, BLOCK)
        ends = tl.load(offsets_ptr + 1 + requests, mask=requests < num_requests, other=_INT32_MAX)
        num_ended += tl.sum((ends <= row).to(tl.int32))
    return tl.minimum(num_ended, num_requests - 1)


@triton.jit
def search_and_write(
    logits, values, places, n, live_tiles, num_blocks, low, high, out, table_row, space, pairs, from_lists,
    TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr, BY_PTX: tl.constexpr,
    ALIGNED: tl.constexpr, IS_LONG: tl.constexpr, LOG_BINS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Write the TOPK best of what is in registers, or of ``num_blocks`` blocks of the row if that is more than 1."""
    THREADS: tl.constexpr = WARPS * 32
    keys = keys_of(values, 4 * TILES)
    low, high, num_equal = _search(
        logits, keys, n, live_tiles, num_blocks, low, high, space, TOPK, BY_PTX, ALIGNED, IS_LONG, LOG_BINS, TILES,
        WARPS,
    )  # fmt: skip
    num_staged = n * 0
    for block in range(num_blocks):
        if IS_LONG:  # noqa: SIM102 - compiled away or not
            if num_blocks > 1:
                keys, live_tiles = _load_keys(logits, n, block, ALIGNED, TILES, WARPS, BY_PTX)
                places = first_places(block * (TILES * WARPS * 128), live_tiles, TILES, WARPS)
        if num_equal >= 0:
            keys, num_met = drop_surplus(keys, low, num_equal, live_tiles, TILES, WARPS)
            num_equal = tl.maximum(num_equal - num_met, 0)
        num_staged = stage_block(space, out, keys, places, high, num_staged, live_tiles, TILES, WARPS, BY_PTX)
    tl.debug_barrier()
    for first in tl.static_range(0, TOPK, THREADS):
        rank = first + tl.arange(0, THREADS)
        position = read_staged(space, out, rank, rank < TOPK, BY_PTX)
        if IS_LONG:  # noqa: SIM102 - compiled away or not
            if from_lists:
                position = tl.load(pairs + 2 * position + 1, mask=rank < TOPK, other=0)
        slots = slots_of(position, rank < TOPK, table_row, PAGE_SIZE, RETURNS_SLOTS)
        tl.store(out + rank, slots, mask=rank < TOPK)


@triton.jit
def first_places(base, live_tiles, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Position of the first of each thread's four logits of every tile of the block that begins at ``base``."""
    places = ()
    for tile in tl.static_range(TILES):
        places = places + (first_of(tile, live_tiles, WARPS) + base,)  # noqa: RUF005
    return places


@triton.jit
def _load_keys(logits, n, block, ALIGNED: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, BY_PTX: tl.constexpr):
    """The keys of one block of a row, and the tiles they take."""
    CAPACITY: tl.constexpr = TILES * WARPS * 128
    block_len = tl.minimum(n - block * CAPACITY, CAPACITY)
    live_tiles = tl.cdiv(block_len, WARPS * 128)
    values = load_block(logits + block * CAPACITY, block_len, live_tiles, ALIGNED, TILES, WARPS, BY_PTX)
    return keys_of(values, 4 * TILES), live_tiles


@triton.jit
def _search(
    logits, keys, n, live_tiles, num_blocks, low, high, space, TOPK: tl.constexpr, BY_PTX: tl.constexpr,
    ALIGNED: tl.constexpr, IS_LONG: tl.constexpr, LOG_BINS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The last key that passes, as ``high``.

    Returns:
        low: if not all keys equal to ``high`` pass, the same key.
        high: see above.
        num_equal: how many keys equal to it pass, the first ones; -1 if all do.
    """
    want = n * 0 + TOPK
    num_equal = n * 0
    num_passes = n * 0
    searching = n > 0
    while searching:
        width = (high - low).to(tl.uint32, bitcast=True)
        shift = shift_for(width, LOG_BINS)
        counts = no_counts(space, 1 << LOG_BINS, BY_PTX)
        below = tl.zeros((WARPS, 32), tl.int32)
        for block in range(num_blocks):
            if IS_LONG:  # noqa: SIM102 - compiled away or not
                if num_blocks > 1:
                    keys, live_tiles = _load_keys(logits, n, block, ALIGNED, TILES, WARPS, BY_PTX)
            counts, below = count_block(counts, below, keys, live_tiles, low, width, shift, LOG_BINS, TILES, BY_PTX)
        num_above, found, bin_index, num_before, is_whole = find_bin(
            counts, below, space, want, LOG_BINS, WARPS * 32, BY_PTX
        )
        if found:
            offset = bin_index << shift
            span = tl.minimum(((1 << shift) - 1).to(tl.uint32), width - offset.to(tl.uint32))
            low += offset
            high = low + span.to(tl.int32)
            num_equal = tl.where(is_whole > 0, -1, want - num_above - num_before)
            searching = (is_whole == 0) & (shift > 0)
        elif num_above >= want:
            high = low - 1
            low = n * 0 + BEST_KEY
        else:
            low = high + 1
            high = n * 0 + WORST_KEY
        num_passes += 1
        searching = searching & (num_passes < _MAX_PASSES)
    return low, high, num_equal
