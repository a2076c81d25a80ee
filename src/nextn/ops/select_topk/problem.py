"""What choosing a kernel for ``select_topk`` depends on: sizes, no tensors.

Hides how sizes are read off the call's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.hardware import Arch, DeviceInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectTopkProblem:
    """Sizes of one ``select_topk`` call.

    Attributes:
        arch: architecture to run on.
        num_sms: its streaming multiprocessors.
        num_rows: R.
        num_columns: C, columns of the logits.
        topk: k, columns of the result.
        returns_slots: whether positions are translated to cache slots.
        page_size: tokens per page.
        max_pages: columns of the page table; 0 without one.
    """

    arch: Arch
    num_sms: int
    num_rows: int
    num_columns: int
    topk: int
    returns_slots: bool = False
    page_size: int = 64
    max_pages: int = 0

    @property
    def visible_columns(self) -> int:
        """The most positions a row can see."""
        return min(self.num_columns, self.max_pages * self.page_size) if self.returns_slots else self.num_columns

    def has_aligned_fours(self, logits: torch.Tensor) -> bool:
        """Whether every group of four logits lies whole inside its row's storage, on 16 bytes."""
        return self.num_columns % 4 == 0 and logits.stride(0) % 4 == 0 and logits.data_ptr() % 16 == 0


def problem_of(
    device: DeviceInfo,
    *,
    logits: torch.Tensor,
    k: int,
    page_table: torch.Tensor | None = None,
    page_size: int = 64,
) -> SelectTopkProblem:
    """The problem of a call's tensors; they may be meta tensors.

    Args:
        device: what to run on.
        logits: ``[R, C]``.
        k: columns of the result.
        page_table: ``[B, P]`` if slots are wanted.
        page_size: tokens per page.
    """
    return SelectTopkProblem(
        arch=device.arch,
        num_sms=device.num_sms,
        num_rows=logits.shape[0],
        num_columns=logits.shape[1],
        topk=k,
        returns_slots=page_table is not None,
        page_size=page_size,
        max_pages=0 if page_table is None else page_table.shape[1],
    )
