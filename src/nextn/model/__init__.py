"""The model: configuration, weights, tokenizer, and the DeepSeek-V3.2 and GLM-5 forward with its NextN layer."""

from nextn.model.config import ModelConfig, load_config
from nextn.model.deepseek import DeepseekV32ForCausalLM
from nextn.model.mtp import NextNLayer, NextNOutput
from nextn.model.rotary import build_rope_table
from nextn.model.tokenizer import Tokenizer, load_tokenizer
from nextn.model.weights import load_model

__all__ = [
    "DeepseekV32ForCausalLM",
    "ModelConfig",
    "NextNLayer",
    "NextNOutput",
    "Tokenizer",
    "build_rope_table",
    "load_config",
    "load_model",
    "load_tokenizer",
]
