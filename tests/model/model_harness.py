"""Small random models, their checkpoints, and a driver that runs a model over paged caches in any chunking."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nextn.backend import DSABackend, LayerCache
from nextn.batch import ForwardBatch, ForwardMode
from nextn.model import DeepseekV32ForCausalLM, build_rope_table
from nextn.model.config import DEEPSEEK, GLM, parse_config

YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def small_config(architecture: str = DEEPSEEK, **changes: Any) -> dict[str, Any]:
    """A config.json of a model that runs in milliseconds, with every part of the architecture in it."""
    config = {
        "architectures": [architecture],
        "model_type": {DEEPSEEK: "deepseek_v32", GLM: "glm_moe_dsa"}[architecture],
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": 48,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 40,
        "index_n_heads": 16,
        "index_head_dim": 128,
        "index_topk": 16,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": dict(YARN) if architecture == DEEPSEEK else None,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return config | changes


def random_tensor(name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """A value that keeps activations near 1 and makes no norm or bias a no-op."""
    noise = torch.randn(tuple(shape), generator=generator)
    if len(shape) == 1:
        return 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
    return noise if name.endswith("embed_tokens.weight") else noise * shape[-1] ** -0.5


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor a checkpoint of ``config`` holds, by name; copies of others are left out."""
    generator = torch.Generator().manual_seed(seed)
    skeleton = DeepseekV32ForCausalLM(parse_config(config), device="meta")
    return {
        target.name: random_tensor(target.name, target.destination.shape, generator)
        for target in skeleton.targets()
        if not target.is_copy
    }


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, num_shards: int = 1
) -> Path:
    """Write a Hugging Face folder; with more than one shard also the index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if num_shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[shard::num_shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::num_shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


class Session:
    """Requests that grow: one model, its caches, and a page-table row per request.

    Args:
        model: the model to run.
        num_requests: how many requests share the caches.
        cache_format: ``fp8``, ``bf16`` or ``fp32``.
        capacity: tokens a request may reach.
        wrap: given the backend, returns what the model is to call instead.
    """

    def __init__(
        self,
        model: DeepseekV32ForCausalLM,
        num_requests: int,
        *,
        cache_format: str = "fp32",
        capacity: int = 512,
        wrap: Callable[[DSABackend], Any] = lambda backend: backend,
    ) -> None:
        spec = model.config.attention_spec(cache_format)
        self.model = model
        self.backend = DSABackend(spec, build_rope_table(model.config))
        self.called = wrap(self.backend)
        pages = -(-capacity // spec.page_size)
        self.caches = self.backend.allocate_caches(pages * num_requests + 1, model.indexer_layers)
        shuffled = torch.randperm(pages * num_requests, generator=torch.Generator().manual_seed(7)) + 1
        self.page_table = shuffled.view(num_requests, pages).to(torch.int32)
        self.lengths = [0] * num_requests

    @property
    def draft_cache(self) -> LayerCache:
        return self.caches[-1]

    def plan(self, row_counts: Sequence[int], *, max_context: int | None = None) -> Any:
        """Metadata of a forward that appends ``row_counts`` rows per request."""
        lengths = [length + count for length, count in zip(self.lengths, row_counts)]
        batch = ForwardBatch.build(
            ForwardMode.EXTEND,
            row_counts=row_counts,
            context_lens=lengths,
            page_table=self.page_table,
            max_context=max_context,
        )
        return self.backend.init_forward_metadata(batch)

    def extend(self, tokens: Sequence[Sequence[int]], *, max_context: int | None = None) -> list[torch.Tensor]:
        """Append each request's tokens in one forward; their hidden states, one tensor per request."""
        counts = [len(ids) for ids in tokens]
        metadata = self.plan(counts, max_context=max_context)
        flat = torch.tensor([token for ids in tokens for token in ids], dtype=torch.int64)
        hidden = self.model(flat, metadata, self.caches, self.called)
        self.lengths = [length + count for length, count in zip(self.lengths, counts)]
        return list(hidden.split(counts))

    def extend_in_chunks(self, tokens: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Append each request's tokens in forwards of ``sizes`` rows, the last size repeated; all hidden states."""
        pieces: list[list[torch.Tensor]] = [[] for _ in tokens]
        start = 0
        for step in range(max(map(len, tokens))):
            size = sizes[min(step, len(sizes) - 1)]
            rows = [ids[start : start + size] for ids in tokens]
            if not any(rows):
                break
            for piece, hidden in zip(pieces, self.extend(rows)):
                piece.append(hidden)
            start += size
        return [torch.cat(parts) for parts in pieces]


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 1) -> list[list[int]]:
    """Token ids, one list per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
