"""Reading paged caches: which request a row is of, and the keys and latents that pages and slots hold.

Hides page strides, byte offsets and e4m3 decoding from the references. Every page id and slot is held inside the cache
before it is used, so nothing is read out of bounds whatever a page table says.
"""

from __future__ import annotations

import torch

from nextn.cache_format import LATENT_DIM, LATENT_ROW_DIM, LATENT_SCALE_BLOCK, IndexCacheFormat, LatentCacheFormat

_SCALES_BYTES = LATENT_DIM // LATENT_SCALE_BLOCK * 4
INT32_MAX = 2**31 - 1


def request_of_row(query_offsets: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The request each row belongs to, found on the device.

    Args:
        query_offsets: int32 ``[B + 1]``, B at least 1 unless there are no rows.
        num_rows: R.

    Returns:
        int64 ``[R]``, in ``[0, B)``; rows past the last offset get the last request.
    """
    rows = torch.arange(num_rows, dtype=query_offsets.dtype, device=query_offsets.device)
    requests = torch.searchsorted(query_offsets[1:].contiguous(), rows, right=True)
    return requests.clamp_(max=max(query_offsets.shape[0] - 2, 0))


def guard_pages(page_ids: torch.Tensor, num_pages: int) -> torch.Tensor:
    """Page ids as int64, with 0 for every id outside ``[0, num_pages)``."""
    pages = page_ids.to(torch.int64)
    return torch.where((pages >= 0) & (pages < num_pages), pages, 0)


def translate_positions(
    positions: torch.Tensor, requests: torch.Tensor, page_table: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Cache slots of positions.

    Args:
        positions: int64 ``[R, k]``; negative for no position; less than ``P * page_size``.
        requests: int64 ``[R]``.
        page_table: int32 ``[B, P]``.
        page_size: tokens per page.

    Returns:
        int64 ``[R, k]``: ``page_table[b, position // page_size] * page_size + position % page_size``; -1 where the
        position is negative, the page id is negative, or the slot does not fit 32 bits.
    """
    if page_table.shape[1] == 0:
        return torch.full_like(positions, -1)
    columns = (positions.clamp(min=0) // page_size).clamp(max=page_table.shape[1] - 1)
    pages = page_table.to(torch.int64)[requests[:, None], columns]
    slots = pages * page_size + positions % page_size
    return torch.where((positions >= 0) & (pages >= 0) & (slots <= INT32_MAX), slots, -1)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Values of uint8 e4m3fn codes, float32 of the same shape; 0x7F and 0xFF are NaN.

    Moved to their places in a float16, the code's bits stand for the value times 2^-8, subnormals included. This takes
    a third of the time of PyTorch's cast from float8 on a CPU.
    """
    bits = codes.contiguous().view(torch.int8).to(torch.int16)  # sign-extended: the sign is right in bit 15 below
    nan = (bits & 0x7F).add_(1).bitwise_and_(0x80).mul_(128)  # the top exponent bit, for a magnitude of 0x7F alone
    bits.mul_(128).bitwise_and_(~0x4000).bitwise_or_(nan)
    return bits.view(torch.float16).to(torch.float32).mul_(256.0)


def gather_index_keys(
    cache: torch.Tensor, cache_format: IndexCacheFormat, page_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys and scales of whole pages.

    Args:
        cache: an index cache in ``cache_format``; pages may be further apart than they are long.
        cache_format: its format.
        page_ids: int64 ``[N]``, all inside the cache.

    Returns:
        keys float32 ``[N * page_size, D]`` as stored, and their scales float32 ``[N * page_size]``, None if the cache
        is not quantised.
    """
    pages = cache.view(cache.shape[0], -1).index_select(0, page_ids)
    if not cache_format.is_quantised:
        return pages.view(-1, cache_format.head_dim), None
    codes, scales = pages.split([cache_format.scale_offset, cache_format.page_size * 4], dim=1)
    keys = decode_e4m3(codes.reshape(-1, cache_format.head_dim))
    return keys, scales.contiguous().view(torch.float32).view(-1)


def gather_latent_rows(cache: torch.Tensor, cache_format: LatentCacheFormat, slots: torch.Tensor) -> torch.Tensor:
    """Dequantised rows of the latent cache.

    Args:
        cache: a latent cache in ``cache_format``, rows dense inside a page; pages may be further apart.
        cache_format: its format.
        slots: int64 ``[N]``, all inside the cache.

    Returns:
        float32 ``[N, 576]``: 512 latents times their scales, then 64 rope values.
    """
    rows = _gather_rows(cache, cache_format.page_size, slots)
    if cache_format.name == "fp32":
        return rows
    if cache_format.name == "bf16":
        return rows.view(torch.bfloat16).to(torch.float32)
    codes, scales, rope = rows.split([LATENT_DIM, _SCALES_BYTES, rows.shape[1] - LATENT_DIM - _SCALES_BYTES], dim=1)
    values = torch.empty(rows.shape[0], LATENT_ROW_DIM, device=rows.device)
    blocks = (LATENT_DIM // LATENT_SCALE_BLOCK, LATENT_SCALE_BLOCK)
    latents = decode_e4m3(codes).unflatten(1, blocks) * scales.contiguous().view(torch.float32)[:, :, None]
    values[:, :LATENT_DIM] = latents.flatten(1)
    values[:, LATENT_DIM:] = rope.contiguous().view(torch.bfloat16)
    return values


def _gather_rows(cache: torch.Tensor, page_size: int, slots: torch.Tensor) -> torch.Tensor:
    """Stored rows ``[N, row]``. One stride over all rows makes the gather a copy of whole rows, far faster."""
    if cache.ndim == 4:
        cache = cache.squeeze(2)
    row_stride = cache.shape[2]  # rows are dense in a page; the stride of a size-1 dimension says nothing
    rows_apart, remainder = divmod(cache.stride(0), row_stride)
    if remainder:
        return cache[slots // page_size, slots % page_size]
    num_rows = (cache.shape[0] - 1) * rows_apart + page_size
    flat = cache.as_strided((num_rows, cache.shape[2]), (row_stride, 1))
    return flat.index_select(0, slots // page_size * rows_apart + slots % page_size)
