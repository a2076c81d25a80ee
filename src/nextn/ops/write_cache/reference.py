"""Writing the caches in plain PyTorch: the definition, and the path of every machine without a better kernel.

Hides the byte offsets inside pages and how rows that write nothing are kept out of a scatter without the host looking.

For a row at position p with slot s, ``page = s // page_size`` and ``offset = s % page_size``::

    latent row = [RMSNorm(kv[:512]) | rotate(kv[512:], table[p], pairs (2i, 2i + 1))]
        fp8:  e4m3 of 4 blocks of 128 latents, their fp32 scales 2^ceil(log2(max(amax, 1e-4) / 448)), bf16 rope values
        bf16: 576 bf16;  fp32: 576 float32
    index key = LayerNorm(k); rotate its first 64; multiply by the orthonormal Hadamard matrix
        fp8:  e4m3 with one such scale; values at byte offset * D of the page, the scale at page_size * D + 4 * offset
        fp32: D float32

Defined cases. A row writes nothing if its slot is negative or beyond the cache, if no request owns it, if its position
is negative, beyond the rope table or (with a page table) beyond the table, or if its page id is outside the cache. The
other bytes of a cache keep their bits. The rows that do write must have distinct slots. A NaN spoils its own row, of a
latent row its block of 128 alone when it was normalised already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nextn.cache_format import (
    LATENT_DIM,
    LATENT_SCALE_BLOCK,
    ROPE_DIM,
    index_cache_format,
    latent_cache_format,
)
from nextn.hardware import ALL_ARCHES
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._numerics import hadamard, layer_norm, quantise_ue8m0, rms_norm, rotate
from nextn.ops._pages import request_of_row, translate_positions
from nextn.ops.write_cache.problem import WriteCacheProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class _Targets:
    """Where rows go in a cache. Rows that write nothing repeat one that does, so that no two rows disagree.

    Attributes:
        source: int64 ``[R]``, the row whose values each row writes.
        pages: int64 ``[R]``, inside the cache.
        offsets: int64 ``[R]``, token within the page.
        is_live: bool ``[]``, whether any row writes; if not, rows must write back what is there.
    """

    source: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    is_live: torch.Tensor


def prepare(problem: WriteCacheProblem, *, plan: OpPlan | None = None, **tensors: Any) -> Launch:
    """Describe the call, which changes the caches in place.

    Args:
        problem: sizes and options.
        plan: nothing is planned for this op.
        tensors: every other argument of ``write_cache`` but the two options that ``problem`` holds.
    """
    del plan
    return Launch(function=_run, arguments={"problem": problem, **tensors})


def _run(
    problem: WriteCacheProblem,
    positions: torch.Tensor,
    rope_table: torch.Tensor,
    query_offsets: torch.Tensor | None,
    page_table: torch.Tensor | None,
    slots: torch.Tensor | None,
    kv: torch.Tensor | None,
    kv_cache: torch.Tensor | None,
    kv_norm_weight: torch.Tensor | None,
    kv_norm_eps: float,
    index_k: torch.Tensor | None,
    index_cache: torch.Tensor | None,
    index_norm_weight: torch.Tensor | None,
    index_norm_bias: torch.Tensor | None,
    index_norm_eps: float,
) -> None:
    if problem.num_rows == 0:
        return
    positions = positions.to(torch.int64)
    if slots is None:
        assert page_table is not None, "neither slots nor a page table"
        assert query_offsets is not None, "a page table without query offsets"
        slots = _derive_slots(positions, query_offsets, page_table, problem.page_size)
    max_positions = rope_table.shape[0]
    slots = torch.where((positions >= 0) & (positions < max_positions), slots, -1).to(torch.int64)
    table_rows = rope_table.index_select(0, positions.clamp(0, max_positions - 1))
    sizes = {cache.shape[0] for cache in (kv_cache, index_cache) if cache is not None}  # nearly always one
    targets = {num_pages: _find_targets(slots, num_pages, problem.page_size) for num_pages in sizes}
    if kv is not None and kv_cache is not None:
        values = kv.to(torch.float32)
        latents, rope = values[:, :LATENT_DIM], values[:, LATENT_DIM:]
        if kv_norm_weight is not None:
            latents = rms_norm(latents, kv_norm_weight, kv_norm_eps)
        _write_latents(latents, rotate(rope, table_rows, interleaved=True), kv_cache, targets[kv_cache.shape[0]])
    if index_k is not None and index_cache is not None:
        keys = index_k.to(torch.float32)
        if index_norm_weight is not None:
            keys = layer_norm(keys, index_norm_weight, index_norm_bias, index_norm_eps)
        rotated = rotate(keys[:, :ROPE_DIM], table_rows, problem.interleaved)
        keys = torch.cat([rotated, keys[:, ROPE_DIM:]], dim=1)
        keys = hadamard(keys) if problem.hadamard else keys
        _write_index_keys(keys, index_cache, targets[index_cache.shape[0]])


def _derive_slots(
    positions: torch.Tensor, query_offsets: torch.Tensor, page_table: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Slots int64 [R] of rows by their request's page-table row; -1 where there is none."""
    num_rows = positions.shape[0]
    requests = request_of_row(query_offsets, num_rows)
    is_owned = torch.arange(num_rows, device=positions.device) < query_offsets[-1]
    is_inside = positions < page_table.shape[1] * page_size
    known = torch.where(is_owned & is_inside, positions, -1)
    return translate_positions(known[:, None], requests, page_table, page_size).squeeze(1)


