"""A pool of candidates in shared memory, and how the best of it are found: device functions around PTX.

Hides every shared-memory access and block-wide step of ``triton_cuda.py``. Tensors are ``[WARPS, 32]``, an element per
thread; shared memory is one region, named by its address.

The pool holds what any warp found, in any order: a warp takes as many places as it needs from a counter. Order comes
back at the end, when what is selected is marked in a bit per position. Counters have 16 bits, two to a word; the search
uses only the even ones, which saves telling the halves apart.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from nextn.ops.select_topk._triton_shared import add_shared, load_shared, zero_four, zero_shared

NUM_BINS = tl.constexpr(4096)
KEY_SHIFT = tl.constexpr(20)  # from a key to its bin
LOG_SEARCH_BINS = tl.constexpr(11)  # the even ones
COUNTER_BYTES = 8192
BIT_BYTES = 8192
POOL_LEN = 3488  # with what unaligned loads of 32 warps take, 4 KB, a program stays within 48 KB
NEAR_LEN = tl.constexpr(64)
MAX_POSITIONS = BIT_BYTES * 8
# Byte offsets: counters, bits, pairs of key and position (later what is staged), sums of warps, results, near pairs.
_SUMS_AT = COUNTER_BYTES + BIT_BYTES + 8 * POOL_LEN
_COUNTER_BYTES = tl.constexpr(COUNTER_BYTES)
_BITS = tl.constexpr(COUNTER_BYTES)
_POOL = tl.constexpr(COUNTER_BYTES + BIT_BYTES)
_CLEARED = tl.constexpr(COUNTER_BYTES + BIT_BYTES)
_SUMS = tl.constexpr(_SUMS_AT)
_FOUND = tl.constexpr(_SUMS_AT + 128)
_NUM_LISTED = tl.constexpr(_SUMS_AT + 168)
_NUM_ABOVE = tl.constexpr(_SUMS_AT + 172)
_NUM_NEAR = tl.constexpr(_SUMS_AT + 176)
_NEAR = tl.constexpr(_SUMS_AT + 192)
NUM_BYTES = _SUMS_AT + 192 + 8 * 64

_ALLOCATE = tl.constexpr(f"{{ .shared .align 16 .b8 nextn_pool[{NUM_BYTES}]; mov.u32 $0, nextn_pool; }}")
_COUNT = tl.constexpr(
    "{ .reg .pred p; .reg .b32 a, v; setp.ne.b32 p, $3, 0; shr.u32 a, $2, 1; mad.lo.s32 a, a, 4, $1;"
    " and.b32 v, $2, 1; mad.lo.s32 v, v, 0xffff, 1; @p red.shared.add.u32 [a], v; mov.b32 $0, 0; }"
)


def _sum_lanes_text(register: str) -> str:
    """PTX that leaves in ``register`` its sum over a warp's lanes up to one's own, and in p whether one is last."""
    return (
        "".join(
            f" shfl.sync.up.b32 t|p, {register}, {distance}, 0, 0xffffffff; @p add.s32 {register}, {register}, t;"
            for distance in (1, 2, 4, 8, 16)
        )
        + " mov.u32 t, %laneid; setp.eq.u32 p, t, 31;"
    )


_SUM_WARP = tl.constexpr(
    f"{{ .reg .pred p; .reg .b32 t; mov.b32 $0, $2;{_sum_lanes_text('$0')} @p st.shared.b32 [$1], $0; }}"
)
_SUM_WARPS = tl.constexpr(
    "{ .reg .pred p; .reg .b32 l, a, v; mov.u32 l, %laneid; mad.lo.s32 a, l, 4, $1; mov.b32 v, 0;"
    " setp.lt.u32 p, l, $2; @p ld.shared.b32 v, [a]; redux.sync.add.s32 $0, v, 0xffffffff; }"
)
_RESERVE = tl.constexpr(
    f"{{ .reg .pred p; .reg .b32 t, s; mov.b32 s, $3;{_sum_lanes_text('s')} mov.b32 t, 0;"
    " @p atom.shared.add.u32 t, [$2], s; shfl.sync.idx.b32 t, t, 31, 31, 0xffffffff; add.s32 s, s, t;"
    " mov.b32 $1, s; sub.s32 $0, s, $3; }"
)
# Bit $10 and the next three of $0: which of four logits reach $8; of $1: which reach $9.
_SORT = tl.constexpr(
    "{ .reg .pred p, q; .reg .b32 u; mov.b32 $0, $2; mov.b32 $1, $3; mov.b32 u, $10;"
    + "".join(
        f" setp.ge.f32 p, ${value}, $8; setp.ge.f32 q, ${value}, $9; @p or.b32 $0, $0, u; @q or.b32 $1, $1, u;"
        " shl.b32 u, u, 1;"
        for value in range(4, 8)
    )
    + " }"
)
# Two lanes' bits of a tile make a byte; the even lane of a pair stores those of four tiles, the odd one of the others.
_STORE_BITS = tl.constexpr(
    "{ .reg .pred p, o; .reg .b32 x, y, d, t, q, a; mov.u32 t, %laneid; and.b32 t, t, 1; setp.ne.b32 o, t, 0;"
    " shfl.sync.bfly.b32 d, $1, 1, 31, 0xffffffff; selp.b32 x, d, $1, o; selp.b32 y, $1, d, o; shl.b32 q, t, 2;"
    " shl.b32 t, t, 4; shr.u32 x, x, t; shr.u32 y, y, t;"
    + "".join(
        f" and.b32 {half}, {half}, 0xffff; shl.b32 t, {half}, 8; or.b32 {half}, {half}, t;"
        f" and.b32 {half}, {half}, 0xff00ff; shl.b32 t, {half}, 4; or.b32 {half}, {half}, t;"
        f" and.b32 {half}, {half}, 0xf0f0f0f;"
        for half in "xy"
    )
    + " shl.b32 y, y, 4; or.b32 x, x, y; mad.lo.s32 a, q, $3, $2;"
    + " setp.lt.s32 p, q, $4; @p st.shared.u8 [a], x; shr.u32 x, x, 8; add.s32 a, a, $3; add.s32 q, q, 1;" * 4
    + " mov.b32 $0, 0; }"
)
_NOTE = tl.constexpr(
    "{ .reg .pred p; .reg .b32 w, b, n, t; mov.b32 w, $1; mov.b32 $0, $2;"
    " nextn_loop: setp.eq.s32 p, w, 0; @p bra nextn_end; brev.b32 b, w; clz.b32 b, b; shr.u32 t, b, 2;"
    " and.b32 b, b, 3; mad.lo.s32 n, t, $4, $3; add.s32 n, n, b; st.shared.b32 [$0 + 4], n; add.s32 $0, $0, 8;"
    " sub.s32 t, w, 1; and.b32 w, w, t; bra nextn_loop; nextn_end: }"
)
# A logit as a key: its bits, inverted below the sign if positive. None is NaN here; -0.0 + 0.0 is +0.0.
_KEY = "add.f32 v, v, 0f00000000; shr.s32 s, v, 31; not.b32 s, s; or.b32 s, s, 0x80000000; xor.b32 v, v, s;"
_KEEP = tl.constexpr(
    "{ .reg .pred p; .reg .b32 t, u; mov.b32 $0, $1; mov.b32 u, $7;"
    + "".join(
        f" and.b32 t, $2, u; setp.ne.b32 p, t, 0; @p st.shared.b32 [$0], ${value}; @p add.s32 $0, $0, 8;"
        " shl.b32 u, u, 1;"
        for value in range(3, 7)
    )
    + " }"
)
_KEY_PAIR = tl.constexpr(
    "{ .reg .pred p; .reg .b32 a, v, s; setp.lt.s32 p, $1, $2; mov.b32 $0, 0; mov.b32 v, 0; mad.lo.s32 a, $1, 8, $3;"
    f" @p ld.shared.b32 v, [a]; {_KEY} @p st.shared.b32 [a], v; sub.s32 v, v, $5; shr.u32 v, v, $6;"
    " min.u32 v, v, 2047; mad.lo.s32 v, v, 4, $4; @p red.shared.add.u32 [v], 1; }"
)
_COUNT_PAIR = tl.constexpr(
    "{ .reg .pred p, q; .reg .b32 v, s; setp.lt.s32 p, $2, $3; mov.b32 v, 0; mov.b32 $0, $1; mad.lo.s32 s, $2, 8, $8;"
    " @p ld.shared.b32 v, [s]; setp.lt.and.s32 q, v, $4, p; @q add.s32 $0, $0, 1; sub.s32 v, v, $4;"
    " setp.le.and.u32 q, v, $5, p; shr.u32 v, v, $6; mad.lo.s32 v, v, 4, $7; @q red.shared.add.u32 [v], 1; }"
)
_MARK_PAIR = tl.constexpr(
    "{ .reg .pred p, q; .reg .b32 s, n, a; setp.lt.s32 p, $4, $5; mov.b32 n, $3; mov.b32 $0, 0;"
    " setp.gt.and.s32 q, $2, $6, p; setp.le.and.s32 q, $2, $7, q; @!q bra nextn_far;"
    " atom.shared.add.u32 a, [$9], 1; mad.lo.s32 a, a, 8, $8; st.shared.v2.b32 [a], {$2, n};"
    " nextn_far: setp.le.and.s32 p, $2, $6, p; shr.u32 a, n, 5; mad.lo.s32 a, a, 4, $1; and.b32 n, n, 31;"
    " mov.b32 s, 1; shl.b32 s, s, n; @p red.shared.or.b32 [a], s; }"
)
_MARK_NEAR = tl.constexpr(
    "{ .reg .pred p; .reg .b32 n, a, k, i, r, e, m; mov.b32 $0, 0; setp.ge.s32 p, $3, $4; @p bra nextn_end;"
    " mad.lo.s32 e, $4, 8, $2; mad.lo.s32 a, $3, 8, $2; ld.shared.v2.b32 {m, n}, [a]; mov.b32 r, 0; mov.b32 i, $2;"
    " nextn_loop: ld.shared.v2.b32 {k, a}, [i]; add.s32 i, i, 8; setp.lt.s32 p, k, m; @p add.s32 r, r, 1;"
    " setp.eq.s32 p, k, m; setp.lt.and.s32 p, a, n, p; @p add.s32 r, r, 1; setp.lt.u32 p, i, e; @p bra nextn_loop;"
    " setp.ge.s32 p, r, $5; @p bra nextn_end; shr.u32 a, n, 5; mad.lo.s32 a, a, 4, $1; and.b32 n, n, 31;"
    " mov.b32 k, 1; shl.b32 k, k, n; red.shared.or.b32 [a], k; nextn_end: }"
)
_STAGE_BITS = tl.constexpr(
    "{ .reg .pred p; .reg .b32 w, b, t; mov.b32 w, $2; mov.b32 $0, $1;"
    " nextn_loop: setp.eq.s32 p, w, 0; @p bra nextn_end; brev.b32 b, w; clz.b32 b, b; add.s32 b, b, $3;"
    " st.shared.b32 [$0], b; add.s32 $0, $0, 4; sub.s32 t, w, 1; and.b32 w, w, t; bra nextn_loop; nextn_end: }"
)


def _find_text(num_words: int) -> str:
    """PTX that leaves, in the thread whose counters hold the wanted one, its number, those before and its count."""
    steps = ""
    for word in range(num_words):
        for half, cut in ((0, "and.b32 h, ${w}, 0xffff;"), (1, "shr.u32 h, ${w}, 16;")):
            steps += f" {cut.format(w=6 + word)} add.s32 r, r, h; setp.lt.s32 q, r, $4; @q mov.b32 s, r;"
            steps += f" @q add.s32 n, $5, {2 * word + half + 1}; @!q min.s32 u, u, r;"
    return (
        "{ .reg .pred p, q; .reg .b32 h, n, s, r, u; mov.b32 $0, 0; setp.lt.s32 p, $2, $4;"
        " setp.ge.and.s32 p, $3, $4, p; @!p bra nextn_end; mov.b32 n, $5; mov.b32 s, $2; mov.b32 r, $2;"
        f" mov.b32 u, 0x7fffffff;{steps} sub.s32 u, u, s; shl.b32 n, n, 16; or.b32 n, n, s; or.b32 n, n, 0x80000000;"
        " st.shared.v2.b32 [$1], {n, u}; nextn_end: }"
    )


_FIND2 = tl.constexpr(_find_text(2))
_FIND4 = tl.constexpr(_find_text(4))


@triton.jit
def _run(TEXT: tl.constexpr, CONSTRAINTS: tl.constexpr, arguments):
    """One PTX block with effects, an int32 per thread."""
    return tl.inline_asm_elementwise(TEXT, CONSTRAINTS, arguments, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def anew(value):
    """The same value, of which the compiler does not know it; keeps what follows from it out of registers till then."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def allocate_pool(seed):
    """The address of the region; whatever it holds."""
    return _run(_ALLOCATE, "=r,r", [seed])


