"""Accepting drafts in plain PyTorch: the definition, and the path of every machine without a better kernel.

Hides how a batch of unequal runs is decided without a loop over requests or tokens.

Row j of a request gives the target's distribution p_j of the token after it; draft d_j, the token row j consumes, was
drawn from q_j. For j = 1, 2, ... (Leviathan et al. 2023, Chen et al. 2023)::

    accept d_j          if u * q_j(d_j) < p_{j-1}(d_j), u uniform in [0, 1)
    at the first d_j that is not, m = j - 1; else m is the number of drafts
    the last token      is drawn from max(p_m - q_{m+1}, 0), normalised; from p_m if every draft was accepted

Without ``draft_probs`` q_j is all on d_j: a draft is accepted with probability p(d), and p without d is drawn from. A
greedy request's p is all on its largest logit, so that its drafts are compared with it. If nothing is left of
``max(p - q, 0)``, which rounding alone can cause, p is drawn from.

Defined cases. Logits as in ``target_probs``. A draft outside the vocabulary, or with ``q`` not above 0, is rejected. A
request without rows accepts 0. Rows that no request owns decide nothing; their ids are -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.hardware import ALL_ARCHES
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._pages import request_of_row
from nextn.ops.accept_drafts._sampling import (
    ACCEPT,
    RESAMPLE,
    SamplingTensors,
    clean_logits,
    draw_uniforms,
    sample_rows,
    target_probs,
)
from nextn.ops.accept_drafts.problem import AcceptDraftsProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Which rows there are and how they follow each other.

    Attributes:
        requests: int64 ``[R]``, the request each row is of.
        is_owned: bool ``[R]``, whether any request owns the row.
        is_first: bool ``[R]``, whether it is its request's first: it consumes a committed token, not a draft.
        starts: int64 ``[B]``, first row of each request.
    """

    requests: torch.Tensor
    is_owned: torch.Tensor
    is_first: torch.Tensor
    starts: torch.Tensor


def prepare(
    problem: AcceptDraftsProblem,
    *,
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    query_offsets: torch.Tensor,
    sampling: SamplingTensors | None,
    draft_probs: torch.Tensor | None,
    positions: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor],
    plan: OpPlan | None = None,
) -> Launch:
    """Describe the call; ``out`` is the accepted lengths and the committed ids, both written."""
    del plan
    arguments = {"problem": problem, "logits": logits, "draft_ids": draft_ids, "query_offsets": query_offsets}
    if problem.is_greedy:
        return Launch(function=_run_greedy, arguments={**arguments, "out": out})
    sampled = {"sampling": sampling, "draft_probs": draft_probs, "positions": positions}
    return Launch(function=_run_sampled, arguments={**arguments, **sampled, "out": out})


