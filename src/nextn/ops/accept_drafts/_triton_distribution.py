"""A row's distribution over the vocabulary: coins, probabilities, and where top-k and top-p cut, as device functions.

Hides that a row is never sorted: a token's place is its scaled logit ``s = (logit - largest) / temperature``, which is
not positive, so the bits of ``|s|`` are integers that rise as probability falls. Top-k and top-p keep what lies before
an *edge* in them, and of the tokens on the edge the first few ids. Definitions: ``_sampling.py``.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

NO_TOKEN = tl.constexpr(0x7FFFFFFF)
NO_EDGE = tl.constexpr(0x7F800000)  # bits of infinity: nothing of any probability lies beyond
_ABSOLUTE = tl.constexpr(0x7FFFFFFF)
_LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
_VANISHING = tl.constexpr(0x42D20000)  # bits of 105, whose negative has exponential 0 in float32
_PURPOSES = tl.constexpr(3)
_LIMITS = tl.constexpr(7)  # looked at in one pass over a row
_MEASURED = tl.constexpr(2048)  # tokens at a time in such a pass
_DEPTH = tl.constexpr(16)  # of a column of the list
_LISTED = tl.constexpr(4)  # rows of columns at a time


@triton.jit
def draw_uniform(seed, position, purpose: tl.constexpr):
    """``_sampling.draw_uniforms`` of scalars: a float64 in [0, 1), a multiple of 2^-48."""
    counter = (position * _PURPOSES + purpose).to(tl.uint64, bitcast=True)
    state = _mix(_mix(_mix(seed.to(tl.uint64, bitcast=True)) ^ counter))
    return (state >> 16).to(tl.int64).to(tl.float64) * 3.552713678800501e-15  # 2^-48


@triton.jit
def _mix(state):
    """One step of splitmix64."""
    state = state + 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def load_logits(row_ptr, stride, columns, vocab):
    """Float32 logits with NaN as -inf, +inf as the largest float32, and -inf beyond the vocabulary."""
    x = tl.load(row_ptr + columns.to(tl.int64) * stride, mask=columns < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("-inf"), x)
    return tl.minimum(x, _LARGEST_FLOAT)


@triton.jit
def scale_logits(x, largest, temperature, EXACT: tl.constexpr):
    """``(x - largest) / temperature``, if EXACT rounded as the reference rounds it, but not below about -1000.

    What is below has probability 0 there too, and the interpreter warns of infinities.
    """
    difference = tl.maximum(x - largest, temperature * -1000.0)
    return tl.div_rn(difference, temperature) if EXACT else difference / temperature


@triton.jit
def order_bits(scaled):
    """Bits of ``|s|``: the most probable tokens have 0."""
    return scaled.to(tl.int32, bitcast=True) & _ABSOLUTE


@triton.jit
def keep(bits, edge, num_edge, edge_rank):
    """Which tokens are before the edge, or on it and among its first ``num_edge``."""
    return (bits < edge) | ((bits == edge) & (edge_rank < num_edge))


@triton.jit
def _choose_middle(low, high, step):
    """Bits from ``low`` up to ``high``: halving the value comes near soon, halving the bits ends whatever they are."""
    halved = (low.to(tl.float32, bitcast=True) + high.to(tl.float32, bitcast=True)) * 0.5
    return tl.minimum(tl.where(step < 16, halved.to(tl.int32, bitcast=True), low + (high - low) // 2), high - 1)


@triton.jit
def _choose_limits(low, high, step):
    """Rising bits from ``low`` up to ``high``, in equal steps of value, at first finer near 0, then of bits."""
    first = low.to(tl.float32, bitcast=True)
    width = high.to(tl.float32, bitcast=True) - first
    part = (high - low) // (_LIMITS + 1)
    rest = (high - low) % (_LIMITS + 1)
    limits = ()
    for i in tl.static_range(1, _LIMITS + 1):
        share = first * 0.0 + i * (1.0 / (_LIMITS + 1))  # a value of the program, as constants are not assigned twice
        by_value = first + width * tl.where(step == 0, share * share, share)
        by_bits = low + part * i + rest * i // (_LIMITS + 1)
        limit = tl.where(step < 4, by_value.to(tl.int32, bitcast=True), by_bits)
        limits = limits + (tl.minimum(tl.maximum(limit, low), high - 1),)  # noqa: RUF005
    return limits


@triton.jit
def _measure_row(row_ptr, stride, vocab, largest, temperature, limits, BLOCK: tl.constexpr):
    """For each limit how many tokens have bits of at most that, and the sum of their ``exp(s)``, float64."""
    columns = tl.arange(0, BLOCK)
    counts = ()
    masses = ()
    for _ in tl.static_range(_LIMITS):
        counts = counts + (tl.zeros([BLOCK], tl.int32),)  # noqa: RUF005
        masses = masses + (tl.zeros([BLOCK], tl.float32),)  # noqa: RUF005
    x = load_logits(row_ptr, stride, columns, vocab)
    for start in range(BLOCK, vocab + BLOCK, BLOCK):
        scaled = scale_logits(x, largest, temperature, True)
        x = load_logits(row_ptr, stride, start + columns, vocab)  # while these are measured
        bits = order_bits(scaled)
        exponentials = tl.exp(scaled)
        new_counts = ()
        new_masses = ()
        for i in tl.static_range(_LIMITS):
            inside = bits <= limits[i]
            new_counts = new_counts + (counts[i] + inside.to(tl.int32),)  # noqa: RUF005
            new_masses = new_masses + (masses[i] + tl.where(inside, exponentials, 0.0),)  # noqa: RUF005
        counts = new_counts
        masses = new_masses
    sums = ()
    for i in tl.static_range(_LIMITS):
        sums = sums + ((tl.sum(counts[i]), tl.sum(masses[i].to(tl.float64))),)  # noqa: RUF005
    return sums


@triton.jit
def _list_bits(row_ptr, stride, vocab, largest, temperature, low, high, list_ptr, LIST: tl.constexpr):
    """Bits of the tokens from ``low`` to ``high`` as one block filled up with NO_EDGE, and whether all of them fit.

    Every LIST // _DEPTH-th token goes to the same column, so that no token needs to know of another column's.
    """
    COLUMNS: tl.constexpr = max(LIST // _DEPTH, 1)
    columns = tl.arange(0, COLUMNS)
    lens = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, vocab, _LISTED * COLUMNS):
        logits = ()
        for part in tl.static_range(_LISTED):  # all before what may depend on them is stored
            logits = logits + (load_logits(row_ptr, stride, columns + (start + part * COLUMNS), vocab),)  # noqa: RUF005
        for part in tl.static_range(_LISTED):
            bits = order_bits(scale_logits(logits[part], largest, temperature, True))
            inside = (bits >= low) & (bits <= high)
            tl.store(list_ptr + lens * COLUMNS + columns, bits, mask=inside & (lens < LIST // COLUMNS))
            lens += inside.to(tl.int32)
    for place in tl.static_range(LIST // COLUMNS):
        tl.store(list_ptr + place * COLUMNS + columns, tl.full([COLUMNS], NO_EDGE, tl.int32), mask=lens <= place)
    tl.debug_barrier()  # other threads stored what is loaded next
    return tl.load(list_ptr + tl.arange(0, LIST)), tl.max(lens) <= LIST // COLUMNS


@triton.jit
def _find_edge(
    row_ptr, stride, vocab, largest, temperature, total, end, num_end, wanted_count, wanted_mass, list_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The least bits at or below which lie ``wanted_count`` tokens or ``wanted_mass``; ``end`` if none do.

    The whole row is read until few enough tokens are left between the bounds to be held at once.

    Args:
        total: sum of exponentials that masses are shares of.
        end: bits to look up to.
        num_end: no fewer tokens than lie there.

    Returns:
        Those bits, how many tokens have them, and how many tokens and what mass lie before them.
    """
    low = tl.full((), 0, tl.int32)  # the least bits of a token that may be the edge; the best has 0
    num_before = tl.full((), 0, tl.int32)
    mass_before = tl.full((), 0.0, tl.float64)
    high = end
    num_high = num_end
    step = tl.full((), 0, tl.int32)
    STEP: tl.constexpr = min(BLOCK, _MEASURED)
    num_listable = vocab * 0 + (BLOCK // 4 if BLOCK > _DEPTH else BLOCK)
    while low < high:
        while (low < high) & (num_high - num_before > num_listable):
            limits = _choose_limits(low, high, step)
            sums = _measure_row(row_ptr, stride, vocab, largest, temperature, limits, STEP)
            for i in tl.static_range(_LIMITS):
                count, mass = sums[i]
                mass = mass / total.to(tl.float64)
                suffices = (count >= wanted_count) | (mass >= wanted_mass)
                is_first = suffices & (limits[i] < high)
                high = tl.where(is_first, limits[i], high)
                num_high = tl.where(is_first, count, num_high)
                low = tl.where(suffices, low, limits[i] + 1)
                num_before = tl.where(suffices, num_before, count)
                mass_before = tl.where(suffices, mass_before, mass)
            step += 1
        if low < high:
            bits, is_whole = _list_bits(row_ptr, stride, vocab, largest, temperature, low, high, list_ptr, BLOCK)
            if is_whole:
                probs = tl.div_rn(_exp_of(bits), total).to(tl.float64)
                num_outside = num_before
                mass_outside = mass_before
                while low < high:
                    middle = _choose_middle(low, high, step)
                    inside = bits <= middle
                    count = num_outside + tl.sum(inside.to(tl.int32))
                    mass = mass_outside + tl.sum(tl.where(inside, probs, 0.0))
                    suffices = (count >= wanted_count) | (mass >= wanted_mass)
                    high = tl.where(suffices, tl.max(tl.where(inside, bits, -1)), high)
                    num_high = tl.where(suffices, count, num_high)
                    low = tl.where(suffices, low, tl.min(tl.where(inside, NO_EDGE, bits)))
                    num_before = tl.where(suffices, num_before, count)
                    mass_before = tl.where(suffices, mass_before, mass)
                    step += 1
            else:
                num_listable //= 8  # columns of unlike lengths
    return high, num_high - num_before, num_before, mass_before


@triton.jit
def truncate(row_ptr, stride, vocab, largest, temperature, total, top_k, top_p, list_ptr, BLOCK: tl.constexpr):
    """Where top-k and then top-p cut a row.

    Args:
        total: float64, the sum of ``exp(s)`` over the whole row.
        list_ptr: int32 ``[BLOCK]``, scratch memory of this program.

    Returns:
        edge: bits; tokens before it are kept.
        num_edge: how many of those on it are, lowest ids first; the size of the vocabulary if all are.
        total: float64, the sum of ``exp(s)`` over what is kept.
    """
    one = tl.full((), 1.0, tl.float32)
    edge = tl.full((), NO_EDGE, tl.int32)
    end = tl.full((), _VANISHING, tl.int32)  # up to where top-p looks
    num_end = vocab
    num_edge = vocab
    num_on_edge = vocab
    mass = total
    if (top_k > 0) & (top_k < vocab):
        edge, num_on_edge, num_end, mass = _find_edge(
            row_ptr, stride, vocab, largest, temperature, one, end, vocab, top_k, float("inf"), list_ptr, BLOCK
        )  # fmt: skip
        end = edge - 1
        num_edge = top_k - num_end
        total = mass + num_edge.to(tl.float64) * _exp_of(edge).to(tl.float64)
    if top_p < 1:
        whole = total.to(tl.float32)
        wanted = top_p.to(tl.float64)
        mass = mass / whole.to(tl.float64)  # of what lies before the edge
        if (mass >= wanted) & (end >= 0):
            edge, num_on_edge, _, mass = _find_edge(
                row_ptr, stride, vocab, largest, temperature, whole, end, num_end, NO_TOKEN, wanted, list_ptr, BLOCK
            )  # fmt: skip
            num_edge = num_on_edge
        if edge < NO_EDGE:
            exponential = _exp_of(edge)
            fitting = tl.ceil((wanted - mass) / tl.div_rn(exponential, whole).to(tl.float64))
            num_edge = tl.minimum(tl.maximum(fitting, 1.0), num_edge.to(tl.float64)).to(tl.int32)
            total = mass * whole.to(tl.float64) + num_edge.to(tl.float64) * exponential.to(tl.float64)
    return edge, tl.where(num_edge < num_on_edge, num_edge, vocab), total


@triton.jit
def _exp_of(bits):
    """``exp(s)`` of a token with these bits."""
    return tl.exp(-bits.to(tl.float32, bitcast=True))


@triton.jit
def count_on_edge(row_ptr, stride, end, largest, temperature, edge, BLOCK: tl.constexpr):
    """How many tokens of ids below ``end`` are on the edge."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, end, BLOCK):
        x = load_logits(row_ptr, stride, start + tl.arange(0, BLOCK), end)  # beyond ``end`` is before no edge
        bits = order_bits(scale_logits(x, largest, temperature, True))
        count += (bits == edge).to(tl.int32)
    return tl.sum(count)
