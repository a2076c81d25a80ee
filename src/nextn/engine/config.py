"""EngineConfig: every setting of the engine, checked once, used alike by the API, the command line and the server.

Hides how settings left at None are derived from the model that is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nextn.errors import ConfigError

MAX_NEXT_N = 8
CACHE_FORMATS = ("fp8", "bf16", "fp32")
DTYPES = ("auto", "float32", "bfloat16")
DEFAULT_CACHE_TOKENS = 65536  # the most tokens the page pool is sized for unless the caller says otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        model: checkpoint folder in the Hugging Face format; the checkpoint that ships inside if None.
        next_n: tokens verified per request and step, draft tokens plus one; 1 is plain decoding, 8 the most.
        max_batch: requests running at once; the others wait.
        max_context: tokens a request may have, prompt and output; the model's own limit if None.
        cache_tokens: tokens the page pool holds, over all requests; if None enough for max_batch full contexts, but at
            most 65536 or one full context, whichever is more.
        prefill_chunk: prompt tokens per step, over all requests; running requests decode in the same step.
        cache_format: ``fp8``, ``bf16`` or ``fp32`` (the last for comparisons on the CPU only).
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: weights and activations: ``float32``, ``bfloat16``, or ``auto`` (float32 on a CPU, else bfloat16).

    Raises:
        ConfigError: a value is outside its range.

    Example:
        >>> EngineConfig(next_n=3).max_batch
        8
    """

    model: str | os.PathLike[str] | None = None
    next_n: int = 4
    max_batch: int = 8
    max_context: int | None = None
    cache_tokens: int | None = None
    prefill_chunk: int = 256
    cache_format: str = "fp8"
    device: str = "cpu"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_next_n(self.next_n, ConfigError)
        _check_at_least("max_batch", self.max_batch, 1)
        _check_at_least("prefill_chunk", self.prefill_chunk, 1)
        if self.max_context is not None:
            _check_at_least("max_context", self.max_context, 2)
        if self.cache_tokens is not None:
            _check_at_least("cache_tokens", self.cache_tokens, 1)
        _check_among("cache_format", self.cache_format, CACHE_FORMATS)
        _check_among("dtype", self.dtype, DTYPES)

    def choose_cache_tokens(self, max_context: int) -> int:
        """Tokens the page pool is to hold, for requests of at most ``max_context`` tokens."""
        if self.cache_tokens is not None:
            return self.cache_tokens
        return min(self.max_batch * max_context, max(DEFAULT_CACHE_TOKENS, max_context))


def build_config(options: Mapping[str, Any]) -> EngineConfig:
    """An :class:`EngineConfig` from keyword options.

    Raises:
        ConfigError: an option is unknown, with the nearest known one named, or a value is outside its range.
    """
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known options are {known}"
            raise ConfigError(f"unknown engine option {name!r}; {hint}")
    return EngineConfig(**options)


def check_next_n(value: object, error: type[Exception]) -> None:
    """Raise ``error`` unless ``value`` is a depth the engine serves, 1 to 8."""
    if not _is_int(value) or not 1 <= value <= MAX_NEXT_N:  # type: ignore[operator]
        raise error(f"next_n {value!r} is outside 1..{MAX_NEXT_N}; 1 is plain decoding, {MAX_NEXT_N} verifies 7 drafts")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_at_least(name: str, value: object, least: int) -> None:
    if not _is_int(value) or value < least:  # type: ignore[operator]
        raise ConfigError(f"{name} {value!r} is not an integer of at least {least}; raise it")


def _check_among(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} {value!r} is unknown; use one of {', '.join(allowed)}")
