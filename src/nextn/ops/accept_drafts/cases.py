"""Named shapes and hostile inputs of ``accept_drafts``, shared by tests, the compile gate and benchmarks.

Hides how a scenario becomes tensors. Drafts mostly follow the target, so that every accepted length occurs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from nextn.hardware import DeviceInfo
from nextn.ops.accept_drafts._sampling import DRAFT, SamplingTensors, sample_rows, target_probs
from nextn.ops.accept_drafts.problem import AcceptDraftsProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How one request samples; the default is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


_GREEDY = Setting()
_SETTINGS = (
    Setting(temperature=1.0),
    _GREEDY,
    Setting(temperature=0.7, top_k=5),
    Setting(temperature=1.3, top_p=0.8),
    Setting(temperature=1.0, top_k=20, top_p=0.5),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptDraftsCase:
    """One scenario.

    Attributes:
        name: unique name.
        row_counts: rows per request.
        vocab: V.
        settings: of requests in turn, repeated as often as needed; none is greedy throughout.
        has_draft_probs: whether drafts were drawn from distributions that are given.
        values: how logits are distributed, a key of ``DISTRIBUTIONS``.
        spare_rows: rows at the end that no request owns.
    """

    name: str
    row_counts: tuple[int, ...]
    vocab: int = 64
    settings: tuple[Setting, ...] = ()
    has_draft_probs: bool = False
    values: str = "normal"
    spare_rows: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def num_rows(self) -> int:
        return sum(self.row_counts) + self.spare_rows

    def problem(self, device: DeviceInfo) -> AcceptDraftsProblem:
        """The problem of this case on ``device``."""
        return AcceptDraftsProblem(
            arch=device.arch,
            num_requests=len(self.row_counts),
            num_rows=self.num_rows,
            vocab=self.vocab,
            is_greedy=not self.settings,
            has_draft_probs=self.has_draft_probs,
        )

    def sampling(self, seed: int) -> SamplingTensors | None:
        """The requests' settings, or None."""
        if not self.settings:
            return None
        chosen = [self.settings[request % len(self.settings)] for request in range(len(self.row_counts))]
        return SamplingTensors(
            temperature=torch.tensor([each.temperature for each in chosen]),
            top_k=torch.tensor([each.top_k for each in chosen], dtype=torch.int32),
            top_p=torch.tensor([each.top_p for each in chosen]),
            seed=torch.arange(len(chosen)) + 1000 * seed,
        )

    def inputs(self, device: torch.device | str = "cpu", *, seed: int = 0) -> dict[str, Any]:
        """The arguments of ``accept_drafts``."""
        generator = torch.Generator().manual_seed(seed)
        logits = DISTRIBUTIONS[self.values]((self.num_rows, self.vocab), generator)
        draft_logits = (logits + 0.2 * torch.randn(logits.shape, generator=generator)).roll(1, dims=0)
        positions = torch.randint(0, 1000, (self.num_rows,), generator=generator)
        sampling = self.sampling(seed)
        drafts, probs = draft_logits.nan_to_num().argmax(dim=-1), None
        if sampling is not None and self.has_draft_probs:
            counts = torch.tensor(self.row_counts)
            requests = torch.arange(len(self.row_counts)).repeat_interleave(counts)
            requests = torch.cat([requests, torch.full((self.spare_rows,), len(self.row_counts) - 1)])
            of_rows = sampling.select(requests)
            probs = target_probs(draft_logits, of_rows)
            drafts = sample_rows(probs, of_rows.seed, positions.roll(1), DRAFT)
        return {
            "logits": logits.to(device),
            "draft_ids": drafts.to(device),
            "query_offsets": torch.tensor([0, *accumulate(self.row_counts)], dtype=torch.int32, device=device),
            "sampling": None if sampling is None else _to_device(sampling, device),
            "draft_probs": None if probs is None else probs.to(device),
            "positions": positions.to(device),
        }


def _to_device(sampling: SamplingTensors, device: torch.device | str) -> SamplingTensors:
    return SamplingTensors(
        temperature=sampling.temperature.to(device),
        top_k=sampling.top_k.to(device),
        top_p=sampling.top_p.to(device),
        seed=sampling.seed.to(device),
        is_truncated=sampling.is_truncated,
    )


def _normal(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * 3.0


def _few_levels(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Ties everywhere."""
    return torch.randint(-1, 2, shape, generator=generator).float()


def _special(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """NaN and both infinities among finite values; row 0 all NaN, the last all -inf."""
    values = torch.randn(shape, generator=generator)
    kinds = torch.randint(0, 12, shape, generator=generator)
    for kind, value in enumerate((float("nan"), float("inf"), float("-inf"), -0.0)):
        values[kinds == kind] = value
    values[:1] = float("nan")
    values[-1:] = float("-inf")
    return values


DISTRIBUTIONS: dict[str, Callable[[tuple[int, int], torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "few_levels": _few_levels,
    "special": _special,
}

_RAGGED = (4, 1, 0, 8, 2, 0, 3, 6, 5, 7, 0)

CASES = (
    AcceptDraftsCase(name="greedy_verify", row_counts=(4,), vocab=4096),
    AcceptDraftsCase(name="greedy_ragged", row_counts=_RAGGED),
    AcceptDraftsCase(name="greedy_ties", row_counts=_RAGGED, values="few_levels", vocab=7),
    AcceptDraftsCase(name="greedy_special", row_counts=_RAGGED, values="special"),
    AcceptDraftsCase(name="greedy_spare_rows", row_counts=(2, 3), spare_rows=3),
    AcceptDraftsCase(name="plain_decode", row_counts=(1, 1, 1)),
    AcceptDraftsCase(name="no_rows", row_counts=(0, 0)),
    AcceptDraftsCase(name="no_requests", row_counts=()),
    AcceptDraftsCase(name="one_token_vocabulary", row_counts=(3, 2), vocab=1, settings=_SETTINGS),
    AcceptDraftsCase(name="sampled_ragged", row_counts=_RAGGED, settings=_SETTINGS),
    AcceptDraftsCase(name="sampled_drafts", row_counts=_RAGGED, settings=_SETTINGS, has_draft_probs=True),
    AcceptDraftsCase(name="sampled_ties", row_counts=_RAGGED, settings=_SETTINGS, values="few_levels", vocab=9),
    AcceptDraftsCase(name="sampled_special", row_counts=_RAGGED, settings=_SETTINGS, values="special"),
    AcceptDraftsCase(
        name="sampled_spare_rows", row_counts=(2, 3), spare_rows=3, settings=_SETTINGS, has_draft_probs=True
    ),
    AcceptDraftsCase(name="sampled_decode", row_counts=(1, 1, 1), settings=_SETTINGS),
    AcceptDraftsCase(name="sampled_no_rows", row_counts=(0, 0), settings=_SETTINGS),
    AcceptDraftsCase(name="v32_vocabulary", row_counts=(2, 3), vocab=129280, settings=_SETTINGS, has_draft_probs=True),
)
