"""Index logits over the paged index cache: how well every cached token suits every query row.

Hides which kernel scores them. The maths and every defined odd case stand in ``reference.py``.
"""

from __future__ import annotations

import torch

from nextn.cache_format import IndexCacheFormat, index_cache_format
from nextn.hardware import describe_device
from nextn.ops._kernel import OpPlan, check_page_table, choose, require, same_device
from nextn.ops.index_logits._contiguous import contiguous_index_logits
from nextn.ops.index_logits.problem import IndexLogitsProblem, problem_of

__all__ = ["IndexLogitsProblem", "contiguous_index_logits", "index_logits", "problem_of"]

_ROW_ALIGNMENT = 64  # columns; rows that begin on 256 bytes are written and read in whole vectors


def index_logits(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
    *,
    max_context: int,
    out: torch.Tensor | None = None,
    plan: OpPlan | None = None,
) -> torch.Tensor:
    """Score every visible key of every row with the lightning indexer.

    ``out[r, s] = scale[s] * sum_h weights[r, h] * max(q[r, h] . key[s], 0)`` (DeepSeek-V3.2-Exp technical report,
    section 2.1), for ``s < visible_lens[r]``. Other columns may hold anything.

    Args:
        q: e4m3fn ``[R, H, D]`` (float32 over a float32 cache), unit stride in D.
        weights: float32 ``[R, H]``, with the softmax-free scales and the query's own scale folded in.
        index_cache: uint8 ``[num_pages, page_size * (D + 4)]``, or DeepGEMM's 4-D view of it, or float32
            ``[num_pages, page_size, D]``; at least one page.
        query_offsets: int32 ``[B + 1]``; request b owns rows ``query_offsets[b]`` to ``query_offsets[b + 1]``.
        visible_lens: int32 ``[R]``, keys each row may see.
        page_table: int32 ``[B, P]``, unit stride along a row; page ids in order of position.
        max_context: columns of the result, at most ``P * page_size``.
        out: float32 or bfloat16 ``[R, max_context]`` to write into; rows may be further apart. Made if None.
        plan: the choice and schedule of this forward, made of the same lengths and page table; chosen here if None.

    Returns:
        ``out``, or a new float32 ``[R, max_context]``, whose rows may be further apart.

    Raises:
        InputError: a tensor has the wrong dtype, shape, stride or device, or ``max_context`` exceeds the page table.

    Example:
        >>> cache = IndexCacheFormat(name="fp8").allocate(2, "cpu")
        >>> lens = torch.tensor([70], dtype=torch.int32)
        >>> offsets, table = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([[0, 1]], dtype=torch.int32)
        >>> q = torch.ones(1, 32, 128).to(torch.float8_e4m3fn)
        >>> index_logits(q, torch.ones(1, 32), cache, offsets, lens, table, max_context=70).shape
        torch.Size([1, 70])
    """
    _check(q, weights, index_cache, query_offsets, visible_lens, page_table, max_context, out)
    if plan is None:
        plan = _plan_alone(q, index_cache, query_offsets, visible_lens, page_table, max_context, out)
    else:
        _check_plan(plan.problem, q, index_cache, page_table, max_context)
    kernel = plan.choice.kernel
    if out is None and not kernel.allocates_output:
        columns = -(-max_context // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        out = torch.empty(q.shape[0], columns, device=q.device)[:, :max_context]
    launch = kernel.prepare(
        plan.problem,
        q=q,
        weights=weights,
        index_cache=index_cache,
        query_offsets=query_offsets,
        visible_lens=visible_lens,
        page_table=page_table,
        out=out,
        plan=plan,
    )
    made = launch()
    return made if out is None else out


def _plan_alone(
    q: torch.Tensor,
    index_cache: torch.Tensor,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
    max_context: int,
    out: torch.Tensor | None,
) -> OpPlan:
    problem = problem_of(
        describe_device(q.device),
        q=q,
        index_cache=index_cache,
        page_table=page_table,
        max_context=max_context,
        out_dtype=torch.float32 if out is None else out.dtype,
    )
    choice = choose("index_logits", problem)
    data = None
    if choice.kernel.plan is not None:
        data = choice.kernel.plan(
            problem, query_offsets=query_offsets, visible_lens=visible_lens, page_table=page_table
        )
    return OpPlan(choice=choice, problem=problem, data=data)


def _check(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
    max_context: int,
    out: torch.Tensor | None,
) -> None:
    require(q.ndim == 3 and min(q.shape[1:]) > 0, f"q has shape {tuple(q.shape)}; pass [rows, heads, dim]")
    num_rows, heads, dim = q.shape
    cache_format = index_cache_format(index_cache, dim)
    wanted = torch.float8_e4m3fn if cache_format.is_quantised else torch.float32
    require(q.dtype == wanted, f"q is {q.dtype} over a {cache_format.name} cache; pass {wanted}")
    require(q.stride(2) == 1, f"q has stride {q.stride(2)} along dim; make its last dimension contiguous")
    require(
        weights.dtype == torch.float32 and tuple(weights.shape) == (num_rows, heads),
        f"weights is {weights.dtype} {tuple(weights.shape)}; pass float32 [{num_rows}, {heads}]",
    )
    _check_cache(index_cache, cache_format)
    _check_batch(num_rows, query_offsets, visible_lens, page_table)
    capacity = page_table.shape[1] * cache_format.page_size
    require(
        0 <= max_context <= capacity,
        f"max_context {max_context} is not within 0 and {capacity}, what {page_table.shape[1]} pages of "
        f"{cache_format.page_size} hold; pass a wider page table or a smaller max_context",
    )
    if out is not None:
        _check_out(out, num_rows, max_context)
    same_device(
        q=q,
        weights=weights,
        index_cache=index_cache,
        query_offsets=query_offsets,
        visible_lens=visible_lens,
        page_table=page_table,
        out=out,
    )


def _check_cache(index_cache: torch.Tensor, cache_format: IndexCacheFormat) -> None:
    require(index_cache.shape[0] > 0, "index_cache has no page; allocate at least one, which padding requests use")
    dense = torch.empty(1, *index_cache.shape[1:], device="meta").stride()[1:]
    sizes = index_cache.shape[1:]
    is_dense = all(size == 1 or have == want for size, have, want in zip(sizes, index_cache.stride()[1:], dense))
    require(
        is_dense and (index_cache.shape[0] == 1 or index_cache.stride(0) % 4 == 0),
        f"index_cache has strides {index_cache.stride()}; keep each page of {cache_format.page_bytes} bytes contiguous "
        "and pages a multiple of 4 bytes apart",
    )
    offset_bytes = index_cache.storage_offset() * index_cache.element_size()
    require(
        offset_bytes % 4 == 0,
        f"index_cache starts {offset_bytes} bytes into its storage; its scales are read as float32, so start it at a "
        "multiple of 4",
    )


def _check_batch(
    num_rows: int, query_offsets: torch.Tensor, visible_lens: torch.Tensor, page_table: torch.Tensor
) -> None:
    check_page_table(query_offsets, page_table)
    num_requests = page_table.shape[0]
    require(
        visible_lens.dtype == torch.int32 and tuple(visible_lens.shape) == (num_rows,),
        f"visible_lens is {visible_lens.dtype} {tuple(visible_lens.shape)}; pass int32 [{num_rows}]",
    )
    require(num_requests > 0 or num_rows == 0, f"{num_rows} rows but no request; pass a page-table row per request")


def _check_out(out: torch.Tensor, num_rows: int, max_context: int) -> None:
    require(
        out.dtype in (torch.float32, torch.bfloat16) and tuple(out.shape) == (num_rows, max_context),
        f"out is {out.dtype} {tuple(out.shape)}; pass float32 or bfloat16 [{num_rows}, {max_context}]",
    )
    require(
        (max_context < 2 or out.stride(1) == 1) and (num_rows < 2 or out.stride(0) >= max_context),
        f"out has strides {out.stride()}; make its columns contiguous and its rows at least {max_context} apart",
    )


def _check_plan(
    problem: IndexLogitsProblem, q: torch.Tensor, index_cache: torch.Tensor, page_table: torch.Tensor, max_context: int
) -> None:
    cache_format = index_cache_format(index_cache, q.shape[2])
    planned = (problem.num_rows, problem.heads, problem.dim, problem.cache, problem.page_size, problem.max_context)
    called = (*q.shape, cache_format.name, cache_format.page_size, max_context)
    require(
        planned == called and problem.num_requests == page_table.shape[0],
        f"the plan is for (rows, heads, dim, cache, page_size, max_context) {planned} of {problem.num_requests} "
        f"requests, the call has {called} of {page_table.shape[0]}; plan again for this batch",
    )
