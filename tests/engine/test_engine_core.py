"""Speculation changes nothing but speed; pages are exact under load. Checked on a model that reads its caches back."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from fake_model import EOS, VOCAB, FakeModel, build_core, plain_greedy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nextn.batch import ForwardBatch, ForwardMode
from nextn.engine.core import EngineCore
from nextn.engine.request import Completion, Request, StreamEvent
from nextn.engine.sampling import SamplingParams
from nextn.errors import RequestError


def make_prompt(seed: int, length: int) -> list[int]:
    return [2 + (seed * 7 + place * place + seed * place) % (VOCAB - 2) for place in range(length)]


def submit(core: EngineCore, prompt: list[int], events: list[StreamEvent], index: int = 0, **params: int) -> Request:
    params = {"max_new_tokens": 12, "ignore_eos": True, **params}
    request = core.build_request(prompt, SamplingParams(**params), index=index, on_event=events.append)  # type: ignore[arg-type]
    core.submit(request)
    return request


def finish(core: EngineCore, events: list[StreamEvent]) -> dict[int, Completion]:
    while core.has_work:
        core.step()
    return {event.index: event.completion for event in events if event.completion is not None}


def run_all(
    core: EngineCore, prompts: list[list[int]], depths: list[int], max_new_tokens: int = 24
) -> list[Completion]:
    events: list[StreamEvent] = []
    for index, (prompt, depth) in enumerate(zip(prompts, depths)):
        submit(core, prompt, events, index, next_n=depth, max_new_tokens=max_new_tokens)
    completions = finish(core, events)
    core.pool.check()
    assert core.pool.num_free == core.pool.num_usable, "a finished request kept pages"
    return [completions[index] for index in range(len(prompts))]


@pytest.mark.parametrize("next_n", range(1, 9))
def test_greedy_output_is_the_plain_output_at_every_depth(next_n: int) -> None:
    prompts = [make_prompt(seed, 1 + 5 * seed) for seed in range(6)]
    completions = run_all(build_core(), prompts, [next_n] * 6)
    for prompt, completion in zip(prompts, completions):
        assert list(completion.token_ids) == plain_greedy(prompt, 24)


def test_runs_of_every_length_are_accepted_and_rejected() -> None:
    """The equalities of this file mean something only if every branch of acceptance is taken."""
    lengths: set[int] = set()
    model = FakeModel(error_percent=30)
    core = build_core(model, next_n=8)
    events: list[StreamEvent] = []
    for index in range(8):
        submit(core, make_prompt(index, 9), events, index, max_new_tokens=60)
    while core.has_work:
        before = len(events)
        core.step()
        lengths |= {len(event.token_ids) for event in events[before:]}
    assert lengths >= set(range(1, 9))


@pytest.mark.parametrize("shares_topk", [False, True])
def test_mixed_depths_at_batch_8_accept_what_each_request_accepts_alone(shares_topk: bool) -> None:
    prompts = [make_prompt(seed, 3 + 4 * seed) for seed in range(16)]
    depths = [1 + seed % 8 for seed in range(16)]

    def build() -> EngineCore:
        return build_core(FakeModel(shares_topk=shares_topk), num_pages=300)

    together = run_all(build(), prompts, depths)
    for prompt, depth, completion in zip(prompts, depths, together):
        (alone,) = run_all(build(), [prompt], [depth])
        assert completion.token_ids == alone.token_ids
        assert completion.stats.verify_steps == alone.stats.verify_steps
        assert completion.stats.accepted_per_position == alone.stats.accepted_per_position
        assert len(completion.stats.accepted_per_position) == depth - 1


def test_a_shared_selection_is_that_of_the_last_accepted_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the last row verified, which may be a rejected draft."""
    core = build_core(FakeModel(shares_topk=True, error_percent=50), next_n=5)
    calls = []
    run_draft = core.runner.run_draft

    def record(batch: ForwardBatch, *arguments: Any, shared_topk: torch.Tensor | None = None) -> Any:
        calls.append((batch, shared_topk))
        return run_draft(batch, *arguments, shared_topk=shared_topk)

    monkeypatch.setattr(core.runner, "run_draft", record)
    (completion,) = run_all(core, [make_prompt(3, 9)], [5])
    assert completion.stats.drafted > sum(completion.stats.accepted_per_position) > 0
    first_steps = [after for before, after in pairwise(calls) if before[1] is None and after[1] is not None]
    assert len(first_steps) > 3
    for batch, shared_topk in first_steps:
        last = int(batch.context_lens[0]) - 2  # the step adds one position to those that are final
        assert shared_topk is not None
        assert int(shared_topk[0, 0]) == int(batch.page_table[0, last // 4]) * 4 + last % 4


@pytest.mark.parametrize("prefill_chunk", [1, 3, 16, 100])
def test_chunks_of_a_prompt_leave_the_same_caches_as_one_forward(prefill_chunk: int) -> None:
    (whole,) = run_all(build_core(prefill_chunk=100), [make_prompt(3, 50)], [5])
    (chunked,) = run_all(build_core(prefill_chunk=prefill_chunk), [make_prompt(3, 50)], [5])
    assert chunked.token_ids == whole.token_ids
    assert chunked.stats.accepted_per_position == whole.stats.accepted_per_position


def test_perfect_drafts_are_accepted_whole_and_hopeless_ones_never() -> None:
    (perfect,) = run_all(build_core(FakeModel(error_percent=0)), [make_prompt(1, 5)], [4], max_new_tokens=25)
    assert perfect.stats.accepted_per_position == (6, 6, 6)
    assert perfect.stats.acceptance_length == 4.0
    assert perfect.stats.drafted == 18
    (hopeless,) = run_all(build_core(FakeModel(error_percent=100)), [make_prompt(1, 5)], [4], max_new_tokens=25)
    assert hopeless.stats.accepted_per_position == (0, 0, 0)
    assert hopeless.stats.verify_steps == 24
    assert hopeless.token_ids == perfect.token_ids


def test_plain_decoding_never_touches_the_draft_layer() -> None:
    model = FakeModel()
    core = build_core(model)
    run_all(core, [make_prompt(1, 20)], [1])
    assert model.mtp is not None
    assert model.mtp.num_rows == 0
    assert {batch.mode for batch in core.runner._backend.batches} == {ForwardMode.EXTEND, ForwardMode.DECODE}


def test_every_forward_is_planned_once_with_a_tight_context_and_its_mode() -> None:
    core = build_core()
    run_all(core, [make_prompt(1, 20), make_prompt(2, 3)], [4, 4])
    batches = core.runner._backend.batches
    assert {batch.mode for batch in batches} == set(ForwardMode) - {ForwardMode.IDLE}
    for batch in batches:
        assert batch.max_context == batch.context_lens.max()
    verified = [batch for batch in batches if batch.mode is ForwardMode.TARGET_VERIFY]
    assert any(batch.row_counts == (4, 4) for batch in verified)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5, 8])
