"""SpeculativeDecoder: draft, verify, accept, extend; the iteration of multi-token prediction for a mixed batch.

Hides how far each request's caches are trusted. Between steps L tokens of a request are final in both caches and the
token after them is known; a step verifies it together with the drafts that follow it at positions L, L+1, ... Slots
written for rejected drafts lie beyond the new L, and the next step writes each of them again before it reads it.

The draft cache pairs slot p with (target hidden of p, token p+1), so it has the target's slot numbers and page table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nextn.batch import ForwardMode
from nextn.engine.runner import Runner, Span, TargetOutput
from nextn.engine.sampling import pack_sampling
from nextn.engine.scheduler import Work
from nextn.ops.accept_drafts import DRAFT, SamplingTensors, accept_drafts, sample_rows, target_probs


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """What the target is to verify for B requests of n_1, ..., n_B rows, flattened request by request.

    Attributes:
        ids: int64 ``[R]``: per request the last committed token, then its drafts.
        probs: float32 ``[R, vocab]``, the distribution each draft was drawn from (first rows unused), or None if every
            draft is a most probable token.
    """

    ids: torch.Tensor
    probs: torch.Tensor | None


class SpeculativeDecoder:
    """Runs one step for any mixture of prompts being cached and requests being decoded at different depths."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> None:
        """Advance every request of ``works``: cache prompt tokens, or commit 1 to next_n tokens.

        Two forwards at least touch all rows, one of the target and one of the draft layer; before them come up to
        next_n - 2 draft steps of one row per request. Requests that will verify no more drafts, those with next_n 1
        among them, take no part in the draft layer's forwards.
        """
        decodes = [work for work in works if not work.is_prefill]
        prefills = [work for work in works if work.is_prefill]
        ordered = [*decodes, *prefills]
        proposal = self._propose(decodes) if decodes else None
        batch = self._runner.build_batch(_find_mode(decodes, prefills), [_span_of(work) for work in ordered])
        known = [token for work in prefills for token in work.request.tokens[work.start : work.end]]
        input_ids = self._tensor(known)
        if proposal is not None:
            input_ids = torch.cat([proposal.ids, input_ids]) if prefills else proposal.ids
        target = self._runner.run_target(batch, input_ids)
        self._commit(decodes, prefills, proposal, target)
        self._extend_drafts([work for work in ordered if work.request.wants_drafts], ordered, target.hidden)

    def _propose(self, decodes: Sequence[Work]) -> Proposal:
        """Draft for every request as deep as its rows go."""
        counts = [work.num_rows for work in decodes]
        width = max(counts)
        ids = self._tensor([work.request.tokens[-1] for work in decodes]).unsqueeze(1).repeat(1, width)
        sampling = pack_sampling([work.request.params for work in decodes], self._runner.device)
        live = [index for index, count in enumerate(counts) if count > 1]
        probs: torch.Tensor | None = None
        hidden = self._stack([decodes[index].request.draft_hidden for index in live])
        for depth in range(1, width):
            rows = self._tensor(live)
            drafts, drawn_from = self._draw(hidden, [decodes[index] for index in live], rows, depth, sampling)
            ids[rows, depth] = drafts
            if drawn_from is not None:
                probs = drawn_from.new_zeros(*ids.shape, drawn_from.shape[1]) if probs is None else probs
                probs[rows, depth] = drawn_from
            kept = [place for place, index in enumerate(live) if counts[index] > depth + 1]
            live = [live[place] for place in kept]
            if live:
                places = self._tensor(kept)
                hidden = self._chain([decodes[index] for index in live], depth, drafts[places], hidden[places])
        return _flatten_proposal(ids, probs, counts)

    def _draw(
        self,
        hidden: torch.Tensor,
        works: Sequence[Work],
        rows: torch.Tensor,
        depth: int,
        sampling: SamplingTensors | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The drafts at ``depth``, int64 ``[live]``, and what they were drawn from (None: the most probable token)."""
        logits = self._runner.compute_draft_logits(hidden)
        if sampling is None:
            return logits.argmax(dim=-1), None
        chosen = sampling.select(rows)
        probs = target_probs(logits, chosen)
        positions = self._tensor([work.start + depth for work in works])
        return sample_rows(probs, chosen.seed, positions, DRAFT), probs

    def _chain(self, works: Sequence[Work], depth: int, drafts: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Feed the drafts at ``depth`` back through the draft layer, one row per request."""
        spans = [Span(owner=work.request.id, start=work.start + depth - 1, num_rows=1) for work in works]
        shared = self._stack([work.request.draft_topk for work in works]) if self._runner.shares_draft_topk else None
        batch = self._runner.build_batch(ForwardMode.DECODE, spans)
        return self._runner.run_draft(batch, drafts, hidden, shared_topk=shared).hidden

    def _commit(
        self,
        decodes: Sequence[Work],
        prefills: Sequence[Work],
        proposal: Proposal | None,
        target: TargetOutput,
    ) -> None:
        """Decide tokens, append them to their requests, and move on what counts as cached."""
        for work in prefills:
            work.request.cached_len = work.end
        # A preempted request that is cached again knows its last token already.
        first = [work for work in prefills if work.completes_prefill and not work.request.num_generated]
        decided = [*decodes, *first]
        if not decided:
            return
        num_verified = sum(work.num_rows for work in decodes)
        rows = self._tensor([*range(num_verified), *_last_rows(prefills, first, offset=num_verified)])
        accept_lens, next_ids = self._accept(decided, len(decodes), rows, proposal, target)
        start = 0
        for work, length in zip(decided, accept_lens):
            request = work.request
            num_committed = request.commit(next_ids[start : start + length])
            start += 1 if work.is_prefill else work.num_rows
            if not work.is_prefill:
                request.cached_len = len(request.tokens) - 1
                request.record_verify(
                    num_drafts=work.num_rows - 1, num_accepted=length - 1, num_committed=num_committed
                )

    def _accept(
        self,
        decided: Sequence[Work],
        num_decodes: int,
        rows: torch.Tensor,
        proposal: Proposal | None,
        target: TargetOutput,
    ) -> tuple[list[int], list[int]]:
        """Accepted tokens per request, and the committed tokens at the front of each request's rows."""
        logits = self._runner.compute_logits(target.hidden[rows])
        num_first = len(decided) - num_decodes
        draft_ids, probs = self._tensor([0] * num_first), None
        if proposal is not None:
            draft_ids = torch.cat([proposal.ids, draft_ids])
            probs = proposal.probs
        if probs is not None and num_first:
            probs = torch.cat([probs, probs.new_zeros(num_first, probs.shape[1])])
        counts = torch.tensor([0, *(1 if work.is_prefill else work.num_rows for work in decided)], dtype=torch.int32)
        accepted = accept_drafts(
            logits,
            draft_ids,
            counts.cumsum(0, dtype=torch.int32).to(logits.device),
            sampling=pack_sampling([work.request.params for work in decided], logits.device),
            draft_probs=probs,
            positions=target.positions[rows] + 1,
        )
        return accepted.accept_lens.tolist(), accepted.next_ids.tolist()

    def _extend_drafts(self, wanted: Sequence[Work], ordered: Sequence[Work], hidden: torch.Tensor) -> None:
        """Run the draft layer over the rows the target ran, each paired with the token now known to follow it.

        Rows of rejected drafts are paired with token 0. Their slots are beyond what is cached.
        """
        if not wanted:
            return
        if len(wanted) < len(ordered):
            hidden = hidden[self._tensor(_rows_of(wanted, ordered))]
        next_ids = []
        for work in wanted:
            known = work.request.tokens[work.start + 1 : work.end + 1]
            next_ids += known + [0] * (work.num_rows - len(known))
        is_prefill = any(work.is_prefill for work in wanted)
        mode = ForwardMode.EXTEND if is_prefill else ForwardMode.DRAFT_EXTEND
        batch = self._runner.build_batch(mode, [_span_of(work) for work in wanted])
        output = self._runner.run_draft(batch, self._tensor(next_ids), hidden)
        offset = 0
        for work in wanted:
            last = offset + work.request.cached_len - work.start - 1
            offset += work.num_rows
            if not work.request.is_prefilling:
                work.request.draft_hidden = output.hidden[last].clone()
            if self._runner.shares_draft_topk and not work.request.is_prefilling:
                work.request.draft_topk = output.topk_slots[last].clone()

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._runner.device)

    def _stack(self, rows: Sequence[torch.Tensor | None]) -> torch.Tensor:
        present = [row for row in rows if row is not None]
        assert len(present) == len(rows), "a request that verifies drafts lacks the draft layer's state"
        return torch.stack(present) if present else torch.empty(0, device=self._runner.device)


