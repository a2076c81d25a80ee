"""What choosing a kernel for ``accept_drafts`` depends on: sizes and options, no tensors.

Hides how sizes are read off the call's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.hardware import Arch, DeviceInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptDraftsProblem:
    """Sizes of one ``accept_drafts`` call.

    Attributes:
        arch: architecture to run on.
        num_requests: B, those without rows included.
        num_rows: R, rows of all requests.
        vocab: tokens of the vocabulary.
        is_greedy: whether every request takes the most probable token.
        has_draft_probs: whether drafts come with the distributions they were drawn from.
    """

    arch: Arch
    num_requests: int
    num_rows: int
    vocab: int
    is_greedy: bool
    has_draft_probs: bool


def problem_of(
    device: DeviceInfo,
    *,
    logits: torch.Tensor,
    query_offsets: torch.Tensor,
    is_greedy: bool,
    has_draft_probs: bool,
) -> AcceptDraftsProblem:
    """The problem of a call's tensors; they may be meta tensors.

    Args:
        device: what to run on.
        logits: ``[R, V]``.
        query_offsets: ``[B + 1]``.
        is_greedy: as in :class:`AcceptDraftsProblem`.
        has_draft_probs: likewise.
    """
    return AcceptDraftsProblem(
        arch=device.arch,
        num_requests=query_offsets.shape[0] - 1,
        num_rows=logits.shape[0],
        vocab=logits.shape[1],
        is_greedy=is_greedy,
        has_draft_probs=has_draft_probs,
    )
