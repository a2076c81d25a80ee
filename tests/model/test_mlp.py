"""Routing picks the experts DeepSeek-V3's rule picks, ties, groups and negative scores included."""

from __future__ import annotations

import pytest
import torch
from model_harness import small_config

from nextn.model.config import parse_config
from nextn.model.mlp import MixtureOfExperts


def build(seed: int, bias: float, **changes) -> MixtureOfExperts:
    """Random experts whose router biases lie around ``bias``."""
    experts = MixtureOfExperts(parse_config(small_config(**changes)), device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    experts.router_bias.copy_(torch.randn(experts.router_bias.shape, generator=generator) * 0.3 + bias)
    return experts


def choose_by_hand(experts: MixtureOfExperts, row: torch.Tensor) -> dict[int, float]:
    """Expert to weight for one row, the rule written out."""
    config = experts.config
    assert experts.router.weight is not None
    scores = (experts.router.weight.double() @ row.double()).sigmoid().tolist()
    ranking = [score + bias for score, bias in zip(scores, experts.router_bias.tolist())]
    size = len(scores) // config.n_group
    groups = [list(range(start, start + size)) for start in range(0, len(scores), size)]
    groups.sort(key=lambda group: -sum(sorted((ranking[expert] for expert in group), reverse=True)[:2]))
    allowed = [expert for group in groups[: config.topk_group] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -ranking[expert])[: config.num_experts_per_tok]
    total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
    return {expert: scores[expert] / total * config.routed_scaling_factor for expert in chosen}


@pytest.mark.parametrize("bias", [0.0, -3.0], ids=["positive", "all scores negative"])
@pytest.mark.parametrize("changes", [{}, {"n_group": 1, "topk_group": 1}, {"norm_topk_prob": False}], ids=str)
def test_experts_and_weights_follow_the_rule(bias, changes):
    experts = build(5, bias, **changes)
    rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    chosen, weights = experts.route(rows)
    for row, numbers, shares in zip(rows, chosen.tolist(), weights.tolist()):
        expected = choose_by_hand(experts, row)
        assert numbers == sorted(expected)
        assert shares == pytest.approx([expected[number] for number in numbers], rel=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1, 13])
def test_the_mixture_is_the_weighted_sum_of_its_experts(num_rows):
    experts = build(6, 0.0)
    rows = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(2))
    chosen, weights = experts.route(rows)
    actual = experts(rows, chosen, weights)
    outputs = torch.stack([expert(rows) for expert in experts.experts], dim=1)
    expected = (outputs.gather(1, chosen[..., None].expand(-1, -1, 64)) * weights[..., None]).sum(dim=1)
    assert actual.shape == (num_rows, 64)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
