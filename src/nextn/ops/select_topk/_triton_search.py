"""Exact selection by counting in bins: device functions in Triton.

Hides how logits become keys, how the bin of the k-th best is found, and how what is selected gets its place.

A key is an int32 that descends as logits do: -0.0 and +0.0 share one, NaN has the greatest but one. A sample gives a
range of keys in which the k-th lies almost surely; the few logits in it are counted in up to 4096 equal bins, and a
prefix sum names the k-th's bin. If all of that bin passes the search is over, which finer bins than candidates make
likely; else the bin becomes the range. A range that misses is replaced by the side it missed, so that a row of any
values takes at most five passes.

Registers hold ``TILES`` x 4 tensors ``[WARPS, 32]``: element (warp, lane) of tensor ``4 * tile + e`` is position
``warp * live_tiles * 128 + tile * 128 + lane * 4 + e``, so that a warp owns a contiguous range and reads 512 bytes at
once.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from nextn.ops.select_topk._triton_shared import (
    add_to_total,
    count_before,
    count_bin,
    count_tile,
    find_counter,
    load4,
    no_counts,
    read_found,
    read_total,
    stage_tile,
)

BEST_KEY = tl.constexpr(-0x80000000)
WORST_KEY = tl.constexpr(0x7FFFFFFF)
_KEY_OF_NAN = tl.constexpr(0x7FFFFFFE)


@triton.jit
def key_of(value):
    """The key of a float32."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is +0.0
    key = bits ^ (~(bits >> 31) | -0x80000000)  # all bits of a positive float are inverted, the sign of others
    return tl.where(value == value, key, _KEY_OF_NAN)