@triton.jit
def thread_index(WARPS: tl.constexpr):
    return tl.arange(0, WARPS)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def clear_pool(space, WARPS: tl.constexpr):
    """Zero counters, bits and results, and empty the pool; a barrier must follow before any is used."""
    thread = thread_index(WARPS)
    for start in tl.static_range(0, _CLEARED, WARPS * 512):
        address = space + tl.minimum(start + thread * 16, _CLEARED - 16)
        zero_four(address)
    zero_shared(space + _FOUND + (thread & 15) * 4)


@triton.jit
def count_bits(word):
    """How many bits are set."""
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def count_threads(mask):
    """How many of the program's threads have ``mask`` set; a barrier."""
    text: tl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $1, 0; barrier.red.popc.u32 $0, 0, p; }"
    return _run(text, "=r,r", [mask.to(tl.int32)])


@triton.jit
def count_key(space, bins, mask):
    """Add 1 to the counter of each unmasked thread's bin."""
    _run(_COUNT, "=r,r,r,r", [space, bins, mask.to(tl.int32)])


@triton.jit
def sum_before(space, number, WARPS: tl.constexpr):
    """The sum of all earlier threads' numbers; a barrier."""
    warp = tl.arange(0, WARPS)[:, None] + tl.zeros((WARPS, 32), tl.int32)
    so_far = _run(_SUM_WARP, "=&r,r,r", [space + _SUMS + warp * 4, number])
    tl.debug_barrier()
    return _run(_SUM_WARPS, "=r,r,r", [space + _SUMS, warp]) + so_far - number


