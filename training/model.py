"""The training form of the model: decoder layers with routed experts, and the NextN (MTP) layer.

Hides expert routing as one wide gated product and the chained drafting that shares one layer over all depths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.attention import (
    MASKED,
    AttentionMode,
    LatentAttention,
    Projected,
    QuantisableLinear,
    RMSNorm,
    causal_mask,
    index_scores,
    rotary_table,
    select_mask,
)
from training.config import ModelShape


class GatedExperts(nn.Module):
    """``num_experts`` SwiGLU blocks evaluated as one product; gates [B, T, num_experts] of None mean one."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int, output_std: float) -> None:
        super().__init__()
        self.gate_up = QuantisableLinear(2, num_experts, intermediate, hidden)
        self.down = QuantisableLinear(num_experts, hidden, intermediate, std=output_std)
        self._sizes = (num_experts, intermediate)

    def forward(self, x: Tensor, gates: Tensor | None) -> Tensor:
        gate, up = F.linear(x, self.gate_up.effective_weight().flatten(0, 2)).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        if gates is not None:
            inner = (inner.unflatten(-1, self._sizes) * gates.to(inner.dtype).unsqueeze(-1)).flatten(-2)
        return F.linear(inner, self.down.effective_weight().transpose(0, 1).flatten(1))


class RoutedExperts(nn.Module):
    """Group-limited sigmoid routing (noaux_tc) over routed experts, plus one shared expert as the last block."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, shape: ModelShape, output_std: float) -> None:
        super().__init__()
        self._shape = shape
        self.gate = nn.Parameter(torch.randn(shape.num_experts, shape.hidden_size) * 0.02)
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.num_experts))
        self.register_buffer("load", torch.zeros(shape.num_experts), persistent=False)
        self.experts = GatedExperts(shape.num_experts + 1, shape.hidden_size, shape.expert_intermediate, output_std)

    def route(self, x: Tensor) -> Tensor:
        """Gate of every expert [B, T, num_experts + 1], zero where not chosen, one for the shared expert."""
        shape = self._shape
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.gate).sigmoid()
        with torch.no_grad():
            biased = scores + self.e_score_correction_bias
            grouped = biased.unflatten(-1, (shape.num_groups, -1))
            groups = grouped.topk(2, dim=-1).values.sum(-1).topk(shape.groups_per_token, dim=-1).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, groups, True)
            biased = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
            chosen = torch.zeros_like(scores).scatter_(-1, biased.topk(shape.experts_per_token, dim=-1).indices, 1.0)
            if self.training:
                self.load += chosen.sum(dim=(0, 1))
        kept = scores * chosen
        routed = kept / (kept.sum(dim=-1, keepdim=True) + 1e-20) * shape.routed_scaling
        return torch.cat([routed, torch.ones_like(routed[..., :1])], dim=-1)

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Nudge the selection bias against the load seen since the last call."""
        self.e_score_correction_bias += speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.route(x))


class DenseMLP(nn.Module):
    """The plain SwiGLU of the first layers."""

    def __init__(self, shape: ModelShape, output_std: float) -> None:
        super().__init__()
        self.experts = GatedExperts(1, shape.hidden_size, shape.dense_intermediate, output_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, None)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with a float32 residual stream."""

    def __init__(self, shape: ModelShape, *, routed: bool, dropout: float) -> None:
        super().__init__()
        output_std = 0.02 / (2 * shape.num_layers) ** 0.5
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_eps)
        self.self_attn = LatentAttention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_eps)
        self.mlp = RoutedExperts(shape, output_std) if routed else DenseMLP(shape, output_std)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Tensor, mode: AttentionMode) -> tuple[Tensor, Tensor, Projected]:
        attended, loss, parts = self.self_attn(self.input_layernorm(x), rotary, mode)
        return self.finish(x, attended), loss, parts

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residual additions after attention."""
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class NextNLayer(nn.Module):
    """Predicts the token after next from a hidden state and the next token; re-applied to draft deeper."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.enorm = RMSNorm(shape.hidden_size, shape.rms_eps)
        self.hnorm = RMSNorm(shape.hidden_size, shape.rms_eps)
        self.eh_proj = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        nn.init.normal_(self.eh_proj.weight, std=0.02)
        self.layer = DecoderLayer(shape, routed=True, dropout=dropout)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_eps)

    def merge(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """eh_proj of [enorm(embedding) | hnorm(hidden)], embedding half first."""
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)).float()


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardResult:
    """Hidden states after the final norm [B, T, hidden], the indexer loss, and every layer's projections."""

    hidden: Tensor
    indexer_loss: Tensor
    parts: list[Projected]


