"""Keys written into the paged caches: normalised, rotated, quantised and scattered.

Hides which kernel writes them. The maths, the bytes and every defined odd case stand in ``reference.py``.
"""

from __future__ import annotations

import torch

from nextn.cache_format import LATENT_DIM, LATENT_ROW_DIM, ROPE_DIM, index_cache_format, latent_cache_format
from nextn.hardware import describe_device
from nextn.ops._kernel import OpPlan, choose, require, same_device
from nextn.ops.write_cache.problem import WriteCacheProblem, problem_of

__all__ = ["WriteCacheProblem", "problem_of", "write_cache"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)
_INDEX_DIMS = (64, 128)


def write_cache(
    *,
    positions: torch.Tensor,
    rope_table: torch.Tensor,
    query_offsets: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    kv: torch.Tensor | None = None,
    kv_cache: torch.Tensor | None = None,
    kv_norm_weight: torch.Tensor | None = None,
    kv_norm_eps: float = 1e-6,
    index_k: torch.Tensor | None = None,
    index_cache: torch.Tensor | None = None,
    index_norm_weight: torch.Tensor | None = None,
    index_norm_bias: torch.Tensor | None = None,
    index_norm_eps: float = 1e-6,
    interleaved: bool = False,
    hadamard: bool = True,
    plan: OpPlan | None = None,
) -> None:
    """Store this forward's latents, index keys or both; the caches are changed in place.

    The latent part is RMSNorm, rotation of the 64 rope values in pairs ``(2i, 2i + 1)``, and the cache's format
    (DeepSeek-V3.2-Exp inference code; the FP8 row is FlashMLA's "V32"). The index part is LayerNorm, rotation of the
    first 64 dims, Hadamard transform, and e4m3 with a power-of-two scale (DeepGEMM's page: values first, scales after).

    Args:
        positions: int32 or int64 ``[R]``.
        rope_table: float32 ``[max_positions, 64]``, 32 cosines and then 32 sines.
        query_offsets: int32 ``[B + 1]``, used with ``page_table``.
        page_table: int32 ``[B, P]``; slots are ``page_table[b, p // page_size] * page_size + p % page_size``.
        slots: int32 or int64 ``[R]``, in place of ``query_offsets`` and ``page_table``, which are then not read.
        kv: floating ``[R, 576]``, 512 latents and 64 rope values before rotation; None writes no latents.
        kv_cache: uint8 ``[num_pages, page_size, 656 or 1152]``, bfloat16 or float32 ``[.., 576]``, or 4-D with a third
            dimension of 1; dense within a page; at least one page.
        kv_norm_weight: ``[512]`` RMSNorm weight, or None if the latents are normalised already.
        kv_norm_eps: its epsilon.
        index_k: floating ``[R, D]``, D 64 or 128; None writes no index keys.
        index_cache: uint8 ``[num_pages, page_size * (D + 4)]`` or DeepGEMM's view of it, or float32
            ``[num_pages, page_size, D]``; dense within a page; at least one page.
        index_norm_weight: ``[D]`` LayerNorm weight, or None if the keys are normalised already.
        index_norm_bias: ``[D]`` LayerNorm bias, or None for none.
        index_norm_eps: its epsilon.
        interleaved: whether index keys rotate pairs ``(2i, 2i + 1)`` rather than ``(i, i + 32)``.
        hadamard: whether index keys are Hadamard-transformed.
        plan: the choice of this forward, for these sizes, formats and options; chosen here if None.

    A row whose slot is negative or beyond the cache, or whose position lies beyond the rope table or the page table,
    writes nothing. The rows that write must have distinct slots.

    Raises:
        InputError: a tensor has the wrong dtype, shape, stride or device, a part lacks its cache, the caches' page
            sizes differ, or neither slots nor a page table is given.

    Example:
        >>> from nextn.cache_format import LatentCacheFormat
        >>> cache = LatentCacheFormat(name="fp8").allocate(1, "cpu")
        >>> table = torch.cat([torch.ones(8, 32), torch.zeros(8, 32)], dim=1)
        >>> write_cache(positions=torch.tensor([3]), rope_table=table, slots=torch.tensor([3]),
        ...             kv=torch.ones(1, 576), kv_cache=cache)
        >>> cache.view(64, 656).any(dim=1).nonzero().tolist()
        [[3]]
    """
    _check_rows(positions, rope_table, query_offsets, page_table, slots)
    num_rows = positions.shape[0]
    page_sizes = _check_latents(num_rows, kv, kv_cache, kv_norm_weight)
    page_sizes |= _check_index(num_rows, index_k, index_cache, index_norm_weight, index_norm_bias)
    require(
        len(page_sizes) < 2, f"the caches have pages of {sorted(page_sizes)} tokens; allocate both with the same size"
    )
    device = same_device(
        positions=positions,
        rope_table=rope_table,
        query_offsets=query_offsets,
        page_table=page_table,
        slots=slots,
        kv=kv,
        kv_cache=kv_cache,
        kv_norm_weight=kv_norm_weight,
        index_k=index_k,
        index_cache=index_cache,
        index_norm_weight=index_norm_weight,
        index_norm_bias=index_norm_bias,
    )
    if not page_sizes:
        return
    if plan is None:
        problem = problem_of(
            describe_device(device),
            positions=positions,
            kv_cache=kv_cache,
            index_k=index_k,
            index_cache=index_cache,
            has_latent_norm=kv_norm_weight is not None,
            has_index_norm=index_norm_weight is not None,
            has_slots=slots is not None,
            interleaved=interleaved,
            hadamard=hadamard,
        )
        plan = OpPlan(choice=choose("write_cache", problem), problem=problem)
    plan.choice.kernel.prepare(
        plan.problem,
        positions=positions,
        rope_table=rope_table,
        query_offsets=query_offsets,
        page_table=page_table,
        slots=slots,
        kv=kv,
        kv_cache=kv_cache,
        kv_norm_weight=kv_norm_weight,
        kv_norm_eps=kv_norm_eps,
        index_k=index_k,
        index_cache=index_cache,
        index_norm_weight=index_norm_weight,
        index_norm_bias=index_norm_bias,
        index_norm_eps=index_norm_eps,
    )()


