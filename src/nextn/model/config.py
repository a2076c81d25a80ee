"""ModelConfig: a checkpoint's config.json, read strictly.

Hides the spellings in which the same model is described (DeepSeek's, GLM's, transformers 5's). Every key of the file is
used, known to change nothing, or reported as an error with its value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextn.cache_format import LATENT_DIM, ROPE_DIM, IndexCacheFormat, LatentCacheFormat
from nextn.errors import ConfigError
from nextn.model.config_reader import ConfigReader, read_quantisation, read_rope
from nextn.model.rotary import RopeConfig
from nextn.plan import DSASpec

DEEPSEEK = "DeepseekV32ForCausalLM"
GLM = "GlmMoeDsaForCausalLM"
INDEX_DIM = 128
CACHE_FORMATS = ("fp8", "bf16", "fp32")
_MODEL_TYPES = {DEEPSEEK: "deepseek_v32", GLM: "glm_moe_dsa"}

# Keys of which one value only is implemented.
_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "kv_lora_rank": LATENT_DIM,
    "qk_rope_head_dim": ROPE_DIM,
    "index_head_dim": INDEX_DIM,
    "rope_interleave": True,
    "partial_rotary_factor": 1.0,
    "num_local_experts": None,
    "num_experts": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and choices of one model, named as in config.json.

    Attributes:
        architecture: ``DeepseekV32ForCausalLM`` or ``GlmMoeDsaForCausalLM``.
        mlp_layer_types: ``dense`` or ``sparse`` (experts), one per layer.
        indexer_types: ``full`` (runs its indexer) or ``shared`` (reuses the last full layer's selection), per layer.
        index_rope_interleaved: whether the indexer rotates pairs (2i, 2i+1) rather than (i, i+32).
        index_share_for_mtp_iteration: whether draft steps after the first reuse the first one's selection.
        weight_block_size: rows and columns of a weight that share one FP8 scale, or None for unquantised weights.
        eos_token_ids: every id that ends a text.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_topk: int
    index_rope_interleaved: bool
    index_share_for_mtp_iteration: bool
    indexer_types: tuple[str, ...]
    intermediate_size: int
    moe_intermediate_size: int
    mlp_layer_types: tuple[str, ...]
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    weight_block_size: tuple[int, int] | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        """Dims of one unabsorbed query head: the part without positions, then the rotated part."""
        return self.qk_nope_head_dim + ROPE_DIM

    @property
    def softmax_scale(self) -> float:
        """Scale of attention scores: ``qk_head_dim ** -0.5``, times YaRN's mscale squared; absorption leaves it."""
        return self.qk_head_dim**-0.5 * self.rope.softmax_factor

    @property
    def indexer_layers(self) -> tuple[bool, ...]:
        """Whether each cache layer has an indexer of its own, the NextN layer last."""
        return tuple(kind == "full" for kind in self.indexer_types) + (True,) * self.num_nextn_predict_layers

    def attention_spec(self, cache_format: str = "fp8") -> DSASpec:
        """The sizes of this model's attention.

        Args:
            cache_format: ``fp8``; ``bf16`` (latents in BF16, index keys in FP8); or ``fp32`` (nothing quantised).

        Raises:
            ConfigError: there is no such format.
        """
        if cache_format not in CACHE_FORMATS:
            raise ConfigError(f"cache_format {cache_format!r} is unknown; use one of {list(CACHE_FORMATS)}")
        index_format = IndexCacheFormat(name="fp32" if cache_format == "fp32" else "fp8", head_dim=INDEX_DIM)
        return DSASpec(
            num_heads=self.num_attention_heads,
            index_heads=self.index_n_heads,
            index_dim=INDEX_DIM,
            index_topk=self.index_topk,
            softmax_scale=self.softmax_scale,
            page_size=index_format.page_size,
            index_format=index_format,
            latent_format=LatentCacheFormat(name=cache_format),
            index_rope_interleaved=self.index_rope_interleaved,
        )


def load_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json`` of a Hugging Face folder.

    Args:
        folder: the checkpoint's folder.

    Raises:
        ConfigError: there is no such file, it is not JSON, or a value is missing, inconsistent or not implemented;
            the message names every such value and what is accepted.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}; pass a folder in the Hugging Face format") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a JSON {type(values).__name__}; it must be an object")
    return parse_config(values, source=str(path))


def parse_config(values: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """Turn the contents of a config.json into a :class:`ModelConfig`.

    Args:
        values: the file's top-level object.
        source: what error messages call it.

    Raises:
        ConfigError: see :func:`load_config`.
    """
    reader = ConfigReader(values)
    architecture = _read_architecture(reader)
    for name, wanted in _ONLY.items():
        reader.require_value(name, wanted)
    num_layers = reader.integer("num_hidden_layers")
    config = ModelConfig(
        architecture=architecture,
        num_hidden_layers=num_layers,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        num_nextn_predict_layers=reader.integer("num_nextn_predict_layers", default=0, minimum=0),
        num_attention_heads=reader.integer("num_attention_heads"),
        q_lora_rank=reader.integer("q_lora_rank"),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim"),
        v_head_dim=reader.integer("v_head_dim"),
        index_n_heads=reader.integer("index_n_heads"),
        index_topk=reader.integer("index_topk"),
        index_rope_interleaved=reader.boolean("indexer_rope_interleave", default=architecture == GLM),
        index_share_for_mtp_iteration=reader.boolean("index_share_for_mtp_iteration", default=False),
        indexer_types=_read_indexer_types(reader, num_layers),
        intermediate_size=reader.integer("intermediate_size"),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        mlp_layer_types=_read_mlp_types(reader, num_layers),
        n_routed_experts=reader.integer("n_routed_experts"),
        n_shared_experts=reader.integer("n_shared_experts", default=1),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        n_group=reader.integer("n_group", default=1),
        topk_group=reader.integer("topk_group", default=1),
        norm_topk_prob=reader.boolean("norm_topk_prob", default=True),
        routed_scaling_factor=reader.number("routed_scaling_factor"),
        rms_norm_eps=reader.number("rms_norm_eps"),
        rope=read_rope(reader),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=False),
        weight_block_size=read_quantisation(reader),
        bos_token_id=reader.value("bos_token_id", default=None),
        eos_token_ids=_as_ids(reader.value("eos_token_id", default=None)),
    )
    _check_consistency(reader, config)
    reader.report_unknown()
    if reader.problems:
        raise ConfigError(f"{source}: " + "; ".join(reader.problems))
    return config


