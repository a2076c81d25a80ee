"""Device code of attention over lists of cache slots, shared by the kernel files of ``sparse_mla``.

Hides how gathered rows become matrix operands, and how a list cut into splits is put together again.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportOptionalOperand=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

from nextn.ops.sparse_mla._triton_union import _locate_tile

_LATENT: tl.constexpr = tl.constexpr(512)
_ROPE: tl.constexpr = tl.constexpr(64)
_SCALES: tl.constexpr = tl.constexpr(4)
_LARGEST_SCALE: tl.constexpr = tl.constexpr(127.0)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _decode_by_ptx(codes, factors):
    """bfloat16 products of uint8 e4m3 codes and factors, each factor twice in an int32: value * factor * 2^-120.

    A code's exponent and mantissa, moved to their places in a bfloat16, stand for the value times 2^-120, subnormals
    included; the multiplication puts that right together with the scale. Five instructions for two values less one
    half, where the conversion instructions by way of float16 and float32 take twice as many, at a lower rate.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a, b, z; mov.b32 z, 0x80008000;"
        " prmt.b32 a, $2, 0, 0x9180; prmt.b32 b, $2, 0, 0xB3A2;"  # sign-extended to 16 bits each
        " shl.b32 a, a, 4; shl.b32 b, b, 4; and.b32 a, a, 0x87F087F0; and.b32 b, b, 0x87F087F0;"
        " fma.rn.bf16x2 $0, a, $3, z; fma.rn.bf16x2 $1, b, $3, z; }",
        "=r,=r,r,r,r,r,r",
        [codes, factors],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _decode_by_integers(codes, scales, DTYPE: tl.constexpr):
    """Products of uint8 e4m3 codes and FP32 scales, on any GPU."""
    wide = codes.to(tl.uint16)
    shifted = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return (shifted.to(tl.float16, bitcast=True).to(tl.float32) * (scales * 256.0)).to(DTYPE)


