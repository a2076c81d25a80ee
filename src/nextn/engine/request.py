"""Request: one prompt being served, from its tokens to its completion.

Hides when an output ends. Tokens are taken one by one in whatever portions a step commits them, so an end-of-sequence
token, a stop string or a limit inside an accepted run truncates the output exactly where plain decoding would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nextn.engine.sampling import SamplingParams
from nextn.engine.text import OutputText


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationStats:
    """How speculation went for one request.

    Attributes:
        verify_steps: target forwards after the prompt, each over 1 to next_n tokens.
        committed: tokens those steps added to the output.
        drafted: draft tokens verified.
        accepted_per_position: of the drafts at depth 1, 2, ..., next_n - 1, how many entered the output.
        first_token_seconds: seconds from submission to the first token; 0 if there was none.
        tokens_per_second: output tokens per second after the first one; 0 for a single token.
    """

    verify_steps: int
    committed: int
    drafted: int
    accepted_per_position: tuple[int, ...]
    first_token_seconds: float
    tokens_per_second: float

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per verify step, 1 for plain decoding; 0 if the output ended with its first token."""
        return self.committed / self.verify_steps if self.verify_steps else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What one prompt got.

    Attributes:
        text: the output, ending before a stop string or an end-of-sequence token.
        token_ids: the output's tokens, the one that ended it included.
        finish_reason: ``stop`` (end of sequence or a stop string), ``length`` (max_new_tokens or the context's end) or
            ``abort``.
        prompt_tokens: tokens of the prompt.
        stats: how speculation went.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    stats: SpeculationStats


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamEvent:
    """News of one request after one step.

    Attributes:
        index: the prompt's place in the call, or the id its submitter gave it.
        text: text to append; whole characters only, empty while a character or a stop string may be unfinished.
        token_ids: tokens committed by the step.
        prefilled: prompt tokens processed so far.
        prompt_tokens: tokens of the prompt.
        completion: the finished output, on the last event of a request; else None.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    prefilled: int
    prompt_tokens: int
    completion: Completion | None = None


class Request:
    """The mutable state of one prompt being served. Owned by the engine core.

    Invariant between steps, once the prompt is cached: the caches hold the final keys of all tokens but the last
    (``cached_len == len(tokens) - 1``), and ``draft_hidden`` is the draft layer's output at the last cached position.

    Args:
        index: identifies the request in its events.
        prompt_ids: the prompt, at least one token.
        params: what was asked for.
        next_n: tokens verified per step.
        max_context: tokens the request may have, prompt and output.
        eos_ids: tokens that end the output.
        decode: token ids to text.
        on_event: called with every :class:`StreamEvent`, from the thread that steps the engine.
    """

    def __init__(
        self,
        *,
        index: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        next_n: int,
        max_context: int,
        eos_ids: frozenset[int],
        decode: Callable[[list[int]], str],
        on_event: Callable[[StreamEvent], None],
    ) -> None:
        self.index = index
        self.id = -1  # set by the engine core: the order of arrival, and the owner of pages
        self.tokens = list(prompt_ids)
        self.prompt_len = len(self.tokens)
        self.params = params
        self.next_n = next_n
        self.max_tokens = min(self.prompt_len + params.max_new_tokens, max_context)
        self.cached_len = 0
        self.draft_hidden: torch.Tensor | None = None  # [hidden]
        self.draft_topk: torch.Tensor | None = None  # int32 [topk], only if the draft layer shares its selection
        self.finish_reason: str | None = None
        self.num_preemptions = 0
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._stream = OutputText(decode, params.stop)
        self._on_event = on_event
        self._num_reported = 0
        self._verify_steps = 0
        self._committed = 0
        self._drafted = 0
        self._accepted = [0] * (next_n - 1)
        self._submitted = time.perf_counter()
        self._first_token: float | None = None
        self._last_token = self._submitted

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def prefill_len(self) -> int:
        """Tokens to cache before decoding: the prompt, or after a preemption all tokens but the last."""
        return len(self.tokens) - 1 if self.num_generated else self.prompt_len

    @property
    def is_prefilling(self) -> bool:
        return self.cached_len < self.prefill_len

    @property
    def verify_rows(self) -> int:
        """Rows of the next verify step: next_n, less where the output's limit comes sooner."""
        return min(self.next_n, self.max_tokens - max(len(self.tokens), self.prompt_len + 1))

    @property
    def wants_drafts(self) -> bool:
        """Whether a later step can verify a draft. Once False it stays so: nothing will read the draft cache again."""
        return self.finish_reason is None and self.verify_rows >= 2

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def forget_cache(self) -> None:
        """After a preemption: everything cached is to be computed again, the tokens stay."""
        self.cached_len = 0
        self.draft_hidden = self.draft_topk = None
        self.num_preemptions += 1

    def commit(self, ids: Sequence[int]) -> int:
        """Append accepted tokens until one of them ends the output; returns how many were appended."""
        before = len(self.tokens)
        for token in ids:
            self.tokens.append(token)
            if self._ends_with(token):
                break
        self._last_token = time.perf_counter()
        self._first_token = self._last_token if self._first_token is None else self._first_token
        return len(self.tokens) - before

    def record_verify(self, *, num_drafts: int, num_accepted: int, num_committed: int) -> None:
        """Count one verify step; drafts cut off by the output's end do not count as accepted."""
        self._verify_steps += 1
        self._committed += num_committed
        self._drafted += num_drafts
        for depth in range(min(num_accepted, num_committed)):
            self._accepted[depth] += 1

    def abort(self) -> None:
        """End the output where it is."""
        if self.finish_reason is None:
            self._finish("abort")

    def report(self) -> None:
        """Send what is new since the last report to the submitter."""
        fresh = tuple(self.tokens[self.prompt_len + self._num_reported :])
        self._num_reported += len(fresh)
        event = StreamEvent(
            index=self.index,
            text=self._stream.take(is_final=self.is_finished),
            token_ids=fresh,
            prefilled=self.prompt_len if self.num_generated else min(self.cached_len, self.prompt_len),
            prompt_tokens=self.prompt_len,
            completion=self._complete() if self.is_finished else None,
        )
        self._on_event(event)

    def _ends_with(self, token: int) -> bool:
        if token in self._eos_ids:
            self._finish("stop")
        elif self._stream.push(token):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self._finish("length")
        return self.is_finished

    def _finish(self, reason: str) -> None:
        self.finish_reason = "stop" if self._stream.finish() else reason

    def _complete(self) -> Completion:
        assert self.finish_reason is not None
        first, elapsed = self._first_token, self._last_token - (self._first_token or 0.0)
        stats = SpeculationStats(
            verify_steps=self._verify_steps,
            committed=self._committed,
            drafted=self._drafted,
            accepted_per_position=tuple(self._accepted),
            first_token_seconds=0.0 if first is None else first - self._submitted,
            tokens_per_second=(self.num_generated - 1) / elapsed if first is not None and elapsed > 0 else 0.0,
        )
        return Completion(
            text=self._stream.text,
            token_ids=tuple(self.tokens[self.prompt_len :]),
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_len,
            stats=stats,
        )
