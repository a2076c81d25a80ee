"""Every accept_drafts kernel against a loop over tokens, and sampled output against the target's distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import DEVICE, IS_INTERPRETING, kernel_case_pairs, problem_or_skip

from nextn.errors import InputError
from nextn.ops import accept_drafts
from nextn.ops.accept_drafts import (
    ACCEPT,
    DRAFT,
    RESAMPLE,
    AcceptedDrafts,
    SamplingTensors,
    _sampling,
    draw_uniforms,
    reference,
    sample_rows,
    target_probs,
)
from nextn.ops.accept_drafts.cases import CASES, AcceptDraftsCase
from nextn.testing.numerics import assert_same_bits
from nextn.testing.poison import poison_output

every_pair = pytest.mark.parametrize(("kernel", "case"), kernel_case_pairs("accept_drafts", CASES))
INF, NAN = float("inf"), float("nan")
# A right implementation fails one of the statistical checks once in a million choices of its fixed seeds.
ERROR_LEVEL = 1e-6


def settings_of(
    count: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, is_truncated: bool = True
) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k, dtype=torch.int32),
        top_p=torch.full((count,), top_p),
        seed=torch.arange(count),
        is_truncated=is_truncated,
    )


def order_of(row: list[float]) -> list[int]:
    """Ids by falling logit, the lowest id first among equals, NaN as -inf."""
    return sorted(range(len(row)), key=lambda i: (INF if math.isnan(row[i]) else -row[i], i))


def plain_probs(row: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The target distribution of one row by its definition."""
    order = order_of(row)
    largest = row[order[0]]
    probs = [0.0] * len(row)
    if temperature <= 0 or math.isnan(largest) or largest == -INF:
        probs[order[0]] = 1.0
        return probs
    ceiling = torch.finfo(torch.float32).max
    kept = order[:top_k] if top_k > 0 else order
    masses = []
    for token in kept:
        value = -INF if math.isnan(row[token]) else min(row[token], ceiling)
        masses.append(math.exp((value - min(largest, ceiling)) / temperature))
    total, reached, count = math.fsum(masses), 0.0, 0
    while count < len(kept) and (count == 0 or top_p >= 1 or reached < top_p):
        reached += masses[count] / total
        count += 1
    total = math.fsum(masses[:count])
    for token, mass in zip(kept[:count], masses):
        probs[token] = mass / total
    return probs


def decide_by_loops(arguments: dict[str, Any]) -> AcceptedDrafts:
    """One token at a time, from the distributions and coins that the op itself exports."""
    cpu: dict[str, Any] = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    logits, drafts, offsets = cpu["logits"], cpu["draft_ids"].tolist(), cpu["query_offsets"].tolist()
    sampling, draft_probs, positions = cpu["sampling"], cpu["draft_probs"], cpu["positions"]
    lens, next_ids = [], [-1] * logits.shape[0]
    for request, (start, stop) in enumerate(pairwise(offsets)):
        committed: list[int] = []
        for row in range(start, stop):
            if sampling is None:
                token = order_of(logits[row].tolist())[0]
                is_accepted = row + 1 < stop and drafts[row + 1] == token
            else:
                one = torch.tensor([request])
                probs = target_probs(logits[row : row + 1], sampling.select(one))[0]
                seed, position = sampling.seed[one], positions[row : row + 1]
                draft = drafts[row + 1] if row + 1 < stop else -1
                is_judged = 0 <= draft < logits.shape[1]
                drawn_from = torch.zeros_like(probs)
                if is_judged and draft_probs is None:
                    drawn_from[draft] = 1.0
                elif row + 1 < stop and draft_probs is not None:
                    drawn_from = draft_probs[row + 1]
                coin = draw_uniforms(seed, position, ACCEPT).item()
                is_accepted = is_judged and coin * drawn_from[draft].double().item() < probs[draft].item()
                residual = (probs - drawn_from).clamp(min=0) if row + 1 < stop else probs
                residual = residual if residual.sum() > 0 else probs
                token = draft if is_accepted else int(sample_rows(residual[None], seed, position, RESAMPLE))
            committed.append(token)
            if not is_accepted:
                break
        lens.append(len(committed))
        next_ids[start : start + len(committed)] = committed
    return AcceptedDrafts(accept_lens=torch.tensor(lens, dtype=torch.int32), next_ids=torch.tensor(next_ids))


