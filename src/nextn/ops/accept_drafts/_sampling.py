"""Distributions and draws: temperature, top-k and top-p, and random numbers that follow from a counter.

Hides the random number generator. A number is a hash of (seed, position, purpose), so it is the same on every device
and whatever else is in the batch, and nothing has to be carried from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.errors import InputError
from nextn.ops._kernel import require, same_device

# What a random number decides about the token at a position.
DRAFT = 0  # which token is drafted there
ACCEPT = 1  # whether that draft is accepted
RESAMPLE = 2  # which token takes its place, or follows the last accepted draft
_PURPOSES = (DRAFT, ACCEPT, RESAMPLE)

_UNIFORM_BITS = 48  # so that a number times any total stays below the total when rounded to float64
_SIGN = 1 << 63
# A CPU sorts integers by radix only in one dimension and from this length: 129280 of them in 4 ms, in a batch in 12.
_RADIX_SORT_LEAST = 32768


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingTensors:
    """How each of N requests (or rows) picks its tokens.

    Attributes:
        temperature: float32 ``[N]``; 0 or less is greedy.
        top_k: int32 ``[N]``, keep this many of the most probable tokens; 0 or less keeps all.
        top_p: float32 ``[N]``, keep the most probable tokens up to this mass; 1 or more keeps all.
        seed: int64 ``[N]``.
        is_truncated: whether any ``top_k`` or ``top_p`` may be in use. False, if the host knows that none is, saves
            sorting the vocabulary; the result is the same.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor
    is_truncated: bool = True

    def select(self, index: torch.Tensor) -> SamplingTensors:
        """The settings of the requests at ``index``, int64 ``[M]``, in that order."""
        return SamplingTensors(
            temperature=self.temperature.index_select(0, index),
            top_k=self.top_k.index_select(0, index),
            top_p=self.top_p.index_select(0, index),
            seed=self.seed.index_select(0, index),
            is_truncated=self.is_truncated,
        )


def check_sampling(sampling: SamplingTensors, count: int, device: torch.device) -> None:
    """Refuse settings that are not ``count`` each, of the right dtype, on ``device``.

    Raises:
        InputError: names the first field that is wrong.
    """
    dtypes = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "seed": torch.int64}
    for name, dtype in dtypes.items():
        field: torch.Tensor = getattr(sampling, name)
        require(
            field.dtype == dtype and tuple(field.shape) == (count,),
            f"sampling.{name} is {field.dtype} {tuple(field.shape)}; pass {dtype} [{count}]",
        )
        require(field.device == device, f"sampling.{name} is on {field.device}; move it to {device}")


def clean_logits(logits: torch.Tensor) -> torch.Tensor:
    """Float32 logits with NaN as -inf and +inf as the largest float32."""
    return logits.to(torch.float32).nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)


