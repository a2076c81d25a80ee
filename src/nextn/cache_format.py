"""Byte layouts of the index cache and of the latent (KV) cache, as frozen data.

Hides where in a page a token's values and scales lie. A cache is one tensor ``[num_pages, ...]``; formats are told
apart by dtype and shape, so no function needs a format argument beside the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.errors import InputError

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4  # smallest amax a scale is made from, as DeepSeek's own kernels have it
LATENT_DIM = 512
ROPE_DIM = 64
LATENT_ROW_DIM = LATENT_DIM + ROPE_DIM
LATENT_SCALE_BLOCK = 128  # latents that share one scale in an FP8 row


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexCacheFormat:
    """One page of index keys.

    The FP8 page holds ``page_size`` rows of ``head_dim`` e4m3 values and then ``page_size`` fp32 scales: values first,
    scales after, so a token's 132 bytes are not contiguous. The unquantised format ``fp32`` is for the reference only.

    Attributes:
        name: ``fp8`` or ``fp32``.
        head_dim: values per key (128 in DeepSeek-V3.2).
        page_size: tokens per page.
    """

    name: str
    head_dim: int = 128
    page_size: int = 64

    @property
    def is_quantised(self) -> bool:
        return self.name == "fp8"

    @property
    def scale_offset(self) -> int:
        """Byte offset of the page's first scale (fp8)."""
        return self.page_size * self.head_dim

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: 8448 for 64 tokens of 128 e4m3 values and a scale each."""
        return self.page_size * (self.head_dim + 4 if self.is_quantised else self.head_dim * 4)

    def allocate(self, num_pages: int, device: torch.device | str) -> torch.Tensor:
        """A zeroed cache: uint8 ``[num_pages, page_bytes]`` (fp8) or float32 ``[num_pages, page_size, head_dim]``."""
        if self.is_quantised:
            return torch.zeros(num_pages, self.page_bytes, dtype=torch.uint8, device=device)
        return torch.zeros(num_pages, self.page_size, self.head_dim, device=device)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCacheFormat:
    """One token's row of the latent cache: 512 latents after their norm, then 64 rotated rope values.

    ``fp8``: 656 bytes = 512 e4m3, 4 fp32 power-of-two scales (one per 128 latents), 64 bf16 rope values.
    ``bf16``: 1152 bytes = 576 bf16. ``fp32``: 576 float32, for the reference only.

    Attributes:
        name: ``fp8``, ``bf16`` or ``fp32``.
        page_size: tokens per page.
    """

    name: str
    page_size: int = 64

    @property
    def is_quantised(self) -> bool:
        return self.name == "fp8"

    @property
    def row_bytes(self) -> int:
        return {"fp8": 656, "bf16": 1152, "fp32": 2304}[self.name]

    def allocate(self, num_pages: int, device: torch.device | str) -> torch.Tensor:
        """A zeroed cache: uint8 ``[num_pages, page_size, row_bytes]``, or float32 ``[.., 576]`` for fp32."""
        if self.name == "fp32":
            return torch.zeros(num_pages, self.page_size, LATENT_ROW_DIM, device=device)
        return torch.zeros(num_pages, self.page_size, self.row_bytes, dtype=torch.uint8, device=device)


def index_cache_format(cache: torch.Tensor, head_dim: int) -> IndexCacheFormat:
    """The format of an index cache tensor.

    Args:
        cache: uint8 ``[num_pages, page_size * (head_dim + 4)]``, DeepGEMM's view of it
            ``[num_pages, page_size, 1, head_dim + 4]``, or float32 ``[num_pages, page_size, head_dim]``.
        head_dim: values per key.

    Raises:
        InputError: no format has this dtype and shape.
    """
    shape = tuple(cache.shape)
    if cache.dtype == torch.float32 and cache.ndim == 3 and shape[2] == head_dim:
        return IndexCacheFormat(name="fp32", head_dim=head_dim, page_size=shape[1])
    if cache.dtype == torch.uint8 and cache.ndim == 4 and shape[2:] == (1, head_dim + 4):
        return IndexCacheFormat(name="fp8", head_dim=head_dim, page_size=shape[1])
    if cache.dtype == torch.uint8 and cache.ndim == 2 and shape[1] % (head_dim + 4) == 0 and shape[1]:
        return IndexCacheFormat(name="fp8", head_dim=head_dim, page_size=shape[1] // (head_dim + 4))
    raise InputError(
        f"index cache of dtype {cache.dtype} and shape {shape} fits no format for head_dim {head_dim}; "
        f"pass uint8 [pages, page_size * {head_dim + 4}] or [pages, page_size, 1, {head_dim + 4}]"
    )


def latent_cache_format(cache: torch.Tensor) -> LatentCacheFormat:
    """The format of a latent cache tensor.

    Args:
        cache: uint8 ``[num_pages, page_size, 656 or 1152]`` (FlashMLA's ``[num_pages, page_size, 1, 656]`` too),
            bfloat16 ``[num_pages, page_size, 576]`` or float32 ``[num_pages, page_size, 576]``.

    Raises:
        InputError: no format has this dtype and shape.
    """
    if cache.ndim == 4 and cache.shape[2] == 1:
        cache = cache.squeeze(2)
    names = {
        (torch.uint8, 656): "fp8",
        (torch.uint8, 1152): "bf16",
        (torch.bfloat16, LATENT_ROW_DIM): "bf16",
        (torch.float32, LATENT_ROW_DIM): "fp32",
    }
    name = names.get((cache.dtype, cache.shape[-1])) if cache.ndim == 3 else None
    if name is None:
        raise InputError(
            f"latent cache of dtype {cache.dtype} and shape {tuple(cache.shape)} fits no format; "
            "pass uint8 [pages, page_size, 656] (FP8), uint8 [.., 1152] or bfloat16 [.., 576] (BF16)"
        )
    return LatentCacheFormat(name=name, page_size=cache.shape[1])