@triton.jit
def sum_all(space, WARPS: tl.constexpr):
    """The sum of all threads' numbers, after ``sum_before``."""
    return _run(_SUM_WARPS, "=r,r,r", [space + _SUMS, tl.full((WARPS, 32), WARPS, tl.int32)])


@triton.jit
def drain(space, WARPS: tl.constexpr):
    """Sum all counters and zero them and the results; a barrier must precede, and is in it.

    Returns:
        words: each thread's counters.
        before: for each thread the sum of those of earlier threads.
        upto: the same with its own.
    """
    NUM: tl.constexpr = _COUNTER_BYTES // (WARPS * 128)
    first = space + thread_index(WARPS) * (4 * NUM)
    words = ()
    for j in tl.static_range(0, NUM, 2):
        one, other = tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0; ld.shared.v2.b32 {$0, $1}, [$2]; st.shared.v2.b32 [$2], {z, z}; }",
            "=&r,=&r,r",
            [first + 4 * j],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
        words = words + (one, other)  # noqa: RUF005
    both = words[0]
    for j in tl.static_range(1, NUM):
        both += words[j]
    number = (both & 0xFFFF) + ((both >> 16) & 0xFFFF)
    for slot in tl.static_range(4):
        zero_shared(space + _FOUND + 8 * slot)
    before = sum_before(space, number, WARPS)
    zero_shared(space + _NUM_ABOVE)  # all have read it before that barrier
    zero_shared(space + _NUM_NEAR)
    return words, before, before + number