@triton.jit
def _round_to(values, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """FP32 values to the nearest of a dtype; the interpreter cuts bits off when it makes bfloat16, hence BY_HAND."""
    if BY_HAND and tl.bfloat16 == DTYPE:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(DTYPE)


@triton.jit
def _expand_scales(scales, TILE: tl.constexpr):
    """[TILE, 4] to [TILE, 512], each for 128 latents."""
    wide = tl.broadcast_to(scales[:, :, None], (TILE, _SCALES, _LATENT // _SCALES))
    return tl.reshape(wide, (TILE, _LATENT))


@triton.jit
def _load_latents(cache, starts, valid, TILE: tl.constexpr, IS_FP8: tl.constexpr, BY_PTX: tl.constexpr,
                  DOT_DTYPE: tl.constexpr):  # fmt: skip
    """Latents [TILE, 512] of rows that begin at ``starts`` bytes, zero where not valid, and what spoils a row, [TILE].

    A scale that is NaN, infinite or above 127 spoils its row: the latents become zero, and what is returned NaN.
    """
    codes_ptr, scales_ptr, rope_ptr = cache
    offs_d = tl.arange(0, _LATENT)
    if IS_FP8:
        codes = tl.load(codes_ptr + starts[:, None] + offs_d[None, :], mask=valid[:, None], other=0)
        scale_ptrs = scales_ptr + ((starts + _LATENT) // 4)[:, None] + tl.arange(0, _SCALES)[None, :]
        scales = tl.load(scale_ptrs, mask=valid[:, None], other=0.0)
        is_sound = tl.abs(scales) <= _LARGEST_SCALE
        spoiled = tl.max(tl.where(is_sound, 0, 1), axis=1)
        scales = tl.where(is_sound, scales, 0.0)
        if BY_PTX:
            half = (scales * 2.0**120).to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.int32)
            latents = _decode_by_ptx(codes, _expand_scales(half | (half << 16), TILE))
        else:
            latents = _decode_by_integers(codes, _expand_scales(scales, TILE), DOT_DTYPE)
    else:
        latents = tl.load(
            rope_ptr + (starts // 2)[:, None] + offs_d[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        spoiled = tl.zeros((TILE,), tl.int32)
    return latents.to(DOT_DTYPE), spoiled


@triton.jit
def _locate_rows(slots, num_slots, page_stride, PAGE: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Byte where the row of each slot begins, and which slots lie inside the cache."""
    valid = (slots >= 0) & (slots < num_slots)
    inside = tl.where(valid, slots, 0)
    starts = (inside // PAGE).to(tl.int64) * page_stride + (inside % PAGE) * ROW_BYTES
    return starts, valid


@triton.jit
def _attend_kernel(
    q_ptr, codes_ptr, scales_ptr, rope_ptr, list_ptr, masks_ptr, counts_ptr, age_ptr, out_ptr, lse_ptr, parts_ptr,
    part_lse_ptr,
    q_row_stride, q_head_stride, page_stride, list_stride, out_row_stride, out_head_stride,
    num_rows, heads, num_slots, list_len, split_len, score_scale,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr, IS_FP8: tl.constexpr, IS_UNION: tl.constexpr, TRANSPOSED: tl.constexpr,
    BY_PTX: tl.constexpr, DOT_DTYPE: tl.constexpr, LIST_BLOCK: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    ROW_BYTES: tl.constexpr = 656 if IS_FP8 else 1152
    ROPE_START: tl.constexpr = 264 if IS_FP8 else 512  # in bfloat16s
    group = tl.program_id(0)
    split = tl.program_id(2)
    # Columns or rows of the products: (token, head) pairs.
    pair = tl.arange(0, PAIRS)
    token = pair // GROUP
    head = tl.program_id(1) * GROUP + pair % GROUP
    SUBGROUPS: tl.constexpr = (DEPTH + TOKENS - 1) // TOKENS
    first_row = (group // SUBGROUPS) * DEPTH + (group % SUBGROUPS) * TOKENS
    stop_row = tl.minimum(tl.minimum(first_row + TOKENS, (group // SUBGROUPS + 1) * DEPTH), num_rows)
    row = (first_row + token).to(tl.int64)
    is_pair = (row < stop_row) & (head < heads)
    q_rows = q_ptr + row * q_row_stride + head * q_head_stride
    offs_d = tl.arange(0, _LATENT)
    offs_r = tl.arange(0, _ROPE)
    q_latent = tl.load(q_rows[:, None] + offs_d[None, :], mask=is_pair[:, None], other=0.0).to(DOT_DTYPE)
    q_rope = tl.load(q_rows[:, None] + _LATENT + offs_r[None, :], mask=is_pair[:, None], other=0.0).to(DOT_DTYPE)

    slots_ptr = list_ptr + group.to(tl.int64) * list_stride
    counts_ptr += group * TOKENS
    masks_ptr += group.to(tl.int64) * list_stride
    if IS_UNION:
        num_tiles = group * 0
        for part in tl.static_range(TOKENS):
            num_tiles += tl.cdiv(tl.load(counts_ptr + part), TILE)
        first_tile = split * num_tiles // SPLITS
        stop_tile = (split + 1) * num_tiles // SPLITS
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (split == 0):
            tl.store(age_ptr, tl.load(age_ptr) + 1)
    else:
        first_tile = split * split_len // TILE
        stop = tl.minimum(split * split_len + split_len, list_len)
        stop = _find_stop(slots_ptr, split * split_len, stop, num_slots, LIST_BLOCK)
        stop_tile = tl.cdiv(stop, TILE)

    largest = tl.full((PAIRS,), float("-inf"), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    if TRANSPOSED:
        acc = tl.zeros((_LATENT, PAIRS), tl.float32)
    else:
        acc = tl.zeros((PAIRS, _LATENT), tl.float32)
    offs_s = tl.arange(0, TILE)
    for tile in tl.range(first_tile, stop_tile, num_stages=NUM_STAGES):
        if IS_UNION:
            start, stop = _locate_tile(tile, counts_ptr, list_len, TOKENS, TILE)
        else:
            start = tile * TILE
        place = start + offs_s
        slots = tl.load(slots_ptr + place, mask=place < stop, other=-1)
        starts, valid = _locate_rows(slots, num_slots, page_stride, PAGE, ROW_BYTES)
        latents, spoiled = _load_latents(
            (codes_ptr, scales_ptr, rope_ptr),
            starts,
            valid,
            TILE,
            IS_FP8,
            BY_PTX,
            DOT_DTYPE,
        )
        ropes = tl.load(
            rope_ptr + (starts // 2)[:, None] + ROPE_START + offs_r[None, :],
            mask=valid[:, None],
            other=0.0,
        ).to(DOT_DTYPE)
        if IS_UNION:
            bits = tl.load(masks_ptr + place, mask=place < stop, other=0)
        if TRANSPOSED:
            scores = tl.dot(latents, tl.trans(q_latent))  # [TILE, PAIRS]
            scores = tl.dot(ropes, tl.trans(q_rope), scores) * score_scale
            if IS_FP8:
                scores = tl.where(spoiled[:, None] != 0, float("nan"), scores)
            if IS_UNION:
                scores = tl.where(((bits[:, None] >> token[None, :]) & 1) != 0, scores, float("-inf"))
            else:
                scores = tl.where(valid[:, None], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=0))
            reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp2(scores - reference[None, :])
            decay = tl.exp2(largest - reference)
            total = total * decay + tl.sum(weights, axis=0)
            acc = acc * decay[None, :]
            acc = tl.dot(tl.trans(latents), weights.to(DOT_DTYPE), acc)
        else:
            scores = tl.dot(q_latent, tl.trans(latents))  # [PAIRS, TILE]
            scores = tl.dot(q_rope, tl.trans(ropes), scores) * score_scale
            if IS_FP8:
                scores = tl.where(spoiled[None, :] != 0, float("nan"), scores)
            if IS_UNION:
                scores = tl.where(((bits[None, :] >> token[:, None]) & 1) != 0, scores, float("-inf"))
            else:
                scores = tl.where(valid[None, :], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, axis=1))
            reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp2(scores - reference[:, None])
            decay = tl.exp2(largest - reference)
            total = total * decay + tl.sum(weights, axis=1)
            acc = acc * decay[:, None]
            acc = tl.dot(weights.to(DOT_DTYPE), latents, acc)
        largest = new_largest

    divisor = tl.where(total == 0.0, 1.0, total)
    inverse = 1.0 / divisor
    lse = (largest + tl.log2(divisor)) * _LN2  # largest is minus infinity where the total is 0
    pair_id = row * heads + head
    if SPLITS == 1:
        tl.store(lse_ptr + pair_id, lse, mask=is_pair)
        out_rows = out_ptr + row * out_row_stride + head * out_head_stride
    else:
        tl.store(part_lse_ptr + pair_id * SPLITS + split, lse, mask=is_pair)
        out_rows = parts_ptr + (pair_id * SPLITS + split) * _LATENT
    if TRANSPOSED:
        values = tl.trans(acc * inverse[None, :])
    else:
        values = acc * inverse[:, None]
    tl.store(
        out_rows[:, None] + offs_d[None, :],
        _round_to(values, out_rows.dtype.element_ty, tl.float32 == DOT_DTYPE),
        mask=is_pair[:, None],
    )


@triton.jit
def _find_stop(slots_ptr, first, stop, num_slots, BLOCK: tl.constexpr):
    """One past the last slot inside the cache among ``[first, stop)``, or ``first``."""
    found = first
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        slots = tl.load(slots_ptr + place, mask=place < stop, other=-1)
        found = tl.maximum(found, tl.max(tl.where((slots >= 0) & (slots < num_slots), place + 1, 0)))
    return found


@triton.jit
def _combine_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, num_pairs, heads, out_row_stride, out_head_stride,
    SPLITS: tl.constexpr, PAIRS: tl.constexpr, IS_DEPENDENT: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The weighted sums of the splits' outputs of (row, head) pairs, in one order whatever finished first.

    IS_DEPENDENT: launched before the attention has ended, to be set up meanwhile.
    """
    if IS_DEPENDENT:
        _wait_for_primary()
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair < num_pairs
    offs_d = tl.arange(0, _LATENT)
    largest = tl.full((PAIRS,), float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        lse = tl.load(part_lse_ptr + pair * SPLITS + split, mask=is_pair, other=float("-inf"))
        largest = tl.maximum(largest, lse)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros((PAIRS,), tl.float32)
    out = tl.zeros((PAIRS, _LATENT), tl.float32)
    for split in tl.static_range(SPLITS):
        lse = tl.load(part_lse_ptr + pair * SPLITS + split, mask=is_pair, other=float("-inf"))
        share = tl.exp(lse - reference)
        total += share
        part_ptrs = parts_ptr + (pair * SPLITS + split)[:, None] * _LATENT + offs_d[None, :]
        out += tl.load(part_ptrs, mask=is_pair[:, None], other=0.0).to(tl.float32) * share[:, None]
    divisor = tl.where(total == 0.0, 1.0, total)
    row, head = pair // heads, pair % heads
    tl.store(lse_ptr + pair, largest + tl.log(divisor), mask=is_pair)
    out_ptrs = out_ptr + (row * out_row_stride + head * out_head_stride)[:, None] + offs_d[None, :]
    out = _round_to(out / divisor[:, None], out_ptr.dtype.element_ty, IS_INTERPRETED)
    tl.store(out_ptrs, out, mask=is_pair[:, None])


@triton.jit
def _wait_for_primary():
    """Until the kernel before has ended and its writes can be read; NVIDIA from SM90."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
