"""Random ragged batches and cache contents for cases: who owns which rows and pages, and bytes in the caches' formats.

Hides how a scenario becomes tensors. Quantising is written here anew and plainly, so that it can witness the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from nextn.cache_format import (
    AMAX_FLOOR,
    E4M3_MAX,
    LATENT_DIM,
    LATENT_SCALE_BLOCK,
    IndexCacheFormat,
    LatentCacheFormat,
)
from nextn.testing.poison import poison_cache, poison_table_tails


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTensors:
    """The tensors of a ragged batch.

    Attributes:
        query_offsets: int32 ``[B + 1]``.
        visible_lens: int32 ``[R]``.
        page_table: int32 ``[B, P]``, tails wild, rows further apart than they are long.
        used_slots: int64 ``[N]``, slots that hold a token of some request.
        num_pages: pages of a cache that fits the table, some of them used by nobody.
    """

    query_offsets: torch.Tensor
    visible_lens: torch.Tensor
    page_table: torch.Tensor
    used_slots: torch.Tensor
    num_pages: int


def build_batch(
    row_counts: Sequence[int], context_lens: Sequence[int], *, page_size: int, max_context: int, seed: int = 0
) -> BatchTensors:
    """A batch on the CPU whose requests own distinct pages in random order, among as many unused ones.

    Args:
        row_counts: rows per request.
        context_lens: cached tokens per request, its rows included; 0 for a padding request.
        page_size: tokens per page.
        max_context: upper bound on the lengths, which sets the width of the page table.
        seed: of the page order.
    """
    generator = torch.Generator().manual_seed(seed)
    used_pages = torch.tensor([-(-length // page_size) for length in context_lens], dtype=torch.int64)
    num_columns = max(1, -(-max_context // page_size))
    num_pages = 2 * int(used_pages.sum()) + 2
    order = torch.randperm(num_pages, generator=generator)
    table = torch.zeros(len(context_lens), num_columns, dtype=torch.int32)
    slots = [torch.empty(0, dtype=torch.int64)]
    first = 0
    for request, (count, length) in enumerate(zip(used_pages.tolist(), context_lens)):
        pages = order[first : first + count]
        table[request, :count] = pages
        slots.append((pages[:, None] * page_size + torch.arange(page_size)).view(-1)[:length])
        first += count
    lens = [max(length - rows + 1 + row, 0) for rows, length in zip(row_counts, context_lens) for row in range(rows)]
    return BatchTensors(
        query_offsets=torch.tensor([0, *accumulate(row_counts)], dtype=torch.int32),
        visible_lens=torch.tensor(lens, dtype=torch.int32),
        page_table=poison_table_tails(table, used_pages),
        used_slots=torch.cat(slots),
        num_pages=num_pages,
    )


def quantise_blocks(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes (uint8) and power-of-two scales of ``values [..., n * block]``, one scale per block.

    ``scale = 2^ceil(log2(max(amax, 1e-4) / 448))``, the UE8M0 rule of DeepSeek-V3.2.
    """
    blocks = values.double().unflatten(-1, (-1, block))
    scales = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1).clamp(min=AMAX_FLOOR) / E4M3_MAX)))
    codes = (blocks / scales[..., None]).float().to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten(-2), scales.float()


def fill_index_cache(
    cache_format: IndexCacheFormat, num_pages: int, slots: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """A CPU index cache with ``keys [N, D]`` in ``slots [N]`` and NaN everywhere else."""
    cache = poison_cache(cache_format.allocate(num_pages, "cpu"))
    pages, offsets = slots // cache_format.page_size, slots % cache_format.page_size
    if not cache_format.is_quantised:
        cache[pages, offsets] = keys
        return cache
    codes, scales = quantise_blocks(keys, cache_format.head_dim)
    cache[:, : cache_format.scale_offset].unflatten(1, (cache_format.page_size, -1))[pages, offsets] = codes
    scale_bytes = cache[:, cache_format.scale_offset :].unflatten(1, (cache_format.page_size, 4))
    scale_bytes[pages, offsets] = scales.view(torch.uint8).view(-1, 4)
    return cache


def fill_latent_cache(
    cache_format: LatentCacheFormat, num_pages: int, slots: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """A CPU latent cache with ``latents [N, 576]`` in ``slots [N]`` and NaN everywhere else."""
    cache = poison_cache(cache_format.allocate(num_pages, "cpu"))
    pages, offsets = slots // cache_format.page_size, slots % cache_format.page_size
    cache[pages, offsets] = {
        "fp32": lambda: latents,
        "bf16": lambda: latents.to(torch.bfloat16).view(torch.uint8),
        "fp8": lambda: _latent_bytes(latents),
    }[cache_format.name]()
    return cache


def _latent_bytes(latents: torch.Tensor) -> torch.Tensor:
    codes, scales = quantise_blocks(latents[:, :LATENT_DIM], LATENT_SCALE_BLOCK)
    rope = latents[:, LATENT_DIM:].to(torch.bfloat16).contiguous()
    return torch.cat([codes, scales.contiguous().view(torch.uint8), rope.view(torch.uint8)], dim=1)