@triton.jit
def find_counter(space, words, before, upto, want, SLOT: tl.constexpr, WARPS: tl.constexpr):
    """Find the counter that the ``want``-th of all counted is in; ``read_found`` has it in SLOT after a barrier."""
    NUM: tl.constexpr = _COUNTER_BYTES // (WARPS * 128)
    address = space + _FOUND + 8 * SLOT
    bins = thread_index(WARPS) * (2 * NUM)
    if NUM == 2:
        _run(_FIND2, "=&r,r,r,r,r,r,r,r", [address, before, upto, want, bins, words[0], words[1]])
    else:
        # More than four words to a thread are searched by fours.
        for j in tl.static_range(0, NUM, 4):
            last = upto
            if j + 4 < NUM:
                both = words[j] + words[j + 1] + words[j + 2] + words[j + 3]
                last = before + (both & 0xFFFF) + ((both >> 16) & 0xFFFF)
            _run(
                _FIND4,
                "=&r,r,r,r,r,r,r,r,r,r",
                [address, before, last, want, bins + 2 * j, words[j], words[j + 1], words[j + 2], words[j + 3]],
            )
            before = last


@triton.jit
def read_found(space, SLOT: tl.constexpr):
    """What ``find_counter`` left: whether there is one, its number, how many before it, and how many in it."""
    code = load_shared(space + _FOUND + 8 * SLOT)
    return code != 0, (code >> 16) & 0xFFF, code & 0xFFFF, load_shared(space + _FOUND + 8 * SLOT + 4)