def test_depth_shrinks_before_the_output_limit_and_reaches_it_exactly(max_new_tokens: int) -> None:
    (completion,) = run_all(build_core(FakeModel(error_percent=0)), [make_prompt(4, 7)], [8], max_new_tokens)
    assert list(completion.token_ids) == plain_greedy(make_prompt(4, 7), max_new_tokens)
    assert completion.finish_reason == "length"
    assert completion.stats.verify_steps == (max_new_tokens > 1)


@pytest.mark.parametrize("prompt_len", [30, 38, 39])
def test_positions_never_pass_the_context(prompt_len: int) -> None:
    """The fake model asserts it of every row; the output fills the context exactly."""
    core = build_core(FakeModel(error_percent=0, max_context=40), next_n=8)
    (completion,) = run_all(core, [make_prompt(5, prompt_len)], [8], max_new_tokens=100)
    assert len(completion.token_ids) == 40 - prompt_len
    assert completion.finish_reason == "length"
    with pytest.raises(RequestError, match="40 tokens, but the context holds 40"):
        submit(core, make_prompt(5, 40), [])


@pytest.mark.parametrize("next_n", [1, 2, 5, 8])
def test_end_of_sequence_inside_an_accepted_run_truncates_as_plain_decoding_does(next_n: int) -> None:
    prompts = [make_prompt(seed, 6) for seed in range(40)]
    core = build_core(FakeModel(error_percent=10), num_pages=200)
    events: list[StreamEvent] = []
    for index, prompt in enumerate(prompts):
        submit(core, prompt, events, index, next_n=next_n, max_new_tokens=40, ignore_eos=False)
    completions = finish(core, events)
    for index, prompt in enumerate(prompts):
        expected = plain_greedy(prompt, 40, ignore_eos=False)
        assert list(completions[index].token_ids) == expected
        assert completions[index].finish_reason == ("stop" if expected[-1] == EOS else "length")
        stats = completions[index].stats
        assert stats.committed == len(expected) - 1
        # Each step adds one token that was no draft, but for the last if a draft ended the output.
        last_by_draft = stats.verify_steps - (stats.committed - sum(stats.accepted_per_position))
        assert last_by_draft == 0 or (last_by_draft == 1 and stats.verify_steps > 0)
    last_runs = {
        len(event.token_ids) for event in events if event.completion and event.completion.finish_reason == "stop"
    }
    assert last_runs >= set(range(1, min(next_n, 5) + 1)), "no output ended at some place of a run"


