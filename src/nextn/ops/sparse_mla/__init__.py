"""Absorbed latent attention over the cache slots each row selected.

Hides which kernel runs it. The maths and every defined odd case stand in ``reference.py``.
"""

from __future__ import annotations

import torch

from nextn.cache_format import LATENT_DIM, LATENT_ROW_DIM, LatentCacheFormat, latent_cache_format
from nextn.hardware import describe_device
from nextn.ops._kernel import OpPlan, choose, require, same_device
from nextn.ops.sparse_mla.problem import SparseMlaProblem, problem_of

__all__ = ["SparseMlaProblem", "problem_of", "sparse_mla"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse_mla(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    scale: float,
    query_offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    plan: OpPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from every row to the latent rows in its slots.

    Softmax of ``scale * (q . kv)`` over 576 values, then the weighted sum of the 512 latents (DeepSeek-V2 report,
    section 2.1, absorbed form).

    Args:
        q: float32, bfloat16 or float16 ``[R, Hq, 576]``: 512 values absorbed into latent space, then 64 rotated ones;
            unit stride along the last dimension.
        kv_cache: uint8 ``[num_pages, page_size, 656 or 1152]``, bfloat16 or float32 ``[num_pages, page_size, 576]``;
            at least one page; pages may be further apart than they are long.
        indices: int32 ``[R, k]`` slots, unit stride along a row; -1 anywhere; a slot outside the cache counts as -1.
        scale: what scores are multiplied by before the softmax.
        query_offsets: int32 ``[B + 1]``, a hint which rows share a request and so many slots; results do not need it.
        out: ``[R, Hq, 512]`` in ``q.dtype`` to write into, unit stride along the last dimension; made if None.
        plan: the choice and workspace of this forward; chosen here if None.

    Returns:
        ``out``, and the natural-log sum of exponentials, float32 ``[R, Hq]``. A row without a slot has 0 and -inf.

    Raises:
        InputError: a tensor has the wrong dtype, shape, stride or device.

    Example:
        >>> cache = LatentCacheFormat(name="fp32", page_size=2).allocate(1, "cpu").fill_(1)
        >>> rows, lse = sparse_mla(torch.ones(1, 1, 576), cache, torch.tensor([[1, -1]], dtype=torch.int32), scale=1.0)
        >>> rows[0, 0, 0], lse
        (tensor(1.), tensor([[576.]]))
    """
    _check(q, kv_cache, indices, query_offsets, out)
    if plan is None:
        problem = problem_of(
            describe_device(q.device), q=q, kv_cache=kv_cache, indices=indices, query_offsets=query_offsets
        )
        choice = choose("sparse_mla", problem)
        data = None if choice.kernel.plan is None else choice.kernel.plan(problem, device=q.device)
        plan = OpPlan(choice=choice, problem=problem, data=data)
    kernel = plan.choice.kernel
    if out is None and not kernel.allocates_output:
        out = torch.empty(*q.shape[:2], LATENT_DIM, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    launch = kernel.prepare(
        plan.problem,
        q=q,
        kv_cache=kv_cache,
        indices=indices,
        scale=scale,
        query_offsets=query_offsets,
        out=out,
        lse=lse,
        plan=plan,
    )
    result = launch()
    return result if out is None else out, lse


def _check(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    query_offsets: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    require(
        q.dtype in _DTYPES and q.ndim == 3 and q.shape[1] > 0 and q.shape[2] == LATENT_ROW_DIM,
        f"q is {q.dtype} {tuple(q.shape)}; pass float32, bfloat16 or float16 [rows, heads, {LATENT_ROW_DIM}]",
    )
    require(q.stride(2) == 1, f"q has stride {q.stride(2)} along its last dimension; make it contiguous there")
    num_rows, num_heads, _ = q.shape
    require(
        indices.dtype == torch.int32 and indices.ndim == 2 and indices.shape[0] == num_rows and indices.shape[1] > 0,
        f"indices is {indices.dtype} {tuple(indices.shape)}; pass int32 [{num_rows}, k] with k at least 1",
    )
    require(
        indices.shape[1] == 1 or indices.stride(1) == 1,
        f"indices has column stride {indices.stride(1)}; its columns must be contiguous",
    )
    _check_cache(kv_cache, latent_cache_format(kv_cache))
    if query_offsets is not None:
        require(
            query_offsets.dtype == torch.int32 and query_offsets.ndim == 1 and query_offsets.shape[0] > 0,
            f"query_offsets is {query_offsets.dtype} {tuple(query_offsets.shape)}; pass int32 [requests + 1]",
        )
    if out is not None:
        wanted = (num_rows, num_heads, LATENT_DIM)
        require(
            out.dtype == q.dtype and tuple(out.shape) == wanted and out.stride(2) == 1,
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; pass {q.dtype} {list(wanted)} with a "
            "contiguous last dimension",
        )
    same_device(q=q, kv_cache=kv_cache, indices=indices, query_offsets=query_offsets, out=out)


def _check_cache(kv_cache: torch.Tensor, cache_format: LatentCacheFormat) -> None:
    require(kv_cache.shape[0] > 0, "kv_cache has no page; allocate at least one, which padding requests use")
    row = kv_cache.shape[-1]
    require(
        kv_cache.stride(-1) == 1 and (cache_format.page_size == 1 or kv_cache.stride(1) == row),
        f"kv_cache has strides {kv_cache.stride()}; keep the {cache_format.page_size} rows of a page contiguous",
    )
