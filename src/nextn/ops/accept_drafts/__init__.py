"""Drafts accepted or rejected so that the output has the target's distribution, and the draws that this takes.

Hides which kernel decides. The rule and every defined odd case stand in ``reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.hardware import describe_device
from nextn.ops._kernel import choose, require, same_device
from nextn.ops.accept_drafts._sampling import (
    ACCEPT,
    DRAFT,
    RESAMPLE,
    SamplingTensors,
    check_sampling,
    draw_uniforms,
    sample_rows,
    target_probs,
)
from nextn.ops.accept_drafts.problem import AcceptDraftsProblem, problem_of

__all__ = [
    "ACCEPT",
    "DRAFT",
    "RESAMPLE",
    "AcceptDraftsProblem",
    "AcceptedDrafts",
    "SamplingTensors",
    "accept_drafts",
    "draw_uniforms",
    "problem_of",
    "sample_rows",
    "target_probs",
]

_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptedDrafts:
    """What one verify step commits.

    Attributes:
        accept_lens: int32 ``[B]``, tokens committed per request: accepted drafts and the one after them; 0 for a
            request without rows.
        next_ids: int64 ``[R]``, those tokens at the front of each request's rows, -1 after them.
    """

    accept_lens: torch.Tensor
    next_ids: torch.Tensor


def accept_drafts(
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    query_offsets: torch.Tensor,
    *,
    sampling: SamplingTensors | None = None,
    draft_probs: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> AcceptedDrafts:
    """Decide how many drafts each request keeps, and the token after them.

    Greedy requests keep the drafts that equal the target's most probable token, the lowest id among equals. Others use
    rejection sampling (Leviathan et al. 2023), which leaves the target's distribution unchanged.

    Args:
        logits: floating ``[R, V]``; row j of a request scores the token after the one it consumes.
        draft_ids: int64 ``[R]``, the token each row consumes: first the last committed token, which is not judged, then
            the drafts.
        query_offsets: int32 ``[B + 1]``; request b owns rows ``query_offsets[b]`` to ``query_offsets[b + 1]``.
        sampling: one entry per request, ``[B]`` each; None is greedy throughout.
        draft_probs: floating ``[R, V]``, what each row's draft was drawn from (first rows are not read), after the same
            temperature, top-k and top-p; None if each draft was chosen without chance.
        positions: int32 or int64 ``[R]``, position of the token that each row decides; keys the random numbers, so it
            must differ from step to step. Needed unless greedy throughout.

    Returns:
        Lengths and tokens; a request's part depends on that request alone.

    Raises:
        InputError: a tensor has the wrong dtype, shape or device, or positions are missing.

    Example:
        >>> logits = torch.eye(4)[[2, 3, 1]]  # after each row: 2, 3, 1
        >>> accepted = accept_drafts(logits, torch.tensor([0, 2, 0]), torch.tensor([0, 3], dtype=torch.int32))
        >>> accepted.accept_lens.tolist(), accepted.next_ids.tolist()
        ([2], [2, 3, -1])
    """
    _check(logits, draft_ids, query_offsets, sampling, draft_probs, positions)
    problem = problem_of(
        describe_device(logits.device),
        logits=logits,
        query_offsets=query_offsets,
        is_greedy=sampling is None,
        has_draft_probs=draft_probs is not None,
    )
    accept_lens = torch.empty(problem.num_requests, dtype=torch.int32, device=logits.device)
    next_ids = torch.empty(problem.num_rows, dtype=torch.int64, device=logits.device)
    kernel = choose("accept_drafts", problem).kernel
    kernel.prepare(
        problem,
        logits=logits,
        draft_ids=draft_ids,
        query_offsets=query_offsets,
        sampling=sampling,
        draft_probs=draft_probs,
        positions=positions,
        out=(accept_lens, next_ids),
    )()
    return AcceptedDrafts(accept_lens=accept_lens, next_ids=next_ids)


def _check(
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    query_offsets: torch.Tensor,
    sampling: SamplingTensors | None,
    draft_probs: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> None:
    require(
        logits.ndim == 2 and logits.shape[1] > 0 and logits.is_floating_point(),
        f"logits is {logits.dtype} {tuple(logits.shape)}; pass float32 [rows, vocabulary]",
    )
    num_rows = logits.shape[0]
    require(
        draft_ids.dtype == torch.int64 and tuple(draft_ids.shape) == (num_rows,),
        f"draft_ids is {draft_ids.dtype} {tuple(draft_ids.shape)}; pass int64 [{num_rows}]",
    )
    require(
        query_offsets.dtype == torch.int32 and query_offsets.ndim == 1 and query_offsets.shape[0] > 0,
        f"query_offsets is {query_offsets.dtype} {tuple(query_offsets.shape)}; pass int32 [requests + 1]",
    )
    num_requests = query_offsets.shape[0] - 1
    require(num_requests > 0 or num_rows == 0, f"{num_rows} rows but no request; pass one offset more per request")
    if draft_probs is not None:
        require(
            draft_probs.is_floating_point() and draft_probs.shape == logits.shape,
            f"draft_probs is {draft_probs.dtype} {tuple(draft_probs.shape)}; pass float32 {list(logits.shape)}",
        )
    if positions is not None:
        require(
            positions.dtype in _INTEGERS and tuple(positions.shape) == (num_rows,),
            f"positions is {positions.dtype} {tuple(positions.shape)}; pass int64 [{num_rows}]",
        )
    if sampling is not None:
        require(positions is not None, "positions is None; sampling needs the position of the token each row decides")
        check_sampling(sampling, num_requests, logits.device)
    same_device(
        logits=logits, draft_ids=draft_ids, query_offsets=query_offsets, draft_probs=draft_probs, positions=positions
    )
