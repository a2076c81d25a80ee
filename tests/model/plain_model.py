"""One decoder layer in float64 as the paper writes it: no pages, no absorption, no blocks, a loop over rows.

Shares no code with the package: it is what the package's layers are tested against where transformers has nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def angles(config: Mapping[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """float64 ``[T, 32]``."""
    scaling = config["rope_scaling"]
    frequencies = []
    for pair in range(32):
        frequency = config["rope_theta"] ** (-2 * pair / 64)
        if scaling:
            bounds = [
                64
                * math.log(scaling["original_max_position_embeddings"] / (2 * math.pi * scaling[beta]))
                / (2 * math.log(config["rope_theta"]))
                for beta in ("beta_fast", "beta_slow")
            ]
            low, high = max(math.floor(bounds[0]), 0), math.ceil(bounds[1])
            share = min(max((pair - low) / (high - low), 0.0), 1.0)
            frequency = frequency * (1 - share) + frequency / scaling["factor"] * share
        frequencies.append(frequency)
    return positions.double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)


def rotate_pairs(x: torch.Tensor, angle: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the 64 dims of ``[T, ..., 64]`` as 32 complex numbers."""
    angle = angle.view(angle.shape[0], *[1] * (x.ndim - 2), 32)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :32], x[..., 32:])
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        return torch.view_as_real(turned).flatten(-2)
    return torch.cat((turned.real, turned.imag), dim=-1)


class PlainLayer:
    """A layer by its tensors' names behind ``model.layers.N.``, on one request whose first row is position 0.

    Attributes:
        margins: after :meth:`run`, per row the gap between the last chosen and the first passed-over index score,
            relative to the largest score; infinite where every token was chosen.
        selected: after :meth:`run`, per row the positions attended to.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Tensors, layer: int) -> None:
        self.config = config
        prefix = f"model.layers.{layer}."
        self.tensors = {name.removeprefix(prefix): t.double() for name, t in tensors.items() if name.startswith(prefix)}
        self.margins: list[float] = []
        self.selected: list[list[int]] = []

    def run(self, x: torch.Tensor, *, reuse: Mapping[int, list[int]] | None = None) -> torch.Tensor:
        """float64 ``[T, hidden]`` to the same; ``reuse`` gives some rows their selection."""
        x = x + self._attend(self._norm("input_layernorm", x), reuse or {})
        return x + self._feed_forward(self._norm("post_attention_layernorm", x))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return rms(x, self.tensors[name + ".weight"], self.config["rms_norm_eps"])

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.tensors[name + ".weight"].T

    def _attend(self, x: torch.Tensor, reuse: Mapping[int, list[int]]) -> torch.Tensor:
        config, length = self.config, x.shape[0]
        heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
        angle = angles(config, torch.arange(length))
        latent = self._norm("self_attn.q_a_layernorm", self._linear("self_attn.q_a_proj", x))
        q = self._linear("self_attn.q_b_proj", latent).view(length, heads, nope + 64)
        q = torch.cat((q[..., :nope], rotate_pairs(q[..., nope:], angle, True)), dim=-1)
        compressed = self._linear("self_attn.kv_a_proj_with_mqa", x)
        c = self._norm("self_attn.kv_a_layernorm", compressed[:, :512])
        k_rope = rotate_pairs(compressed[:, 512:], angle, True)
        expanded = self._linear("self_attn.kv_b_proj", c).view(length, heads, nope + config["v_head_dim"])
        k = torch.cat((expanded[..., :nope], k_rope[:, None].expand(-1, heads, -1)), dim=-1)
        scale = (nope + 64) ** -0.5
        if config["rope_scaling"]:
            scale *= (0.1 * math.log(config["rope_scaling"]["factor"]) + 1) ** 2
        scores = self._index_scores(x, latent, angle)
        outputs = []
        self.margins, self.selected = [], []
        for row in range(length):
            chosen = reuse[row] if row in reuse else self._select(scores[row, : row + 1])
            self.selected.append(chosen)
            weights = (torch.einsum("hd,shd->hs", q[row], k[chosen]) * scale).softmax(dim=-1)
            outputs.append(torch.einsum("hs,shd->hd", weights, expanded[chosen][..., nope:]).flatten())
        return self._linear("self_attn.o_proj", torch.stack(outputs))

    def _index_scores(self, x: torch.Tensor, latent: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        config, length = self.config, x.shape[0]
        interleaved = config["model_type"] == "glm_moe_dsa"
        q = self._linear("self_attn.indexer.wq_b", latent).view(length, -1, 128)
        k = self._linear("self_attn.indexer.wk", x)
        k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        k = k * self.tensors["self_attn.indexer.k_norm.weight"] + self.tensors["self_attn.indexer.k_norm.bias"]
        q = torch.cat((rotate_pairs(q[..., :64], angle, interleaved), q[..., 64:]), dim=-1)
        k = torch.cat((rotate_pairs(k[..., :64], angle, interleaved), k[..., 64:]), dim=-1)
        weights = self._linear("self_attn.indexer.weights_proj", x) * config["index_n_heads"] ** -0.5 * 128**-0.5
        return torch.einsum("th,ths->ts", weights, torch.einsum("thd,sd->ths", q, k).relu())

    def _select(self, scores: torch.Tensor) -> list[int]:
        ranked = sorted(range(len(scores)), key=lambda position: (-scores[position].item(), position))
        top_k = self.config["index_topk"]
        gap = float("inf") if len(ranked) <= top_k else (scores[ranked[top_k - 1]] - scores[ranked[top_k]]).item()
        self.margins.append(gap / scores.abs().max().item())
        return sorted(ranked[:top_k])

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        if "mlp.gate.weight" not in self.tensors:
            return self._gated("mlp", x)
        return torch.stack([self._mixture(row) for row in x]) + self._gated("mlp.shared_experts", x)

    def _gated(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate = self._linear(f"{name}.gate_proj", x)
        return self._linear(f"{name}.down_proj", gate * gate.sigmoid() * self._linear(f"{name}.up_proj", x))

    def _mixture(self, row: torch.Tensor) -> torch.Tensor:
        config = self.config
        scores = self._linear("mlp.gate", row).sigmoid().tolist()
        ranking = [s + b for s, b in zip(scores, self.tensors["mlp.gate.e_score_correction_bias"].tolist())]
        size = len(scores) // config["n_group"]
        groups = [range(start, start + size) for start in range(0, len(scores), size)]
        groups.sort(key=lambda group: -sum(sorted((ranking[e] for e in group), reverse=True)[:2]))
        candidates = [expert for group in groups[: config["topk_group"]] for expert in group]
        chosen = sorted(candidates, key=lambda expert: -ranking[expert])[: config["num_experts_per_tok"]]
        total = sum(scores[expert] for expert in chosen) if config["norm_topk_prob"] else 1.0
        factor = config["routed_scaling_factor"] / total
        return torch.stack([scores[e] * factor * self._gated(f"mlp.experts.{e}", row) for e in chosen]).sum(dim=0)
