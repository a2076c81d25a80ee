"""The k best visible columns of every row, as positions or as cache slots.

Hides which kernel selects them. Order, ties and every defined odd case stand in ``reference.py``.
"""

from __future__ import annotations

import torch

from nextn.hardware import describe_device
from nextn.ops._kernel import OpPlan, check_page_table, choose, require, same_device
from nextn.ops.select_topk.problem import SelectTopkProblem, problem_of

__all__ = ["SelectTopkProblem", "problem_of", "select_topk"]

_MAX_COLUMNS = 2**31 - 1


def select_topk(
    logits: torch.Tensor,
    visible_lens: torch.Tensor,
    k: int,
    *,
    query_offsets: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    page_size: int = 64,
    out: torch.Tensor | None = None,
    plan: OpPlan | None = None,
) -> torch.Tensor:
    """Select the k highest logits among each row's visible columns, exactly.

    Ties go to the lowest position, NaN ranks below minus infinity, and a row that sees at most k columns gets them all.

    Args:
        logits: float32 ``[R, C]``, unit stride along a row; rows may be further apart.
        visible_lens: int32 ``[R]``; below 0 counts as 0, above C as C.
        k: columns of the result, at least 1.
        query_offsets: int32 ``[B + 1]``, given exactly when ``page_table`` is.
        page_table: int32 ``[B, P]``, to get cache slots in place of positions.
        page_size: tokens per page of the table.
        out: int32 ``[R, k]`` to write into; made if None.
        plan: the choice and workspace of this forward; chosen here if None.

    Returns:
        int32 ``[R, k]``: positions in ascending order, or their slots in the same order, then -1.

    Raises:
        InputError: a tensor has the wrong dtype, shape, stride or device, k or page_size is below 1, or one of
            ``query_offsets`` and ``page_table`` is given without the other.

    Example:
        >>> select_topk(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([4], dtype=torch.int32), 2)
        tensor([[1, 2]], dtype=torch.int32)
    """
    _check(logits, visible_lens, k, query_offsets, page_table, page_size, out)
    if plan is None:
        problem = problem_of(
            describe_device(logits.device), logits=logits, k=k, page_table=page_table, page_size=page_size
        )
        choice = choose("select_topk", problem)
        data = None if choice.kernel.plan is None else choice.kernel.plan(problem, device=logits.device)
        plan = OpPlan(choice=choice, problem=problem, data=data)
    if out is None:
        out = torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)
    launch = plan.choice.kernel.prepare(
        plan.problem,
        logits=logits,
        visible_lens=visible_lens,
        query_offsets=query_offsets,
        page_table=page_table,
        out=out,
        plan=plan,
    )
    launch()
    return out


def _check(
    logits: torch.Tensor,
    visible_lens: torch.Tensor,
    k: int,
    query_offsets: torch.Tensor | None,
    page_table: torch.Tensor | None,
    page_size: int,
    out: torch.Tensor | None,
) -> None:
    require(
        logits.dtype == torch.float32 and logits.ndim == 2,
        f"logits is {logits.dtype} {tuple(logits.shape)}; pass float32 [rows, columns]",
    )
    num_rows, num_columns = logits.shape
    require(
        num_columns < 2 or logits.stride(1) == 1,
        f"logits has column stride {logits.stride(1)}; its columns must be contiguous",
    )
    require(num_columns <= _MAX_COLUMNS, f"logits has {num_columns} columns; int32 positions reach {_MAX_COLUMNS}")
    require(
        visible_lens.dtype == torch.int32 and tuple(visible_lens.shape) == (num_rows,),
        f"visible_lens is {visible_lens.dtype} {tuple(visible_lens.shape)}; pass int32 [{num_rows}]",
    )
    require(k >= 1, f"k is {k}; select at least 1")
    require(page_size >= 1, f"page_size is {page_size}; a page holds at least 1 token")
    require(
        (query_offsets is None) == (page_table is None),
        "one of query_offsets and page_table is missing; give both for slots, neither for positions",
    )
    if page_table is not None and query_offsets is not None:
        _check_table(num_rows, query_offsets, page_table)
    if out is not None:
        require(
            out.dtype == torch.int32 and tuple(out.shape) == (num_rows, k) and (k == 1 or out.stride(1) == 1),
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; pass int32 [{num_rows}, {k}] with "
            "contiguous columns",
        )
    same_device(logits=logits, visible_lens=visible_lens, query_offsets=query_offsets, page_table=page_table, out=out)


def _check_table(num_rows: int, query_offsets: torch.Tensor, page_table: torch.Tensor) -> None:
    check_page_table(query_offsets, page_table)
    num_requests = page_table.shape[0]
    require(num_requests > 0 or num_rows == 0, f"{num_rows} rows but no request; pass a page-table row per request")