@triton.jit
def reserve(space, number):
    """Places in the pool for ``number`` pairs of each thread; they go on beyond its end.

    Returns:
        Each thread's first place, and the one past its last.
    """
    return tl.inline_asm_elementwise(
        _RESERVE, "=&r,=&r,r,r", [space + _NUM_LISTED, number], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
    )


@triton.jit
def num_reserved(space):
    """How many places were taken in all, after a barrier."""
    return load_shared(space + _NUM_LISTED)


@triton.jit
def sort_four(reaching, sure, a, b, c, d, bound, sure_bound, BIT: tl.constexpr):
    """Set the bits from BIT on of ``reaching`` and ``sure`` whose logits reach the bounds."""
    return tl.inline_asm_elementwise(
        _SORT, "=&r,=&r,r,r,r,r,r,r,r,r,r", [reaching, sure, a, b, c, d, bound, sure_bound, 1 << BIT],
        dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def store_bits(space, bits, position, spacing, num_live):
    """Mark what 32 bits of each thread say, four for each of its warp's first ``num_live`` tiles ``spacing`` apart."""
    address = space + _BITS + (position >> 3)
    _run(_STORE_BITS, "=&r,r,r,r,r", [bits, address, spacing >> 3, num_live])


@triton.jit
def note_positions(space, bits, place, position, spacing):
    """Put the positions that 32 bits of each thread stand for into the pool from ``place`` on."""
    _run(_NOTE, "=&r,r,r,r,r", [bits, space + _POOL + place * 8, position, spacing])


@triton.jit
def pool_address(space, place):
    return space + _POOL + place * 8


@triton.jit
def keep_four(address, bits, logits, FIRST: tl.constexpr, BIT: tl.constexpr):
    """Put those of four logits whose bits from BIT on are set into pairs from ``address`` on; returns their end."""
    return _run(
        _KEEP, "=&r,r,r,r,r,r,r,r",
        [address, bits, logits[FIRST], logits[FIRST + 1], logits[FIRST + 2], logits[FIRST + 3], 1 << BIT],
    )  # fmt: skip


@triton.jit
def put_pair(space, place, logit, position, mask):
    """Put a pair of a logit and its position into the pool."""
    _run(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.shared.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }", "=r,r,r,r,r",
        [space + _POOL + place * 8, logit, position, mask.to(tl.int32)],
    )  # fmt: skip


@triton.jit
def key_pairs(space, num_listed, low, shift, WARPS: tl.constexpr):
    """Make the pool's logits keys, and count these from ``low`` on; barriers must stand before and after."""
    for start in range(0, num_listed, WARPS * 32):
        place = start + thread_index(WARPS)
        _run(_KEY_PAIR, "=&r,r,r,r,r,r,r", [place, num_listed, space + _POOL, space, low, shift])


@triton.jit
def mark_position(space, position, mask):
    """Mark a position, after a barrier that follows ``store_bits``."""
    _run(
        "{ .reg .pred p; .reg .b32 a, s; setp.ne.b32 p, $3, 0; shr.u32 a, $2, 5; mad.lo.s32 a, a, 4, $1;"
        " and.b32 s, $2, 31; shl.b32 s, 1, s; @p red.shared.or.b32 [a], s; mov.b32 $0, 0; }", "=&r,r,r,r",
        [space + _BITS, position, mask.to(tl.int32)],
    )  # fmt: skip


@triton.jit
def count_pairs(space, num_listed, low, width, shift, WARPS: tl.constexpr):
    """Count the pool's keys from ``low`` to ``low + width`` in even bins of ``2 ** shift``; returns those below."""
    below = tl.zeros((WARPS, 32), tl.int32)
    for start in range(0, num_listed, WARPS * 32):
        place = start + thread_index(WARPS)
        below = _run(
            _COUNT_PAIR, "=&r,r,r,r,r,r,r,r,r",
            [below, place, num_listed, low, width, shift, space, space + _POOL],
        )  # fmt: skip
    return below