@triton.jit
def value_of(key):
    """The float32 of a key; NaN for one beyond minus infinity."""
    return (key ^ tl.where(key < 0, -1, -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(values, COUNT: tl.constexpr):
    """The keys of a tuple of tensors."""
    keys = ()
    for i in tl.static_range(COUNT):
        keys = keys + (key_of(values[i]),)  # noqa: RUF005
    return keys


@triton.jit
def first_of(tile, live_tiles, WARPS: tl.constexpr):
    """Position of the first of each thread's four elements of a tile, ``[WARPS, 32]``."""
    return tl.arange(0, WARPS)[:, None] * (live_tiles * 128) + tile * 128 + tl.arange(0, 32)[None, :] * 4


@triton.jit
def load_block(
    source, n, live_tiles, ALIGNED: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, BY_PTX: tl.constexpr
):
    """``n`` floats from ``source``, NaN past the end."""
    values = ()
    for tile in tl.static_range(TILES):
        bound = n if tile == 0 else tl.where(tile < live_tiles, n, 0)
        first = first_of(tile, live_tiles, WARPS)
        values = values + load4(source + first, first, bound, ALIGNED, BY_PTX)
    if n % 4 != 0:  # apart from the loads, which else would wait for each other
        values = _blank(values, n, live_tiles, TILES, WARPS)
    return values


@triton.jit
def _blank(values, n, live_tiles, TILES: tl.constexpr, WARPS: tl.constexpr):
    """The values, NaN from position ``n`` on."""
    blanked = ()
    for tile in tl.static_range(TILES):
        first = first_of(tile, live_tiles, WARPS)
        for e in tl.static_range(4):
            blanked = blanked + (tl.where(first + e < n, values[4 * tile + e], float("nan")),)  # noqa: RUF005
    return blanked


@triton.jit
def sample_block(
    counts, values, n, live_tiles, LOG_BINS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    BY_PTX: tl.constexpr,
):  # fmt: skip
    """Count every fourth of a block's ``n`` logits by their keys' upper bits; returns the counters."""
    for tile in tl.static_range(TILES):
        if tile < live_tiles:
            in_row = first_of(tile, live_tiles, WARPS) < n
            counts = count_sample(counts, key_of(values[4 * tile]), in_row, LOG_BINS, BY_PTX)
    return counts


@triton.jit
def load_samples(row, n, SAMPLES: tl.constexpr, WARPS: tl.constexpr):
    """SAMPLES of a row's ``n`` logits, spread over it irregularly."""
    stride = n // SAMPLES
    rest = n % SAMPLES
    samples = ()
    for start in tl.static_range(0, SAMPLES, WARPS * 32):
        number = start + tl.arange(0, WARPS)[:, None] * 32 + tl.arange(0, 32)[None, :]
        scrambled = (number * -1640531527) & 0x7FFFFFFF
        shift = ((scrambled.to(tl.int64) * stride) >> 31).to(tl.int32)
        position = number * stride + number * rest // SAMPLES + shift
        samples = samples + (tl.load(row + position, mask=position < n, other=float("nan")),)  # noqa: RUF005
    return samples


@triton.jit
def count_samples(
    counts, samples, LOG_BINS: tl.constexpr, SAMPLES: tl.constexpr, WARPS: tl.constexpr, BY_PTX: tl.constexpr
):
    """Count samples by their keys' upper bits; returns the counters."""
    for i in tl.static_range(SAMPLES // (WARPS * 32)):
        counts = count_sample(counts, key_of(samples[i]), samples[i] == samples[i], LOG_BINS, BY_PTX)
    return counts


@triton.jit
def refine(
    samples, space, low, rank, LOG_BINS: tl.constexpr, SAMPLES: tl.constexpr, WARPS: tl.constexpr,
    BY_PTX: tl.constexpr,
):  # fmt: skip
    """The last key of the finer bin that holds the ``rank``-th of the samples in the bin that begins at ``low``."""
    SHIFT: tl.constexpr = 32 - LOG_BINS
    FINER: tl.constexpr = SHIFT - LOG_BINS if SHIFT > LOG_BINS else 0
    counts = no_counts(space, 1 << LOG_BINS, BY_PTX)
    for i in tl.static_range(SAMPLES // (WARPS * 32)):
        key = key_of(samples[i])
        in_bin = ((key >> SHIFT) == (low >> SHIFT)) & (samples[i] == samples[i])
        counts = count_bin(counts, (key & ((1 << SHIFT) - 1)) >> FINER, in_bin, 1 << LOG_BINS, BY_PTX)
    tl.debug_barrier()
    drained, before = count_before(counts, space, 1 << LOG_BINS, WARPS * 32, BY_PTX)
    code = find_counter(space, drained, before, rank, 0, 1 << LOG_BINS, WARPS * 32, BY_PTX)
    tl.debug_barrier()
    return low + ((((read_found(space, code, 0, BY_PTX) & 0xFFF) + 1) << FINER) - 1)


@triton.jit
def count_sample(counts, keys, mask, LOG_BINS: tl.constexpr, BY_PTX: tl.constexpr):
    bins = (keys >> (32 - LOG_BINS)) + (1 << (LOG_BINS - 1))
    return count_bin(counts, bins, mask, 1 << LOG_BINS, BY_PTX)


@triton.jit
def bracket(
    counts, space, num_samples, n, want, FINDS_CROWDS: tl.constexpr, LOG_BINS: tl.constexpr, THREADS: tl.constexpr,
    BY_PTX: tl.constexpr,
):  # fmt: skip
    """Keys between which the ``want``-th best of ``n`` almost surely lies, from a sample that is counted.

    Returns:
        best: the better end, which fails once in 700 rows; that costs no more than a pass.
        worst: the worse end, which fails once in 30 000 rows.
        rank_in_bin: if the bin that ``worst`` ends holds half as many samples again, the rank in it that is meant; else
            0. Bins are fractions of a power of 2, so that logits far from 0 lie in few of them.
    """
    share = want.to(tl.float32) / n.to(tl.float32)
    expected = share * num_samples.to(tl.float32)
    deviation = tl.sqrt(expected * (1.0 - share))
    rank_best = (expected - 3.0 * deviation).to(tl.int32)
    rank_worst = (expected + 4.0 * deviation).to(tl.int32) + 2
    BINS: tl.constexpr = 1 << LOG_BINS
    tl.debug_barrier()
    drained, before = count_before(counts, space, BINS, THREADS, BY_PTX)
    best = find_counter(space, drained, before, rank_best, 0, BINS, THREADS, BY_PTX)
    worst = find_counter(space, drained, before, rank_worst, 1, BINS, THREADS, BY_PTX)
    wide = worst
    if FINDS_CROWDS:
        wide = find_counter(space, drained, before, rank_worst + rank_worst // 2 + 8, 2, BINS, THREADS, BY_PTX)
    tl.debug_barrier()
    best = read_found(space, best, 0, BY_PTX)
    worst = read_found(space, worst, 1, BY_PTX)
    rank_in_bin = rank_worst * 0
    if FINDS_CROWDS:
        is_crowded = (worst > 0) & ((read_found(space, wide, 2, BY_PTX) & 0xFFF) == (worst & 0xFFF))
        rank_in_bin = tl.where(is_crowded, rank_worst - ((worst >> 12) & 0xFFF), 0)
    SHIFT: tl.constexpr = 32 - LOG_BINS
    first_best = ((best & 0xFFF) - (BINS >> 1)) << SHIFT
    last_worst = (((worst & 0xFFF) - (BINS >> 1)) << SHIFT) + ((1 << SHIFT) - 1)
    return tl.where(best > 0, first_best, BEST_KEY), tl.where(worst > 0, last_worst, WORST_KEY), rank_in_bin


@triton.jit
def count_block(
    counts, below, keys, live_tiles, low, width, shift, LOG_BINS: tl.constexpr, TILES: tl.constexpr,
    BY_PTX: tl.constexpr,
):  # fmt: skip
    """Count a block's keys from ``low`` to ``low + width`` in bins of ``2 ** shift``, and per thread those below."""
    for tile in tl.static_range(TILES):
        if tile < live_tiles:
            counts, below = count_tile(
                counts, below, keys[4 * tile], keys[4 * tile + 1], keys[4 * tile + 2], keys[4 * tile + 3],
                low, width, shift, 1 << LOG_BINS, BY_PTX,
            )  # fmt: skip
    return counts, below


@triton.jit
def find_bin(counts, below, space, want, LOG_BINS: tl.constexpr, THREADS: tl.constexpr, BY_PTX: tl.constexpr):
    """The bin that holds the ``want``-th best.

    Returns:
        num_above: keys before the first bin.
        found: whether any bin holds it.
        bin_index: that bin.
        num_before: keys in the bins before it.
        is_whole: whether it is the last of its bin.
    """
    BINS: tl.constexpr = 1 << LOG_BINS
    add_to_total(space, below, BY_PTX)
    tl.debug_barrier()
    num_above = read_total(space, below, BY_PTX)
    drained, before = count_before(counts, space, BINS, THREADS, BY_PTX)
    code = find_counter(space, drained, before, want - num_above, 0, BINS, THREADS, BY_PTX)
    tl.debug_barrier()
    code = read_found(space, code, 0, BY_PTX)
    return num_above, code > 0, code & 0xFFF, (code >> 12) & 0xFFF, (code >> 24) & 1


@triton.jit
def shift_for(width, LOG_BINS: tl.constexpr):
    """The least shift that leaves ``width``, uint32, below ``2 ** LOG_BINS``; or one more."""
    exponent = (width.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.maximum(exponent - (LOG_BINS - 1), 0)


@triton.jit
def rank_block(numbers, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Ranks, in order of position, of what each thread has in every tile, 0 to 4 each; and how many there are."""
    ranks = ()
    num_before = tl.zeros((WARPS,), tl.int32)
    for first in tl.static_range(0, TILES, 4):
        # A warp has at most 128 in a tile, so four tiles' counters share one int32.
        packed = tl.zeros((WARPS, 32), tl.int32)
        for tile in tl.static_range(first, min(first + 4, TILES)):
            packed += numbers[tile] << (8 * (tile - first))
        earlier = tl.cumsum(packed, axis=1) - packed
        totals = tl.sum(packed, axis=1)
        for tile in tl.static_range(first, min(first + 4, TILES)):
            rank = num_before[:, None] + ((earlier >> (8 * (tile - first))) & 0xFF)
            ranks = ranks + (rank,)  # noqa: RUF005
            num_before += (totals >> (8 * (tile - first))) & 0xFF
    base = (tl.cumsum(num_before, axis=0) - num_before)[:, None]
    placed = ()
    for tile in tl.static_range(TILES):
        placed = placed + (ranks[tile] + base,)  # noqa: RUF005
    return placed, tl.sum(num_before, axis=0)


@triton.jit
def _count_between(keys, first, last, live_tiles, TILES: tl.constexpr, WARPS: tl.constexpr):
    """How many keys from ``first`` to ``last`` each thread has in every tile."""
    numbers = ()
    for tile in tl.static_range(TILES):
        number = tl.zeros((WARPS, 32), tl.int32)
        if tile < live_tiles:
            for e in tl.static_range(4):
                number += ((keys[4 * tile + e] >= first) & (keys[4 * tile + e] <= last)).to(tl.int32)
        numbers = numbers + (number,)  # noqa: RUF005
    return numbers


@triton.jit
def drop_surplus(keys, equal, num_kept, live_tiles, TILES: tl.constexpr, WARPS: tl.constexpr):
    """Make the key ``equal`` the worst from its ``num_kept``-th occurrence on; returns the keys and the occurrences."""
    ranks, num_equal = rank_block(_count_between(keys, equal, equal, live_tiles, TILES, WARPS), TILES, WARPS)
    kept = ()
    for tile in tl.static_range(TILES):
        rank = ranks[tile]
        for e in tl.static_range(4):
            is_equal = keys[4 * tile + e] == equal
            kept = kept + (tl.where(is_equal & (rank >= num_kept), WORST_KEY, keys[4 * tile + e]),)  # noqa: RUF005
            rank += is_equal.to(tl.int32)
    return kept, num_equal


@triton.jit
def stage_block(
    space, out, keys, places, last, num_staged, live_tiles, TILES: tl.constexpr, WARPS: tl.constexpr,
    BY_PTX: tl.constexpr,
):  # fmt: skip
    """Stage the places of all keys up to ``last``; returns how many are staged in all.

    Args:
        places: the place of the first of each thread's four keys of a tile; the others follow.
    """
    numbers = _count_between(keys, BEST_KEY, last, live_tiles, TILES, WARPS)
    ranks, num_selected = rank_block(numbers, TILES, WARPS)
    for tile in tl.static_range(TILES):
        if tile < live_tiles:
            stage_tile(
                space, out, num_staged + ranks[tile],
                keys[4 * tile], keys[4 * tile + 1], keys[4 * tile + 2], keys[4 * tile + 3],
                last, places[tile], BY_PTX,
            )  # fmt: skip
    return num_staged + num_selected
