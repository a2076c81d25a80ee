"""What choosing a kernel for ``write_cache`` depends on: sizes, formats and options, no tensors.

Hides how sizes are read off the call's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.cache_format import index_cache_format, latent_cache_format
from nextn.hardware import Arch, DeviceInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteCacheProblem:
    """Sizes of one ``write_cache`` call.

    Attributes:
        arch: architecture to run on.
        num_rows: R.
        page_size: tokens per page of both caches.
        latent_format: ``fp8``, ``bf16`` or ``fp32``; None if no latents are written.
        index_format: ``fp8`` or ``fp32``; None if no index keys are written.
        index_dim: values per index key; 0 if none are written.
        has_latent_norm: whether latents are normalised on the way.
        has_index_norm: whether index keys are.
        has_slots: whether slots are given rather than derived from a page table.
        interleaved: whether index keys rotate pairs ``(2i, 2i + 1)`` rather than ``(i, i + 32)``.
        hadamard: whether index keys are Hadamard-transformed.
    """

    arch: Arch
    num_rows: int
    page_size: int
    latent_format: str | None
    index_format: str | None
    index_dim: int
    has_latent_norm: bool
    has_index_norm: bool
    has_slots: bool
    interleaved: bool
    hadamard: bool


def problem_of(
    device: DeviceInfo,
    *,
    positions: torch.Tensor,
    kv_cache: torch.Tensor | None,
    index_k: torch.Tensor | None,
    index_cache: torch.Tensor | None,
    has_latent_norm: bool,
    has_index_norm: bool,
    has_slots: bool,
    interleaved: bool,
    hadamard: bool,
) -> WriteCacheProblem:
    """The problem of a call's tensors, at least one cache among them; they may be meta tensors.

    Args:
        device: what to run on.
        positions: ``[R]``.
        kv_cache: the latent cache, or None.
        index_k: ``[R, D]``, or None.
        index_cache: the index cache, or None.
        has_latent_norm: as in :class:`WriteCacheProblem`.
        has_index_norm: likewise.
        has_slots: likewise.
        interleaved: likewise.
        hadamard: likewise.
    """
    latent_format = None if kv_cache is None else latent_cache_format(kv_cache)
    index_dim = 0 if index_k is None else index_k.shape[1]
    index_format = None if index_cache is None else index_cache_format(index_cache, index_dim)
    paged = latent_format or index_format
    assert paged is not None, "neither cache is written"
    return WriteCacheProblem(
        arch=device.arch,
        num_rows=positions.shape[0],
        page_size=paged.page_size,
        latent_format=latent_format.name if latent_format else None,
        index_format=index_format.name if index_format else None,
        index_dim=index_dim,
        has_latent_norm=has_latent_norm,
        has_index_norm=has_index_norm,
        has_slots=has_slots,
        interleaved=interleaved,
        hadamard=hadamard,
    )
