"""What choosing a kernel for ``prepare_query`` depends on: sizes and options, no tensors.

Hides how sizes are read off the call's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.hardware import Arch, DeviceInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareQueryProblem:
    """Sizes of one ``prepare_query`` call.

    Attributes:
        arch: architecture to run on.
        num_rows: R.
        heads: index heads.
        dim: values per head.
        dtype: dtype of the queries.
        interleaved: whether pairs ``(2i, 2i + 1)`` are rotated rather than ``(i, i + 32)``.
        hadamard: whether the rotated query is Hadamard-transformed.
        quantise: whether the result is e4m3 rather than float32.
    """

    arch: Arch
    num_rows: int
    heads: int
    dim: int
    dtype: str
    interleaved: bool
    hadamard: bool
    quantise: bool


def problem_of(
    device: DeviceInfo, *, q: torch.Tensor, interleaved: bool, hadamard: bool = True, quantise: bool = True
) -> PrepareQueryProblem:
    """The problem of a call's tensors; they may be meta tensors.

    Args:
        device: what to run on.
        q: ``[R, H, D]``.
        interleaved: as in :class:`PrepareQueryProblem`.
        hadamard: likewise.
        quantise: likewise.
    """
    num_rows, heads, dim = q.shape
    return PrepareQueryProblem(
        arch=device.arch,
        num_rows=num_rows,
        heads=heads,
        dim=dim,
        dtype=str(q.dtype).removeprefix("torch."),
        interleaved=interleaved,
        hadamard=hadamard,
        quantise=quantise,
    )
