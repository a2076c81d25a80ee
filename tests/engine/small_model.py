"""A random DeepSeek-V3.2 model small enough to run in milliseconds, whose draft layer is right about half of the time.

The residual stream is mostly the current token's embedding, the draft layer passes on the next token's embedding, and
the head reads each token's successor from it, so both predict nearly the same; their attention disturbs it enough for
drafts of every depth to be rejected too.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from nextn.backend import DSABackend
from nextn.engine.config import EngineConfig
from nextn.engine.llm import LLM
from nextn.model import DeepseekV32ForCausalLM, build_rope_table
from nextn.model.config import parse_config
from nextn.model.rowwise import pack_weights

HIDDEN = 64


def build_small_model(
    *,
    vocab_size: int = 96,
    seed: int = 0,
    disturbance: float = 0.35,
    head_scale: float = 1.0,
    shares_topk: bool = False,
) -> DeepseekV32ForCausalLM:
    """A model of two layers and a NextN layer, index_topk 16; ``head_scale`` sharpens its distributions."""
    config = parse_config(
        {
            "architectures": ["GlmMoeDsaForCausalLM" if shares_topk else "DeepseekV32ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_nextn_predict_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "index_n_heads": 8,
            "index_head_dim": 128,
            "index_topk": 16,
            "index_share_for_mtp_iteration": shares_topk,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 512,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
    )
    model = DeepseekV32ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for target in model.targets():
            if not target.is_copy:
                shape = tuple(target.destination.shape)
                target.destination.copy_(_make_value(target.name, shape, generator, disturbance))
        successor = torch.randperm(vocab_size, generator=generator)
        assert model.head.weight is not None
        model.head.weight.copy_(model.embedding[successor] * (head_scale * HIDDEN**-0.5))
    pack_weights(model)
    return model.eval()


def build_small_llm(model: DeepseekV32ForCausalLM, *, cache_format: str = "fp8", **options: int) -> LLM:
    """An LLM around ``model``; its text is the letters a to z by token id modulo 26."""
    backend = DSABackend(model.config.attention_spec(cache_format), build_rope_table(model.config))
    tokenizer = SimpleNamespace(
        eos_ids=(1,),
        encode=lambda text: [ord(letter) % model.config.vocab_size for letter in text],
        decode=lambda ids: "".join(chr(ord("a") + token % 26) for token in ids),
    )
    options = {"cache_tokens": 4096, **options}
    return LLM.from_parts(model, backend, tokenizer, config=EngineConfig(**options))  # type: ignore[arg-type]


def _make_value(name: str, shape: tuple[int, ...], generator: torch.Generator, disturbance: float) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
    if name.endswith("embed_tokens.weight"):
        return noise
    noise *= shape[-1] ** -0.5
    if name.endswith("eh_proj.weight"):
        passed_on = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1)
        return passed_on + 0.3 * disturbance * noise
    is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
    return disturbance * 4 * noise if is_output else noise