@every_pair
def test_decides_as_a_loop_over_tokens_does(kernel, case):
    problem = problem_or_skip(kernel, case)
    lens = set()
    for seed in range(1 if case.vocab > 10_000 else 2 if IS_INTERPRETING else 8):
        arguments = case.inputs(DEVICE, seed=seed)
        accept_lens = poison_output((problem.num_requests, 1), torch.int32, DEVICE)
        next_ids = poison_output((problem.num_rows, 1), torch.int64, DEVICE)
        out = (accept_lens.view.squeeze(1), next_ids.view.squeeze(1))
        kernel.prepare(problem, **arguments, out=out)()
        accept_lens.assert_untouched_around()
        next_ids.assert_untouched_around()
        expected = decide_by_loops(arguments)
        assert out[0].tolist() == expected.accept_lens.tolist()
        assert out[1].tolist() == expected.next_ids.tolist()
        lens |= set(out[0].tolist())
    if case.name in ("greedy_ragged", "sampled_drafts") and not IS_INTERPRETING:
        assert lens == set(range(9)), "the case is meant to reach every accepted length"


def greedy(logits: torch.Tensor, drafts: list[int], counts: list[int]) -> tuple[list[int], list[int]]:
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    accepted = accept_drafts(logits, torch.tensor(drafts), offsets)
    return accepted.accept_lens.tolist(), accepted.next_ids.tolist()


def test_greedy_accepts_all_some_or_none():
    logits = torch.eye(5)[[1, 2, 3, 4]]
    assert greedy(logits, [0, 1, 2, 3], [4]) == ([4], [1, 2, 3, 4])
    assert greedy(logits, [0, 1, 9, 3], [4]) == ([2], [1, 2, -1, -1])
    assert greedy(logits, [0, 0, 2, 3], [4]) == ([1], [1, -1, -1, -1])
    assert greedy(logits, [-7, 1, 2, -1], [0, 3, 0, 1, 0]) == ([0, 3, 0, 1, 0], [1, 2, 3, 4])
    assert greedy(logits, [0] * 4, [1, 1, 1, 1]) == ([1] * 4, [1, 2, 3, 4])


def test_the_first_draft_of_a_request_is_not_judged_by_the_request_before():
    logits = torch.eye(3)[[1, 2, 0, 1]]
    assert greedy(logits, [0, 1, 2, 0], [2, 2]) == ([2, 2], [1, 2, 0, 1])
    assert greedy(logits, [0, 2, 0, 0], [2, 2]) == ([1, 2], [1, -1, 0, 1])


def test_greedy_takes_the_lowest_id_among_equals_and_never_nan():
    rows = [[0.0, 2.0, 2.0], [NAN, -5.0, NAN], [NAN, NAN, NAN], [-INF, -INF, -INF], [1.0, INF, INF], [-0.0, 0.0, -1.0]]
    ids = [1, 1, 0, 0, 1, 0]
    assert greedy(torch.tensor(rows), [0] * 6, [1] * 6) == ([1] * 6, ids)
    assert target_probs(torch.tensor(rows), settings_of(6, temperature=0.0)).argmax(1).tolist() == ids


ROWS = {
    "plain": [0.3, -1.0, 2.0, 0.0, 1.9],
    "ties": [1.0, 1.0, 1.0, 0.0, 1.0],
    "special": [NAN, 1.0, -INF, 0.5, NAN],
    "infinity": [INF, 1.0, INF, 0.5, 0.0],
    "huge": [3e38, -3e38, 3e38, 0.0, 1.0],
    "nothing": [NAN, -INF, NAN, -INF, -INF],
    "zeros": [0.0, -0.0, 0.0, -0.0, -1.0],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.7), (9, 1.0), (0, 0.0), (0, 0.25), (0, 0.6), (0, 0.99)]
)
def test_target_probs_follow_their_definition(name, temperature, top_k, top_p):
    row = ROWS[name]
    is_truncated = top_k > 0 or top_p < 1
    setting = settings_of(2, temperature=temperature, top_k=top_k, top_p=top_p, is_truncated=is_truncated)
    probs = target_probs(torch.tensor([row, row[::-1]]), setting)
    for actual, values in zip(probs, (row, row[::-1])):
        expected = plain_probs(values, max(temperature, 1e-30) if temperature else 0.0, top_k, top_p)
        torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [9, 40_000])