class TinyModel(nn.Module):
    """DeepSeek-V3.2 in miniature: embedding, decoder layers, head and one NextN layer."""

    rotary: Tensor

    def __init__(self, shape: ModelShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, routed=i >= shape.num_dense_layers, dropout=dropout) for i in range(shape.num_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.rms_eps)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        self.nextn = NextNLayer(shape, dropout)
        self.register_buffer("rotary", rotary_table(shape), persistent=False)

    def forward(self, tokens: Tensor, mode: AttentionMode) -> ForwardResult:
        """Run the target layers on ``tokens`` [B, T] from position 0."""
        x = self.embed(tokens).float()
        loss, parts = x.new_zeros(()), []
        for layer in self.layers:
            x, layer_loss, layer_parts = layer(x, self.rotary[:, : tokens.shape[1]], mode)
            loss = loss + layer_loss
            parts.append(layer_parts)
        return ForwardResult(hidden=self.norm(x), indexer_loss=loss, parts=parts)

    def decoder_layers(self) -> list[DecoderLayer]:
        """The target's layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def draft_once(self, next_tokens: Tensor, hidden: Tensor, mode: AttentionMode) -> ForwardResult:
        """First draft depth: slot p pairs ``hidden[:, p]`` with ``next_tokens[:, p]`` = x_{p+1}."""
        merged = self.nextn.merge(self.embed(next_tokens).float(), hidden)
        y, loss, parts = self.nextn.layer(merged, self.rotary[:, : next_tokens.shape[1]], mode)
        return ForwardResult(hidden=self.nextn.norm(y), indexer_loss=loss, parts=[parts])

    def draft_chain(
        self, hidden: Tensor, next_token: Callable[[int, Tensor | None], Tensor], depths: int, mode: AttentionMode
    ) -> tuple[list[Tensor], Tensor]:
        """Draft ``depths`` tokens from every slot at once, as chained decoding does from one slot.

        Chain s starts at slot s with (h_s, x_{s+1}). At depth d it sits at slot s+d-1, consumes its own previous
        output, and sees the depth-1 keys of slots <= s and its own keys of depths 2..d (as EAGLE-3 trains).

        Args:
            hidden: target hidden states [B, T, hidden].
            next_token: given the depth d >= 1 and the previous depth's output z [B, T, hidden] (None at depth 1),
                the tokens consumed [B, T].
            depths: number of depths.
            mode: attention mode; the indexer loss is taken at depth 1.

        Returns:
            z of each depth [B, T, hidden] and the indexer loss.
        """
        attention = self.nextn.layer.self_attn
        num_slots = hidden.shape[1]
        outputs: list[Tensor] = []
        first = self.draft_once(next_token(1, None), hidden, mode)
        outputs.append(first.hidden)
        chain: list[Projected] = []
        for depth in range(2, depths + 1):
            tokens = next_token(depth, outputs[-1])
            merged = self.nextn.merge(self.embed(tokens).float(), outputs[-1])
            normed = self.nextn.layer.input_layernorm(merged)
            chain.append(attention.project(normed, self.rotary[:, depth - 1 : depth - 1 + num_slots], mode))
            attended = _attend_chain(attention, first.parts[0], chain, mode)
            outputs.append(self.nextn.norm(self.nextn.layer.finish(merged, attended)))
        return outputs, first.indexer_loss

    def set_quantised(self, quantised: bool) -> None:
        """Use FP8-rounded weights (with straight-through gradients) in every block-quantised product."""
        for module in self.modules():
            if isinstance(module, QuantisableLinear):
                module.quantised = quantised

    def balance_experts(self, speed: float = 1e-3) -> None:
        """Apply the routing bias update of every routed layer."""
        for module in self.modules():
            if isinstance(module, RoutedExperts):
                module.balance(speed)


def _attend_chain(attention: LatentAttention, first: Projected, chain: list[Projected], mode: AttentionMode) -> Tensor:
    """Attention of the newest depth over depth-1 keys (causal) and each chain's own later keys: [B, T, hidden]."""
    newest, num_slots = chain[-1], first.k.shape[1]
    rows = torch.arange(num_slots, device=first.k.device)
    visible = F.pad(causal_mask(rows, num_slots), (0, len(chain)), value=True)
    allowed = _chain_selection(attention, first, chain, visible) if mode.sparse else visible
    scores = torch.einsum("bthd,bshd->bhts", newest.q, first.k)
    own = torch.stack([torch.einsum("bthd,bthd->bht", newest.q, parts.k) for parts in chain], dim=-1)
    logits = torch.cat([scores, own], dim=-1) * newest.q.shape[-1] ** -0.5
    logits = logits.float().masked_fill(~allowed.unsqueeze(1), MASKED)
    weights = logits.softmax(dim=-1).to(first.v.dtype)
    out = torch.einsum("bhts,bshd->bthd", weights[..., :num_slots], first.v)
    for step, parts in enumerate(chain):
        out = out + weights[..., num_slots + step].transpose(1, 2).unsqueeze(-1) * parts.v
    return attention.o_proj(out.flatten(2))


@torch.no_grad()
def _chain_selection(attention: LatentAttention, first: Projected, chain: list[Projected], visible: Tensor) -> Tensor:
    newest, masks = chain[-1].index, []
    for row in range(newest.key.shape[0]):
        one = slice(row, row + 1)
        q, weights = attention.indexer.queries(newest, one, slice(None))
        scores = index_scores(q, weights, first.index.key[one])
        own = torch.stack([torch.einsum("bthd,btd->bth", q, parts.index.key[one]) for parts in chain], dim=-1)
        own_scores = (own.float().relu() * weights.unsqueeze(-1)).sum(dim=2)
        masks.append(select_mask(torch.cat([scores, own_scores], dim=-1), visible, attention.shape.index_topk))
    return torch.cat(masks)
