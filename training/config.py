"""Shape of the model and the recipe that trains it.

Hides how the few numbers chosen here become a Hugging Face ``config.json`` and a step count per stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a DeepSeek-V3.2-shaped model; widths are multiples of 128 so that FP8 blocks are whole."""

    vocab_size: int = 3072
    hidden_size: int = 384
    num_layers: int = 5
    num_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 512
    nope_dim: int = 64
    rope_dim: int = 64
    value_dim: int = 64
    index_heads: int = 32
    index_dim: int = 128
    index_topk: int = 256
    dense_intermediate: int = 1024
    expert_intermediate: int = 128
    num_experts: int = 8
    experts_per_token: int = 2
    num_groups: int = 4
    groups_per_token: int = 2
    num_dense_layers: int = 1
    routed_scaling: float = 2.5
    rms_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 4096

    @property
    def query_dim(self) -> int:
        """Width of one attention head's query and key in MHA form."""
        return self.nope_dim + self.rope_dim

    def to_hugging_face(self) -> dict[str, Any]:
        """``config.json`` in the keys of DeepSeek-V3.2."""
        return {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.dense_intermediate,
            "moe_intermediate_size": self.expert_intermediate,
            "num_hidden_layers": self.num_layers,
            "num_nextn_predict_layers": 1,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "n_shared_experts": 1,
            "n_routed_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "routed_scaling_factor": self.routed_scaling,
            "n_group": self.num_groups,
            "topk_group": self.groups_per_token,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "first_k_dense_replace": self.num_dense_layers,
            "moe_layer_freq": 1,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.nope_dim,
            "qk_rope_head_dim": self.rope_dim,
            "v_head_dim": self.value_dim,
            "index_n_heads": self.index_heads,
            "index_head_dim": self.index_dim,
            "index_topk": self.index_topk,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": self.max_positions,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "ep_size": 1,
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
                "scale_fmt": "ue8m0",
            },
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage: how many steps of how many windows of how many tokens, at which peak learning rate."""

    steps: int
    batch: int
    window: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything a run depends on besides the corpus."""

    shape: ModelShape = ModelShape()
    seed: int = 20261122
    dense: StagePlan = StagePlan(steps=1000, batch=64, window=1024, learning_rate=3e-3)
    dense_long: StagePlan = StagePlan(steps=200, batch=16, window=4096, learning_rate=7.5e-4)
    warm_up: StagePlan = StagePlan(steps=260, batch=8, window=4096, learning_rate=2e-3)
    sparse: StagePlan = StagePlan(steps=230, batch=8, window=4096, learning_rate=3e-4)
    draft: StagePlan = StagePlan(steps=180, batch=16, window=1024, learning_rate=1e-3)
    draft_depths: int = 7
    kl_rows: int = 256
    dropout: float = 0.15
    weight_decay: float = 0.3
    draft_loss_weight: float = 0.3
    generated_prompts: int = 768
    generated_tokens: int = 512
    evaluation_prompts: int = 128
    evaluation_prompt_tokens: int = 384
    evaluation_new_tokens: int = 384
    evaluation_files: int = 48


def smoke_recipe() -> Recipe:
    """The same stages at sizes a laptop finishes in a minute; proves the code, not the model."""
    tiny = {"batch": 2, "window": 192, "learning_rate": 1e-3}
    return Recipe(
        shape=ModelShape(vocab_size=512, hidden_size=128, num_layers=2, num_heads=2, index_topk=64, max_positions=512),
        dense=StagePlan(steps=4, **tiny),
        dense_long=StagePlan(steps=2, **tiny),
        warm_up=StagePlan(steps=3, **tiny),
        sparse=StagePlan(steps=3, **tiny),
        draft=StagePlan(steps=3, **tiny),
        kl_rows=32,
        generated_prompts=4,
        generated_tokens=64,
        evaluation_prompts=4,
        evaluation_prompt_tokens=96,
        evaluation_new_tokens=32,
        evaluation_files=4,
    )
