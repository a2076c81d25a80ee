"""Device code of attention over lists of cache slots for Hopper: decoding, scoring and weighted sums side by side.

Hides buffers, barriers and layouts. One warpgroup decodes latents into shared memory, two buffers of them; one scores
them, turns scores into weights and sums half of the output's columns; one sums the other half.
"""

# Device code is Gluon's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportOptionalOperand=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nextn.ops._gluon_names import barrier, copy_async, reinterpret

_PAIRS = gl.constexpr(64)
_TILE = gl.constexpr(64)
_QUARTER = gl.constexpr(16)
_LATENT = gl.constexpr(512)
_HALF = gl.constexpr(256)
_ROPE = gl.constexpr(64)
_CHUNK = gl.constexpr(128)  # latents that share a scale
_ROW_BYTES = gl.constexpr(656)
_LARGEST_SCALE = gl.constexpr(127.0)
_LN2 = gl.constexpr(0.6931471805599453)

# Layouts of four warps.
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_OUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
_CODES = gl.constexpr(gl.BlockedLayout([1, 1, 2], [2, 1, 16], [4, 1, 1], [2, 1, 0]))
_SCALES = gl.constexpr(gl.BlockedLayout([1, 2], [32, 1], [4, 1], [1, 0]))
_ROPES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_QUERIES = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
_CODES_ROW = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, _CODES.value)))
_SCALES_ROW = gl.constexpr(gl.SliceLayout(1, _SCALES.value))
_ROPES_ROW = gl.constexpr(gl.SliceLayout(1, _ROPES.value))
_ROW = gl.constexpr(gl.SliceLayout(1, _SCORES.value))
_COLUMN = gl.constexpr(gl.SliceLayout(0, _SCORES.value))
_OUT_ROW = gl.constexpr(gl.SliceLayout(1, _OUT.value))


@gluon.jit
def _decode(codes, factors):
    """Four e4m3 codes in an int32 times two factors in an int32, as two int32 of two bfloat16 each.

    Words, since registers that live through a loop hold a byte each otherwise; see ``_triton_attend._decode_by_ptx``.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a, b, z; mov.b32 z, 0x80008000;"
        " prmt.b32 a, $2, 0, 0x9180; prmt.b32 b, $2, 0, 0xB3A2;"
        " shl.b32 a, a, 4; shl.b32 b, b, 4; and.b32 a, a, 0x87F087F0; and.b32 b, b, 0x87F087F0;"
        " fma.rn.bf16x2 $0, a, $3, z; fma.rn.bf16x2 $1, b, $3, z; }",
        "=r,=r,r,r",
        [codes, factors],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _locate_pairs(rows, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Row, int64, and head of each (row, head) pair, and which of them exist."""
    first_row, stop_row, first_head, heads = rows
    pair = gl.arange(0, _PAIRS, layout=LAYOUT)
    row = first_row + pair // GROUP
    head = first_head + pair % GROUP
    return row.to(gl.int64), head, (row < stop_row) & (head < heads)


@gluon.jit
def _locate_tile(parts, tile, TILE: gl.constexpr):
    """Where in a list a tile begins and its part ends; past the last tile nothing lies between them."""
    start, stop = tile * TILE, parts[0][2]
    for part in gl.static_range(1, len(parts)):
        first_tile, shift, part_stop = parts[part]
        start = gl.where(tile >= first_tile, tile * TILE + shift, start)
        stop = gl.where(tile >= first_tile, part_stop, stop)
    return start, stop


@gluon.jit
def _find_parts(counts_ptr, topk, TOKENS: gl.constexpr, TILE: gl.constexpr):
    """Of each part of a list its first tile, what is to be added to a tile's number times TILE, and its end."""
    num_tiles = topk * 0
    parts = ()
    for part in gl.static_range(TOKENS):
        count = gl.load(counts_ptr + part)
        parts += ((num_tiles, part * topk - num_tiles * TILE, part * topk + count),)
        num_tiles += gl.cdiv(count, TILE)
    return parts, num_tiles


