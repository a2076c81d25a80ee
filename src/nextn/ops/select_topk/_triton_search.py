"""Search for the threshold that exactly k logits pass, on logits held in registers: device functions in Triton.

Hides how thresholds move and how selected logits get their places. Floats are never made into keys: comparing with a
float threshold already gives the contract's order (-0.0 equals +0.0, NaN passes nothing), and only thresholds move
through the integers that order floats. A counting pass costs two and a half instructions a logit and one reduction.

The search starts from the normal quantile of a sample, takes Newton steps, then interpolates inside the bracket with
bisections between, and stops as soon as exactly k logits pass: 6 to 8 passes on bell-shaped rows, some dozens on
hostile ones. What passes is the same whatever path the search took.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

KEY_OF_MINUS_INF = tl.constexpr(-0x7F800001)
_KEY_ABOVE_INF = tl.constexpr(0x7F800001)
_HUGE = tl.constexpr(1e15)  # squares of a whole sample stay finite


@triton.jit
def _key_to_float(key):
    """The float a key stands for; keys are int64 here and ascend as floats do."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _float_to_key(value):
    """The key of a float; -0.0 gets that of +0.0, which it equals."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(key == -1, 0, key)


@triton.jit
def tile_index(tile, live_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Places of a tile's logits in the block, ``[ROWS, COLUMNS]``: each row owns a contiguous range of the block."""
    rows = tl.arange(0, ROWS)[:, None]
    return rows * (live_tiles * COLUMNS) + tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_block(
    source, n, live_tiles, ALIGNED: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``n`` floats from ``source`` as tiles, NaN past the end."""
    # A bound that is a multiple of 4 keeps the loads 16 bytes wide; the up to three logits past n are blanked after.
    bound = (n + 3) // 4 * 4 if ALIGNED else n
    tiles = ()
    for tile in tl.static_range(TILES):
        index = tile_index(tile, live_tiles, ROWS, COLUMNS)
        tile_bound = bound if tile == 0 else tl.where(tile < live_tiles, bound, 0)
        values = tl.load(source + index, mask=index < tile_bound, other=float("nan"))
        if ALIGNED:  # noqa: SIM102 - compiled away or not; a runtime test is no part of that
            if bound != n:
                values = tl.where(index < n, values, float("nan"))
        tiles = tiles + (values,)  # noqa: RUF005
    return tiles


@triton.jit
def _count(tiles, live_tiles, threshold, TILES: tl.constexpr):
    """How many logits are at least ``threshold``."""
    passing = (tiles[0] >= threshold).to(tl.int32)
    for tile in tl.static_range(1, TILES):
        if tile < live_tiles:
            passing += (tiles[tile] >= threshold).to(tl.int32)
    return tl.sum(passing)


@triton.jit
def _snap(tiles, live_tiles, low, high, TILES: tl.constexpr):
    """The least logit from ``low`` up and the greatest one below ``high``."""
    least = tl.full(tiles[0].shape, float("inf"), tl.float32)
    greatest = tl.full(tiles[0].shape, float("-inf"), tl.float32)
    for tile in tl.static_range(TILES):
        if tile < live_tiles:
            reaching = tl.where(tiles[tile] >= low, tiles[tile], float("inf"))
            least = tl.minimum(least, reaching)
            greatest = tl.maximum(greatest, tl.where(reaching >= high, float("-inf"), reaching))
    return tl.min(least), tl.max(greatest)


@triton.jit
def _first_guess(sample, n, want):
    """A value that about ``want`` of ``n`` logits reach if they are normal, and the change of value per logit there.

    The quantile is formula 26.2.23 of Abramowitz and Stegun, good to 4.5e-4.
    """
    usable = tl.abs(sample) < _HUGE
    finite = tl.where(usable, sample, 0.0)
    num = tl.maximum(tl.sum(usable.to(tl.float32)), 1.0)
    mean = tl.sum(finite) / num
    deviation = tl.sqrt(tl.maximum(tl.sum(finite * finite) / num - mean * mean, 0.0))
    share = want.to(tl.float32) / n.to(tl.float32)
    tail = tl.minimum(share, 1.0 - share)
    t = tl.sqrt(-2.0 * tl.log(tail))
    quantile = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    density = 0.3989423 * tl.exp(-0.5 * quantile * quantile) * n.to(tl.float32)
    quantile = tl.where(share > 0.5, -quantile, quantile)
    return mean + deviation * quantile, deviation / density


@triton.jit
def search(tiles, live_tiles, n, want, floor, takes_all, TILES: tl.constexpr):
    """Where to cut so that the best ``want`` logits pass, or fewer if fewer reach ``floor`` and not ``takes_all``.

    Returns:
        upper: every logit of at least this passes.
        lower: logits from here up to ``upper`` are equals; the first ``num_equal`` of them pass.
        num_equal: see ``lower``.
        num_selected: how many pass in all.
        low: key of ``lower``; a later logit must be above it to matter.
        equals_are_rest: whether the equals are all logits below ``upper``, NaN among them.
    """
    low = floor
    high = tl.full((), _KEY_ABOVE_INF, tl.int64)
    num_low = _count(tiles, live_tiles, _key_to_float(floor), TILES)
    num_high = num_low * 0
    takes_rest = num_low <= want
    if num_low > want:
        guess, slope = _first_guess(tiles[0], n, want)
        weight_low = tl.full((), 1.0, tl.float32)
        weight_high = tl.full((), 1.0, tl.float32)
        step = num_low * 0
        last_side = num_low * 0
        while (high - low > 1) & (num_low != want):
            bisects = (step % 6 == 5) | ((step > 24) & (step % 2 == 1))
            if bisects & (step % 12 == 11):
                least, greatest = _snap(tiles, live_tiles, _key_to_float(low), _key_to_float(high), TILES)
                low = tl.maximum(low, _float_to_key(least))
                high = tl.minimum(high, _float_to_key(greatest) + 1)
            above = (num_low - want).to(tl.float32) * weight_low
            below = (want - num_high).to(tl.float32) * weight_high
            between = low + (above / (above + below) * (high - low).to(tl.float32)).to(tl.int64)
            between = tl.where(bisects, low + (high - low) // 2, between)
            # Zero is where logits pile up, and where keys of both signs meet.
            between = tl.where((low < 0) & (high > 0), 0, between)
            middle = tl.where(step < 4, _float_to_key(guess), between)
            middle = tl.minimum(tl.maximum(middle, low + 1), tl.maximum(high - 1, low))
            value = _key_to_float(middle)
            num = _count(tiles, live_tiles, value, TILES)
            guess = value + slope * (num - want).to(tl.float32)
            reaches = num >= want
            side = tl.where(reaches, 1, -1)
            # The end that stays put loses half its weight each time, or interpolation would creep (Illinois method).
            weight_high = tl.where(reaches & (last_side == side), weight_high * 0.5, 1.0)
            weight_low = tl.where((num < want) & (last_side == side), weight_low * 0.5, 1.0)
            last_side = side
            low = tl.where(reaches, middle, low)
            num_low = tl.where(reaches, num, num_low)
            high = tl.where(reaches, high, middle)
            num_high = tl.where(reaches, num_high, num)
            step += 1
    is_exact = num_low == want
    high = tl.where(is_exact | takes_rest, low, high)
    num_equal = tl.where(is_exact, 0, want - num_high)
    rest = tl.where(takes_all, want - num_low, 0)
    num_equal = tl.where(takes_rest, rest, num_equal)
    num_selected = tl.where(takes_rest, num_low + rest, want)
    # If the rest is taken, the worst of them is below the floor, which then is the next to be reached.
    low = tl.where(takes_rest & (num_low < want), low - 1, low)
    return _key_to_float(high), _key_to_float(low), num_equal, num_selected, low, takes_rest


@triton.jit
def _flags(values, upper, lower, equals_are_rest):
    """1 for a logit above, 65536 for an equal, 0 for the others: two counters in one int32."""
    equals = tl.where((values >= lower) | equals_are_rest, 65536, 0)
    return tl.where(values >= upper, 1, equals)


@triton.jit
def places(tiles, live_tiles, upper, lower, equals_are_rest, TILES: tl.constexpr, COLUMNS: tl.constexpr):
    """Counters of everything before each tile row, ``[ROWS]``."""
    counters = _flags(tiles[0], upper, lower, equals_are_rest)
    for tile in tl.static_range(1, TILES):
        if tile < live_tiles:
            counters += _flags(tiles[tile], upper, lower, equals_are_rest)
    totals = tl.sum(counters, axis=1)
    return tl.cumsum(totals, axis=0) - totals


@triton.jit
def rank_tile(values, before, upper, lower, equals_are_rest, num_equal):
    """Which logits of a tile are selected, their ranks in the block, and the counters for the next tile."""
    flags = _flags(values, upper, lower, equals_are_rest)
    earlier = before[:, None] + tl.cumsum(flags, axis=1) - flags
    equals_before = (earlier >> 16) & 0xFFFF
    selected = ((flags & 0xFFFF) > 0) | ((flags > 0xFFFF) & (equals_before < num_equal))
    rank = (earlier & 0xFFFF) + tl.minimum(equals_before, num_equal)
    return selected, rank, before + tl.sum(flags, axis=1)
