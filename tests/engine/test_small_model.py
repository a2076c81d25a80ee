"""Speculation on a real DeepSeek-V3.2 model with random weights: outputs, acceptance and caches do not depend on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_model import build_small_llm, build_small_model

from nextn.engine.llm import LLM
from nextn.engine.request import Completion, StreamEvent
from nextn.engine.sampling import SamplingParams
from nextn.model import DeepseekV32ForCausalLM

NUM_TOKENS = 20
DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> DeepseekV32ForCausalLM:
    return build_small_model(disturbance=0.5)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Shorter and much longer than the 16 tokens a row selects."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 96, (length,), generator=generator).tolist() for length in (1, 5, 17, 40, 64, 65, 90, 130)]


@pytest.fixture(scope="module")
def plain(model: DeepseekV32ForCausalLM, prompts: list[list[int]]) -> list[Completion]:
    return [run_alone(model, prompt, 1) for prompt in prompts]


def params(next_n: int | None = None, count: int = NUM_TOKENS, **options: float) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, next_n=next_n, **options)  # type: ignore[arg-type]


def run_alone(model: DeepseekV32ForCausalLM, prompt: list[int], next_n: int) -> Completion:
    return build_small_llm(model).generate([prompt], params(next_n))[0]


@pytest.mark.parametrize("next_n", DEPTHS[1:])
def test_greedy_output_equals_plain_output(
    next_n: int, model: DeepseekV32ForCausalLM, prompts: list[list[int]], plain: list[Completion]
) -> None:
    llm = build_small_llm(model, next_n=next_n, max_batch=3)
    completions = llm.generate(prompts, params())
    assert [each.token_ids for each in completions] == [each.token_ids for each in plain]
    accepted = torch.tensor([each.stats.accepted_per_position for each in completions]).sum(0)
    verified = sum(each.stats.verify_steps for each in completions)
    assert accepted[-1] > 0, "no run was accepted whole"
    assert accepted[0] < verified, "no draft was rejected"


def test_mixed_depths_at_batch_8_give_what_each_gives_alone(
    model: DeepseekV32ForCausalLM, prompts: list[list[int]], plain: list[Completion]
) -> None:
    together = build_small_llm(model, prefill_chunk=50).generate(prompts, [params(depth) for depth in DEPTHS])
    for prompt, depth, expected, completion in zip(prompts, DEPTHS, plain, together):
        alone = run_alone(model, prompt, depth)
        assert completion.token_ids == alone.token_ids == expected.token_ids
        assert completion.stats.accepted_per_position == alone.stats.accepted_per_position
        assert completion.stats.acceptance_length == alone.stats.acceptance_length


def test_sampled_output_does_not_depend_on_the_batch(model: DeepseekV32ForCausalLM, prompts: list[list[int]]) -> None:
    each = [params(depth, temperature=0.8, top_p=0.9, top_k=20 * (depth % 2), seed=depth) for depth in DEPTHS]
    together = build_small_llm(model).generate(prompts, each)
    for prompt, wanted, completion in zip(prompts, each, together):
        (alone,) = build_small_llm(model).generate([prompt], wanted)
        assert completion.token_ids == alone.token_ids
        assert completion.stats.accepted_per_position == alone.stats.accepted_per_position


@pytest.mark.parametrize("cache_format", ["bf16", "fp32"])
def test_other_cache_formats_are_exact_too(
    cache_format: str, model: DeepseekV32ForCausalLM, prompts: list[list[int]]
) -> None:
    llm = build_small_llm(model, cache_format=cache_format)
    first, *others = [[each.token_ids for each in llm.generate(prompts[:4], params(n))] for n in (1, 4, 7)]
    assert others == [first, first]


def test_preemption_and_chunking_change_nothing(model: DeepseekV32ForCausalLM, prompts: list[list[int]]) -> None:
    """Keys computed again in one prompt forward equal those that verify steps wrote."""
    chosen = [prompts[7][start : start + 50] for start in (0, 25, 50, 75)]  # one page each at first, then two
    expected = [each.token_ids for each in build_small_llm(model, next_n=1).generate(chosen, params())]
    llm = build_small_llm(model, next_n=5, cache_tokens=3 * 64, prefill_chunk=23)
    events: list[StreamEvent] = []
    requests = [
        llm.core.build_request(prompt, params(), index=index, on_event=events.append)
        for index, prompt in enumerate(chosen)
    ]
    for request in requests:
        llm.core.submit(request)
    while llm.core.has_work:
        llm.core.step()
    assert sum(request.num_preemptions for request in requests) > 0
    completions = {event.index: event.completion.token_ids for event in events if event.completion is not None}
    assert [completions[index] for index in range(4)] == expected


def test_index_sharing_across_draft_steps_is_exact_and_batch_independent(prompts: list[list[int]]) -> None:
    model = build_small_model(disturbance=0.5, shares_topk=True)
    expected = [each.token_ids for each in build_small_llm(model).generate(prompts, params(1))]
    together = build_small_llm(model).generate(prompts, [params(2 + depth % 7) for depth in DEPTHS])
    assert [each.token_ids for each in together] == expected
    for prompt, depth, completion in zip(prompts, DEPTHS, together):
        alone = run_alone(model, prompt, 2 + depth % 7)
        assert completion.stats.accepted_per_position == alone.stats.accepted_per_position
    assert sum(sum(each.stats.accepted_per_position[1:]) for each in together) > 0


def read_slots(llm: LLM, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the first ``count`` positions of the first request served, whose pages are 1, 2, ... in order."""
    cache = llm.core.runner.caches[layer]
    page_size, dim = 64, 128
    kv = cache.kv[1:].flatten(0, 1)[:count]
    values = cache.index[1:, : page_size * dim].reshape(-1, dim)[:count]
    scales = cache.index[1:, page_size * dim :].reshape(-1, 4)[:count]
    return kv.clone(), torch.cat([values, scales], dim=1)


@pytest.mark.parametrize("next_n", [2, 5, 8])
def test_rejected_drafts_leave_no_trace_in_the_caches(
    next_n: int, model: DeepseekV32ForCausalLM, prompts: list[list[int]]
) -> None:
    """Every committed position holds the bytes that plain decoding writes, and the draft cache those of next_n 3."""
    prompt = prompts[3]
    engines = {depth: build_small_llm(model, next_n=depth) for depth in (1, 3, next_n)}
    stats = {depth: llm.generate([prompt], params())[0].stats for depth, llm in engines.items()}
    assert stats[next_n].drafted > sum(stats[next_n].accepted_per_position), "nothing was rejected"
    num_cached = len(prompt) + NUM_TOKENS - 1
    for layer in range(2):
        for plain_bytes, speculated in zip(*(read_slots(engines[depth], layer, num_cached) for depth in (1, next_n))):
            assert torch.equal(plain_bytes, speculated)
    # The draft cache is not extended past what a later draft could read.
    num_drafted_from = num_cached - 8
    for first, second in zip(*(read_slots(engines[depth], 2, num_drafted_from) for depth in (3, next_n))):
        assert torch.equal(first, second)
        assert first[: len(prompt)].any(dim=1).all(), "a prompt position was left unwritten"