def _run_greedy(
    problem: AcceptDraftsProblem,
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    query_offsets: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    if problem.num_rows == 0:
        out[0].zero_()
        return
    rows = _find_rows(query_offsets, problem.num_rows)
    best = clean_logits(logits).argmax(dim=-1)
    is_kept = _find_kept(draft_ids == best.roll(1), rows)
    _count_kept(is_kept, rows, out[0])
    # A kept draft is the best token of the row before it, so every kept row commits its best.
    out[1].copy_(torch.where(is_kept, best, -1))


def _run_sampled(
    problem: AcceptDraftsProblem,
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    query_offsets: torch.Tensor,
    sampling: SamplingTensors,
    draft_probs: torch.Tensor | None,
    positions: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    if problem.num_rows == 0:
        out[0].zero_()
        return
    accept_lens, next_ids = out
    rows = _find_rows(query_offsets, problem.num_rows)
    of_rows = sampling.select(rows.requests)
    probs = target_probs(logits, of_rows)
    positions = positions.to(torch.int64)
    is_accepted = _test_drafts(probs, draft_ids, draft_probs, of_rows.seed, positions)
    is_kept = _find_kept(is_accepted, rows)
    _count_kept(is_kept, rows, accept_lens)
    last = (rows.starts + accept_lens - 1).clamp_(0, problem.num_rows - 1)
    is_rejected = _follows_in_request(last, rows)
    leftover = _find_leftover(probs, draft_ids, draft_probs, last, is_rejected)
    drawn = sample_rows(leftover, sampling.seed, positions.index_select(0, last), RESAMPLE)
    # Every kept row but the last commits the draft that the row after it consumed.
    is_last = torch.arange(problem.num_rows, device=logits.device) == last.index_select(0, rows.requests)
    committed = torch.where(is_last, drawn.index_select(0, rows.requests), draft_ids.roll(-1))
    next_ids.copy_(torch.where(is_kept, committed, -1))


def _find_rows(query_offsets: torch.Tensor, num_rows: int) -> _Rows:
    offsets = query_offsets.to(torch.int64)
    requests = request_of_row(query_offsets, num_rows)
    rows = torch.arange(num_rows, device=query_offsets.device)
    starts = offsets[:-1]
    return _Rows(
        requests=requests,
        is_owned=rows < offsets[-1],
        is_first=rows == starts.index_select(0, requests),
        starts=starts,
    )


def _find_kept(is_accepted: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """Rows whose token is committed: bool [R], each request's first and all that follow without a rejection."""
    # The verdict on a request's first row, which is no draft, is in both of the sums compared.
    rejections = (~is_accepted).cumsum(0)
    at_start = rejections.index_select(0, rows.starts.clamp(max=is_accepted.shape[0] - 1))
    return (rejections == at_start.index_select(0, rows.requests)) & rows.is_owned


def _count_kept(is_kept: torch.Tensor, rows: _Rows, accept_lens: torch.Tensor) -> None:
    accept_lens.zero_().index_add_(0, rows.requests, is_kept.to(accept_lens.dtype))


def _follows_in_request(last: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """Whether the row after ``last [B]`` is of the same request, whose draft was then rejected: bool [B]."""
    num_rows = rows.requests.shape[0]
    after = (last + 1).clamp(max=num_rows - 1)
    return (last + 1 < num_rows) & rows.is_owned.index_select(0, after) & ~rows.is_first.index_select(0, after)


def _test_drafts(
    probs: torch.Tensor,
    draft_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Whether each row's draft passes, judged by the row before it: bool [R]; of a request's first row, anything."""
    vocab = probs.shape[1]
    is_token = (draft_ids >= 0) & (draft_ids < vocab)
    ids = draft_ids.clamp(0, vocab - 1)[:, None]
    target = probs[torch.arange(-1, probs.shape[0] - 1, device=probs.device), ids.squeeze(1)]
    coins = draw_uniforms(seeds, positions.roll(1), ACCEPT)
    if draft_probs is None:
        return (coins < target) & is_token
    drafted = draft_probs.gather(1, ids).squeeze(1)
    return (coins * drafted < target) & (drafted > 0) & is_token


def _find_leftover(
    probs: torch.Tensor,
    draft_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    last: torch.Tensor,
    is_rejected: torch.Tensor,
) -> torch.Tensor:
    """What each request's last token is drawn from, [B, V], not normalised."""
    num_rows, vocab = probs.shape
    target = probs.index_select(0, last)
    after = (last + 1).clamp(max=num_rows - 1)
    if draft_probs is None:
        ids = draft_ids.index_select(0, after)
        is_removed = is_rejected & (ids >= 0) & (ids < vocab)
        ids = ids.clamp(0, vocab - 1)[:, None]
        held = target.gather(1, ids)
        residual = target.scatter(1, ids, torch.where(is_removed[:, None], 0.0, held))
    else:
        drafted = draft_probs.index_select(0, after)
        # A q that is NaN or negative counts as 0.
        residual = (target - torch.where(drafted > 0, drafted, 0)).clamp_(min=0)
    is_usable = is_rejected & (residual > 0).any(dim=1)
    return torch.where(is_usable[:, None], residual, target)


KERNEL = Kernel(
    op="accept_drafts",
    name="reference",
    arches=ALL_ARCHES,
    rejects=lambda problem: None,
    prepare=prepare,
    rank=lambda problem: 0,
)
