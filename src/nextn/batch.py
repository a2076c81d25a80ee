"""ForwardMode and ForwardBatch: which rows a forward runs, and where their keys lie.

Hides nothing on purpose: a batch is rows plus offsets, lengths and one page-table row per request. The host knows the
row counts and an upper bound on the lengths; the lengths themselves live on the device.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from nextn.errors import InputError


class ForwardMode(enum.Enum):
    """Why a forward is run. A label: kernels are dispatched on rows, never on the mode."""

    EXTEND = "extend"  # a prompt, or a chunk of one
    DECODE = "decode"  # one row per request
    TARGET_VERIFY = "target_verify"  # next_n rows per request: the last committed token and the drafts
    DRAFT_EXTEND = "draft_extend"  # the rows just verified, through the draft layer
    IDLE = "idle"  # no rows at all


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch:
    """The rows of one forward. Build it with :meth:`build`, or from a host's own tensors.

    Row ``r`` belongs to the request ``b`` with ``query_offsets[b] <= r < query_offsets[b + 1]``. After this forward's
    keys are written a request has ``context_lens[b]`` cached tokens, its own rows included.

    Attributes:
        mode: why the forward is run.
        row_counts: rows of each request, on the host; may be 0.
        query_offsets: int32 ``[B + 1]``, the running sum of ``row_counts``.
        context_lens: int32 ``[B]``, tokens cached once this forward's rows are written; 0 for padding requests.
        page_table: int32 ``[B, P]``, page ids in order of position, unit column stride; entry 0 is valid even for
            padding requests.
        max_context: host-known upper bound on ``context_lens``; the width of the index logits.
        visible_lens: int32 ``[R]`` tokens each row may see, if the host computes its own; else None and the plan does.
    """

    mode: ForwardMode
    row_counts: tuple[int, ...]
    query_offsets: torch.Tensor
    context_lens: torch.Tensor
    page_table: torch.Tensor
    max_context: int
    visible_lens: torch.Tensor | None = None

    @property
    def num_requests(self) -> int:
        return len(self.row_counts)

    @property
    def num_rows(self) -> int:
        return sum(self.row_counts)

    @property
    def max_rows(self) -> int:
        """The most rows any request has; 0 for an empty batch."""
        return max(self.row_counts, default=0)

    @property
    def next_n(self) -> int | None:
        """Rows per request if every request has as many (and at least one), else None: the batch is ragged."""
        counts = set(self.row_counts)
        return counts.pop() if len(counts) == 1 and 0 not in counts else None

    @classmethod
    def build(
        cls,
        mode: ForwardMode,
        *,
        row_counts: Sequence[int],
        context_lens: Sequence[int] | torch.Tensor,
        page_table: torch.Tensor,
        max_context: int | None = None,
        page_size: int = 64,
        visible_lens: torch.Tensor | None = None,
    ) -> ForwardBatch:
        """Make a batch from host values, checking everything the host can know.

        Args:
            mode: why the forward is run.
            row_counts: rows of each of the B requests, each at least 0.
            context_lens: tokens cached per request once this forward's rows are written; a sequence is checked and
                copied to the page table's device, an int32 tensor ``[B]`` is used as it is.
            page_table: int32 ``[B, P]``.
            max_context: upper bound on the lengths; by default their maximum if they are a sequence, else
                ``P * page_size``.
            page_size: tokens per page.
            visible_lens: int32 ``[R]``, or None.

        Raises:
            InputError: a count or length is negative, a request has fewer cached tokens than rows, a shape or dtype is
                wrong, or a context does not fit its page-table row.

        Example:
            >>> import torch
            >>> table = torch.arange(4, dtype=torch.int32).reshape(2, 2)
            >>> batch = ForwardBatch.build(ForwardMode.TARGET_VERIFY, row_counts=[4, 4], context_lens=[70, 9],
            ...                            page_table=table)
            >>> batch.next_n, batch.num_rows, batch.max_context
            (4, 8, 70)
        """
        counts = tuple(int(count) for count in row_counts)
        _check_table(page_table, len(counts))
        if any(count < 0 for count in counts):
            raise InputError(f"row_counts {list(counts)} has a negative entry; give 0 for a request without rows")
        capacity = page_table.shape[1] * page_size
        if not isinstance(context_lens, torch.Tensor):
            lens = [int(length) for length in context_lens]
            _check_lens(lens, counts, capacity)
            max_context = max(lens, default=0) if max_context is None else max_context
            if lens and max(lens) > max_context:
                raise InputError(f"context_lens has {max(lens)} above max_context {max_context}; raise max_context")
            context_lens = torch.tensor(lens, dtype=torch.int32, device=page_table.device)
        if context_lens.dtype != torch.int32 or tuple(context_lens.shape) != (len(counts),):
            raise InputError(
                f"context_lens is {context_lens.dtype} {tuple(context_lens.shape)}; pass int32 [{len(counts)}]"
            )
        max_context = capacity if max_context is None else max_context
        if not 0 <= max_context <= capacity:
            raise InputError(
                f"max_context {max_context} does not fit a page table of {page_table.shape[1]} pages of {page_size}; "
                f"pass at most {capacity} or a wider table"
            )
        if visible_lens is not None and (visible_lens.dtype != torch.int32 or visible_lens.shape != (sum(counts),)):
            raise InputError(
                f"visible_lens is {visible_lens.dtype} {tuple(visible_lens.shape)}; pass int32 [{sum(counts)}]"
            )
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=page_table.device)
        return cls(
            mode=mode,
            row_counts=counts,
            query_offsets=offsets,
            context_lens=context_lens,
            page_table=page_table,
            max_context=max_context,
            visible_lens=visible_lens,
        )


def _check_table(page_table: torch.Tensor, num_requests: int) -> None:
    if page_table.dtype != torch.int32 or page_table.ndim != 2 or page_table.shape[0] != num_requests:
        raise InputError(
            f"page_table is {page_table.dtype} {tuple(page_table.shape)}; pass int32 [{num_requests}, pages]"
        )
    if page_table.shape[1] > 1 and page_table.stride(1) != 1:
        raise InputError(f"page_table has column stride {page_table.stride(1)}; its columns must be contiguous")


def _check_lens(lens: list[int], counts: tuple[int, ...], capacity: int) -> None:
    if len(lens) != len(counts):
        raise InputError(f"{len(lens)} context_lens for {len(counts)} requests; pass one length per request")
    for request, (length, count) in enumerate(zip(lens, counts)):
        if length < count:
            raise InputError(
                f"request {request} has {count} rows but only {length} cached tokens; context_lens includes the rows"
            )
        if length > capacity:
            raise InputError(f"request {request} has {length} tokens, above the {capacity} its page-table row holds")