@triton.jit
def _load_pair(space, place, num_listed):
    """A key and its position."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.s32 p, $3, $4; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.shared.v2.b32 {$0, $1}, [$2]; }",
        "=&r,=&r,r,r,r",
        [space + _POOL + place * 8, place, num_listed],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def add_above(space, numbers):
    """Add every thread's number to what ``num_above`` returns after a barrier."""
    add_shared(space + _NUM_ABOVE, numbers)


@triton.jit
def num_above(space):
    return load_shared(space + _NUM_ABOVE)


@triton.jit
def mark_pairs(space, num_listed, marked, noted, WARPS: tl.constexpr):
    """Mark the positions of keys up to ``marked`` in the pool, and note the pairs of others up to ``noted``.

    At most NEAR_LEN may be to note.
    """
    for start in range(0, num_listed, 2 * WARPS * 32):
        place = start + thread_index(WARPS)
        other = place + WARPS * 32
        keys, positions = _load_pair(space, place, num_listed)
        other_keys, other_positions = _load_pair(space, other, num_listed)
        _mark_pair(space, keys, positions, place, num_listed, marked, noted)
        _mark_pair(space, other_keys, other_positions, other, num_listed, marked, noted)


@triton.jit
def _mark_pair(space, key, position, place, num_listed, marked, noted):
    _run(
        _MARK_PAIR, "=&r,r,r,r,r,r,r,r,r,r",
        [space + _BITS, key, position, place, num_listed, marked, noted, space + _NEAR, space + _NUM_NEAR],
    )  # fmt: skip


@triton.jit
def mark_near(space, num_near, num_kept, WARPS: tl.constexpr):
    """Mark the ``num_kept`` best of the pairs that were noted. Among equal keys lower positions are better."""
    _run(_MARK_NEAR, "=&r,r,r,r,r,r", [space + _BITS, space + _NEAR, thread_index(WARPS), num_near, num_kept])


@triton.jit
def stage_marked(space, NUM: tl.constexpr, WARPS: tl.constexpr):
    """Stage the marked of the first ``NUM * THREADS * 32`` positions in ascending order; a barrier is in it."""
    thread = thread_index(WARPS)
    words = ()
    number = tl.zeros((WARPS, 32), tl.int32)
    for j in tl.static_range(NUM):
        word = load_shared(space + _BITS + (thread * NUM + j) * 4)
        words = words + (word,)  # noqa: RUF005
        number += count_bits(word)
    address = space + _POOL + sum_before(space, number, WARPS) * 4
    for j in tl.static_range(NUM):
        address = _run(_STAGE_BITS, "=&r,r,r,r", [address, words[j], (thread * NUM + j) * 32])


@triton.jit
def read_staged(space, rank, mask):
    """The position staged at each rank, 0 where masked off."""
    return _run(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.shared.b32 $0, [$1]; }",
        "=&r,r,r",
        [space + _POOL + rank * 4, mask.to(tl.int32)],
    )


@triton.jit
def load_bits(address, mask, OTHER: tl.constexpr):
    """32 bits of global memory, OTHER where masked off.

    Triton would move a gather's operands to a layout it thinks coalesced, through shared memory.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, $3; @p ld.global.b32 $0, [$1]; }",
        "=&r,l,r,r",
        [address.to(tl.int64), mask.to(tl.int32), OTHER],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_samples(row, n, SAMPLES: tl.constexpr, WARPS: tl.constexpr):
    """SAMPLES of a row's ``n`` logits, spread over it irregularly, as bits."""
    stride = n // SAMPLES
    rest = n % SAMPLES
    samples = ()
    for start in tl.static_range(0, SAMPLES, WARPS * 32):
        number = start + thread_index(WARPS)
        shift = tl.umulhi((number * -1640531527).to(tl.uint32, bitcast=True), stride.to(tl.uint32))
        position = number * stride + number * rest // SAMPLES + shift.to(tl.int32)
        samples = samples + (load_bits(row + position, position < n, 0x7FFFFFFF).to(tl.float32, bitcast=True),)  # noqa: RUF005
    return samples
