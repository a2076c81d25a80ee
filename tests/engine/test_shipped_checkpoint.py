"""The shipped model: 64 prompts give the same tokens at every depth, alone and in mixed batches of 8.

By default each prompt meets one depth alone and two in a batch; with EXHAUSTIVE=1 in the environment it meets all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from nextn.engine.llm import LLM, SHIPPED_MODEL
from nextn.engine.request import Completion
from nextn.engine.sampling import SamplingParams

NUM_TOKENS = 10  # the first comes with the prompt, so that a step of depth 8 still fits
IS_EXHAUSTIVE = os.environ.get("EXHAUSTIVE") == "1"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600 if IS_EXHAUSTIVE else 600),
    pytest.mark.skipif(not SHIPPED_MODEL.is_dir(), reason=f"there is no checkpoint at {SHIPPED_MODEL}"),
]

_VERBS = ("read", "parse", "merge", "write", "find", "close", "split", "count")
_NOUNS = ("config", "header", "items", "tree", "socket", "lines", "token", "path")
# More tokens than a row selects, so that the selection decides what is seen.
_PREAMBLE = "".join(
    f"def {verb}_{noun}({noun}):\n    return {noun}.{verb}()\n\n" for verb, noun in zip(_VERBS * 3, _NOUNS * 2)
)
_STARTS = [
    f"class {noun.title()}:\n    def {verb}(self, {noun}, default=None):\n" for verb in _VERBS for noun in _NOUNS
]
PROMPTS = [_PREAMBLE + start if index == 0 else start for index, start in enumerate(_STARTS)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@pytest.fixture(scope="module")
def plain(llm: LLM) -> list[tuple[int, ...]]:
    """The tokens of plain decoding."""
    return [each.token_ids for each in llm.generate(PROMPTS, make_params(1))]


@pytest.fixture(scope="module")
def alone(llm: LLM) -> dict[tuple[int, int], Completion]:
    """(prompt, depth) to its completion, one prompt at a time."""
    depths = range(1, 9) if IS_EXHAUSTIVE else (None,)
    keys = [(index, depth or 2 + index % 7) for depth in depths for index in range(len(PROMPTS))]
    return {(index, depth): llm.generate(PROMPTS[index], make_params(depth))[0] for index, depth in keys}


def make_params(next_n: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=NUM_TOKENS, next_n=next_n, ignore_eos=True)


def test_every_depth_gives_the_plain_tokens_at_batch_1(
    alone: dict[tuple[int, int], Completion], plain: list[tuple[int, ...]]
) -> None:
    assert {depth for _, depth in alone} >= set(range(2, 9))
    for (index, _), completion in alone.items():
        assert completion.token_ids == plain[index]


def test_mixed_depths_at_batch_8_give_the_same_tokens_and_acceptance(
    llm: LLM, alone: dict[tuple[int, int], Completion], plain: list[tuple[int, ...]]
) -> None:
    num_compared = 0
    for shift in range(8) if IS_EXHAUSTIVE else (0, 3):
        # By default the first shift repeats the depths that prompts had alone.
        repeats = shift == 0 and not IS_EXHAUSTIVE
        depths = [2 + index % 7 if repeats else 1 + (index + shift) % 8 for index in range(len(PROMPTS))]
        completions = llm.generate(PROMPTS, [make_params(depth) for depth in depths])
        assert [each.token_ids for each in completions] == plain
        for key, completion in zip(enumerate(depths), completions):
            if key in alone:
                assert completion.stats.accepted_per_position == alone[key].stats.accepted_per_position
                assert completion.stats.acceptance_length == alone[key].stats.acceptance_length
                num_compared += 1
    assert num_compared >= len(PROMPTS)


def test_drafts_of_every_depth_were_accepted_and_rejected(alone: dict[tuple[int, int], Completion]) -> None:
    accepted, drafted = [0] * 7, 0
    for completion in alone.values():
        drafted += completion.stats.drafted
        for place, count in enumerate(completion.stats.accepted_per_position):
            accepted[place] += count
    assert all(accepted[:4])
    assert sum(accepted) < drafted
