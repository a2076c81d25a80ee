"""Shared memory and wide or scattered accesses that Triton's language cannot name: device functions around PTX.

Hides which of them NVIDIA GPUs do in PTX and what stands in elsewhere. There a counter or a staged value costs one
instruction; the stand-ins use ``tl.histogram`` and the output row, and serve the same algorithm.

Every function acts once per element, so its tensors must have at least one element per thread: a smaller one would be
replicated, and each copy counted.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

MAX_BINS = 4096
MAX_STAGED = 2048
# Byte offsets behind the counters: a total, three results of ``find_counter``, the staged values.
_TOTAL = tl.constexpr(4 * MAX_BINS)
_FOUND = tl.constexpr(4 * MAX_BINS + 4)
_STAGED = tl.constexpr(4 * MAX_BINS + 16)

_LOAD = tl.constexpr(
    "{ .reg .pred p; setp.lt.s32 p, $5, $6; mov.b32 $0, 0x7fffffff; mov.b32 $1, $0; mov.b32 $2, $0; mov.b32 $3, $0;"
    " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)
# The thread whose counters hold the wanted one leaves a code of 26 bits; see ``find_counter``.
_FIND = tl.constexpr(
    "{ .reg .pred p, q0, q1, q2; .reg .b32 a, b, c, d, n, s, r; mov.b32 $0, 0;"
    " add.s32 a, $2, $3; add.s32 b, a, $4; add.s32 c, b, $5; add.s32 d, c, $6;"
    " setp.lt.s32 p, $2, $8; setp.ge.and.s32 p, d, $8, p; @!p bra nextn_end;"
    " setp.lt.s32 q0, a, $8; setp.lt.s32 q1, b, $8; setp.lt.s32 q2, c, $8;"
    " mov.b32 n, $7; mov.b32 s, $2; mov.b32 r, a;"
    " @q0 add.s32 n, $7, 1; @q0 mov.b32 s, a; @q0 mov.b32 r, b;"
    " @q1 add.s32 n, $7, 2; @q1 mov.b32 s, b; @q1 mov.b32 r, c;"
    " @q2 add.s32 n, $7, 3; @q2 mov.b32 s, c; @q2 mov.b32 r, d;"
    " shl.b32 s, s, 12; or.b32 n, n, s; or.b32 n, n, 0x2000000; setp.eq.s32 p, r, $8; @p or.b32 n, n, 0x1000000;"
    " st.shared.b32 [$1], n; nextn_end: }"
)
# Four keys or logits at once, $2 to $5 of each thread; what a comparison finds stays a predicate.
_COUNT = tl.constexpr(
    "{ .reg .pred p, q; .reg .b32 t, n; mov.b32 n, $1;"
    + "".join(
        f" sub.s32 t, ${key}, $6; setp.lt.s32 q, ${key}, $6; setp.le.u32 p, t, $7; shr.u32 t, t, $8;"
        " mad.lo.s32 t, t, 4, $9; @q add.s32 n, n, 1; @p red.shared.add.u32 [t], 1;"
        for key in range(2, 6)
    )
    + " mov.b32 $0, n; }"
)
_STAGE = tl.constexpr(
    "{ .reg .pred p; .reg .b32 t, n; mov.b32 t, $1; mov.b32 n, $7;"
    + "".join(
        f" setp.le.s32 p, ${key}, $6; @p st.shared.b32 [t], n; @p add.s32 t, t, 4; add.s32 n, n, 1;"
        for key in range(2, 6)
    )
    + " mov.b32 $0, t; }"
)
_REACHING = tl.constexpr(
    "{ .reg .pred p; .reg .b32 n; mov.b32 n, 0;"
    + "".join(f" setp.ge.f32 p, ${value}, $5; @p add.s32 n, n, 1;" for value in range(1, 5))
    + " mov.b32 $0, n; }"
)
_LIST = tl.constexpr(
    "{ .reg .pred p; .reg .b64 t; .reg .b32 n, o; mov.b32 o, $8; mov.b32 n, $7;"
    + "".join(
        f" setp.ge.f32 p, ${value}, $6; cvt.u64.u32 t, o; add.s64 t, t, $1; @p st.global.v2.b32 [t], {{${value}, n}};"
        " @p add.s32 o, o, 8; add.s32 n, n, 1;"
        for value in range(2, 6)
    )
    + " mov.b32 $0, n; }"
)


@triton.jit
def allocate(seed, BY_PTX: tl.constexpr):
    """The address of MAX_BINS counters, a total, results and MAX_STAGED values; whatever they hold."""
    if BY_PTX:
        return tl.inline_asm_elementwise(
            "{ .shared .align 16 .b32 nextn_space[6148]; mov.u32 $0, nextn_space; }",
            "=r,r",
            [seed],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return seed


@triton.jit
def clear(space, BINS: tl.constexpr, THREADS: tl.constexpr, BY_PTX: tl.constexpr):
    """Zero all counters; a barrier must follow before any is used."""
    if BY_PTX:
        thread = tl.arange(0, THREADS)
        for start in tl.static_range(0, 4 * BINS, 16 * THREADS):
            zero_four(space + start + thread * 16)
        zero_four(space + _TOTAL + thread * 0)


@triton.jit
def zero_four(address):
    tl.inline_asm_elementwise(
        "{ .reg .b32 z; mov.b32 z, 0; st.shared.v4.b32 [$1], {z, z, z, z}; mov.b32 $0, z; }",
        "=r,r",
        [address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def no_counts(space, BINS: tl.constexpr, BY_PTX: tl.constexpr):
    """Counters at zero, as ``count_bin`` takes them: the address of cleared ones, or a tensor."""
    if BY_PTX:
        return space
    else:
        return tl.zeros((BINS,), tl.int32)


@triton.jit
def count_bin(counts, bins, mask, BINS: tl.constexpr, BY_PTX: tl.constexpr):
    """Add 1 to the counter of each unmasked element's bin; returns the counters."""
    if BY_PTX:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p red.shared.add.u32 [$1], 1; mov.b32 $0, 0; }",
            "=r,r,r",
            [counts + bins * 4, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        return counts
    else:
        return counts + tl.histogram(tl.ravel(tl.where(mask, bins, 0)), BINS, mask=tl.ravel(mask))


@triton.jit
def add_to_total(space, numbers, BY_PTX: tl.constexpr):
    """Add every thread's number to the total that ``read_total`` returns after a barrier."""
    if BY_PTX:
        add_shared(space + _TOTAL, numbers)


@triton.jit
def add_shared(address, numbers):
    """Add every thread's number to a word that all of a warp's threads name."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 s, t; redux.sync.add.s32 s, $2, 0xffffffff; mov.u32 t, %laneid;"
        " setp.eq.u32 p, t, 0; @p red.shared.add.u32 [$1], s; mov.b32 $0, 0; }",
        "=r,r,r",
        [address, numbers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def read_total(space, numbers, BY_PTX: tl.constexpr):
    """The sum of what ``add_to_total`` was given since the total was last zeroed."""
    if BY_PTX:
        return load_shared(space + _TOTAL)
    else:
        return tl.sum(tl.ravel(numbers))


@triton.jit
def load_shared(address):
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def zero_shared(address):
    tl.inline_asm_elementwise(
        "st.shared.b32 [$1], 0; mov.b32 $0, 0;", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def count_before(counts, space, BINS: tl.constexpr, THREADS: tl.constexpr, BY_PTX: tl.constexpr):
    """All counters, then zero again, and the sums of those before; a barrier must precede.

    Returns:
        drained: tensors of which element i of number j is counter ``i * len(drained) + j``.
        before: for each i the sum of all counters before the first of i.
    """
    if BY_PTX:
        zero_shared(space + _FOUND)  # the barrier of the sum below stands between this and ``find_counter``
        zero_shared(space + _FOUND + 4)
        zero_shared(space + _FOUND + 8)
        NUM: tl.constexpr = BINS // THREADS
        first = counts + tl.arange(0, THREADS) * (4 * NUM)
        drained = ()
        for start in tl.static_range(0, 4 * NUM, 16):
            a, b, c, d = _drain4(first + start)
            drained = drained + (a, b, c, d)  # noqa: RUF005
        totals = drained[0]
        for j in tl.static_range(1, NUM):
            totals += drained[j]
        before = tl.cumsum(totals) - totals
        zero_shared(space + _TOTAL)  # read before that barrier, added to after the next
        return drained, before
    else:
        return (counts,), tl.cumsum(counts) - counts


@triton.jit
def find_counter(
    space, drained, before, want, SLOT: tl.constexpr, BINS: tl.constexpr, THREADS: tl.constexpr, BY_PTX: tl.constexpr
):
    """Find the counter that the ``want``-th of all counted is in; ``read_found`` has it after a barrier.

    Returns:
        0 if there is none; else the counter's number, 12 bits; how many were counted before it, 12 bits; whether it is
        the last of its counter, 1 bit; and a set bit. Without PTX; with it the same is left in SLOT, 0 to 2.
    """
    if BY_PTX:
        NUM: tl.constexpr = BINS // THREADS
        for j in tl.static_range(0, NUM, 4):
            tl.inline_asm_elementwise(
                _FIND,
                "=&r,r,r,r,r,r,r,r,r",
                [
                    space + (_FOUND + 4 * SLOT), before, drained[j], drained[j + 1], drained[j + 2], drained[j + 3],
                    tl.arange(0, THREADS) * NUM + j, want,
                ],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )  # fmt: skip
            before += drained[j] + drained[j + 1] + drained[j + 2] + drained[j + 3]
        return want
    else:
        reached = before + drained[0]
        code = (1 << 25) | ((reached == want).to(tl.int32) << 24) | (before << 12) | tl.arange(0, BINS)
        return tl.sum(tl.where((before < want) & (reached >= want), code, 0))


@triton.jit
def read_found(space, found, SLOT: tl.constexpr, BY_PTX: tl.constexpr):
    """What ``find_counter``, which returned ``found``, has found."""
    if BY_PTX:
        return load_shared(space + _FOUND + 4 * SLOT)
    else:
        return found


@triton.jit
def _drain4(address):
    return tl.inline_asm_elementwise(
        "{ .reg .b32 z; mov.b32 z, 0; ld.shared.v4.b32 {$0, $1, $2, $3}, [$4]; st.shared.v4.b32 [$4], {z, z, z, z}; }",
        "=&r,=&r,=&r,=&r,r",
        [address],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def load4(source, start, n, ALIGNED: tl.constexpr, BY_PTX: tl.constexpr):
    """Elements ``start`` to ``start + 3``, floats from each ``source``, NaN for fours that begin at ``n`` or later.

    ALIGNED fours are on 16 bytes and may be read whole; otherwise every element from ``n`` on is NaN.
    """
    if ALIGNED and BY_PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            _LOAD,
            "=&r,=&r,=&r,=&r,l,r,r",
            [source.to(tl.int64), start, n],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        a = tl.load(source, mask=start < n, other=float("nan"))
        b = tl.load(source + 1, mask=start + 1 < n, other=float("nan"))
        c = tl.load(source + 2, mask=start + 2 < n, other=float("nan"))
        d = tl.load(source + 3, mask=start + 3 < n, other=float("nan"))
    return a, b, c, d


@triton.jit
def load_listed(pairs, mask, BY_PTX: tl.constexpr):
    """The logits of four (logit, position) pairs from each ``pairs``, 32 bytes aligned; NaN where masked off."""
    if BY_PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; setp.ne.b32 p, $5, 0; mov.b32 $0, 0x7fffffff; mov.b32 $1, $0;"
            " mov.b32 $2, $0; mov.b32 $3, $0; @p ld.global.v4.b32 {$0, t, $1, t}, [$4];"
            " @p ld.global.v4.b32 {$2, t, $3, t}, [$4 + 16]; }",
            "=&r,=&r,=&r,=&r,l,r",
            [pairs.to(tl.int64), mask.to(tl.int32)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        values = ()
        for e in tl.static_range(4):
            bits = tl.load(pairs + 2 * e, mask=mask, other=0x7FFFFFFF)
            values = values + (bits.to(tl.float32, bitcast=True),)  # noqa: RUF005
        return values


@triton.jit
def count_reaching(a, b, c, d, bound, BY_PTX: tl.constexpr):
    """How many of each thread's four logits reach ``bound``."""
    if BY_PTX:
        return tl.inline_asm_elementwise(
            _REACHING, "=r,r,r,r,r,r", [a, b, c, d, bound], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (
            (a >= bound).to(tl.int32)
            + (b >= bound).to(tl.int32)
            + (c >= bound).to(tl.int32)
            + (d >= bound).to(tl.int32)
        )


@triton.jit
def list_tile(pairs, place, a, b, c, d, bound, position, BY_PTX: tl.constexpr):
    """Store each thread's logits that reach ``bound``, with their positions, one after the other from ``place`` on.

    Triton would move operands of scattered stores to a layout it thinks coalesced, through shared memory; PTX leaves
    them where they are.
    """
    if BY_PTX:
        tl.inline_asm_elementwise(
            _LIST,
            "=&r,l,r,r,r,r,r,r,r",
            [pairs.to(tl.int64), a, b, c, d, bound, position, place * 8],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        values = (a, b, c, d)
        for e in tl.static_range(4):
            reaches = values[e] >= bound
            tl.store(pairs + 2 * place, values[e].to(tl.int32, bitcast=True), mask=reaches)
            tl.store(pairs + 2 * place + 1, position + e, mask=reaches)
            place += reaches.to(tl.int32)


@triton.jit
def count_tile(counts, below, a, b, c, d, low, width, shift, BINS: tl.constexpr, BY_PTX: tl.constexpr):
    """Count keys from ``low`` to ``low + width`` in bins of ``2 ** shift``.

    Returns:
        counts: the counters.
        below: increased by how many of each thread's keys are below ``low``.
    """
    if BY_PTX:
        below = tl.inline_asm_elementwise(
            _COUNT,
            "=&r,r,r,r,r,r,r,r,r,r",
            [below, a, b, c, d, low, width, shift, counts],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        keys = (a, b, c, d)
        for e in tl.static_range(4):
            below += (keys[e] < low).to(tl.int32)
            distance = (keys[e] - low).to(tl.uint32, bitcast=True)
            counts = count_bin(counts, (distance >> shift).to(tl.int32), distance <= width, BINS, BY_PTX)
    return counts, below


@triton.jit
def stage_tile(space, out, rank, a, b, c, d, last, position, BY_PTX: tl.constexpr):
    """Keep positions of each thread's keys up to ``last``, from ``rank`` on, for ``read_staged`` after a barrier."""
    if BY_PTX:
        tl.inline_asm_elementwise(
            _STAGE,
            "=&r,r,r,r,r,r,r,r",
            [space + _STAGED + rank * 4, a, b, c, d, last, position],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        keys = (a, b, c, d)
        for e in tl.static_range(4):
            tl.store(out + rank, position + e, mask=keys[e] <= last)
            rank += (keys[e] <= last).to(tl.int32)


@triton.jit
def prefetch(address, num_bytes):
    """Ask the L2 cache for ``num_bytes``, a multiple of 16, from a 16-byte aligned address: one instruction in all."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r",
        [address.to(tl.int64), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def read_staged(space, out, rank, mask, BY_PTX: tl.constexpr):
    """What was staged at each rank, 0 where masked off."""
    if BY_PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.shared.b32 $0, [$1]; }",
            "=&r,r,r",
            [space + _STAGED + rank * 4, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.load(out + rank, mask=mask, other=0)