def test_top_p_keeps_the_shortest_prefix_that_reaches_it(vocab):
    """Eight equal logits: mass 1/8 each, exact in binary, so that reaching and passing differ by one token."""
    logits = torch.full((2, vocab), -INF)
    logits[0, 1:9] = logits[1, vocab - 8 :] = 1.0
    for top_p, kept in ((0.125, 1), (0.1251, 2), (0.5, 4), (0.875, 7), (0.8751, 8), (0.0, 1), (1.0, 8)):
        probs = target_probs(logits, settings_of(2, top_p=top_p))
        assert probs[0].nonzero().view(-1).tolist() == list(range(1, 1 + kept))
        assert probs[1].nonzero().view(-1).tolist() == list(range(vocab - 8, vocab - 8 + kept))


@pytest.mark.parametrize("vocab", [100, 40_000])
def test_top_k_keeps_the_lowest_ids_among_equals(vocab):
    logits = torch.zeros(3, vocab)
    logits[1, vocab - 3] = 1.0
    logits[2, ::2] = -0.0
    probs = target_probs(logits, settings_of(3, top_k=4))
    assert probs[0].nonzero().view(-1).tolist() == [0, 1, 2, 3]
    assert probs[1].nonzero().view(-1).tolist() == [0, 1, 2, vocab - 3]
    assert probs[2].nonzero().view(-1).tolist() == [0, 1, 2, 3]


def test_not_sorting_changes_nothing_when_nothing_is_truncated():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    first, second = (target_probs(logits, settings_of(5, is_truncated=flag)) for flag in (True, False))
    assert_same_bits(first, second)


def test_sampling_never_returns_a_token_of_probability_zero():
    probs = torch.zeros(4000, 7)
    probs[:, 2], probs[:, 5] = 1e-30, 3e-30
    ids = sample_rows(probs, torch.arange(4000), torch.zeros(4000, dtype=torch.int64), DRAFT)
    assert set(ids.tolist()) == {2, 5}


@pytest.mark.parametrize(("coin", "token"), [(0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2.0**-48, 3)])
def test_a_coin_at_an_edge_draws_the_token_whose_range_it_begins(monkeypatch, coin, token):
    monkeypatch.setattr(
        _sampling, "draw_uniforms", lambda seed, position, purpose: torch.full(seed.shape, coin, dtype=torch.float64)
    )
    one = torch.zeros(1, dtype=torch.int64)
    assert sample_rows(torch.tensor([[0.0, 0.3, 0.0, 0.3, 0.0]]), one, one, DRAFT).tolist() == [token]


def splitmix(state: int) -> int:
    """Steele, Lea and Flood's generator in Python's integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_uniforms_are_splitmix_of_the_counter_on_every_device():
    seeds, positions = [0, 1, 2**62, 2**63 - 1, -5], [0, 7, 10**12, 3, 1]
    for purpose in (DRAFT, ACCEPT, RESAMPLE):
        actual = draw_uniforms(torch.tensor(seeds, device=DEVICE), torch.tensor(positions, device=DEVICE), purpose)
        words = [splitmix(splitmix(splitmix(s % 2**64) ^ (3 * p + purpose))) for s, p in zip(seeds, positions)]
        assert actual.tolist() == [(word >> 16) * 2.0**-48 for word in words]
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the published first output of seed 0


def chi_square_limit(freedom: int) -> float:
    """The value that chi-square exceeds with probability ERROR_LEVEL (Wilson and Hilferty's approximation)."""
    quantile = 4.7534  # of the normal distribution at 1 - 1e-6
    return freedom * (1 - 2 / (9 * freedom) + quantile * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, float]:
    """The statistic of counts against probabilities, cells of few expected counts pooled, and its limit."""
    expected = probs.double().reshape(-1) * counts.sum()
    observed = counts.double().reshape(-1)
    assert not observed[expected == 0].any(), "a token of probability 0 came out"
    is_large = expected >= 10
    pooled = [(observed[~is_large].sum(), expected[~is_large].sum())] if expected[~is_large].sum() >= 10 else []
    cells = [*zip(observed[is_large], expected[is_large]), *pooled]
    statistic = sum(float((have - want) ** 2 / want) for have, want in cells)
    return statistic, chi_square_limit(len(cells) - 1)


@pytest.mark.parametrize("varied", ["seed", "position", "both"])
def test_uniforms_are_uniform_and_their_purposes_independent(varied):
    count = 100_000
    numbers, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    seed = zeros if varied == "position" else numbers
    position = zeros if varied == "seed" else numbers
    coins = [draw_uniforms(seed, position, purpose) for purpose in (DRAFT, ACCEPT, RESAMPLE)]
    pairs = [*((coins[i], coins[j]) for i, j in ((0, 1), (0, 2), (1, 2))), (coins[0][:-1], coins[0][1:])]
    for first, second in pairs:
        assert first.min() >= 0
        assert first.max() < 1
        cells = (first * 16).long() * 16 + (second * 16).long()
        statistic, limit = chi_square(torch.bincount(cells, minlength=256), torch.full((256,), 1 / 256))
        assert statistic < limit


VOCAB, REQUESTS = 6, 20_000
FIRST = torch.tensor([1.0, 0.2, -0.5, 0.9, -2.0, 0.0])
SECOND = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5
THIRD = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(6))
DRAFT_FIRST = torch.tensor([0.0, 1.0, 0.0, 0.5, -1.0, 1.0])
DRAFT_SECOND = SECOND.roll(1, dims=1) * 0.7


