"""Writes the checkpoint as a Hugging Face folder with FP8 128 x 128 block weights, and reads it back.

Hides the mapping between the fused training parameters and DeepSeek-V3.2's tensor names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from training.config import ModelShape
from training.corpus import save_tokenizer
from training.model import DecoderLayer, DenseMLP, RoutedExperts, TinyModel
from training.quantisation import dequantise_blocks, quantise_blocks

SHARD_BYTES = 12 * 2**20
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "indexer.wq_b", "indexer.wk")
Entry = tuple[str, Tensor, str]  # name, a view of the parameter, storage: "fp8", "bf16" or "fp32"


def _experts(prefix: str, module: RoutedExperts | DenseMLP) -> Iterator[Entry]:
    gate_up, down = module.experts.gate_up.weight, module.experts.down.weight
    names = [f"{prefix}experts.{e}." for e in range(down.shape[0] - 1)] + [f"{prefix}shared_experts."]
    names = names if isinstance(module, RoutedExperts) else [prefix]
    for e, name in enumerate(names):
        yield f"{name}gate_proj.weight", gate_up[0, e], "fp8"
        yield f"{name}up_proj.weight", gate_up[1, e], "fp8"
        yield f"{name}down_proj.weight", down[e], "fp8"


def _decoder_layer(prefix: str, layer: DecoderLayer) -> Iterator[Entry]:
    attention = layer.self_attn
    yield f"{prefix}input_layernorm.weight", layer.input_layernorm.weight, "fp32"
    yield f"{prefix}post_attention_layernorm.weight", layer.post_attention_layernorm.weight, "fp32"
    for name in ATTENTION:
        yield f"{prefix}self_attn.{name}.weight", attention.get_parameter(f"{name}.weight"), "fp8"
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        yield f"{prefix}self_attn.{name}.weight", attention.get_parameter(f"{name}.weight"), "fp32"
    yield f"{prefix}self_attn.indexer.k_norm.weight", attention.indexer.k_norm.weight, "fp32"
    yield f"{prefix}self_attn.indexer.k_norm.bias", attention.indexer.k_norm.bias, "fp32"
    yield f"{prefix}self_attn.indexer.weights_proj.weight", attention.indexer.weights_proj.weight, "bf16"
    yield from _experts(f"{prefix}mlp.", layer.mlp)
    if isinstance(layer.mlp, RoutedExperts):
        yield f"{prefix}mlp.gate.weight", layer.mlp.gate, "bf16"
        yield f"{prefix}mlp.gate.e_score_correction_bias", layer.mlp.e_score_correction_bias, "fp32"


def checkpoint_entries(model: TinyModel) -> Iterator[Entry]:
    """Every tensor of the checkpoint: its name, the view of the parameter it stores, and how it is stored."""
    yield "model.embed_tokens.weight", model.embed.weight, "bf16"
    yield "model.norm.weight", model.norm.weight, "fp32"
    yield "lm_head.weight", model.head.weight, "bf16"
    for i, layer in enumerate(model.decoder_layers()):
        yield from _decoder_layer(f"model.layers.{i}.", layer)
    prefix, nextn = f"model.layers.{len(model.layers)}.", model.nextn
    yield from _decoder_layer(prefix, nextn.layer)
    yield f"{prefix}enorm.weight", nextn.enorm.weight, "fp32"
    yield f"{prefix}hnorm.weight", nextn.hnorm.weight, "fp32"
    yield f"{prefix}eh_proj.weight", nextn.eh_proj.weight, "bf16"
    yield f"{prefix}shared_head.norm.weight", nextn.norm.weight, "fp32"


def _stored_tensors(model: TinyModel) -> Iterator[tuple[str, Tensor]]:
    for name, view, storage in checkpoint_entries(model):
        tensor = view.detach()
        if storage == "fp8":
            values, scale = quantise_blocks(tensor)
            yield name, values.cpu().contiguous()
            yield f"{name}_scale_inv", scale.cpu().contiguous()
        else:
            dtype = torch.bfloat16 if storage == "bf16" else torch.float32
            yield name, tensor.to(dtype).cpu().contiguous().clone()


def export(model: TinyModel, tokenizer: Tokenizer, folder: Path) -> int:
    """Write config, generation config, tokenizer and shards into ``folder``; returns the bytes on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in _stored_tensors(model):
        if filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    documents = {
        "model.safetensors.index.json": index,
        "config.json": model.shape.to_hugging_face(),
        "generation_config.json": generation,
    }
    for file, content in documents.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    save_tokenizer(tokenizer, folder, model.shape.max_positions)
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def load(folder: Path, shape: ModelShape, device: torch.device) -> TinyModel:
    """The training form of an exported folder, with the weights as any reader of the folder sees them."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    stored: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(folder / file, framework="pt") as shard:
            stored.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    model = TinyModel(shape)
    with torch.no_grad():
        for name, view, storage in checkpoint_entries(model):
            tensor = stored.pop(name)
            view.copy_(dequantise_blocks(tensor, stored.pop(f"{name}_scale_inv")) if storage == "fp8" else tensor)
    if stored:
        raise ValueError(f"{folder} has {len(stored)} unexpected tensors, such as {sorted(stored)[0]}")
    return model.to(device).eval()


def snap_to_checkpoint(module: nn.Module, model: TinyModel) -> None:
    """Replace the parameters of ``module`` (a part of ``model``) by their stored values, in place."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    with torch.no_grad():
        for _, view, storage in checkpoint_entries(model):
            if view.untyped_storage().data_ptr() not in owned or storage == "fp32":
                continue
            stored = dequantise_blocks(*quantise_blocks(view)) if storage == "fp8" else view.to(torch.bfloat16)
            view.copy_(stored)