def _check_rows(
    positions: torch.Tensor,
    rope_table: torch.Tensor,
    query_offsets: torch.Tensor | None,
    page_table: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> None:
    require(
        positions.ndim == 1 and positions.dtype in _INTEGERS,
        f"positions is {positions.dtype} {tuple(positions.shape)}; pass int64 [rows]",
    )
    require(
        rope_table.ndim == 2
        and rope_table.shape[0] > 0
        and rope_table.shape[1] == ROPE_DIM
        and rope_table.dtype == torch.float32,
        f"rope_table is {rope_table.dtype} {tuple(rope_table.shape)}; pass float32 [max_positions, {ROPE_DIM}]",
    )
    num_rows = positions.shape[0]
    if slots is not None:
        require(
            tuple(slots.shape) == (num_rows,) and slots.dtype in _INTEGERS,
            f"slots is {slots.dtype} {tuple(slots.shape)}; pass int64 [{num_rows}]",
        )
        return
    if page_table is None or query_offsets is None:
        require(False, "no slots, and not both of page_table and query_offsets; pass slots, or those two")
        return
    require(
        page_table.ndim == 2 and page_table.dtype == torch.int32,
        f"page_table is {page_table.dtype} {tuple(page_table.shape)}; pass int32 [requests, pages]",
    )
    num_requests = page_table.shape[0]
    require(
        query_offsets.dtype == torch.int32 and tuple(query_offsets.shape) == (num_requests + 1,),
        f"query_offsets is {query_offsets.dtype} {tuple(query_offsets.shape)}; pass int32 [{num_requests + 1}], one "
        "more than page_table has rows",
    )
    require(num_requests > 0 or num_rows == 0, f"{num_rows} rows but no request; pass a page-table row per request")


def _check_latents(
    num_rows: int, kv: torch.Tensor | None, kv_cache: torch.Tensor | None, weight: torch.Tensor | None
) -> set[int]:
    """The latent cache's page size, in a set that is empty if no latents are written."""
    if kv is None or kv_cache is None:
        require(kv is None and kv_cache is None, "kv and kv_cache go together; pass both or neither")
        return set()
    require(
        tuple(kv.shape) == (num_rows, LATENT_ROW_DIM) and kv.dtype in _FLOATS,
        f"kv is {kv.dtype} {tuple(kv.shape)}; pass float32 or bfloat16 [{num_rows}, {LATENT_ROW_DIM}]",
    )
    _check_vector("kv_norm_weight", weight, LATENT_DIM)
    page_size = latent_cache_format(kv_cache).page_size
    _check_pages("kv_cache", kv_cache)
    return {page_size}


def _check_index(
    num_rows: int,
    index_k: torch.Tensor | None,
    index_cache: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> set[int]:
    """The index cache's page size, in a set that is empty if no index keys are written."""
    if index_k is None or index_cache is None:
        require(index_k is None and index_cache is None, "index_k and index_cache go together; pass both or neither")
        return set()
    require(
        index_k.ndim == 2
        and index_k.shape[0] == num_rows
        and index_k.shape[1] in _INDEX_DIMS
        and index_k.dtype in _FLOATS,
        f"index_k is {index_k.dtype} {tuple(index_k.shape)}; pass float32 or bfloat16 "
        f"[{num_rows}, {_INDEX_DIMS[0]} or {_INDEX_DIMS[1]}]",
    )
    dim = index_k.shape[1]
    _check_vector("index_norm_weight", weight, dim)
    _check_vector("index_norm_bias", bias, dim)
    require(bias is None or weight is not None, "index_norm_bias is given without index_norm_weight; pass both")
    page_size = index_cache_format(index_cache, dim).page_size
    _check_pages("index_cache", index_cache)
    return {page_size}


def _check_vector(name: str, vector: torch.Tensor | None, size: int) -> None:
    if vector is not None:
        require(
            tuple(vector.shape) == (size,) and vector.dtype in _FLOATS,
            f"{name} is {vector.dtype} {tuple(vector.shape)}; pass float32 or bfloat16 [{size}]",
        )


def _check_pages(name: str, cache: torch.Tensor) -> None:
    """Rows and pages must be dense inside; pages may be further apart, but may not overlap."""
    sizes, strides = cache.shape[1:], cache.stride()[1:]
    dense = torch.empty(1, *sizes, device="meta").stride()[1:]
    is_dense = all(size == 1 or have == want for size, have, want in zip(sizes, strides, dense))
    require(cache.shape[0] > 0, f"{name} has no page; allocate at least one")
    require(
        is_dense and (cache.shape[0] < 2 or cache.stride(0) >= sizes.numel()),
        f"{name} has strides {cache.stride()}; keep each page of shape {tuple(sizes)} contiguous and pages at least "
        f"{sizes.numel()} elements apart",
    )
    offset_bytes, page_bytes = (count * cache.element_size() for count in (cache.storage_offset(), cache.stride(0)))
    require(
        offset_bytes % 4 == 0 and (cache.shape[0] < 2 or page_bytes % 4 == 0),
        f"{name} starts {offset_bytes} bytes into its storage and its pages lie {page_bytes} bytes apart; scales are "
        "written as float32, so make both multiples of 4",
    )