def test_prompts_and_decoding_share_steps_fairly() -> None:
    """A long prompt costs running requests no step, and a later prompt starts when the earlier one ends."""
    core = build_core(next_n=2, num_pages=300, prefill_chunk=8)
    events: list[StreamEvent] = []
    submit(core, make_prompt(1, 4), events, 0, max_new_tokens=40)
    core.step()
    submit(core, make_prompt(2, 60), events, 1)
    submit(core, make_prompt(3, 10), events, 2)
    for _ in range(8):
        before = len(events)
        core.step()
        assert any(event.index == 0 and event.token_ids for event in events[before:])
    progress = [(event.index, event.prefilled) for event in events if event.index and not event.token_ids]
    assert progress == [(1, 8 * step) for step in range(1, 8)] + [(2, 4)]


def test_preempted_requests_give_identical_output_and_statistics() -> None:
    prompts = [make_prompt(seed, 12 + seed) for seed in range(6)]
    depths = [4, 1, 8, 3, 2, 5]
    roomy = run_all(build_core(num_pages=300), prompts, depths, max_new_tokens=40)
    core = build_core(num_pages=24)
    preempted = 0
    events: list[StreamEvent] = []
    requests = [
        submit(core, prompt, events, index, next_n=depth, max_new_tokens=40)
        for index, (prompt, depth) in enumerate(zip(prompts, depths))
    ]
    completions = finish(core, events)
    preempted = sum(request.num_preemptions for request in requests)
    assert preempted >= 3
    assert requests[0].num_preemptions == 0, "the oldest request must always advance"
    for index, completion in enumerate(roomy):
        assert completions[index].token_ids == completion.token_ids
        assert completions[index].stats.accepted_per_position == completion.stats.accepted_per_position
        assert completions[index].stats.verify_steps == completion.stats.verify_steps


def test_a_request_the_pool_can_never_hold_is_refused_with_the_figures() -> None:
    core = build_core(num_pages=8)
    assert submit(core, make_prompt(1, 20), [], max_new_tokens=13)
    with pytest.raises(RequestError, match=r"takes 9 cache pages of 4 tokens, but the pool has 8"):
        submit(core, make_prompt(1, 20), [], max_new_tokens=14)


def test_a_request_of_exactly_the_pools_size_ends() -> None:
    (completion,) = run_all(build_core(num_pages=8), [make_prompt(1, 20)], [8], max_new_tokens=13)
    assert list(completion.token_ids) == plain_greedy(make_prompt(1, 20), 13)


def test_an_abort_frees_pages_at_once_and_reports_what_there_is() -> None:
    core = build_core()
    events: list[StreamEvent] = []
    request = submit(core, make_prompt(1, 9), events, max_new_tokens=100)
    for _ in range(5):
        core.step()
    core.abort(request)
    core.abort(request)
    assert core.step() is False
    assert core.pool.num_free == core.pool.num_usable
    completion = events[-1].completion
    assert completion is not None
    assert completion.finish_reason == "abort"
    assert list(completion.token_ids) == plain_greedy(make_prompt(1, 9), len(completion.token_ids))
    assert sum(event.completion is not None for event in events) == 1


def test_a_failing_model_aborts_everything_and_leaves_the_engine_usable() -> None:
    model = FakeModel()
    core = build_core(model)
    events: list[StreamEvent] = []
    for index in range(3):
        submit(core, make_prompt(index, 5), events, index)
    core.step()
    working, model.compute_logits = model.compute_logits, lambda hidden: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        core.step()
    assert [event.completion.finish_reason for event in events if event.completion] == ["abort"] * 3
    assert core.pool.num_free == core.pool.num_usable
    model.compute_logits = working  # type: ignore[method-assign]
    (completion,) = run_all(core, [make_prompt(7, 5)], [4])
    assert list(completion.token_ids) == plain_greedy(make_prompt(7, 5), 24)