@gluon.jit
def _load_slots(list_ptr, first, stop, num_slots, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Slots ``[first, first + SIZE)`` of a list; -1 past ``stop`` and for slots outside the cache."""
    place = first + gl.arange(0, SIZE, layout=LAYOUT)
    slots = gl.load(list_ptr + place, mask=place < stop, other=-1)
    return gl.where((slots >= 0) & (slots < num_slots), slots, -1)


@gluon.jit
def _load_tile(list_ptr, parts, tile, num_slots):
    """A tile's slots: a quarter at a time as codes are loaded, and in the layouts that copy scales and ropes."""
    first, stop = _locate_tile(parts, tile, _TILE)
    quarters = ()
    for quarter in gl.static_range(_TILE // _QUARTER):
        quarters += (_load_slots(list_ptr, first + quarter * _QUARTER, stop, num_slots, _QUARTER, _CODES_ROW),)
    scales = _load_slots(list_ptr, first, stop, num_slots, _TILE, _SCALES_ROW)
    ropes = _load_slots(list_ptr, first, stop, num_slots, _TILE, _ROPES_ROW)
    return quarters, scales, ropes


@gluon.jit
def _locate_slots(slots, page_stride, PAGE: gl.constexpr, IS_DENSE: gl.constexpr):
    """Byte where each slot's row begins, a multiple of 16; below 0 for no slot."""
    if IS_DENSE:
        return slots.to(gl.int64) * _ROW_BYTES
    starts = (slots // PAGE).to(gl.int64) * page_stride + (slots % PAGE) * _ROW_BYTES
    return gl.where(slots >= 0, starts, -16)


@gluon.jit
def _load_codes(codes_ptr, slots, half, page_stride, PAGE: gl.constexpr, IS_DENSE: gl.constexpr):
    """Codes of half the latents of a quarter of a tile, four to an int32: [16, 2, 32]."""
    row = _locate_slots(slots, page_stride, PAGE, IS_DENSE)[:, None, None] // 4
    offs_c = half * (_HALF // 4) + (_CHUNK // 4) * gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, _CODES)))
    offs_d = gl.arange(0, _CHUNK // 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, _CODES)))
    offsets = row + offs_c[None, :, None] + offs_d[None, None, :]
    return gl.load(codes_ptr + offsets, mask=(slots >= 0)[:, None, None], other=0)


@gluon.jit
def _copy_scales(scales_ptr, slots, target, buffer, page_stride, PAGE: gl.constexpr, IS_DENSE: gl.constexpr):
    """Begin to copy a tile's scales to shared memory; those of no slot become zero."""
    row = (_locate_slots(slots, page_stride, PAGE, IS_DENSE) + _LATENT)[:, None] // 4
    offs = gl.arange(0, 2, layout=gl.SliceLayout(0, _SCALES))[None, :]
    copy_async(target.index(buffer * 2), scales_ptr + row + offs, mask=(slots >= 0)[:, None])
    copy_async(target.index(buffer * 2 + 1), scales_ptr + row + (offs + 2), mask=(slots >= 0)[:, None])
    async_copy.commit_group()


@gluon.jit
def _copy_ropes(ropes_ptr, slots, target, page_stride, PAGE: gl.constexpr, IS_DENSE: gl.constexpr):
    """Begin to copy a tile's rope values to shared memory; those of no slot become zero."""
    row = (_locate_slots(slots, page_stride, PAGE, IS_DENSE) + (_LATENT + 16))[:, None] // 2
    offs = gl.arange(0, _ROPE, layout=gl.SliceLayout(0, _ROPES))[None, :]
    copy_async(target, ropes_ptr + row + offs, mask=(slots >= 0)[:, None])
    async_copy.commit_group()


@gluon.jit
def _decode_quarter(codes, scales, latents, IS_UNION: gl.constexpr):
    """Decode codes, int32 [16, 2, 32], to shared memory.

    Returns which rows have a scale that spoils them, [16]; where rows share a list, their latents become zero, for the
    sake of the rows that did not select them.
    """
    factors = scales.load(gl.SliceLayout(2, _CODES))  # [16, 2]
    is_sound = gl.abs(factors) <= _LARGEST_SCALE
    if IS_UNION:
        factors = gl.where(is_sound, factors, 0.0)
    half = (factors * 1.329227995784916e36).to(gl.bfloat16)  # 2^120
    half = half.to(gl.uint16, bitcast=True).to(gl.int32)
    low, high = _decode(codes, (half | (half << 16))[:, :, None])
    latents.store(gl.reshape(gl.join(low, high), [_QUARTER, _HALF // 2]))
    return gl.max(gl.where(is_sound, 0, 1), axis=1).to(gl.int8)


@gluon.jit
def _produce(
    codes_ptr, scales_ptr, ropes_ptr, list_ptr, parts, first_tile, stop_tile, num_slots, page_stride,
    left, right, ropes, scales, spoils, filled_bars, empty_bars,
    PAGE: gl.constexpr, IS_DENSE: gl.constexpr, IS_UNION: gl.constexpr,
):  # fmt: skip
    """Decode tiles into two buffers in turn. Codes are loaded a tile ahead, a quarter as soon as one is decoded."""
    quarters, scale_slots, rope_slots = _load_tile(list_ptr, parts, first_tile, num_slots)
    _copy_scales(scales_ptr, scale_slots, scales, 0, page_stride, PAGE, IS_DENSE)
    codes = ()
    for quarter in gl.static_range(4):
        codes += (
            _load_codes(codes_ptr, quarters[quarter], 0, page_stride, PAGE, IS_DENSE),
            _load_codes(codes_ptr, quarters[quarter], 1, page_stride, PAGE, IS_DENSE),
        )
    quarters, scale_slots, next_rope_slots = _load_tile(list_ptr, parts, first_tile + 1, num_slots)
    for tile in range(first_tile, stop_tile):
        count = tile - first_tile
        buffer = count % 2
        mbarrier.wait(empty_bars.index(buffer), (count // 2) % 2 ^ 1)
        _copy_ropes(ropes_ptr, rope_slots, ropes.index(buffer), page_stride, PAGE, IS_DENSE)
        _copy_scales(scales_ptr, scale_slots, scales, buffer ^ 1, page_stride, PAGE, IS_DENSE)
        async_copy.wait_group(2)  # this tile's scales
        next_codes = ()
        for quarter in gl.static_range(4):
            own_scales = scales.index(buffer * 2).slice(quarter * _QUARTER, _QUARTER)
            own_left = left.index(buffer).slice(quarter * _QUARTER, _QUARTER)
            left_spoils = _decode_quarter(codes[2 * quarter], own_scales, own_left, IS_UNION)
            own_scales = scales.index(buffer * 2 + 1).slice(quarter * _QUARTER, _QUARTER)
            own_right = right.index(buffer).slice(quarter * _QUARTER, _QUARTER)
            right_spoils = _decode_quarter(codes[2 * quarter + 1], own_scales, own_right, IS_UNION)
            if IS_UNION:
                spoils.index(buffer).slice(quarter * _QUARTER, _QUARTER).store(gl.maximum(left_spoils, right_spoils))
            next_codes += (
                _load_codes(codes_ptr, quarters[quarter], 0, page_stride, PAGE, IS_DENSE),
                _load_codes(codes_ptr, quarters[quarter], 1, page_stride, PAGE, IS_DENSE),
            )
        async_copy.wait_group(1)  # this tile's ropes
        fence_async_shared()
        mbarrier.arrive(filled_bars.index(buffer), count=1)
        codes = next_codes
        rope_slots = next_rope_slots
        quarters, scale_slots, next_rope_slots = _load_tile(list_ptr, parts, tile + 2, num_slots)
    async_copy.wait_group(0)


@gluon.jit
def _score(
    list_ptr, masks_ptr, parts, first_tile, stop_tile, num_slots, score_scale,
    q, q_rope, left, right, ropes, spoils, weights_smem, decays, filled_bars, empty_bars, weighed_bars, summed_bars,
    rows, out_ptr, out_row_stride, out_head_stride, lse_ptr, lse_row_stride, lse_head_stride,
    GROUP: gl.constexpr, IS_UNION: gl.constexpr,
):  # fmt: skip
    """Score tiles, hand their weights on, and sum the left half of the output; then store it and the lse."""
    zeros = gl.zeros([_PAIRS, _TILE], gl.float32, _SCORES)
    token = gl.arange(0, _PAIRS, layout=_ROW) // GROUP
    largest = gl.full([_PAIRS], float("-inf"), gl.float32, _ROW)
    total = gl.zeros([_PAIRS], gl.float32, _ROW)
    acc = gl.zeros([_PAIRS, _HALF], gl.float32, _OUT)
    for tile in range(first_tile, stop_tile):
        count = tile - first_tile
        buffer = count % 2
        first, stop = _locate_tile(parts, tile, _TILE)
        if IS_UNION:
            place = first + gl.arange(0, _TILE, layout=_COLUMN)
            bits = gl.load(masks_ptr + place, mask=place < stop, other=0)
        else:
            bits = _load_slots(list_ptr, first, stop, num_slots, _TILE, _COLUMN)
        mbarrier.wait(filled_bars.index(buffer), (count // 2) % 2)
        scores = warpgroup_mma(q.index(0), left.index(buffer).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma(q.index(1), right.index(buffer).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma(q_rope, ropes.index(buffer).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = scores * score_scale
        if IS_UNION:
            scores = gl.where(spoils.index(buffer).load(_COLUMN)[None, :] != 0, float("nan"), scores)
            scores = gl.where(((bits[None, :] >> token[:, None]) & 1) != 0, scores, float("-inf"))
        else:
            scores = gl.where(bits[None, :] >= 0, scores, float("-inf"))
        new_largest = gl.maximum(largest, gl.max(scores, axis=1))
        reference = gl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = gl.exp2(scores - reference[:, None])
        decay = gl.exp2(largest - reference)
        total = total * decay + gl.sum(weights, axis=1)
        largest = new_largest
        weights = weights.to(gl.bfloat16)
        mbarrier.wait(summed_bars, count % 2 ^ 1)
        weights_smem.store(weights)
        decays.store(decay)
        fence_async_shared()
        mbarrier.arrive(weighed_bars, count=1)
        acc = acc * gl.convert_layout(decay, _OUT_ROW)[:, None]
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, _OUT, 2))
        acc = warpgroup_mma(operand, left.index(buffer), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty_bars.index(buffer), count=1)

    divisor = gl.where(total == 0.0, 1.0, total)
    mbarrier.wait(summed_bars, (stop_tile - first_tile) % 2 ^ 1)
    decays.store(1.0 / divisor)
    mbarrier.arrive(weighed_bars, count=1)
    lse = (largest + gl.log2(divisor)) * _LN2  # largest is minus infinity where the total is 0
    row, head, is_pair = _locate_pairs(rows, GROUP, _ROW)
    gl.store(lse_ptr + row * lse_row_stride + head * lse_head_stride, lse, mask=is_pair)
    inverse = gl.convert_layout(1.0 / divisor, _OUT_ROW)
    _store_half(acc * inverse[:, None], left.index(0), 0, rows, out_ptr, out_row_stride, out_head_stride, GROUP)


@gluon.jit
def _sum_right(
    num_tiles, right, weights_smem, decays, filled_bars, empty_bars, weighed_bars, summed_bars,
    rows, out_ptr, out_row_stride, out_head_stride, GROUP: gl.constexpr,
):  # fmt: skip
    """Sum the right half of the output with the weights handed on, and store it."""
    acc = gl.zeros([_PAIRS, _HALF], gl.float32, _OUT)
    for count in range(0, num_tiles):
        buffer = count % 2
        mbarrier.wait(filled_bars.index(buffer), (count // 2) % 2)
        mbarrier.wait(weighed_bars, count % 2)
        acc = acc * decays.load(_OUT_ROW)[:, None]
        acc = warpgroup_mma(weights_smem, right.index(buffer), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(summed_bars, count=1)
        mbarrier.arrive(empty_bars.index(buffer), count=1)
    mbarrier.wait(weighed_bars, num_tiles % 2)  # after which no score reads the right halves either
    _store_half(
        acc * decays.load(_OUT_ROW)[:, None], right.index(0), 1, rows, out_ptr, out_row_stride, out_head_stride, GROUP
    )


@gluon.jit
def _store_half(values, buffer, half, rows, out_ptr, out_row_stride, out_head_stride, GROUP: gl.constexpr):
    """Store half of the output by way of a buffer that is no longer used, so that threads write 16 bytes at once."""
    buffer.store(values.to(gl.bfloat16))
    row, head, is_pair = _locate_pairs(rows, GROUP, gl.SliceLayout(1, _QUERIES))
    offs_d = half * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(0, _QUERIES))
    out_rows = out_ptr + row * out_row_stride + head * out_head_stride
    gl.store(out_rows[:, None] + offs_d[None, :], buffer.load(_QUERIES), mask=is_pair[:, None])


@gluon.jit
def _load_queries(q_ptr, rows, q_row_stride, q_head_stride, q, q_rope, GROUP: gl.constexpr):
    """Queries of the program's (row, head) pairs to shared memory, zero for pairs that do not exist."""
    row, head, is_pair = _locate_pairs(rows, GROUP, gl.SliceLayout(1, _QUERIES))
    q_rows = (q_ptr + row * q_row_stride + head * q_head_stride)[:, None]
    offs_d = gl.arange(0, _HALF, layout=gl.SliceLayout(0, _QUERIES))
    for half in gl.static_range(2):
        q.index(half).store(gl.load(q_rows + (half * _HALF + offs_d)[None, :], mask=is_pair[:, None], other=0.0))
    row, head, is_pair = _locate_pairs(rows, GROUP, _ROPES_ROW)
    q_rows = (q_ptr + row * q_row_stride + head * q_head_stride)[:, None]
    offs_r = _LATENT + gl.arange(0, _ROPE, layout=gl.SliceLayout(0, _ROPES))
    q_rope.store(gl.load(q_rows + offs_r[None, :], mask=is_pair[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def _attend_sm90_kernel(
    q_ptr, codes_ptr, scales_ptr, rope_ptr, list_ptr, masks_ptr, counts_ptr, out_ptr, lse_ptr, parts_ptr,
    part_lse_ptr, q_row_stride, q_head_stride, page_stride, list_stride, out_row_stride, out_head_stride,
    num_rows, heads, num_slots, list_len, split_len, score_scale,
    TOKENS: gl.constexpr, DEPTH: gl.constexpr, GROUP: gl.constexpr, PAGE: gl.constexpr, SPLITS: gl.constexpr,
    IS_DENSE: gl.constexpr, IS_UNION: gl.constexpr,
):  # fmt: skip
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(gl.bfloat16, [2, _PAIRS, _HALF], OPERAND)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [_PAIRS, _ROPE], OPERAND)
    left = gl.allocate_shared_memory(gl.bfloat16, [2, _TILE, _HALF], OPERAND)
    right = gl.allocate_shared_memory(gl.bfloat16, [2, _TILE, _HALF], OPERAND)
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    left_words = reinterpret(left, gl.int32, [2, _TILE, _HALF // 2], WORDS)
    right_words = reinterpret(right, gl.int32, [2, _TILE, _HALF // 2], WORDS)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [2, _TILE, _ROPE], OPERAND)
    scales = gl.allocate_shared_memory(gl.float32, [4, _TILE, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    spoils = gl.allocate_shared_memory(gl.int8, [2, _TILE], FLAT)
    weights = gl.allocate_shared_memory(gl.bfloat16, [_PAIRS, _TILE], OPERAND)
    decays = gl.allocate_shared_memory(gl.float32, [_PAIRS], FLAT)
    filled_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weighed_bars = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    summed_bars = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        mbarrier.init(filled_bars.index(buffer), count=1)
        mbarrier.init(empty_bars.index(buffer), count=2)
    mbarrier.init(weighed_bars, count=1)
    mbarrier.init(summed_bars, count=1)

    group = gl.program_id(0)
    split = gl.program_id(2)
    SUBGROUPS: gl.constexpr = (DEPTH + TOKENS - 1) // TOKENS
    first_row = (group // SUBGROUPS) * DEPTH + (group % SUBGROUPS) * TOKENS
    stop_row = gl.minimum(gl.minimum(first_row + TOKENS, (group // SUBGROUPS + 1) * DEPTH), num_rows)
    rows = (first_row, stop_row, gl.program_id(1) * GROUP, heads)
    _load_queries(q_ptr, rows, q_row_stride, q_head_stride, q, q_rope, GROUP)
    _wait_for_lists()
    list_ptr += group.to(gl.int64) * list_stride
    masks_ptr += group.to(gl.int64) * list_stride
    if IS_UNION:
        parts, num_tiles = _find_parts(counts_ptr + group * TOKENS, list_len, TOKENS, _TILE)
        first_tile = split * num_tiles // SPLITS
        stop_tile = (split + 1) * num_tiles // SPLITS
    else:
        stop = gl.minimum(split * split_len + split_len, list_len)
        stop = _find_stop(list_ptr, split * split_len, stop, num_slots)
        first_tile = split * split_len // _TILE
        stop_tile = gl.cdiv(stop, _TILE)
        parts = ((first_tile, 0, stop),)
    if SPLITS > 1:
        out_ptr = parts_ptr + split * _LATENT
        out_row_stride, out_head_stride = heads * (SPLITS * _LATENT), SPLITS * _LATENT
        lse_ptr = part_lse_ptr + split
    LSE_STEP: gl.constexpr = SPLITS
    gl.warp_specialize(
        [
            (
                _score,
                (
                    list_ptr, masks_ptr, parts, first_tile, stop_tile, num_slots, score_scale,
                    q, q_rope, left, right, ropes, spoils, weights, decays,
                    filled_bars, empty_bars, weighed_bars, summed_bars,
                    rows, out_ptr, out_row_stride, out_head_stride, lse_ptr, heads * LSE_STEP, LSE_STEP,
                    GROUP, IS_UNION,
                ),
            ),
            (
                _sum_right,
                (
                    stop_tile - first_tile, right, weights, decays,
                    filled_bars, empty_bars, weighed_bars, summed_bars,
                    rows, out_ptr, out_row_stride, out_head_stride, GROUP,
                ),
            ),
            (
                _produce,
                (
                    codes_ptr, scales_ptr, rope_ptr, list_ptr, parts, first_tile, stop_tile, num_slots, page_stride,
                    left_words, right_words, ropes, scales, spoils, filled_bars, empty_bars,
                    PAGE, IS_DENSE, IS_UNION,
                ),
            ),
        ],
        [4, 4],
        [160, 128],
    )  # fmt: skip


@gluon.jit
def _wait_for_lists():
    """Until the kernel that makes the lists has ended, if this one was launched as its dependent.

    From then on this one's own dependent may set itself up.
    """
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _find_stop(list_ptr, first, stop, num_slots):
    """One past the last slot inside the cache among ``[first, stop)``, or ``first``."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    found = first
    for start in range(first, stop, 1024):
        place = start + gl.arange(0, 1024, layout=LAYOUT)
        slots = gl.load(list_ptr + place, mask=place < stop, other=-1)
        found = gl.maximum(
            found,
            gl.max(gl.where((slots >= 0) & (slots < num_slots), place + 1, 0), axis=0),
        )
    # Triton reduces in shared memory into which ``warp_specialize`` stores its arguments, and puts no barrier between.
    barrier()
    return found
