"""Sums over index heads where a Hopper product leaves them, for ``gluon_sm90.py``.

Hides which lane and register of a warpgroup holds which key, row and head. A product is [64, ROWS * HEADS], keys by
(row, head) pairs: lane ``4 * octet + lane`` of a warp holds keys ``octet`` and ``octet + 8`` of the warp's sixteen, and
of each row the heads ``8 * i + 2 * lane`` and the next, for every i.

Order of a sum, the same for every row wherever it stands: a chain over a lane's heads, ascending, then the lane two
apart, then the neighbour. Ascending heads lie in registers of either bank in turn: in the order that splitting leaves
them in, all even ones first, the kernel took 234.8 us, not 230.9, at 64 x 32768 and eight rows, 135.5, not 134.9, at
four (an H100; both in one run).
"""

# Triton's types describe host values; device code is checked by the compile gate.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# [64, 2] of (token, row), one a lane: lane bit 0 is bit 3 of the token, lane bit 1 the row, as sums come to lie.
LOGITS_LAYOUT = gl.DistributedLinearLayout(
    reg_bases=[],
    lane_bases=[[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]],
    warp_bases=[[16, 0], [32, 0]],
    block_bases=[],
    shape=[64, 2],
)


@gluon.jit
def split_heads(x, ROWS: gl.constexpr, HEADS: gl.constexpr):
    """A product [64, ROWS * HEADS] as HEADS / 4 tensors [4, 8, 4, ROWS, 2] of (warp, octet, lane, row, token bit 3).

    Columns are (row, 8 * i + 2 * lane + c); each tensor is one (i, c), one register per row and token of a lane.
    """
    x = x.reshape([4, 2, 8, ROWS, HEADS // 8, 4, 2]).permute((0, 2, 5, 3, 1, 4, 6))
    parts = (x.reshape([4, 8, 4, ROWS, 2, HEADS // 4]),)
    for _ in gl.static_range(4 if HEADS == 64 else 3):
        halves = ()
        for i in gl.static_range(len(parts)):
            even, odd = gl.split(parts[i].reshape([4, 8, 4, ROWS, 2, parts[i].shape[5] // 2, 2]))
            halves += (even, odd)
        parts = halves
    flat = ()
    for i in gl.static_range(len(parts)):
        flat += (parts[i].reshape([4, 8, 4, ROWS, 2]),)
    return flat


@gluon.constexpr_function
def _place(i, size):
    """Where the i-th of a lane's heads is among the parts that halving them again and again leaves."""
    place = 0
    while size > 1:
        place, i, size = place * 2 + i % 2, i // 2, size // 2
    return place


@gluon.jit
def sum_own_heads(products, halves):
    """Weighted sum over the heads a lane holds, in order.

    x + |x| is twice the ReLU, exactly, and the weights are halved: an add with a free absolute value, which the
    multiply-add units take at twice the rate of a maximum.
    """
    total = (products[0] + gl.abs(products[0])) * halves[0]
    for i in gl.static_range(1, len(products)):
        total = gl.fma(
            products[_place(i, len(products))] + gl.abs(products[_place(i, len(products))]),
            halves[_place(i, len(products))],
            total,
        )
    return total


@gluon.jit
def _sum_two_rows(x):
    """Sum [4, 8, 4, 2, 2] of (warp, octet, lane, row, token bit 3) over lanes, which leaves [64, 2] of (token, row).

    Lanes two apart exchange one row each, then neighbours one token each: lane bit 1 says which row a lane keeps, lane
    bit 0 which token.
    """
    early, late = gl.split(x)
    early_0, early_1 = gl.split(early)
    late_0, late_1 = gl.split(late)
    total = gl.inline_asm_elementwise(
        """{
        .reg .pred %row, %token;
        .reg .b32 %bit, %keep, %give, %early, %late;
        mov.u32 %bit, %laneid;
        and.b32 %keep, %bit, 2;
        setp.ne.b32 %row, %keep, 0;
        and.b32 %keep, %bit, 1;
        setp.ne.b32 %token, %keep, 0;
        selp.b32 %keep, $2, $1, %row;
        selp.b32 %give, $1, $2, %row;
        shfl.sync.bfly.b32 %give, %give, 2, 31, -1;
        add.f32 %early, %keep, %give;
        selp.b32 %keep, $4, $3, %row;
        selp.b32 %give, $3, $4, %row;
        shfl.sync.bfly.b32 %give, %give, 2, 31, -1;
        add.f32 %late, %keep, %give;
        selp.b32 %keep, %late, %early, %token;
        selp.b32 %give, %early, %late, %token;
        shfl.sync.bfly.b32 %give, %give, 1, 31, -1;
        add.f32 $0, %keep, %give;
        }""",
        "=f,f,f,f,f",
        [early_0, early_1, late_0, late_1],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return _place_logits(total)


@gluon.jit
def _sum_one_row(x):
    """As :func:`_sum_two_rows`, and in its order, for [4, 8, 4, 1, 2]; both lanes of a row get the same."""
    early, late = gl.split(x)
    total = gl.inline_asm_elementwise(
        """{
        .reg .pred %token;
        .reg .b32 %bit, %keep, %give, %early, %late;
        mov.u32 %bit, %laneid;
        and.b32 %keep, %bit, 1;
        setp.ne.b32 %token, %keep, 0;
        shfl.sync.bfly.b32 %give, $1, 2, 31, -1;
        add.f32 %early, $1, %give;
        shfl.sync.bfly.b32 %give, $2, 2, 31, -1;
        add.f32 %late, $2, %give;
        selp.b32 %keep, %late, %early, %token;
        selp.b32 %give, %early, %late, %token;
        shfl.sync.bfly.b32 %give, %give, 1, 31, -1;
        add.f32 $0, %keep, %give;
        }""",
        "=f,f,f",
        [early.reshape([4, 8, 4]), late.reshape([4, 8, 4])],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return _place_logits(total)


@gluon.jit
def _place_logits(total):
    """[4, 8, 4] of (warp, octet, lane) as [64, 2] of (token, row); nothing moves."""
    total = total.reshape([4, 8, 2, 2]).permute((0, 3, 1, 2)).reshape([64, 2])
    return gl.convert_layout(total, LOGITS_LAYOUT, assert_trivial=True)


@gluon.jit
def sum_lanes(x, ROWS: gl.constexpr):
    """[64, 2] of (token, row) for every two rows."""
    if ROWS == 1:
        return (_sum_one_row(x),)
    elif ROWS == 2:
        return (_sum_two_rows(x),)
    else:
        low, high = gl.split(x.reshape([4, 8, 4, 2, 2, 2]).permute((0, 1, 2, 4, 5, 3)))
        return (_sum_two_rows(low), _sum_two_rows(high))
