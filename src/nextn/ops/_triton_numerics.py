"""Rotation, Hadamard transform and e4m3 quantisation of rows held in registers: device functions in Triton.

Hides how a row of 64 or 128 values is spread: as a tuple of parts ``[ROWS, WIDTH]``, so that the largest strides of the
transform are additions between registers. Definitions: ``_numerics.py``; a kernel that uses these must be compiled with
``enable_fp_fusion=False``, as the reference does not fuse products and sums.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from nextn.hardware import Arch

# An FP8 conversion of their own; everywhere else e4m3 is rounded with integers.
_NATIVE_E4M3 = frozenset({Arch.SM89, Arch.SM90, Arch.SM100, Arch.SM103, Arch.SM120})

_ABSOLUTE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_AMAX_FLOOR = tl.constexpr(0x38D1B717)  # bits of 1e-4
_QUIET_NAN = tl.constexpr(0x7FC00000)


def has_native_e4m3(arch: Arch) -> bool:
    """Whether Triton converts float32 to e4m3 in hardware on ``arch``; the bytes are the same either way."""
    return arch in _NATIVE_E4M3 and not knobs.runtime.interpret  # the interpreter's conversion rounds otherwise


@triton.jit
def load_parts(row_ptr, stride, mask, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The values of each row as ``DIM / WIDTH`` parts ``[ROWS, WIDTH]`` in float32.

    Args:
        row_ptr: ``[ROWS, 1]``, where each row starts.
        stride: between two values of a row.
        mask: ``[ROWS, 1]``; the others read 0.
    """
    columns = tl.arange(0, WIDTH)[None, :] * stride
    parts = ()
    for part in tl.static_range(DIM // WIDTH):
        values = tl.load(row_ptr + stride * (part * WIDTH) + columns, mask=mask, other=0.0)
        parts = parts + (values.to(tl.float32),)  # noqa: RUF005
    return parts


@triton.jit
def rotate_parts(parts, angles_ptr, stride, INTERLEAVED: tl.constexpr, NUM_PARTS: tl.constexpr):
    """Rotate the first 64 values of each row by its angles; pairs as in ``_numerics.rotate``.

    Args:
        angles_ptr: ``[ROWS, 1]``, where each row's 32 cosines and then 32 sines start.
        stride: between two of them.
    """
    ROWS: tl.constexpr = parts[0].shape[0]
    WIDTH: tl.constexpr = parts[0].shape[1]
    rotated = ()
    if INTERLEAVED:
        for part in tl.static_range(64 // WIDTH):
            columns = (tl.arange(0, WIDTH // 2)[None, :] + part * (WIDTH // 2)) * stride
            cos = tl.load(angles_ptr + columns)
            sin = tl.load(angles_ptr + stride * 32 + columns)
            a, b = tl.split(tl.reshape(parts[part], [ROWS, WIDTH // 2, 2]))
            pair = tl.join(a * cos - b * sin, b * cos + a * sin)
            rotated = rotated + (tl.reshape(pair, [ROWS, WIDTH]),)  # noqa: RUF005
    else:
        second = ()
        for part in tl.static_range(32 // WIDTH):
            columns = (tl.arange(0, WIDTH)[None, :] + part * WIDTH) * stride
            cos = tl.load(angles_ptr + columns)
            sin = tl.load(angles_ptr + stride * 32 + columns)
            a = parts[part]
            b = parts[part + 32 // WIDTH]
            rotated = rotated + (a * cos - b * sin,)  # noqa: RUF005
            second = second + (b * cos + a * sin,)  # noqa: RUF005
        rotated = rotated + second
    for part in tl.static_range(64 // WIDTH, NUM_PARTS):
        rotated = rotated + (parts[part],)  # noqa: RUF005
    return rotated


@triton.jit
def _hadamard_parts(parts, NUM_PARTS: tl.constexpr):
    """Each row times the Sylvester matrix of ones and minus ones, not normalised, in float32."""
    for stage in tl.static_range(4):
        if (1 << stage) < NUM_PARTS:
            sums = ()
            for part in tl.static_range(NUM_PARTS):
                if (part >> stage) % 2 == 0:
                    sums = sums + (parts[part] + parts[part + (1 << stage)],)  # noqa: RUF005
                else:
                    sums = sums + (parts[part - (1 << stage)] - parts[part],)  # noqa: RUF005
            parts = sums
    transformed = ()
    for part in tl.static_range(NUM_PARTS):
        transformed = transformed + (_hadamard_columns(parts[part]),)  # noqa: RUF005
    return transformed


@triton.jit
def _hadamard_columns(x):
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    for stage in tl.static_range(5):
        if (1 << stage) < WIDTH:
            pairs = tl.permute(tl.reshape(x, [ROWS, WIDTH >> (stage + 1), 2, 1 << stage]), (0, 1, 3, 2))
            a, b = tl.split(pairs)
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [ROWS, WIDTH])
    return x


@triton.jit
def absolute_bits(x):
    """Bits of ``|x|``, which as integers are ordered as the values are, infinity above them and NaN above that."""
    return x.to(tl.int32, bitcast=True) & _ABSOLUTE


@triton.jit
def scale_parts(parts, factor, HADAMARD: tl.constexpr, QUANTISE: tl.constexpr, NUM_PARTS: tl.constexpr):
    """Transform rows and divide them by a power of two of their own, so that they fit e4m3.

    Args:
        factor: ``DIM**-0.5``, used by the transform.

    Returns:
        The parts, and the scale of each row, ``[ROWS]``. Without QUANTISE the parts are not divided. A row with a NaN
        or an infinity becomes NaN throughout if it is transformed, its scale included.
    """
    if HADAMARD:
        parts = _hadamard_parts(parts, NUM_PARTS)
        # What is not finite is part of every sum, so a maximum that passes over NaN still sees it.
        largest = tl.abs(parts[0])
        for part in tl.static_range(1, NUM_PARTS):
            largest = tl.maximum(largest, tl.abs(parts[part]))
        largest_bits = tl.max(absolute_bits(largest), axis=1)
        amax_bits = absolute_bits(largest_bits.to(tl.float32, bitcast=True) * factor)
        scale, inverse = power_of_two_scale(amax_bits)
        is_finite = amax_bits < _INFINITY
        scale = tl.where(is_finite, scale, float("nan"))
        multiplier = tl.where(is_finite, factor * inverse if QUANTISE else factor, float("nan"))
    else:
        largest_bits = absolute_bits(parts[0])
        for part in tl.static_range(1, NUM_PARTS):
            largest_bits = tl.maximum(largest_bits, absolute_bits(parts[part]))
        scale, multiplier = power_of_two_scale(tl.max(largest_bits, axis=1))
    if HADAMARD or QUANTISE:
        scaled = ()
        for part in tl.static_range(NUM_PARTS):
            scaled = scaled + (parts[part] * multiplier[:, None],)  # noqa: RUF005
        parts = scaled
    return parts, scale


@triton.jit
def power_of_two_scale(amax_bits):
    """``_numerics.power_of_two_scale`` of magnitudes given as bits, and its reciprocal; both float32.

    ``amax / 448`` is ``(m / 1.75) 2^(e - 8)``: the power of two above it is ``2^(e - 8)`` if the mantissa m is at most
    1.75, else twice that, so a carry out of the mantissa's bits takes the place of division and logarithm.
    """
    is_finite = amax_bits < _INFINITY
    raised = tl.maximum(amax_bits, _AMAX_FLOOR) + 0x1FFFFF
    scale_bits = (raised & _INFINITY) - (8 << 23)
    inverse_bits = (254 << 23) - scale_bits
    odd_inverse = tl.where(amax_bits == _INFINITY, 0, _QUIET_NAN)
    scale = tl.where(is_finite, scale_bits, amax_bits).to(tl.float32, bitcast=True)
    return scale, tl.where(is_finite, inverse_bits, odd_inverse).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_bytes(x, NATIVE: tl.constexpr):
    """E4m3fn codes, uint8, of float32 values of at most 448, rounded to nearest even; NaN stays NaN."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & _ABSOLUTE
    # From 2^-6 up, three of the mantissa's bits are kept and the exponent's bias falls from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below, codes count units of 2^-9; beside 2^14 those are units of the last place, so the addition rounds to them.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.where(magnitude > _INFINITY, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def bfloat16_bits(x):
    """Bits, uint16, of float32 values rounded to bfloat16, to nearest even; the interpreter's conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    rounded = tl.where((bits & _ABSOLUTE) > _INFINITY, bits | 0x400000, rounded)
    return (rounded >> 16).to(tl.uint16)
