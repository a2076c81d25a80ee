"""FP8 e4m3 rounding with power-of-two scales, as the exported weights and both caches use it.

Hides straight-through gradients, ragged last blocks and the Hadamard rotation of the indexer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP8_MAX = 448.0
AMAX_FLOOR = 1e-4
BLOCK = 128


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The smallest power of two ``s`` with ``amax / s <= 448``; ``amax`` is floored at 1e-4 first."""
    return torch.exp2(torch.ceil(torch.log2(amax.float().clamp_min(AMAX_FLOOR) / FP8_MAX)))


def round_rows(x: Tensor, block: int = BLOCK) -> Tensor:
    """Round ``x`` [..., D] to e4m3 with one scale per ``block`` of the last dimension; returns float32 values."""
    blocks = x.detach().float().unflatten(-1, (-1, block))
    scale = power_of_two_scale(blocks.abs().amax(dim=-1, keepdim=True))
    rounded = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)


def round_rows_through(x: Tensor, block: int = BLOCK) -> Tensor:
    """``round_rows`` whose gradient is the identity."""
    return x + (round_rows(x, block) - x.detach())


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise ``weight`` [..., out, in] in 128 x 128 blocks.

    Returns:
        e4m3 values of the same shape and float32 scales [..., ceil(out/128), ceil(in/128)]; value = e4m3 * scale.
    """
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.detach().float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = power_of_two_scale(blocks.abs().amax(dim=(-1, -3), keepdim=True))
    values = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).flatten(-4, -3).flatten(-2)
    return values[..., :rows, :columns].to(torch.float8_e4m3fn), scale.squeeze(-1).squeeze(-2)


def dequantise_blocks(values: Tensor, scale: Tensor) -> Tensor:
    """Inverse of ``quantise_blocks``, in float32."""
    rows, columns = values.shape[-2:]
    expanded = scale.repeat_interleave(BLOCK, dim=-2).repeat_interleave(BLOCK, dim=-1)
    return values.float() * expanded[..., :rows, :columns]


def round_weight_through(weight: Tensor) -> Tensor:
    """``weight`` as it will be read back from the checkpoint, with the gradient of the unrounded one."""
    rounded = dequantise_blocks(*quantise_blocks(weight))
    return weight + (rounded - weight.detach())


def hadamard_matrix(size: int = BLOCK) -> Tensor:
    """Orthonormal Sylvester Hadamard matrix [size, size], float32; ``size`` is a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)