def _write_latents(latents: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, targets: _Targets) -> None:
    cache_format = latent_cache_format(cache)
    if cache.ndim == 4:
        cache = cache.squeeze(2)
    if cache_format.name == "fp32":
        rows = torch.cat([latents, rope], dim=1)
    elif cache_format.name == "bf16":
        rows = torch.cat([latents, rope], dim=1).to(torch.bfloat16)
        cache = cache.view(torch.bfloat16)
    else:
        codes, scales = quantise_ue8m0(latents, LATENT_SCALE_BLOCK)
        parts = [codes, scales, rope.to(torch.bfloat16)]
        rows = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
    _scatter(cache, rows, targets)


def _write_index_keys(keys: torch.Tensor, cache: torch.Tensor, targets: _Targets) -> None:
    dim = keys.shape[1]
    cache_format = index_cache_format(cache, dim)
    num_pages, page_size = cache.shape[0], cache_format.page_size
    if not cache_format.is_quantised:
        _scatter(cache, keys, targets)
        return
    codes, scales = quantise_ue8m0(keys, dim)
    # Pages may be further apart than they are long, and the 4-D view of a page is nominal: address bytes directly.
    page_stride = cache.stride(0)
    start = cache.storage_offset()
    values = cache.as_strided((num_pages, page_size, dim), (page_stride, dim, 1), start)
    _scatter(values, codes.view(torch.uint8), targets)
    scale_bytes = cache.as_strided((num_pages, page_size, 4), (page_stride, 4, 1), start + cache_format.scale_offset)
    _scatter(scale_bytes, scales.view(torch.uint8), targets)


def _find_targets(slots: torch.Tensor, num_pages: int, page_size: int) -> _Targets:
    rows = torch.arange(slots.shape[0], device=slots.device)
    is_valid = (slots >= 0) & (slots < num_pages * page_size)
    source = torch.where(is_valid, rows, is_valid.to(torch.uint8).argmax())
    inside = torch.where(is_valid, slots, 0).index_select(0, source)
    return _Targets(source=source, pages=inside // page_size, offsets=inside % page_size, is_live=is_valid.any())


def _scatter(cache: torch.Tensor, rows: torch.Tensor, targets: _Targets) -> None:
    """Store rows ``[R, width]`` in a cache ``[pages, page_size, width]`` of the same dtype."""
    held = cache[targets.pages, targets.offsets]
    cache[targets.pages, targets.offsets] = torch.where(targets.is_live, rows.index_select(0, targets.source), held)


KERNEL = Kernel(
    op="write_cache",
    name="reference",
    arches=ALL_ARCHES,
    rejects=lambda problem: None,
    prepare=prepare,
    rank=lambda problem: 0,
)
