"""ConfigReader: values out of a config.json, with everything wrong collected rather than raised one at a time.

Hides type checks, defaults and the spellings of nested objects. What nothing asked for is reported as unknown.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from nextn.model.rotary import RopeConfig, YarnScaling

# Bookkeeping of training, of transformers, or of a server: no value of these changes what a token's logits are.
_HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "aux_loss_alpha",
        "chunk_size_feed_forward",
        "dtype",
        "ep_size",
        "head_dim",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "num_key_value_heads",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "seq_aux",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_MISSING = object()


class ConfigReader:
    """Takes values out of the file's object, and remembers what was wrong and what was never asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []
        self.known = set(_HARMLESS)

    def value(self, name: str, default: Any = _MISSING) -> Any:
        self.known.add(name)
        found = self.values.get(name, default)
        if found is _MISSING:
            self.problems.append(f"{name} is missing")
        return found

    def integer(self, name: str, *, default: Any = _MISSING, minimum: int = 1) -> int:
        found = self.value(name, default)
        if found is _MISSING:
            return minimum
        if isinstance(found, bool) or not isinstance(found, int) or found < minimum:
            self.problems.append(f"{name} is {found!r}; it must be an integer of at least {minimum}")
            return minimum
        return found

    def number(self, name: str) -> float:
        found = self.value(name)
        if found is _MISSING:
            return 1.0
        if not _is_number(found) or found <= 0:
            self.problems.append(f"{name} is {found!r}; it must be a positive number")
            return 1.0
        return float(found)

    def boolean(self, name: str, *, default: bool) -> bool:
        found = self.value(name, default)
        if not isinstance(found, bool):
            self.problems.append(f"{name} is {found!r}; it must be true or false")
            return default
        return found

    def require_value(self, name: str, wanted: Any) -> None:
        """Accept a key only with the one value that is implemented; absent counts as that value."""
        found = self.value(name, None)
        if found is not None and (found != wanted or isinstance(found, bool) != isinstance(wanted, bool)):
            self.problems.append(f"{name} is {found!r}; only {wanted!r} is implemented")

    def report_unknown(self) -> None:
        """Name the keys nothing asked for; null and false say that a feature is off and pass."""
        for name in sorted(set(self.values) - self.known):
            found = self.values[name]
            if found is None or found is False:
                continue
            close = difflib.get_close_matches(name, self.known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            self.problems.append(f"{name} = {found!r} is not known here and may change the maths{hint}")


def read_rope(reader: ConfigReader) -> RopeConfig:
    """``rope_theta`` and ``rope_scaling``, or transformers 5's ``rope_parameters`` that holds both."""
    scaling = reader.value("rope_scaling", None)
    parameters = reader.value("rope_parameters", None)
    theta = reader.value("rope_theta", None)
    if scaling is not None and parameters is not None and dict(scaling) != dict(parameters):
        reader.problems.append("rope_scaling and rope_parameters are both given and differ; keep one")
    fields = dict(parameters or scaling or {})
    theta = fields.pop("rope_theta", theta)
    kinds = {fields.pop(name) for name in ("rope_type", "type") if fields.get(name) is not None} or {"default"}
    kind = kinds.pop()
    if not _is_number(theta) or theta <= 1:
        reader.problems.append(f"rope_theta is {theta!r}; it must be a number above 1")
        theta = 10000.0
    if kinds or kind not in ("default", "yarn"):
        reader.problems.append(f"rope type is {kind!r}; only 'default' and 'yarn' are implemented")
        return RopeConfig(theta=float(theta))
    if fields.get("partial_rotary_factor") == 1.0:
        fields.pop("partial_rotary_factor")
    yarn = _read_yarn(reader, fields) if kind == "yarn" else None
    for name, found in fields.items():
        if found is not None:
            reader.problems.append(f"rope parameter {name} = {found!r} is not known for rope type {kind!r}")
    return RopeConfig(theta=float(theta), yarn=yarn)


def _read_yarn(reader: ConfigReader, fields: dict[str, Any]) -> YarnScaling | None:
    """Take YaRN's numbers out of ``fields``."""
    lengths = {"factor": None, "original_max_position_embeddings": None, "beta_fast": 32, "beta_slow": 1}
    numbers = {name: fields.pop(name, default) for name, default in lengths.items()}
    bad = {name: found for name, found in numbers.items() if not _is_number(found) or found <= 0}
    scales = {name: fields.pop(name, None) or 0 for name in ("mscale", "mscale_all_dim")}
    bad |= {name: found for name, found in scales.items() if not _is_number(found) or found < 0}
    if fields.get("truncate") is True:
        fields.pop("truncate")
    if bad:
        reader.problems.append(f"YaRN parameters {bad} must be positive numbers")
        return None
    return YarnScaling(**{name: float(found) for name, found in (numbers | scales).items()})


def read_quantisation(reader: ConfigReader) -> tuple[int, int] | None:
    """The block of FP8 weights, checked to be DeepSeek's format."""
    quantisation = reader.value("quantization_config", None)
    if quantisation is None:
        return None
    wanted = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
    ignored = {"modules_to_not_convert", "dequantize", "weight_block_size"}
    for name, found in dict(quantisation).items():
        if found is not None and name not in ignored and found != wanted.get(name):
            accepted = wanted.get(name, "absent")
            reader.problems.append(f"quantization_config.{name} is {found!r}; only {accepted!r} is implemented")
    block = quantisation.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        reader.problems.append(f"quantization_config.weight_block_size is {block!r}; it must be like [128, 128]")
        return None
    return block[0], block[1]


def _is_number(found: Any) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
