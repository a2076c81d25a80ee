"""Rotation, Hadamard transform, FP8 scaling and norms: the row-wise maths that the ops and the model share.

Hides how they are ordered so that a row's bits never depend on the rows around it or on the number of threads.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from nextn.cache_format import AMAX_FLOOR, E4M3_MAX, ROPE_DIM

_MANTISSA = 2**23 - 1
_HALF = ROPE_DIM // 2


def rotate(x: torch.Tensor, table_rows: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate 32 pairs of values by their position's angles (RoPE, Su et al. 2021), in float32.

    Pair ``(a, b)`` becomes ``(a cos - b sin, b cos + a sin)``.

    Args:
        x: ``[..., 64]``.
        table_rows: float32 ``[..., 64]``, 32 cosines and then 32 sines, broadcast over ``x``.
        interleaved: whether the pairs are ``(2i, 2i + 1)`` rather than ``(i, i + 32)``.

    Returns:
        ``[..., 64]`` in the dtype of ``x``.
    """
    cos, sin = table_rows[..., :_HALF], table_rows[..., _HALF:]
    values = x.to(torch.float32)
    if interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
    else:
        first, second = values[..., :_HALF], values[..., _HALF:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return rotated.to(x.dtype)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Multiply by the orthonormal Sylvester Hadamard matrix: ``x @ H * D**-0.5``.

    Values are first rounded to multiples of a unit between 2^-44 and 2^-42 of the row's largest, which leaves float32
    values down to 2^-18 of it as they are. Every partial sum of D such values is then exact in float64, so the product
    has the same bits in whatever order BLAS adds. A row with a NaN or an infinity becomes NaN throughout.

    Args:
        x: ``[..., D]``, D a power of two up to 128.

    Returns:
        float32 ``[..., D]``.
    """
    dim = x.shape[-1]
    values = x.to(torch.float64)
    # Adding 512 times the largest leaves units of at least 511/2^53 of it; 128 of those values fit in 2^53 units.
    offset = values.abs().amax(dim=-1, keepdim=True) * 512.0
    rounded = (values + offset) - offset
    return (rounded @ _hadamard_matrix(dim, x.device)).mul_(dim**-0.5).to(torch.float32)


def power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    """The smallest power of two by which values up to ``amax`` must be divided to fit e4m3.

    ``2^ceil(log2(max(amax, 1e-4) / 448))``, DeepSeek's "ue8m0" scale, by carrying the mantissa into the exponent.

    Args:
        amax: float32, any shape.

    Returns:
        float32 of the same shape; NaN and infinity where ``amax`` is.
    """
    ratio = amax.clamp(min=AMAX_FLOOR) / E4M3_MAX
    bits = ratio.view(torch.int32)
    scale = ((bits + _MANTISSA) & ~_MANTISSA).view(torch.float32)
    return torch.maximum(scale, ratio)  # never below the ratio, and NaN stays NaN


def quantise_ue8m0(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to e4m3 with one power-of-two scale per block of the last dimension.

    Args:
        x: float32 ``[..., D]``.
        block: values that share a scale; divides D.

    Returns:
        e4m3fn ``[..., D]``, rounded to nearest even, and float32 scales ``[..., D // block]``. A block with a NaN
        becomes NaN throughout.
    """
    blocks = x.unflatten(-1, (-1, block))
    scale = power_of_two_scale(blocks.abs().amax(dim=-1))
    scaled = (blocks / scale.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX)
    return scaled.flatten(-2).to(torch.float8_e4m3fn), scale


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        eps: added to the mean square.

    Returns:
        ``[..., D]`` in the dtype of ``x``.
    """
    values = x.to(torch.float32)
    mean_square = values.square().mean(dim=-1, keepdim=True)
    return (values * torch.rsqrt(mean_square + eps) * weight.to(torch.float32)).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, in float32.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        bias: ``[D]``, or None for none.
        eps: added to the variance.

    Returns:
        ``[..., D]`` in the dtype of ``x``.
    """
    shift = None if bias is None else bias.to(torch.float32)
    values = functional.layer_norm(x.to(torch.float32), (x.shape[-1],), weight.to(torch.float32), shift, eps)
    return values.to(x.dtype)


@functools.cache
def _hadamard_matrix(dim: int, device: torch.device) -> torch.Tensor:
    """The Sylvester matrix of ones and minus ones, float64 ``[dim, dim]``."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device)
