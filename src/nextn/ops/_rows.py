"""Where each row of a batch stands: its request, its position, what it may see, and the slot its keys go to.

Hides who computes it: plain PyTorch, which is the definition, or one Triton launch on a GPU, equal in every bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from nextn.hardware import has_module
from nextn.ops._pages import request_of_row, translate_positions


@dataclass(kw_only=True, slots=True)
class Fills:
    """Workspaces that must start with one value, filled together with the rows rather than in launches of their own.

    Attributes:
        device: where they lie.
        requests: the memory and its value, in the order asked for.
    """

    device: torch.device
    requests: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def ask(self, shape: tuple[int, ...], dtype: torch.dtype, value: int) -> torch.Tensor:
        """Memory of an integer dtype that holds ``value`` everywhere once the forward is planned."""
        memory = torch.empty(shape, dtype=dtype, device=self.device)
        if memory.numel():
            self.requests.append((memory, value))
        return memory


@dataclass(frozen=True, kw_only=True, slots=True)
class RowArrays:
    """One value per row.

    Attributes:
        positions: int64 ``[R]``, the row's position in its request; 0 where it has none.
        visible_lens: int32 ``[R]``, cached tokens the row may see, itself included; 0 where it has no position.
        request_of_row: int64 ``[R]``; the last request for rows that no request owns.
        slots: int64 ``[R]``, where the row's keys are written; -1 writes nothing.
    """

    positions: torch.Tensor
    visible_lens: torch.Tensor
    request_of_row: torch.Tensor
    slots: torch.Tensor


def locate_rows(
    *,
    query_offsets: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    num_rows: int,
    page_size: int,
    visible_lens: torch.Tensor | None = None,
    fills: Fills | None = None,
) -> RowArrays:
    """Row ``j`` of request ``b`` is at position ``context_lens[b] - rows_b + j``.

    It has no position, and so sees and writes nothing, where that is negative (a padding request has fewer cached
    tokens than rows) or where no request owns the row (the offsets end before ``num_rows``).

    Args:
        query_offsets: int32 ``[B + 1]``.
        context_lens: int32 ``[B]``, tokens cached once these rows are written.
        page_table: int32 ``[B, P]``.
        num_rows: R.
        page_size: tokens per page.
        visible_lens: int32 ``[R]``, the host's own in place of position + 1.
        fills: memory to fill on the way.
    """
    locate = _find_triton() if query_offsets.device.type == "cuda" else None
    return (locate or locate_rows_in_torch)(
        query_offsets=query_offsets,
        context_lens=context_lens,
        page_table=page_table,
        num_rows=num_rows,
        page_size=page_size,
        visible_lens=visible_lens,
        fills=fills,
    )


def locate_rows_in_torch(
    *,
    query_offsets: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    num_rows: int,
    page_size: int,
    visible_lens: torch.Tensor | None = None,
    fills: Fills | None = None,
) -> RowArrays:
    """The definition of :func:`locate_rows`."""
    for memory, value in fills.requests if fills else ():
        memory.fill_(value)
    requests = request_of_row(query_offsets, num_rows)
    rows = torch.arange(num_rows, device=query_offsets.device)
    position_of_row_zero = context_lens.to(torch.int64) - query_offsets[1:]
    positions = rows + position_of_row_zero.index_select(0, requests)
    positions = torch.where(rows < query_offsets[-1], positions, -1).clamp_(min=-1)
    if visible_lens is None:
        visible_lens = (positions + 1).to(torch.int32)
    is_inside = positions < page_table.shape[1] * page_size
    inside = torch.where(is_inside, positions, -1)
    slots = translate_positions(inside[:, None], requests, page_table, page_size).squeeze(1)
    return RowArrays(positions=positions.clamp(min=0), visible_lens=visible_lens, request_of_row=requests, slots=slots)


@functools.cache
def _find_triton():
    if not has_module("triton"):
        return None
    from nextn.ops._triton_rows import locate_rows_in_triton

    return locate_rows_in_triton