def draw_two_tokens(setting: SamplingTensors, *, has_draft_probs: bool) -> torch.Tensor:
    """How often each pair of first tokens comes out of speculation of depth 2: int64 [V, V], REQUESTS in all.

    Requests whose first draft is rejected draft their second token anew at the same position, as an engine does.
    """
    first_drafts, first_probs = draw_draft(DRAFT_FIRST.expand(REQUESTS, -1), setting, 1, has_draft_probs)
    second_drafts, second_probs = draw_draft(DRAFT_SECOND[first_drafts], setting, 2, has_draft_probs)
    logits = torch.stack([FIRST.expand(REQUESTS, -1), SECOND[first_drafts], THIRD[second_drafts]], dim=1)
    drafts = torch.stack([torch.zeros_like(first_drafts), first_drafts, second_drafts], dim=1)
    probs = torch.stack([first_probs, first_probs, second_probs], dim=1)
    accept_lens, tokens = verify(logits, drafts, probs if has_draft_probs else None, setting, 1)
    again = (accept_lens == 1).nonzero().squeeze(1)
    left = setting.select(again)
    redrafts, redraft_probs = draw_draft(DRAFT_SECOND[tokens[again, 0]], left, 2, has_draft_probs)
    logits = torch.stack([SECOND[tokens[again, 0]], THIRD[redrafts]], dim=1)
    drafts = torch.stack([tokens[again, 0], redrafts], dim=1)
    probs = torch.stack([redraft_probs, redraft_probs], dim=1)
    _, later = verify(logits, drafts, probs if has_draft_probs else None, left, 2)
    tokens[again, 1] = later[:, 0]
    return torch.bincount(tokens[:, 0] * VOCAB + tokens[:, 1], minlength=VOCAB**2).view(VOCAB, VOCAB)


