"""Multi-head latent attention with the lightning indexer, in the uncompressed MHA form used for training.

Hides both rotary conventions, the simulated FP8 caches, top-k masks and the indexer's distillation loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ModelShape
from training.quantisation import hadamard_matrix, round_rows_through, round_weight_through

MASKED = -1e30


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMode:
    """What a forward pass simulates and which extra loss it returns.

    ``kl_rows`` [K] are the query rows on which the indexer is distilled; None skips the loss.
    """

    sparse: bool = False
    quantise_caches: bool = False
    kl_rows: Tensor | None = None

    @property
    def uses_indexer(self) -> bool:
        """Whether index keys are needed at all."""
        return self.sparse or self.kl_rows is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexState:
    """Index keys [B, T, dim] and the detached inputs from which index queries are made when they are wanted.

    Queries are 32 times as wide as keys, so they are never kept for a whole batch.
    """

    x: Tensor
    latent: Tensor
    rotary: Tensor
    key: Tensor
    quantise: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Projected:
    """One layer's queries, keys and values [B, T, heads, dim]; ``index_state`` is None if nothing needs it."""

    q: Tensor
    k: Tensor
    v: Tensor
    index_state: IndexState | None

    @property
    def index(self) -> IndexState:
        """The index state of a forward whose mode uses the indexer."""
        assert self.index_state is not None, "the attention mode did not ask for the indexer"
        return self.index_state


class QuantisableLinear(nn.Module):
    """Bias-free linear map whose weight [..., out, in] can be trained as the FP8 checkpoint will store it."""

    def __init__(self, *shape: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) * std)
        self.quantised = False

    def effective_weight(self) -> Tensor:
        """The weight as used in products."""
        return round_weight_through(self.weight) if self.quantised else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight())


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self._eps)