class EngineMachine(RuleBasedStateMachine):
    """Random submissions, aborts and steps in a pool so small that it is full most of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.core = build_core(FakeModel(error_percent=30, max_context=48), max_batch=4, num_pages=14, prefill_chunk=6)
        self.events: list[StreamEvent] = []
        self.requests: list[Request] = []
        self.aborted: set[int] = set()

    @rule(seed=st.integers(0, 50), length=st.integers(1, 30), max_new=st.integers(1, 20), depth=st.integers(1, 8))
    def submit(self, seed: int, length: int, max_new: int, depth: int) -> None:
        prompt = make_prompt(seed, length)
        index = len(self.requests)
        self.requests.append(submit(self.core, prompt, self.events, index, max_new_tokens=max_new, next_n=depth))

    @rule(choice=st.integers(0, 1000))
    def abort(self, choice: int) -> None:
        if self.requests:
            request = self.requests[choice % len(self.requests)]
            self.core.abort(request)
            self.aborted.add(request.index)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.core.step()

    @invariant()
    def pages_belong_to_live_requests_and_cover_what_they_cached(self) -> None:
        pool = self.core.pool
        pool.check()
        live = {request.id: request for request in self.core.scheduler.requests}
        assert pool.owners <= live.keys()
        assert list(live) == sorted(live), "a running request is younger than a waiting one"
        for request in live.values():
            assert len(pool.pages_of(request.id)) >= pool.count_pages(request.cached_len)

    def teardown(self) -> None:
        while self.core.has_work:
            self.core.step()
        assert self.core.pool.num_free == self.core.pool.num_usable
        completions = {event.index: event.completion for event in self.events if event.completion is not None}
        assert completions.keys() == set(range(len(self.requests))), "a request was dropped"
        for request in self.requests:
            check_completion(request, completions[request.index], self.events, is_aborted=request.index in self.aborted)


def check_completion(
    request: Request, completion: Completion, events: list[StreamEvent], *, is_aborted: bool = False
) -> None:
    """Its tokens are the plain ones, all of them unless it was aborted, and its events add up to it."""
    prompt = request.tokens[: request.prompt_len]
    count = len(completion.token_ids) if completion.finish_reason == "abort" else request.max_tokens - len(prompt)
    assert completion.finish_reason == "length" or is_aborted
    assert list(completion.token_ids) == plain_greedy(prompt, count)
    own = [event for event in events if event.index == request.index]
    assert sum((event.token_ids for event in own), ()) == completion.token_ids
    assert "".join(event.text for event in own) == completion.text


EngineMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None, derandomize=True)
TestServingUnderPressure = EngineMachine.TestCase


@pytest.mark.slow
def test_accounting_is_exact_after_two_thousand_requests_aborts_and_full_caches() -> None:
    generator = random.Random(11)
    core = build_core(FakeModel(error_percent=30, max_context=64), max_batch=8, num_pages=28, prefill_chunk=64)
    events: list[StreamEvent] = []
    requests: list[Request] = []
    aborted: set[int] = set()
    while len(requests) < 2000 or core.has_work:
        if len(requests) < 2000 and core.scheduler.num_waiting < 6:
            prompt = make_prompt(generator.randrange(500), generator.randint(1, 40))
            limit, depth = generator.randint(1, 14), generator.randint(1, 8)
            requests.append(submit(core, prompt, events, len(requests), max_new_tokens=limit, next_n=depth))
        if generator.random() < 0.05:
            victim = requests[-generator.randint(1, min(8, len(requests)))]
            core.abort(victim)
            aborted.add(victim.index)
        core.step()
        core.pool.check()
    assert core.pool.num_free == core.pool.num_usable
    assert sum(request.num_preemptions for request in requests) > 100
    completions = {event.index: event.completion for event in events if event.completion is not None}
    assert len(completions) == 2000
    assert 50 < sum(completion.finish_reason == "abort" for completion in completions.values()) < 400
    per_request: dict[int, list[StreamEvent]] = {request.index: [] for request in requests}
    for event in events:
        per_request[event.index].append(event)
    for request in requests[::10]:
        own = per_request[request.index]
        check_completion(request, completions[request.index], own, is_aborted=request.index in aborted)