def draw_draft(
    logits: torch.Tensor, setting: SamplingTensors, position: int, has_draft_probs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    probs = target_probs(logits, setting)
    if not has_draft_probs:
        return logits.argmax(1), probs
    return sample_rows(probs, setting.seed, torch.full_like(setting.seed, position), DRAFT), probs


def verify(
    logits: torch.Tensor, drafts: torch.Tensor, probs: torch.Tensor | None, setting: SamplingTensors, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    count, depth = drafts.shape
    accepted = accept_drafts(
        logits.flatten(0, 1),
        drafts.flatten(),
        (torch.arange(count + 1) * depth).int(),
        sampling=setting,
        draft_probs=None if probs is None else probs.flatten(0, 1),
        positions=(position + torch.arange(depth)).repeat(count),
    )
    return accepted.accept_lens, accepted.next_ids.view(count, depth)


def joint_target(setting: SamplingTensors) -> torch.Tensor:
    one, every = torch.zeros(1, dtype=torch.int64), torch.zeros(VOCAB, dtype=torch.int64)
    first, second = target_probs(FIRST[None], setting.select(one)), target_probs(SECOND, setting.select(every))
    return first.double().T * second.double()


@pytest.mark.parametrize("has_draft_probs", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
    ],
    ids=str,
)
def test_speculation_keeps_the_joint_distribution_of_two_tokens(options, has_draft_probs):
    is_truncated = "top_k" in options or "top_p" in options
    setting = settings_of(REQUESTS, **options, is_truncated=is_truncated)
    statistic, limit = chi_square(draw_two_tokens(setting, has_draft_probs=has_draft_probs), joint_target(setting))
    assert statistic < limit


def accept_everything(probs: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.ones(probs.shape[0], dtype=torch.bool)


def accept_by_half_the_target(probs: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _TEST_DRAFTS(probs * 0.5, *rest)


def keep_the_target(probs: torch.Tensor, draft_ids: Any, draft_probs: Any, last: torch.Tensor, *rest: Any) -> Any:
    return probs.index_select(0, last)


_TEST_DRAFTS = reference._test_drafts


@pytest.mark.parametrize("has_draft_probs", [False, True])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_test_drafts", accept_everything),
        ("_test_drafts", accept_by_half_the_target),
        ("_find_leftover", keep_the_target),
        ("ACCEPT", RESAMPLE),
    ],
)
def test_the_distribution_test_sees_a_wrong_rule(monkeypatch, name, wrong, has_draft_probs):
    monkeypatch.setattr(reference, name, wrong)
    setting = settings_of(REQUESTS, is_truncated=False)
    statistic, limit = chi_square(draw_two_tokens(setting, has_draft_probs=has_draft_probs), joint_target(setting))
    assert statistic > 2 * limit


def test_residual_without_mass_falls_back_to_the_target():
    """q above p everywhere, as rounding may leave it, and a draft that p does not have."""
    logits = torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, 0.0]]).repeat(200, 1)
    arguments = {
        "draft_ids": torch.tensor([0, 2]).repeat(200),
        "query_offsets": (torch.arange(201) * 2).int(),
        "sampling": settings_of(200),
        "positions": torch.zeros(400, dtype=torch.int64),
    }
    for probs in (torch.full((400, 3), 0.6), torch.full((400, 3), INF)):
        accepted = accept_drafts(logits, **arguments, draft_probs=probs)
        assert accepted.accept_lens.unique().tolist() == [1]
        assert set(accepted.next_ids[::2].tolist()) == {0, 1}


@pytest.mark.parametrize("drawn_from", [[NAN] * 3, [-1.0] * 3, [0.5, 0.0, 0.5]])
def test_a_draft_without_a_probability_of_its_own_is_rejected(drawn_from):
    accepted = accept_drafts(
        torch.zeros(200, 3),
        torch.tensor([0, 1]).repeat(100),
        (torch.arange(101) * 2).int(),
        sampling=settings_of(100),
        draft_probs=torch.tensor(drawn_from).expand(200, -1),
        positions=torch.tensor([4, 5]).repeat(100),
    )
    assert accepted.accept_lens.unique().tolist() == [1]
    expected = {1} if drawn_from[0] == 0.5 else {0, 1, 2}  # what is left of the target
    assert set(accepted.next_ids[::2].tolist()) == expected


def test_greedy_requests_decide_alike_alone_and_among_sampled_ones():
    case = AcceptDraftsCase(name="greedy", row_counts=(4, 8, 1, 3, 2))
    for seed in range(10):
        arguments = case.inputs(seed=seed)
        alone = accept_drafts(**arguments)
        mixed = accept_drafts(**{**arguments, "sampling": settings_of(5, temperature=0.0)})
        assert mixed.accept_lens.tolist() == alone.accept_lens.tolist()
        assert mixed.next_ids.tolist() == alone.next_ids.tolist()


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 8), min_size=1, max_size=7),
    threads=st.sampled_from([1, 2]),
    has_draft_probs=st.booleans(),
    values=st.sampled_from(["normal", "few_levels", "special"]),
    seed=st.integers(0, 1000),
)
def test_a_request_decides_alike_in_any_batch(counts, threads, has_draft_probs, values, seed):
    mixed = next(case for case in CASES if case.name == "sampled_ragged").settings
    case = AcceptDraftsCase(
        name="any", row_counts=tuple(counts), settings=mixed, has_draft_probs=has_draft_probs, values=values
    )
    arguments = case.inputs(seed=seed)
    whole = accept_drafts(**arguments)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        alone = [accept_drafts(**cut_request(arguments, request)) for request in range(len(counts))]
    finally:
        torch.set_num_threads(before)
    assert torch.cat([part.accept_lens for part in alone]).tolist() == whole.accept_lens.tolist()
    assert torch.cat([part.next_ids for part in alone]).tolist() == whole.next_ids.tolist()