def _flatten_proposal(ids: torch.Tensor, probs: torch.Tensor | None, counts: Sequence[int]) -> Proposal:
    """Drop the entries beyond each request's rows."""
    if min(counts) == max(counts):
        return Proposal(ids=ids.reshape(-1), probs=None if probs is None else probs.flatten(0, 1))
    width = ids.shape[1]
    places = [index * width + depth for index, count in enumerate(counts) for depth in range(count)]
    kept = torch.tensor(places, dtype=torch.int64, device=ids.device)
    return Proposal(ids=ids.reshape(-1)[kept], probs=None if probs is None else probs.flatten(0, 1)[kept])


def _find_mode(decodes: Sequence[Work], prefills: Sequence[Work]) -> ForwardMode:
    if prefills:
        return ForwardMode.EXTEND
    return ForwardMode.TARGET_VERIFY if any(work.num_rows > 1 for work in decodes) else ForwardMode.DECODE


def _span_of(work: Work) -> Span:
    return Span(owner=work.request.id, start=work.start, num_rows=work.num_rows)


def _last_rows(works: Sequence[Work], chosen: Sequence[Work], *, offset: int) -> list[int]:
    """The last row of each chosen work, when the rows of ``works`` begin at ``offset``."""
    rows = []
    for work in works:
        offset += work.num_rows
        if work in chosen:
            rows.append(offset - 1)
    return rows


def _rows_of(chosen: Sequence[Work], works: Sequence[Work]) -> list[int]:
    """Every row of each chosen work."""
    rows: list[int] = []
    offset = 0
    owners = {work.request.id for work in chosen}
    for work in works:
        if work.request.id in owners:
            rows += range(offset, offset + work.num_rows)
        offset += work.num_rows
    return rows
