"""Scheduler: which requests run in a step, and with how many rows.

Hides the queue and preemption. First come, first served: running requests are always older than waiting ones, and when
pages run out the youngest running request gives its pages back and is computed again later, so the oldest one always
advances and every request ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nextn.engine.pages import PagePool
from nextn.engine.request import Request
from nextn.errors import CapacityError, RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A request's part in one step.

    Attributes:
        request: whose.
        start: position of its first row: the tokens cached before the step.
        num_rows: rows it runs through the target; their pages are reserved.
        is_prefill: whether the rows are known tokens, so that there is nothing to verify.
    """

    request: Request
    start: int
    num_rows: int
    is_prefill: bool

    @property
    def end(self) -> int:
        """Tokens cached for the request once the step's rows are written."""
        return self.start + self.num_rows

    @property
    def completes_prefill(self) -> bool:
        return self.is_prefill and self.end == self.request.prefill_len


class Scheduler:
    """Continuous batching over one page pool.

    Args:
        pool: the pages.
        max_batch: requests running at once.
        prefill_chunk: prompt tokens per step over all requests. Decoding requests run in every step regardless, so a
            long prompt delays them by one chunk at most.
    """

    def __init__(self, pool: PagePool, *, max_batch: int, prefill_chunk: int) -> None:
        self._pool = pool
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def requests(self) -> tuple[Request, ...]:
        """Every request, oldest first."""
        return (*self._running, *self._waiting)

    def check_fits(self, request: Request) -> None:
        """Refuse a request that the pool could not hold even alone.

        Raises:
            RequestError: it could not; names the pages it takes and those there are.
        """
        # The last token of an output is never cached.
        needed, usable = self._pool.count_pages(request.max_tokens - 1), self._pool.num_usable
        if needed > usable:
            raise RequestError(
                f"a prompt of {request.prompt_len} tokens with max_new_tokens {request.params.max_new_tokens} takes "
                f"{needed} cache pages of {self._pool.page_size} tokens, but the pool has {usable}; "
                "raise cache_tokens, or shorten the prompt or max_new_tokens"
            )

    def add(self, request: Request) -> None:
        """Queue a request; it must be younger than every other one."""
        self._waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, finished or aborted, and take its pages back."""
        self._pool.release(request.id)
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    def schedule(self) -> tuple[Work, ...]:
        """The next step's work, oldest request first, with all of its pages reserved; empty if there is none.

        Raises:
            CapacityError: requests wait although nothing runs and all pages are free (a request too large for the pool
                was added unchecked).
        """
        has_preempted = self._reserve_for_decoding()
        if not has_preempted:
            self._admit()
        if self._waiting and not self._running:
            raise CapacityError(
                f"request {self._waiting[0].index} waits for more pages than the pool's {self._pool.num_usable}; "
                "raise cache_tokens"
            )
        return self._assign_rows()

    def _reserve_for_decoding(self) -> bool:
        """Pages for every decoding request's rows, oldest first; returns whether anything was preempted."""
        has_preempted = False
        for request in list(self._running):
            # A preempted request is never older than the one served, so those still to come must be looked up again.
            while request in self._running and not self._reserve_rows(request):
                self._preempt(self._running[-1])
                has_preempted = True
        return has_preempted

    def _reserve_rows(self, request: Request) -> bool:
        end = request.prefill_len if request.is_prefilling else request.cached_len + request.verify_rows
        return self._pool.reserve(request.id, num_tokens=end)

    def _preempt(self, request: Request) -> None:
        self._pool.release(request.id)
        self._running.remove(request)
        request.forget_cache()
        self._waiting.appendleft(request)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_batch:
            request = self._waiting[0]
            # Its whole prompt and its first verify step at once: a prompt never stops half-way for lack of pages.
            if not self._pool.reserve(request.id, num_tokens=request.prefill_len + request.verify_rows):
                return
            self._running.append(self._waiting.popleft())

    def _assign_rows(self) -> tuple[Work, ...]:
        budget = self._prefill_chunk
        works = []
        for request in self._running:
            start = request.cached_len
            if not request.is_prefilling:
                works.append(Work(request=request, start=start, num_rows=request.verify_rows, is_prefill=False))
            elif budget:
                num_rows = min(budget, request.prefill_len - start)
                budget -= num_rows
                works.append(Work(request=request, start=start, num_rows=num_rows, is_prefill=True))
        return tuple(works)
