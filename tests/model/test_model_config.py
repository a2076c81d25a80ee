"""config.json is read strictly: every spelling of the released models is understood, everything else is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from model_harness import YARN, small_config

from nextn.errors import ConfigError
from nextn.model.config import DEEPSEEK, GLM, load_config, parse_config
from nextn.model.rotary import RopeConfig, YarnScaling, build_rope_table, compute_frequencies

V32_YARN = YarnScaling(
    factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
)


def test_the_released_deepseek_v32_config_is_understood():
    config = parse_config(
        small_config(
            num_hidden_layers=61,
            num_attention_heads=128,
            num_key_value_heads=128,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            v_head_dim=128,
            index_n_heads=64,
            index_topk=2048,
            first_k_dense_replace=3,
            n_routed_experts=256,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            moe_layer_freq=1,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            attention_bias=False,
            attention_dropout=0.0,
            ep_size=1,
            use_cache=True,
            initializer_range=0.02,
            torch_dtype="bfloat16",
            transformers_version="4.44.2",
            max_position_embeddings=163840,
            rope_scaling={
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            quantization_config={
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
                "scale_fmt": "ue8m0",
            },
        )
    )
    assert config.softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 58
    assert config.indexer_layers == (True,) * 62
    assert config.weight_block_size == (128, 128)
    assert not config.index_rope_interleaved
    spec = config.attention_spec("fp8")
    assert (spec.num_heads, spec.index_heads, spec.index_topk) == (128, 64, 2048)
    assert (spec.latent_format.row_bytes, spec.index_format.page_bytes) == (656, 8448)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    plain = compute_frequencies(RopeConfig(theta=10000.0))
    stretched = compute_frequencies(RopeConfig(theta=10000.0, yarn=V32_YARN))
    assert torch.equal(stretched[:11], plain[:11])
    torch.testing.assert_close(stretched[23:], plain[23:] / 40)
    assert ((stretched[11:23] < plain[11:23]) & (stretched[11:23] > plain[11:23] / 40)).all()


def test_the_rope_table_holds_cosines_then_sines_past_the_context():
    config = parse_config(small_config(GLM))
    table = build_rope_table(config)
    assert table.dtype == torch.float32
    assert table.shape[0] > config.max_position_embeddings + 8
    angle = 300 * 10000.0 ** (-2 * 5 / 64)
    assert table[300, 5].item() == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-4)
    assert table[300, 37].item() == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-4)


def test_unequal_mscales_scale_the_table():
    yarn = YARN | {"mscale": 0.5}
    scaled = build_rope_table(parse_config(small_config(rope_scaling=yarn)))
    plain = build_rope_table(parse_config(small_config()))
    ratio = (0.05 * torch.tensor(8.0).log() + 1) / (0.1 * torch.tensor(8.0).log() + 1)
    torch.testing.assert_close(scaled, plain * ratio)


def test_rope_parameters_of_transformers_5_mean_the_same():
    old = small_config()
    new = {name: value for name, value in old.items() if name not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = YARN | {"type": "yarn", "rope_theta": 10000.0}
    assert parse_config(new) == parse_config(old)


@pytest.mark.parametrize(
    "spelling",
    [
        {"indexer_types": ["full", "shared", "shared", "full", "shared"]},
        {"indexer_types": ["full", "shared", "shared", "full", "shared", "full"]},
        {"index_topk_pattern": "FSSFS"},
        {"index_topk_freq": 3, "index_skip_topk_offset": 1},
    ],
    ids=["list", "list with the NextN layer", "pattern", "period"],
)
def test_index_sharing_is_read_from_every_spelling(spelling):
    config = parse_config(small_config(GLM, num_hidden_layers=5, **spelling))
    assert config.indexer_types == ("full", "shared", "shared", "full", "shared")
    assert config.indexer_layers == (True, False, False, True, False, True)


def test_glm_52_shares_indexers_as_released():
    config = parse_config(small_config(GLM, num_hidden_layers=12, index_topk_freq=4, index_skip_topk_offset=3))
    expected = tuple("full" if layer < 3 or (layer - 2) % 4 == 0 else "shared" for layer in range(12))
    assert config.indexer_types == expected


def test_glm_interleaves_its_indexer_rotation_unless_told_otherwise():
    assert parse_config(small_config(GLM)).index_rope_interleaved
    assert not parse_config(small_config(GLM, indexer_rope_interleave=False)).index_rope_interleaved


def test_eos_may_be_one_id_or_several():
    assert parse_config(small_config(eos_token_id=[1, 5])).eos_token_ids == (1, 5)
    assert parse_config(small_config(eos_token_id=1)).eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"kv_lora_rank": 256}, "kv_lora_rank is 256"),
        ({"index_head_dim": 64}, "index_head_dim is 64"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor = 2.0"),
        ({"rope_scaling": YARN | {"factor": "big"}}, "'factor': 'big'"),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, "differ"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"index_kpool": 4}, "index_kpool = 4"),
        ({"index_top_k": 4}, "did you mean index_topk?"),
        ({"quantization_config": {"quant_method": "awq", "weight_block_size": [128, 128]}}, "'awq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
        ({"n_group": 3}, "does not divide"),
        ({"n_group": 8}, "two best"),
        ({"topk_group": 5}, "topk_group 5"),
        ({"num_experts_per_tok": 5}, "above the 4 experts"),
        ({"qk_head_dim": 100}, "qk_head_dim is 100"),
        ({"indexer_types": ["shared", "full", "full"]}, "starts with 'shared'"),
        ({"indexer_types": ["full"]}, "indexer_types"),
        ({"index_topk_freq": 4}, "index_skip_topk_offset is None"),
        ({"layer_types": ["full_attention"] * 3}, "full_attention"),
        ({"model_type": "glm_moe_dsa"}, "model_type"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_is_not_implemented_is_named(change: dict[str, Any], named: str):
    with pytest.raises(ConfigError) as caught:
        parse_config(small_config(**change))
    assert named in str(caught.value)


def test_every_problem_is_reported_at_once():
    values = small_config(hidden_act="gelu", mystery=3)
    del values["hidden_size"]
    with pytest.raises(ConfigError, match=r"hidden_act.*hidden_size is missing.*mystery = 3"):
        parse_config(values)


def test_switched_off_unknown_features_pass():
    assert parse_config(small_config(some_feature=False, other=None)) == parse_config(small_config())


@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe"], ids=["absent", "cut", "list", "not UTF-8"])
def test_an_unreadable_file_is_a_config_error(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_file_and_its_contents_mean_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    assert load_config(tmp_path) == parse_config(small_config())


def test_an_unknown_cache_format_is_refused():
    with pytest.raises(ConfigError, match="int4"):
        parse_config(small_config()).attention_spec("int4")


def test_architecture_follows_from_model_type_alone():
    values = small_config()
    del values["architectures"]
    assert parse_config(values).architecture == DEEPSEEK
