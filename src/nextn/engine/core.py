"""EngineCore: submit requests, step, receive events.

Hides the order of one step: take new requests and aborts, schedule, decode, report, free. One thread steps; any thread
may submit or abort, which takes effect between steps.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nextn.engine.pages import PagePool
from nextn.engine.request import Request, StreamEvent
from nextn.engine.runner import Runner
from nextn.engine.sampling import SamplingParams
from nextn.engine.scheduler import Scheduler
from nextn.engine.speculative import SpeculativeDecoder
from nextn.errors import RequestError


class EngineCore:
    """The engine without its front: token ids in, events out.

    Args:
        model: as :class:`~nextn.engine.runner.Runner` takes it.
        backend: likewise.
        decode: token ids to text.
        eos_ids: tokens that end an output.
        vocab_size: token ids are below it.
        next_n: tokens verified per step, for requests that do not say.
        max_batch: requests running at once.
        max_context: tokens a request may have, prompt and output.
        cache_tokens: tokens the page pool holds.
        prefill_chunk: prompt tokens per step.
        page_size: tokens per page.
        shares_draft_topk: as :class:`~nextn.engine.runner.Runner` takes it.
    """

    def __init__(
        self,
        model: Any,
        backend: Any,
        *,
        decode: Callable[[list[int]], str],
        eos_ids: Iterable[int],
        vocab_size: int,
        next_n: int,
        max_batch: int,
        max_context: int,
        cache_tokens: int,
        prefill_chunk: int,
        page_size: int = 64,
        shares_draft_topk: bool = False,
    ) -> None:
        self.next_n = next_n
        self.max_context = max_context
        self.pool = PagePool(num_pages=-(-cache_tokens // page_size) + 1, page_size=page_size, device=backend.device)
        self.runner = Runner(model, backend, self.pool, shares_draft_topk=shares_draft_topk)
        self.scheduler = Scheduler(self.pool, max_batch=max_batch, prefill_chunk=prefill_chunk)
        self._decoder = SpeculativeDecoder(self.runner)
        self._decode = decode
        self._eos_ids = frozenset(eos_ids)
        self._vocab_size = vocab_size
        self._can_draft = model.mtp is not None
        self._ids = itertools.count()
        self._submitted: deque[Request] = deque()
        self._aborted: deque[Request] = deque()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._submitted or self._aborted or self.scheduler.num_running or self.scheduler.num_waiting)

    def build_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        index: int = 0,
        on_event: Callable[[StreamEvent], None],
    ) -> Request:
        """Check a prompt and its parameters; the result is to be passed to :meth:`submit`.

        Args:
            prompt_ids: the prompt's tokens.
            params: what is asked of the output.
            index: comes back in the request's events.
            on_event: called with every event, from the thread that steps.

        Raises:
            RequestError: the prompt is empty, holds an id outside the vocabulary or leaves no room in the context; the
                page pool could never hold the request; or it asks for drafts of a model without a draft layer.
        """
        self._check_prompt(prompt_ids)
        next_n = self.next_n if params.next_n is None else params.next_n
        if next_n > 1 and not self._can_draft:
            raise RequestError(f"next_n {next_n} needs drafts, but the model has no NextN layer; use next_n 1")
        request = Request(
            index=index,
            prompt_ids=prompt_ids,
            params=params,
            next_n=next_n,
            max_context=self.max_context,
            eos_ids=self._eos_ids,
            decode=self._decode,
            on_event=on_event,
        )
        self.scheduler.check_fits(request)
        return request

    def submit(self, request: Request) -> None:
        """Queue a request for the next step."""
        self._submitted.append(request)

    def abort(self, request: Request) -> None:
        """End a request at the next step; its last event says ``abort``. One that is finished stays so."""
        self._aborted.append(request)

    def step(self) -> bool:
        """Advance every running request by one step and report what is new; returns whether anything ran.

        If the model raises, every request is aborted and all pages are freed before the error is passed on.
        """
        self.take_messages()
        works = self.scheduler.schedule()
        if not works:
            return False
        try:
            self._decoder.run(works)
        except BaseException:
            for request in self.scheduler.requests:
                self._end(request)
            raise
        for work in works:
            if work.request.is_finished:
                self.scheduler.remove(work.request)
            work.request.report()
        return True

    def take_messages(self) -> None:
        """Apply what was submitted and aborted since the last step, without running anything."""
        while self._submitted:
            request = self._submitted.popleft()
            request.id = next(self._ids)
            self.scheduler.add(request)
        while self._aborted:
            request = self._aborted.popleft()
            if not request.is_finished:
                self._end(request)

    def _end(self, request: Request) -> None:
        request.abort()
        self.scheduler.remove(request)
        request.report()

    def _check_prompt(self, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise RequestError("the prompt is empty; give at least one token")
        wrong = [token for token in prompt_ids if not 0 <= token < self._vocab_size]
        if wrong:
            raise RequestError(f"prompt token {wrong[0]} is outside the vocabulary of {self._vocab_size}; leave it out")
        if len(prompt_ids) >= self.max_context:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, but the context holds {self.max_context} with at least one "
                "of output; shorten the prompt"
            )
