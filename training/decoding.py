"""Batched plain decoding with key-value caches, for self-generated training text and for evaluation.

Hides the caches: one set of preallocated tensors per layer, grown a token at a time for all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.attention import (
    MASKED,
    AttentionMode,
    LatentAttention,
    Projected,
    index_scores,
    select_mask,
)
from training.model import TinyModel

DECODE = AttentionMode(sparse=True, quantise_caches=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """Keys and values [B, heads, capacity, dim] and index keys [B, capacity, dim] of one layer.

    Heads come before positions so that a product over a prefix needs no copy of it.
    """

    k: Tensor
    v: Tensor
    index_k: Tensor


def _make_cache(parts: Projected, capacity: int) -> LayerCache:
    def extend(filled: Tensor) -> Tensor:
        cache = filled.new_zeros((*filled.shape[:-2], capacity, filled.shape[-1]))
        cache[..., : filled.shape[-2], :] = filled
        return cache

    # Index keys are exact in bfloat16 (e4m3 times a power of two); the autocast products want that type.
    index_k = parts.index.key.to(parts.k.dtype)
    return LayerCache(k=extend(parts.k.transpose(1, 2)), v=extend(parts.v.transpose(1, 2)), index_k=extend(index_k))


def _step_attention(attention: LatentAttention, parts: Projected, cache: LayerCache, position: int) -> Tensor:
    cache.k[:, :, position], cache.v[:, :, position] = parts.k[:, 0], parts.v[:, 0]
    cache.index_k[:, position] = parts.index.key[:, 0].to(cache.index_k.dtype)
    k, v, index_k = (part[..., : position + 1, :] for part in (cache.k, cache.v, cache.index_k))
    q, weights = attention.indexer.queries(parts.index, slice(None), slice(None))
    scores = index_scores(q, weights, index_k)
    allowed = select_mask(scores, torch.ones_like(scores[:1], dtype=torch.bool), attention.shape.index_topk)
    logits = torch.matmul(parts.q.transpose(1, 2), k.mT) * parts.q.shape[-1] ** -0.5
    probabilities = logits.float().masked_fill(~allowed.unsqueeze(1), MASKED).softmax(dim=-1).to(v.dtype)
    return attention.o_proj(torch.matmul(probabilities, v).transpose(1, 2).flatten(2))


def _step(model: TinyModel, tokens: Tensor, caches: list[LayerCache], position: int) -> Tensor:
    x = model.embed(tokens).float()
    rotary = model.rotary[:, position : position + 1]
    for layer, cache in zip(model.decoder_layers(), caches):
        parts = layer.self_attn.project(layer.input_layernorm(x), rotary, DECODE)
        x = layer.finish(x, _step_attention(layer.self_attn, parts, cache, position))
    return model.head(model.norm(x))[:, -1].float()


def _choose(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    greedy = logits.argmax(dim=-1, keepdim=True)
    scaled = (logits / temperatures.clamp_min(0.05).unsqueeze(-1)).softmax(dim=-1)
    sampled = torch.multinomial(scaled, 1, generator=generator)
    return torch.where(temperatures.unsqueeze(-1) > 0, sampled, greedy)


@torch.no_grad()
def generate(model: TinyModel, prompts: Tensor, num_new: int, temperatures: Tensor, seed: int) -> Tensor:
    """Continue ``prompts`` [B, P] by ``num_new`` tokens; temperature 0 of a row means greedy.

    Returns:
        Token ids [B, P + num_new]; end-of-sequence does not stop a row.
    """
    model.eval()
    generator = torch.Generator(device=prompts.device).manual_seed(seed)
    num_prompt, capacity = prompts.shape[1], prompts.shape[1] + num_new
    result = model(prompts, DECODE)
    caches = [_make_cache(parts, capacity) for parts in result.parts]
    logits = model.head(result.hidden[:, -1:])[:, -1].float()
    del result
    tokens = [_choose(logits, temperatures, generator)]
    for position in range(num_prompt, capacity - 1):
        logits = _step(model, tokens[-1], caches, position)
        tokens.append(_choose(logits, temperatures, generator))
    return torch.cat([prompts, *tokens], dim=1)
