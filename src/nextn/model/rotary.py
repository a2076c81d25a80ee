"""Rotary positions: the table of cosines and sines, with YaRN's stretched frequencies.

Hides how a frequency follows from theta and YaRN's ramp. Both the attention and the indexer read the same table and
differ only in which dims they pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nextn.cache_format import ROPE_DIM

if TYPE_CHECKING:
    from nextn.model.config import ModelConfig

# Drafts are written up to seven tokens past the last committed one, so positions run a little past the context.
TABLE_SLACK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023) as DeepSeek uses it.

    Attributes:
        factor: how many times longer than the original context positions may get.
        original_max_position_embeddings: context length the frequencies were first trained for.
        beta_fast: rotations within the original context above which a frequency is kept.
        beta_slow: rotations below which it is divided by ``factor``.
        mscale: weight of the logarithmic correction of the table's magnitude; 0 if absent.
        mscale_all_dim: weight of that correction in the softmax scale, by which the table is divided; 0 if absent.
    """

    factor: float
    original_max_position_embeddings: float
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @property
    def table_factor(self) -> float:
        """What cosines and sines are multiplied by: 1 in every released model, where both mscales are equal."""
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale is multiplied by: the magnitude squared, once for queries and once for keys."""
        return self._magnitude(self.mscale_all_dim) ** 2

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Base of the frequencies, and YaRN's scaling of them or None."""

    theta: float
    yarn: YarnScaling | None = None

    @property
    def softmax_factor(self) -> float:
        return self.yarn.softmax_factor if self.yarn else 1.0


def compute_frequencies(rope: RopeConfig) -> torch.Tensor:
    """Angle per position of each of the 32 pairs: float32 ``[32]``.

    Float32 throughout, as in DeepSeek's release and in transformers: at position 100000 a float64 angle differs from
    the one the model was trained with by more than a float32 rounding.
    """
    powers = rope.theta ** (torch.arange(0, ROPE_DIM, 2, dtype=torch.float32) / ROPE_DIM)
    kept = 1.0 / powers
    if rope.yarn is None:
        return kept
    low, high = _ramp_bounds(rope.theta, rope.yarn)
    ramp = ((torch.arange(ROPE_DIM // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    stretched = 1.0 / (rope.yarn.factor * powers)
    return stretched * ramp + kept * (1 - ramp)


def build_rope_table(config: ModelConfig) -> torch.Tensor:
    """Cosines and sines of every position a model may be asked for.

    Returns:
        float32 ``[max_position_embeddings + 64, 64]``: 32 cosines, then 32 sines.
    """
    positions = torch.arange(config.max_position_embeddings + TABLE_SLACK, dtype=torch.float32)
    angles = torch.outer(positions, compute_frequencies(config.rope))
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    return table * config.rope.yarn.table_factor if config.rope.yarn else table


def _ramp_bounds(theta: float, yarn: YarnScaling) -> tuple[float, float]:
    """The pairs between which a frequency goes from kept to divided."""

    def pair_of(rotations: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return ROPE_DIM * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), ROPE_DIM - 1)
    return low, high if high > low else low + 0.001
