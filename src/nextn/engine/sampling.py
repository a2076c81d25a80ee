"""SamplingParams: what a request asks of its output, and the tensors the acceptance op reads it from.

Hides the packing of per-request settings into tensors. Random numbers are keyed by (seed, position, purpose) inside the
op, so nothing here carries a generator's state from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nextn.engine.config import check_next_n
from nextn.errors import RequestError
from nextn.ops.accept_drafts import SamplingTensors


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What one request asks of its output.

    Attributes:
        max_new_tokens: the most tokens to generate.
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this much probability; 1 keeps all.
        seed: of the request's random numbers; the same seed, prompt and next_n give the same tokens in any batch.
        stop: strings that end the output; the text ends before them. One string may be given bare.
        ignore_eos: generate past end-of-sequence tokens.
        next_n: tokens verified per step for this request, 1 to 8; the engine's own if None.

    Raises:
        RequestError: a value is outside its range.

    Example:
        >>> SamplingParams(temperature=0.7, stop="\\n\\n").stop
        ('\\n\\n',)
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    next_n: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _check_integer("max_new_tokens", self.max_new_tokens, least=1)
        _check_integer("top_k", self.top_k, least=0)
        _check_integer("seed", self.seed, least=0, most=2**63 - 1)
        _check_number("temperature", self.temperature)
        _check_number("top_p", self.top_p)
        if self.temperature < 0:
            raise RequestError(f"temperature {self.temperature} is negative; use 0 for greedy output, or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p {self.top_p} is outside (0, 1]; 1 keeps every token")
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop {list(stop)!r} has an entry that is not a non-empty string; leave it out")
        if self.next_n is not None:
            check_next_n(self.next_n, RequestError)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most probable one."""
        return self.temperature == 0


def pack_sampling(params: Sequence[SamplingParams], device: torch.device | str) -> SamplingTensors | None:
    """The settings of B requests as tensors ``[B]``, or None if all of them are greedy."""
    if all(each.is_greedy for each in params):
        return None
    return SamplingTensors(
        temperature=torch.tensor([each.temperature for each in params], dtype=torch.float32, device=device),
        top_k=torch.tensor([each.top_k for each in params], dtype=torch.int32, device=device),
        top_p=torch.tensor([each.top_p for each in params], dtype=torch.float32, device=device),
        seed=torch.tensor([each.seed for each in params], dtype=torch.int64, device=device),
        is_truncated=any(each.top_k or each.top_p < 1 for each in params if not each.is_greedy),
    )


def _check_integer(name: str, value: object, *, least: int, most: int | None = None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):  # type: ignore[operator]
        limit = f"at least {least}" if most is None else f"{least} to {most}"
        raise RequestError(f"{name} {value!r} is not an integer of {limit}; change it")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name} {value!r} is not a finite number; change it")
