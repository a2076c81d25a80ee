"""Sampled output of the whole engine has the target's distribution, whatever the drafts are worth.

Every test compares the joint counts of the first tokens of N outputs, seeds 0 to N - 1, with the exact probabilities
by a chi-square test at level 1e-6. Seeds are fixed, so a test either always passes or always fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from fake_model import VOCAB, FakeModel, build_llm, logits_of, mix
from small_model import build_small_llm, build_small_model

from nextn.batch import ForwardBatch, ForwardMode
from nextn.engine.llm import LLM
from nextn.engine.sampling import SamplingParams
from nextn.model import DeepseekV32ForCausalLM

ALPHA = 1e-6
PROMPT = [2, 5, 3]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def chi_square_p(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """The p-value of the counts; outcomes expected fewer than 5 times are pooled, impossible ones fail at once."""
    total = sum(counts.values())
    assert all(expected.get(outcome, 0.0) > 0 for outcome in counts), "an outcome of probability 0 was drawn"
    cells, rest_seen, rest_expected = [], 0, 0.0
    for outcome, probability in expected.items():
        if probability * total >= 5:
            cells.append((counts[outcome], probability * total))
        else:
            rest_seen, rest_expected = rest_seen + counts[outcome], rest_expected + probability * total
    if rest_expected > 0:
        cells.append((rest_seen, rest_expected))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def treat(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Float64 probabilities of one row after temperature, top-k and top-p, the plain way."""
    probs = (logits.double() / params.temperature).softmax(-1)
    falling = probs.argsort(descending=True, stable=True).tolist()
    kept = falling[: params.top_k or len(falling)]
    mass = probs[kept].sum()
    total, prefix = 0.0, []
    for token in kept:
        if total >= params.top_p and prefix:
            break
        prefix.append(token)
        total += float(probs[token] / mass)
    treated = torch.zeros_like(probs)
    treated[prefix] = probs[prefix] / probs[prefix].sum()
    return treated


def draw_counts(llm: LLM, params: list[SamplingParams]) -> tuple[Counter[tuple[int, ...]], list[int]]:
    """How often each output was drawn, and how many drafts were verified and accepted."""
    completions = llm.generate([PROMPT] * len(params), params)
    drafted = sum(each.stats.drafted for each in completions)
    accepted = sum(sum(each.stats.accepted_per_position) for each in completions)
    return Counter(each.token_ids for each in completions), [drafted, accepted]


FAKE_CASES = [
    {"temperature": 1.0, "top_k": 6},
    {"temperature": 0.7, "top_p": 0.6},
    {"temperature": 1.3, "top_k": 8, "top_p": 0.9},
]


@pytest.mark.parametrize(
    ("next_n", "options"), [(1, FAKE_CASES[2]), (2, FAKE_CASES[0]), (3, FAKE_CASES[1]), (4, FAKE_CASES[2])], ids=str
)
def test_the_first_three_tokens_are_distributed_as_the_targets(next_n: int, options: dict[str, float]) -> None:
    llm = build_llm(FakeModel(error_percent=50), max_batch=64, cache_tokens=4096, prefill_chunk=512)
    params = [
        SamplingParams(max_new_tokens=4, ignore_eos=True, next_n=next_n, seed=seed, **options)  # type: ignore[arg-type]
        for seed in range(3000)
    ]
    drawn, (drafted, accepted) = draw_counts(llm, params)
    counts: Counter[tuple[int, ...]] = Counter()
    for outcome, count in drawn.items():
        counts[outcome[:3]] += count
    assert chi_square_p(counts, fake_distribution(params[0])) > ALPHA
    if next_n > 1:
        assert 0.2 * drafted < accepted < 0.95 * drafted, "acceptance or rejection was hardly exercised"


def fake_distribution(params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Exact probabilities of the first three tokens after PROMPT."""
    state = mix(torch.tensor(PROMPT), torch.arange(len(PROMPT))).sum()
    paths: dict[tuple[int, ...], tuple[float, torch.Tensor]] = {(): (1.0, state)}
    for depth in range(3):
        position = torch.tensor(len(PROMPT) + depth)
        longer = {}
        for path, (probability, before) in paths.items():
            probs = treat(logits_of(before.reshape(1))[0], params)
            for token in range(VOCAB):
                if probs[token] > 0:
                    after = before + mix(torch.tensor(token), position)
                    longer[(*path, token)] = (probability * float(probs[token]), after)
        paths = longer
    return {path: probability for path, (probability, _) in paths.items()}


def test_a_real_model_on_a_small_vocabulary_draws_from_its_own_distribution() -> None:
    model = build_small_model(vocab_size=8, disturbance=0.5, head_scale=2.0)
    llm = build_small_llm(model, max_batch=64, prefill_chunk=512, cache_tokens=64 * 64)
    params = [
        SamplingParams(max_new_tokens=3, ignore_eos=True, next_n=3, seed=seed, temperature=1.0) for seed in range(1200)
    ]
    drawn, (drafted, accepted) = draw_counts(llm, params)
    assert chi_square_p(drawn, model_distribution(model)) > ALPHA
    assert 0.2 * drafted < accepted < 0.98 * drafted


def model_distribution(model: DeepseekV32ForCausalLM) -> dict[tuple[int, ...], float]:
    """Exact probabilities of the first three tokens after PROMPT, each prefix run from its beginning."""
    llm = build_small_llm(model)
    runner, pool = llm.core.runner, llm.core.pool
    pool.reserve(0, num_tokens=64)
    paths: dict[tuple[int, ...], float] = {(): 1.0}
    for depth in range(3):
        probabilities = {}
        for path in product(range(8), repeat=depth):
            tokens = [*PROMPT, *path]
            batch = ForwardBatch.build(
                ForwardMode.EXTEND,
                row_counts=[len(tokens)],
                context_lens=[len(tokens)],
                page_table=pool.build_table([0], num_tokens=64),
            )
            with torch.inference_mode():
                hidden = runner.run_target(batch, torch.tensor(tokens)).hidden
                probs = runner.compute_logits(hidden[-1:])[0].double().softmax(-1)
            for token in range(8):
                probabilities[(*path, token)] = paths[path] * float(probs[token])
        paths = probabilities
    return paths