def cut_request(arguments: dict[str, Any], request: int) -> dict[str, Any]:
    start, stop = arguments["query_offsets"][request : request + 2].tolist()
    cut = {name: None if arguments[name] is None else arguments[name][start:stop] for name in ("draft_probs",)}
    cut |= {name: arguments[name][start:stop] for name in ("logits", "draft_ids", "positions")}
    offsets = torch.tensor([0, stop - start], dtype=torch.int32)
    return {**cut, "query_offsets": offsets, "sampling": arguments["sampling"].select(torch.tensor([request]))}


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 39), count=st.integers(1, 40), threads=st.sampled_from([1, 2]))
def test_bits_of_a_distribution_do_not_depend_on_the_batch_or_the_threads(start, count, threads):
    generator = torch.Generator().manual_seed(start)
    logits = torch.randn(40, 2000, generator=generator) * 3
    of_rows = settings_of(40, top_k=500, top_p=0.9)
    whole = target_probs(logits, of_rows)
    part = torch.arange(start, min(start + count, 40))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same_bits(target_probs(logits[part], of_rows.select(part)), whole[part])
    finally:
        torch.set_num_threads(before)


LOGITS, DRAFTS, OFFSETS = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3], dtype=torch.int32)
ONE = settings_of(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": LOGITS[0]}, r"pass float32 \[rows, vocabulary\]"),
        ({"logits": LOGITS.long()}, r"logits is torch.int64"),
        ({"logits": LOGITS[:, :0]}, r"\(3, 0\)"),
        ({"draft_ids": DRAFTS.int()}, r"draft_ids is torch.int32"),
        ({"draft_ids": DRAFTS[:2]}, r"pass int64 \[3\]"),
        ({"query_offsets": OFFSETS.long()}, r"query_offsets is torch.int64"),
        ({"query_offsets": OFFSETS[:0]}, r"pass int32 \[requests \+ 1\]"),
        ({"query_offsets": OFFSETS[:1]}, r"3 rows but no request"),
        ({"draft_probs": LOGITS[:2]}, r"pass float32 \[3, 5\]"),
        ({"draft_probs": LOGITS.long()}, r"draft_probs is torch.int64"),
        ({"positions": DRAFTS[:1]}, r"pass int64 \[3\]"),
        ({"positions": LOGITS[:, 0]}, r"positions is torch.float32"),
        ({"sampling": ONE}, r"positions is None"),
        ({"sampling": settings_of(2), "positions": DRAFTS}, r"sampling.temperature is torch.float32 \(2,\)"),
        ({"sampling": replace(ONE, seed=ONE.seed.to("meta")), "positions": DRAFTS}, r"sampling.seed is on meta"),
        ({"positions": DRAFTS.to("meta")}, r"several devices"),
    ],
)
def test_wrong_input_is_refused_with_the_value_and_the_fix(changes, message):
    arguments = {"logits": LOGITS, "draft_ids": DRAFTS, "query_offsets": OFFSETS, **changes}
    with pytest.raises(InputError, match=message):
        accept_drafts(**arguments)


def test_wrong_draws_are_refused():
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match="purpose 3 is unknown"):
        draw_uniforms(one, one, 3)
    with pytest.raises(InputError, match="pass int64 of the same shape"):
        draw_uniforms(one, two, DRAFT)
    with pytest.raises(InputError, match=r"seed has shape \(2,\) for probs of 3 rows"):
        sample_rows(torch.ones(3, 4), two, two, DRAFT)
    with pytest.raises(InputError, match=r"probs is torch.float32 \(4,\)"):
        sample_rows(torch.ones(4), one, one, DRAFT)
    with pytest.raises(InputError, match=r"sampling.temperature .* pass torch.float32 \[3\]"):
        target_probs(torch.ones(3, 4), ONE)