def target_probs(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """The distribution each row's token is drawn from, after temperature, then top-k, then top-p.

    Top-k keeps the k largest logits, ties going to the lowest ids. Top-p then keeps the shortest prefix, in order of
    falling probability and rising id, whose renormalised mass reaches ``top_p``, and at least one token. A greedy row
    puts all mass on its largest logit, the lowest id among equals. NaN counts as -inf; of a row that has nothing else,
    token 0 has all mass.

    Args:
        logits: floating ``[R, V]``.
        sampling: one entry per row, ``[R]`` each.

    Returns:
        float32 ``[R, V]``. A row's bits depend on that row alone.

    Raises:
        InputError: a tensor has the wrong dtype, shape or device.

    Example:
        >>> one = torch.ones(1)
        >>> half = SamplingTensors(temperature=one, top_k=one.int(), top_p=one, seed=one.long())
        >>> target_probs(torch.tensor([[0.0, 2.0, 2.0]]), half)
        tensor([[0., 1., 0.]])
    """
    require(
        logits.ndim == 2 and logits.shape[1] > 0 and logits.is_floating_point(),
        f"logits is {logits.dtype} {tuple(logits.shape)}; pass float32 [rows, vocabulary]",
    )
    check_sampling(sampling, logits.shape[0], logits.device)
    cleaned = clean_logits(logits)
    best = cleaned.argmax(dim=-1, keepdim=True)
    is_greedy = (sampling.temperature <= 0)[:, None]
    largest = cleaned.gather(1, best)
    divisor = torch.where(is_greedy, 1.0, sampling.temperature[:, None])
    # Less the largest first: a tiny temperature then overflows to -inf, which is what it should become.
    scaled = (cleaned - largest) / divisor
    # Of a greedy row, and of one that is -inf throughout, only the best is left.
    is_single = is_greedy | torch.isneginf(largest)
    scaled = torch.where(is_single, -torch.inf, scaled).scatter_(1, best, 0.0)
    if sampling.is_truncated:
        scaled = _truncate(scaled, sampling)
    return scaled.softmax(dim=-1)


def sample_rows(probs: torch.Tensor, seed: torch.Tensor, position: torch.Tensor, purpose: int) -> torch.Tensor:
    """Draw one token per row by inverting the cumulative distribution, summed in float64.

    Args:
        probs: floating ``[R, V]``, not negative, of any positive total.
        seed: int64 ``[R]``.
        position: int64 ``[R]``, of the token that is drawn.
        purpose: DRAFT, ACCEPT or RESAMPLE.

    Returns:
        int64 ``[R]``; never a token of probability 0, unless a row has no other.

    Raises:
        InputError: a tensor has the wrong dtype or shape.
    """
    require(
        probs.ndim == 2 and probs.shape[1] > 0 and probs.is_floating_point(),
        f"probs is {probs.dtype} {tuple(probs.shape)}; pass float32 [rows, vocabulary]",
    )
    coins = draw_uniforms(seed, position, purpose)
    require(
        coins.shape == probs.shape[:1],
        f"seed has shape {tuple(seed.shape)} for probs of {probs.shape[0]} rows; match them",
    )
    cumulated = probs.cumsum(dim=-1, dtype=torch.float64)
    thresholds = coins[:, None] * cumulated[:, -1:]
    ids = torch.searchsorted(cumulated, thresholds, right=True).squeeze(1)
    return ids.clamp_(max=probs.shape[1] - 1)


def draw_uniforms(seed: torch.Tensor, position: torch.Tensor, purpose: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), each a hash of (seed, position, purpose).

    Three rounds of splitmix64 (Steele, Lea and Flood 2014) in wrapping int64 arithmetic.

    Args:
        seed: int64 ``[N]``.
        position: int64 ``[N]``.
        purpose: DRAFT, ACCEPT or RESAMPLE.

    Returns:
        float64 ``[N]``, multiples of 2^-48, the same on every device.

    Raises:
        InputError: the dtypes or shapes are wrong, or there is no such purpose.
    """
    if purpose not in _PURPOSES:
        raise InputError(f"purpose {purpose!r} is unknown; use DRAFT, ACCEPT or RESAMPLE ({_PURPOSES})")
    require(
        seed.dtype == torch.int64 and position.dtype == torch.int64 and seed.shape == position.shape,
        f"seed is {seed.dtype} {tuple(seed.shape)} and position {position.dtype} {tuple(position.shape)}; "
        "pass int64 of the same shape",
    )
    same_device(seed=seed, position=position)
    counter = position * len(_PURPOSES) + purpose
    state = _mix(_mix(_mix(seed) ^ counter))
    return _shift_right(state, 64 - _UNIFORM_BITS).to(torch.float64) * 2.0**-_UNIFORM_BITS


def _truncate(scaled: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """Scaled logits with -inf for every token that top-k or top-p drops."""
    vocab = scaled.shape[1]
    order = _sort_ids(scaled)
    falling = scaled.gather(1, order)
    rank = torch.arange(vocab, device=scaled.device)
    top_k = torch.where(sampling.top_k > 0, sampling.top_k, vocab)[:, None]
    falling = torch.where(rank < top_k, falling, -torch.inf)
    mass = falling.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    is_kept = torch.ones_like(falling, dtype=torch.bool)  # the first token whatever top_p is, low
    top_p = torch.where(sampling.top_p < 1, sampling.top_p.to(torch.float64), torch.inf)[:, None]
    torch.lt(mass[:, :-1], top_p, out=is_kept[:, 1:])
    return torch.full_like(scaled, -torch.inf).scatter_(1, order, torch.where(is_kept, falling, -torch.inf))


def _sort_ids(values: torch.Tensor) -> torch.Tensor:
    """Ids int64 ``[R, V]`` by falling value and, among equals, by rising id; no value is NaN."""
    bits = (values + 0.0).view(torch.int32)  # adding 0 makes -0.0 equal to 0.0
    falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))  # rises as the float falls
    if values.device.type != "cpu" or values.shape[1] < _RADIX_SORT_LEAST:
        return falling.sort(dim=-1, stable=True).indices
    return torch.stack([row.sort(stable=True).indices for row in falling])


def _mix(state: torch.Tensor) -> torch.Tensor:
    """One step of splitmix64."""
    state = state + _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift_right(state, 31)


def _shift_right(state: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift; that of int64 drags the sign along."""
    return (state >> count) & ((1 << (64 - count)) - 1)


def _signed(constant: int) -> int:
    """The int64 with the bits of an unsigned constant."""
    return constant - (1 << 64) if constant & _SIGN else constant