def rotary_table(shape: ModelShape) -> Tensor:
    """cos and sin [2, max_positions, rope_dim / 2], float32."""
    half = torch.arange(0, shape.rope_dim, 2, dtype=torch.float64) / shape.rope_dim
    angles = torch.outer(torch.arange(shape.max_positions, dtype=torch.float64), shape.rope_theta**-half)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate_interleaved(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i+1) of ``x`` [B, T, heads, D] by ``rotary`` [2, T, D/2]."""
    cos, sin = rotary.unsqueeze(2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def rotate_half_split(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of ``x`` [B, T, heads, D] by ``rotary`` [2, T, D/2]."""
    cos, sin = rotary.unsqueeze(2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _weighted_relu_sum(scores: Tensor, weights: Tensor) -> Tensor:
    return (scores.float().relu() * weights.unsqueeze(-1)).sum(dim=2)


def _finish_index(x: Tensor, rotary: Tensor, hadamard: Tensor, quantise: bool) -> Tensor:
    rope_dim = 2 * rotary.shape[-1]
    rotated = torch.cat([rotate_half_split(x[..., :rope_dim], rotary), x[..., rope_dim:].float()], dim=-1)
    mixed = torch.matmul(rotated, hadamard)
    return round_rows_through(mixed) if quantise else mixed


_EAGER = {"weighted_relu_sum": _weighted_relu_sum, "finish_index": _finish_index}
_CHAINS = dict(_EAGER)


def fuse_indexer(fused: bool) -> None:
    """Compile the indexer's elementwise chains, or go back to eager ones.

    Worth it in training on a GPU only: evaluation meets so many shapes that compiling takes longer than it saves.
    """
    # Stages differ in shape, autocast and gradient mode; the default limit would fall back to eager silently.
    torch._dynamo.config.recompile_limit = 64
    for name, function in _EAGER.items():
        _CHAINS[name] = torch.compile(function, dynamic=True) if fused else function


def index_scores(index_q: Tensor, index_w: Tensor, index_k: Tensor) -> Tensor:
    """I[b, t, s] = sum_h w[b, t, h] relu(q[b, t, h] . k[b, s]): [B, T, S] float32."""
    batch, rows, heads, _ = index_q.shape
    products = torch.matmul(index_q.flatten(1, 2), index_k.transpose(1, 2)).view(batch, rows, heads, -1)
    return _CHAINS["weighted_relu_sum"](products, index_w)


def select_mask(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Boolean mask [B, T, S] of the ``topk`` best visible columns of each row; all visible ones if fewer."""
    visible = visible.expand_as(scores)
    if scores.shape[-1] <= topk:
        return visible
    best = scores.masked_fill(~visible, float("-inf")).topk(topk, dim=-1, sorted=False).indices
    return torch.zeros_like(visible).scatter_(-1, best, True) & visible


def causal_mask(rows: Tensor, num_columns: int) -> Tensor:
    """[1, T, S] boolean: query row ``rows[t]`` sees columns up to itself."""
    return (torch.arange(num_columns, device=rows.device) <= rows[:, None])[None]


class Indexer(nn.Module):
    """Scores every earlier token for every query token; shares the query latent with the attention."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self._heads, self._dim = shape.index_heads, shape.index_dim
        self.wq_b = QuantisableLinear(shape.index_heads * shape.index_dim, shape.q_lora_rank)
        self.wk = QuantisableLinear(shape.index_dim, shape.hidden_size)
        self.k_norm = nn.LayerNorm(shape.index_dim, eps=1e-6)
        self.weights_proj = nn.Linear(shape.hidden_size, shape.index_heads, bias=False)
        nn.init.normal_(self.weights_proj.weight, std=0.02)
        self.register_buffer("hadamard", hadamard_matrix(shape.index_dim), persistent=False)

    def state(self, x: Tensor, latent: Tensor, rotary: Tensor, quantise: bool) -> IndexState:
        """Index keys of ``x`` [B, T, hidden], and what queries will be made from; inputs are detached."""
        x, latent = x.detach(), latent.detach()
        key = self.k_norm(self.wk(x).float()).unsqueeze(2)
        key = _CHAINS["finish_index"](key, rotary, self.hadamard, quantise).squeeze(2)
        return IndexState(x=x, latent=latent, rotary=rotary, key=key, quantise=quantise)

    def queries(self, state: IndexState, batch: slice, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Index queries [B, R, heads, dim] and folded head weights [B, R, heads] of the named rows."""
        q = self.wq_b(state.latent[batch, rows]).unflatten(-1, (self._heads, self._dim))
        q = _CHAINS["finish_index"](q, state.rotary[:, rows], self.hadamard, state.quantise)
        with torch.autocast(q.device.type, enabled=False):
            weights = F.linear(state.x[batch, rows].float(), self.weights_proj.weight)
        return q, weights * (self._heads**-0.5 * self._dim**-0.5)


class LatentAttention(nn.Module):
    """MLA over full keys and values, with an indexer trained beside it on detached inputs."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        heads, hidden = shape.num_heads, shape.hidden_size
        self.q_a_proj = QuantisableLinear(shape.q_lora_rank, hidden)
        self.q_a_layernorm = RMSNorm(shape.q_lora_rank, shape.rms_eps)
        self.q_b_proj = QuantisableLinear(heads * shape.query_dim, shape.q_lora_rank)
        self.kv_a_proj_with_mqa = QuantisableLinear(shape.kv_lora_rank + shape.rope_dim, hidden)
        self.kv_a_layernorm = RMSNorm(shape.kv_lora_rank, shape.rms_eps)
        self.kv_b_proj = QuantisableLinear(heads * (shape.nope_dim + shape.value_dim), shape.kv_lora_rank)
        std = 0.02 / (2 * shape.num_layers) ** 0.5
        self.o_proj = QuantisableLinear(hidden, heads * shape.value_dim, std=std)
        self.indexer = Indexer(shape)

    def project(self, x: Tensor, rotary: Tensor, mode: AttentionMode) -> Projected:
        """Queries, keys, values and index parts of ``x`` [B, T, hidden]; index inputs are detached."""
        shape = self.shape
        latent_q = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(latent_q).unflatten(-1, (shape.num_heads, shape.query_dim))
        q_nope, q_rope = q.split([shape.nope_dim, shape.rope_dim], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([shape.kv_lora_rank, shape.rope_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        latent = round_rows_through(latent) if mode.quantise_caches else latent
        expanded = self.kv_b_proj(latent).unflatten(-1, (shape.num_heads, shape.nope_dim + shape.value_dim))
        k_nope, v = expanded.split([shape.nope_dim, shape.value_dim], dim=-1)
        k_rope = rotate_interleaved(k_rope.unsqueeze(2), rotary).to(v.dtype).expand(-1, -1, shape.num_heads, -1)
        state = self.indexer.state(x, latent_q, rotary, mode.quantise_caches) if mode.uses_indexer else None
        return Projected(
            q=torch.cat([q_nope, rotate_interleaved(q_rope, rotary).to(v.dtype)], dim=-1),
            k=torch.cat([k_nope, k_rope], dim=-1),
            v=v,
            index_state=state,
        )

    def forward(self, x: Tensor, rotary: Tensor, mode: AttentionMode) -> tuple[Tensor, Tensor, Projected]:
        """Attend causally over ``x``; returns the output [B, T, hidden], the indexer loss and the projections."""
        parts = self.project(x, rotary, mode)
        mask = self.selection(parts) if mode.sparse else None
        out = self._attend(parts, mask)
        loss = self._indexer_loss(parts, mask, mode.kl_rows) if mode.kl_rows is not None else out.new_zeros(())
        return self.o_proj(out.flatten(2)), loss, parts

    @torch.no_grad()
    def selection(self, parts: Projected) -> Tensor:
        """Mask [B, T, T] of the columns each row attends to; one sequence at a time to bound memory."""
        state = parts.index
        num_sequences, num_tokens, _ = state.key.shape
        visible = causal_mask(torch.arange(num_tokens, device=state.key.device), num_tokens)
        masks = []
        for row in range(num_sequences):
            one = slice(row, row + 1)
            q, weights = self.indexer.queries(state, one, slice(None))
            masks.append(select_mask(index_scores(q, weights, state.key[one]), visible, self.shape.index_topk))
        return torch.cat(masks)

    def _attend(self, parts: Projected, mask: Tensor | None) -> Tensor:
        # Padding V to the query width lets the fused kernels take it.
        padding = parts.q.shape[-1] - parts.v.shape[-1]
        q, k, v = (part.transpose(1, 2) for part in (parts.q, parts.k, F.pad(parts.v, (0, padding))))
        bias = None if mask is None else mask.unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=mask is None)
        return out.transpose(1, 2)[..., : parts.v.shape[-1]]

    def _indexer_loss(self, parts: Projected, mask: Tensor | None, rows: Tensor) -> Tensor:
        """KL(head-averaged attention || softmax of index scores) on ``rows``, over the selected set if sparse."""
        allowed = causal_mask(rows, parts.k.shape[1]) if mask is None else mask[:, rows]
        with torch.no_grad():
            logits = torch.einsum("bthd,bshd->bhts", parts.q[:, rows], parts.k) * parts.q.shape[-1] ** -0.5
            logits = logits.float().masked_fill(~allowed.unsqueeze(1), MASKED)
            target = logits.softmax(dim=-1).mean(dim=1)
        q, weights = self.indexer.queries(parts.index, slice(None), rows)
        scores = index_scores(q, weights, parts.index.key)
        predicted = scores.masked_fill(~allowed, MASKED).log_softmax(dim=-1)
        return (target * (target.clamp_min(1e-20).log() - predicted)).sum(dim=-1).mean()