def _read_architecture(reader: ConfigReader) -> str:
    named = reader.values.get("architectures")
    model_type = reader.values.get("model_type")
    if not named:
        named = [name for name, kind in _MODEL_TYPES.items() if kind == model_type]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in _MODEL_TYPES:
        raise ConfigError(f"architectures is {named!r}; use one of {sorted(_MODEL_TYPES)}")
    if model_type not in (None, _MODEL_TYPES[named[0]]):
        reader.problems.append(f"model_type is {model_type!r}; {named[0]} has {_MODEL_TYPES[named[0]]!r}")
    return named[0]


def _read_types(reader: ConfigReader, name: str, allowed: tuple[str, str], num_layers: int) -> tuple[str, ...] | None:
    """A per-layer list, which may include an entry for the NextN layer."""
    kinds = reader.value(name, None)
    if kinds is None:
        return None
    if not isinstance(kinds, list) or not set(kinds) <= set(allowed) or len(kinds) not in (num_layers, num_layers + 1):
        reader.problems.append(f"{name} is {kinds!r}; it must hold {num_layers} entries out of {list(allowed)}")
        return None
    return tuple(kinds[:num_layers])


def _read_mlp_types(reader: ConfigReader, num_layers: int) -> tuple[str, ...]:
    num_dense = reader.integer("first_k_dense_replace", default=0, minimum=0)
    kinds = _read_types(reader, "mlp_layer_types", ("dense", "sparse"), num_layers)
    attention_kinds = reader.value("layer_types", None)
    if attention_kinds is not None and set(attention_kinds) != {"indexed_attention"}:
        reader.problems.append(f"layer_types is {attention_kinds!r}; only 'indexed_attention' is implemented")
    return kinds or tuple("dense" if layer < num_dense else "sparse" for layer in range(num_layers))


def _read_indexer_types(reader: ConfigReader, num_layers: int) -> tuple[str, ...]:
    """Explicit list, letters, or a period; the first layer must be full, since later ones reuse its selection."""
    kinds = _read_types(reader, "indexer_types", ("full", "shared"), num_layers)
    pattern = reader.value("index_topk_pattern", None)
    period = reader.integer("index_topk_freq", default=1)
    offset = reader.value("index_skip_topk_offset", None)
    if kinds is None and pattern is not None:
        letters = {"F": "full", "S": "shared", "full": "full", "shared": "shared"}
        if len(pattern) < num_layers or not set(pattern) <= set(letters):
            reader.problems.append(f"index_topk_pattern is {pattern!r}; it must hold an F or S for each layer")
        kinds = tuple(letters.get(entry, "full") for entry in pattern[:num_layers])
    if kinds is None and period > 1 and not isinstance(offset, int):
        reader.problems.append(
            f"index_topk_freq is {period} but index_skip_topk_offset is {offset!r}; other stacks disagree on its "
            "default, so give it, or better indexer_types"
        )
    if kinds is None:
        start = offset if isinstance(offset, int) else 1
        skipped = (max(layer - start + 1, 0) % period != 0 for layer in range(num_layers))
        kinds = tuple("shared" if skip else "full" for skip in skipped)
    if kinds[:1] == ("shared",):
        reader.problems.append("indexer_types starts with 'shared'; the first layer has no earlier selection to reuse")
    return kinds


def _as_ids(found: Any) -> tuple[int, ...]:
    if found is None:
        return ()
    return tuple(found) if isinstance(found, Sequence) else (found,)


def _check_consistency(reader: ConfigReader, config: ModelConfig) -> None:
    """Values that are each fine but do not fit together."""
    qk_head_dim = reader.value("qk_head_dim", None)
    group_size, rest = divmod(config.n_routed_experts, config.n_group)
    problems = {
        f"qk_head_dim is {qk_head_dim}; qk_nope_head_dim + qk_rope_head_dim is {config.qk_head_dim}": qk_head_dim
        not in (None, config.qk_head_dim),
        f"num_nextn_predict_layers is {config.num_nextn_predict_layers}; at most 1 is implemented, and it is re-applied"
        " for deeper drafts": config.num_nextn_predict_layers > 1,
        f"n_routed_experts {config.n_routed_experts} does not divide into n_group {config.n_group}": bool(rest),
        f"n_group {config.n_group} leaves groups of {group_size}; a group is scored by its two best experts": (
            config.n_group > 1 and group_size < 2
        ),
        f"topk_group {config.topk_group} is above n_group {config.n_group}": config.topk_group > config.n_group,
        f"num_experts_per_tok {config.num_experts_per_tok} is above the {group_size * config.topk_group} experts of "
        f"topk_group {config.topk_group} groups": config.num_experts_per_tok > group_size * config.topk_group,
    }
    reader.problems.extend(problem for problem, holds in problems.items() if holds)
