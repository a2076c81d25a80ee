"""What a paged-logits kernel with a schedule prepares once per forward.

Hides nothing: the plan reads these fields to show them in the forward's metadata, without knowing the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedSchedule:
    """Lengths, schedule and page table of one forward, for every layer's call alike.

    Attributes:
        context_lens: int32 ``[B, next_n]`` (native) or ``[R, 1]`` (flattened), contiguous, at least 1: the very tensor
            ``metadata`` was built from.
        metadata: int32 ``[slots + 1, 2]``, the library's own split of the work over the device.
        page_table: int32, one row per row of ``context_lens``. Native: the batch's own table; flattened: its rows
            repeated.
        is_native: whether a request's rows are scored together.
    """

    context_lens: torch.Tensor
    metadata: torch.Tensor
    page_table: torch.Tensor
    is_native: bool
