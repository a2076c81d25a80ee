"""Checkpoints are loaded exactly, or refused with everything that is wrong with them."""

from __future__ import annotations

import json

import pytest
import torch
from model_harness import Session, random_prompts, random_tensors, small_config, write_checkpoint

from nextn.errors import CheckpointError
from nextn.model import DeepseekV32ForCausalLM, load_model
from nextn.model.config import GLM
from nextn.model.weights import dequantise_blocks

QUANTISATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
NEVER_QUANTISED = ("embed_tokens", "lm_head", "mlp.gate.", "weights_proj", "eh_proj", "shared_head")


def quantise(tensors: dict[str, torch.Tensor], block: int = 128) -> dict[str, torch.Tensor]:
    """The same checkpoint as DeepSeek stores it: matrices in e4m3 with a scale per block, the others in BF16."""
    stored = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or any(part in name for part in NEVER_QUANTISED):
            stored[name] = tensor.to(torch.bfloat16) if tensor.ndim == 2 else tensor
            continue
        rows, columns = tensor.shape
        scales = torch.empty(-(-rows // block), -(-columns // block))
        values = torch.empty_like(tensor)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                scales[i, j] = torch.exp2((tensor[part].abs().amax() / 448).log2().ceil())
                values[part] = tensor[part] / scales[i, j]
        stored[name] = values.to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scales
    return stored


def restore(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the quantised checkpoint stands for, in float32, by a plain loop over elements' blocks."""
    plain = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(name + "_scale_inv")
        plain[name] = tensor.float()
        if scale is not None:
            rows = torch.arange(tensor.shape[0]) // 128
            columns = torch.arange(tensor.shape[1]) // 128
            plain[name] = plain[name] * scale[rows][:, columns]
    return plain


def loaded_tensors(folder, **options) -> dict[str, torch.Tensor]:
    """Every tensor of a loaded model by its checkpoint name, before weights are packed away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nextn.model.weights.pack_weights", lambda model: None)
        model = load_model(folder, **options)
    return {target.name: target.destination for target in model.targets() if not target.is_copy}


@pytest.mark.parametrize("num_shards", [1, 5])
def test_plain_tensors_arrive_unchanged(tmp_path, num_shards):
    config = small_config()
    tensors = random_tensors(config)
    loaded = loaded_tensors(write_checkpoint(tmp_path, config, tensors, num_shards=num_shards))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


def test_fp8_blocks_are_multiplied_by_their_scales_also_ragged_ones(tmp_path):
    config = small_config(hidden_size=200, q_lora_rank=136, quantization_config=QUANTISATION)
    stored = quantise(random_tensors(config))
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
    loaded = loaded_tensors(write_checkpoint(tmp_path, config, stored, num_shards=7))
    for name, tensor in restore(stored).items():
        assert torch.equal(loaded[name], tensor), name


def test_blocks_of_another_shape_are_dequantised():
    weight = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    expected = weight.float() * scale[torch.arange(5) // 2][:, torch.arange(7) // 4]
    assert torch.equal(dequantise_blocks(weight, scale, (2, 4)), expected)


def test_bf16_models_keep_norms_and_router_in_float32(tmp_path):
    loaded = loaded_tensors(
        write_checkpoint(tmp_path, small_config(), random_tensors(small_config())), dtype=torch.bfloat16
    )
    in_float32 = {name.rsplit("layers.", 1)[-1][2:] for name, tensor in loaded.items() if tensor.dtype == torch.float32}
    assert "self_attn.indexer.weights_proj.weight" in in_float32
    assert "mlp.gate.weight" in in_float32
    assert all("norm" in name or "gate." in name or "weights_proj" in name for name in in_float32)


def test_progress_counts_every_byte_once(tmp_path):
    folder = write_checkpoint(tmp_path, small_config(), random_tensors(small_config()), num_shards=3)
    seen: list[tuple[int, int]] = []
    load_model(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(4 * tensor.numel() for tensor in random_tensors(small_config()).values())
    assert seen == sorted(seen)


def test_the_nextn_layer_may_repeat_embedding_and_head(tmp_path):
    config, tensors = small_config(), random_tensors(small_config())
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    model = load_model(write_checkpoint(tmp_path, config, tensors))
    assert model.mtp is not None
    assert model.mtp.embedding is model.embedding


def test_a_nextn_head_of_its_own_is_refused(tmp_path):
    config, tensors = small_config(), random_tensors(small_config())
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"layers\.3\.shared_head\.head\.weight differs"):
        load_model(write_checkpoint(tmp_path, config, tensors))


def test_tied_models_use_the_embedding_as_head(tmp_path):
    config = small_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    assert "lm_head.weight" not in tensors
    model = load_model(write_checkpoint(tmp_path, config, tensors))
    hidden = torch.randn(3, config["hidden_size"])
    torch.testing.assert_close(model.compute_logits(hidden), hidden @ tensors["model.embed_tokens.weight"].T)


def test_a_model_without_nextn_layer_and_with_shared_indexers_loads(tmp_path):
    config = small_config(GLM, num_nextn_predict_layers=0, indexer_types=["full", "shared", "full"])
    tensors = random_tensors(config)
    assert not any("layers.1.self_attn.indexer" in name for name in tensors)
    model = load_model(write_checkpoint(tmp_path, config, tensors))
    assert model.mtp is None
    assert model.indexer_layers == (True, False, True)


def test_every_difference_is_reported_at_once(tmp_path):
    config, tensors = small_config(), random_tensors(small_config())
    del tensors["model.norm.weight"]
    tensors["model.layers.0.stray.weight"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(7, 64)
    tensors["model.layers.1.mlp.gate.weight"] = torch.zeros(8, 64, dtype=torch.float16)
    with pytest.raises(CheckpointError) as caught:
        load_model(write_checkpoint(tmp_path, config, tensors))
    message = str(caught.value)
    assert "1 missing: model.norm.weight [64]" in message
    assert "1 unexpected: model.layers.0.stray.weight F32 [2]" in message
    assert "lm_head.weight [7, 64], expected [96, 64]" in message
    assert "model.layers.1.mlp.gate.weight F16" in message


def test_long_lists_of_differences_stay_readable(tmp_path):
    config, tensors = small_config(), random_tensors(small_config())
    kept = {name: tensor for name, tensor in tensors.items() if "experts" not in name}
    with pytest.raises(CheckpointError, match=r"81 missing: .* and 73 more") as caught:
        load_model(write_checkpoint(tmp_path, config, kept))
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("announced", [0, 1])
def test_a_nextn_layer_that_config_and_files_disagree_on_gets_a_hint(tmp_path, announced):
    tensors = random_tensors(small_config())
    if announced:
        tensors = {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}
    config = small_config(num_nextn_predict_layers=announced)
    with pytest.raises(CheckpointError, match=f"set num_nextn_predict_layers to {1 - announced}"):
        load_model(write_checkpoint(tmp_path, config, tensors))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda stored: stored.pop("lm.q_b_proj.weight_scale_inv"), r"missing: .*q_b_proj\.weight_scale_inv \[1, 1\]"),
        (
            lambda stored: stored.update({"lm.q_b_proj.weight_scale_inv": torch.ones(1, 9)}),
            r"\[1, 9\], expected \[1, 1\]",
        ),
        (lambda stored: stored.update({"lm.q_a_layernorm.weight_scale_inv": torch.ones(1)}), "1 unexpected"),
        (
            lambda stored: stored.update({"lm.q_a_layernorm.weight": torch.ones(48).to(torch.float8_e4m3fn)}),
            "wrong dtype: .*F8_E4M3",
        ),
    ],
    ids=["no scale", "scale shape", "stray scale", "FP8 norm"],
)
def test_scales_that_do_not_fit_are_reported(tmp_path, change, named):
    config = small_config(quantization_config=QUANTISATION, num_attention_heads=1)
    prefix = "model.layers.0.self_attn."
    stored = {name.replace(prefix, "lm."): tensor for name, tensor in quantise(random_tensors(config)).items()}
    change(stored)
    with pytest.raises(CheckpointError, match=named):
        load_model(write_checkpoint(tmp_path, config, {name.replace("lm.", prefix): t for name, t in stored.items()}))


def test_fp8_without_quantization_config_is_refused(tmp_path):
    stored = quantise(random_tensors(small_config()))
    with pytest.raises(CheckpointError, match="quantization_config"):
        load_model(write_checkpoint(tmp_path, small_config(), stored))


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_truncated_shard_is_named(tmp_path, size):
    folder = write_checkpoint(tmp_path, small_config(), random_tensors(small_config()), num_shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is truncated"):
        load_model(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_checkpoint(tmp_path, small_config(), random_tensors(small_config()), num_shards=3)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors"):
        load_model(folder)


def test_a_broken_index_and_an_empty_folder_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    with pytest.raises(CheckpointError, match="neither"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        load_model(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, small_config(), random_tensors(small_config()), num_shards=2)
    (folder / "model-00002-of-00002.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="is in both"):
        load_model(folder)


def test_a_wrong_checkpoint_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    devices = []
    original = DeepseekV32ForCausalLM.__init__

    def record(self, config, **options):
        devices.append(str(options["device"]))
        original(self, config, **options)

    monkeypatch.setattr(DeepseekV32ForCausalLM, "__init__", record)
    tensors = random_tensors(small_config())
    devices.clear()
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError):
        load_model(write_checkpoint(tmp_path, small_config(), tensors))
    assert devices == ["meta"]


def test_packed_weights_give_what_plain_ones_do(tmp_path):
    folder = write_checkpoint(tmp_path, small_config(), random_tensors(small_config()))
    prompts = random_prompts([40], 96)
    packed = Session(load_model(folder), 1).extend(prompts)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nextn.model.weights.pack_weights", lambda model: None)
        plain = Session(load_model(folder), 1).extend(prompts)[0]
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-4)
