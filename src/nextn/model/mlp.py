"""Feed-forward halves of a layer: the gated MLP, and experts behind sigmoid group-limited routing.

Hides how rows are sorted by expert and put back. A row's result is summed over its experts in order of their number, so
that it does not depend on which other rows share an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from nextn.model.config import ModelConfig
from nextn.model.parameters import TensorTarget, linear_target, stacked_targets, vector_target, with_prefix
from nextn.model.rowwise import RowLinear, empty_parameter, map_rows

# On a GPU, row-expert pairs few enough to run every expert on every row: nothing waits for the host, so graphs capture.
_DENSE_PAIRS = 4096


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, with gate and up stacked. Row-wise: call it on blocks."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.intermediate_size = intermediate_size
        self.gate_up = RowLinear(hidden_size, 2 * intermediate_size, device=device, dtype=dtype)
        self.down = RowLinear(intermediate_size, hidden_size, device=device, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden).split(self.intermediate_size, dim=1)
        return self.down(functional.silu(gate) * up)

    def targets(self) -> Iterator[TensorTarget]:
        size = self.intermediate_size
        yield from stacked_targets(self.gate_up, ("gate_proj", size), ("up_proj", size))
        yield linear_target("down_proj", self.down)


class MixtureOfExperts(nn.Module):
    """Routed experts and the shared expert that every row runs through."""

    def __init__(self, config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        size, num_experts = config.moe_intermediate_size, config.n_routed_experts
        self.router = RowLinear(config.hidden_size, num_experts, device=device, dtype=torch.float32)
        self.router_bias = empty_parameter(num_experts, device=device, dtype=torch.float32)
        self.experts = nn.ModuleList(
            GatedMLP(config.hidden_size, size, device=device, dtype=dtype) for _ in range(num_experts)
        )
        self.shared = GatedMLP(config.hidden_size, size * config.n_shared_experts, device=device, dtype=dtype)

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose each row's experts (DeepSeek-V3's ``noaux_tc``). Row-wise: call it on blocks.

        The bias decides who is chosen and never enters the weights. Groups compete first, by the sum of their two best;
        the experts of the losing groups are out at -inf, which is right for negative scores too.

        Args:
            hidden: ``[R, hidden_size]``.

        Returns:
            Expert numbers int64 ``[R, k]`` ascending, and their weights float32 ``[R, k]``.
        """
        config = self.config
        scores = self.router(hidden.float()).sigmoid()
        ranking = scores + self.router_bias
        if config.n_group > 1:
            grouped = ranking.unflatten(1, (config.n_group, -1))
            group_scores = grouped.topk(2, dim=2).values.sum(dim=2)
            is_out = torch.ones_like(group_scores, dtype=torch.bool)
            is_out.scatter_(1, group_scores.topk(config.topk_group, dim=1).indices, False)
            ranking = grouped.masked_fill(is_out.unsqueeze(2), float("-inf")).flatten(1)
        chosen = ranking.topk(config.num_experts_per_tok, dim=1).indices.sort(dim=1).values
        weights = scores.gather(1, chosen)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
        return chosen, weights * config.routed_scaling_factor

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed experts' weighted sum, ``[R, hidden_size]``, for any number of rows.

        Args:
            hidden: ``[R, hidden_size]``.
            chosen: int64 ``[R, k]`` from :meth:`route`.
            weights: float32 ``[R, k]`` from :meth:`route`.
        """
        if hidden.is_cuda and hidden.shape[0] * len(self.experts) <= _DENSE_PAIRS:
            outputs = torch.stack([expert(hidden) for expert in self.experts], dim=1)
            outputs = outputs.take_along_dim(chosen.unsqueeze(2), dim=1)
        else:
            outputs = self._run_by_expert(hidden, chosen)
        weights = weights.to(hidden.dtype)
        total = outputs[:, 0] * weights[:, :1]
        for rank in range(1, chosen.shape[1]):
            total = total + outputs[:, rank] * weights[:, rank : rank + 1]
        return total

    def _run_by_expert(self, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Each row through each of its experts, ``[R, k, hidden_size]``; every expert sees its rows only."""
        pairs = chosen.flatten()
        order = pairs.argsort(stable=True)
        counts = pairs.bincount(minlength=len(self.experts)).tolist()
        rows_by_expert = hidden.index_select(0, order // chosen.shape[1]).split(counts)
        outputs = [
            map_rows(lambda block, expert=expert: (expert(block),), rows)[0]
            for expert, rows in zip(self.experts, rows_by_expert)
            if rows.shape[0]
        ]
        unsorted = torch.empty(len(pairs), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        if outputs:
            unsorted[order] = torch.cat(outputs)
        return unsorted.unflatten(0, chosen.shape)

    def targets(self) -> Iterator[TensorTarget]:
        """Every checkpoint tensor of the experts, named as behind ``mlp.``."""
        yield linear_target("gate", self.router)
        yield vector_target("gate.e_score_correction_bias", self.router_bias)
        for number, expert in enumerate(self.experts):
            assert isinstance(expert, GatedMLP)
            yield from with_prefix(f"experts.{number}", expert.targets())
        yield from with_prefix("shared_experts", self.shared.targets())
