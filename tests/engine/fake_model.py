"""A model whose every output is a function of the tokens its caches hold, so that a wrong cache is a wrong token.

The target's state at a position is a sum over all cached tokens up to it, read back through the page table; the token
after it is a hash of that state. The draft layer knows the target's rule, and errs where a hash of its own cache says
so: drafts are accepted to every depth, and acceptance shows whether the draft cache is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from nextn.batch import ForwardBatch, ForwardMode
from nextn.engine.config import EngineConfig
from nextn.engine.core import EngineCore
from nextn.engine.llm import LLM

VOCAB = 32
EOS = 1
_PRIMES = (0x9E3779B97F4A7C15 - 2**64, 0xC2B2AE3D27D4EB4F - 2**64, 0x165667B19E3779F9)


def mix(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A hash of two int64 tensors; arithmetic wraps."""
    value = first * _PRIMES[0] + second * _PRIMES[1] + _PRIMES[2]
    value = (value ^ (value >> 29)) * _PRIMES[1]
    value = (value ^ (value >> 32)) * _PRIMES[2]
    return value ^ (value >> 31)


def logits_of(state: torch.Tensor) -> torch.Tensor:
    """Float32 ``[R, VOCAB]``: pseudo-random logits of the token after each state, spread over 4 units, never tied."""
    hashed = mix(state.unsqueeze(1), torch.arange(VOCAB)).remainder(1 << 20)
    return hashed.float() * (4.0 / (1 << 20)) + torch.arange(VOCAB) * 1e-5


def plain_greedy(prompt: list[int], max_new_tokens: int, *, ignore_eos: bool = True) -> list[int]:
    """What the target generates, without caches, pages or drafts."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens:
        state = mix(torch.tensor(tokens), torch.arange(len(tokens))).sum()
        tokens.append(int(logits_of(state.reshape(1)).argmax()))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


@dataclass
class FakeCache:
    """One int64 per slot, garbage at first."""

    values: torch.Tensor


class FakeBackend:
    """Plans a forward and counts how often it is asked to."""

    def __init__(self, page_size: int = 4) -> None:
        self.device = torch.device("cpu")
        self.spec = SimpleNamespace(page_size=page_size)
        self.hardware = SimpleNamespace(name="fake")
        self.batches: list[ForwardBatch] = []

    def allocate_caches(self, num_pages: int, layers: tuple[bool, ...]) -> tuple[FakeCache, ...]:
        generator = torch.Generator().manual_seed(5)
        shape = (num_pages * self.spec.page_size,)
        return tuple(FakeCache(torch.randint(-(2**62), 2**62, shape, generator=generator)) for _ in layers)

    def init_forward_metadata(self, batch: ForwardBatch) -> SimpleNamespace:
        self.batches.append(batch)
        request = torch.tensor([index for index, count in enumerate(batch.row_counts) for _ in range(count)])
        positions = torch.arange(batch.num_rows) - batch.query_offsets[1:].long()[request]
        positions += batch.context_lens.long()[request]
        return SimpleNamespace(
            batch=batch, request_of_row=request, positions=positions, slots=self.slots(batch)[request, positions]
        )

    def slots(self, batch: ForwardBatch) -> torch.Tensor:
        """Slot of every position of every request, int64 ``[B, C]``."""
        positions = torch.arange(batch.max_context)
        pages = batch.page_table.long()[:, positions // self.spec.page_size]
        return pages * self.spec.page_size + positions % self.spec.page_size

    def kernels(self, metadata: SimpleNamespace) -> dict[str, str]:
        return {"index_logits": "fake"}


def _sum_visible(cache: FakeCache, metadata: SimpleNamespace, backend: FakeBackend) -> torch.Tensor:
    sums = cache.values[backend.slots(metadata.batch)].cumsum(1)
    return sums[metadata.request_of_row, metadata.positions]


class FakeModel:
    """The target: hidden states are (state, position, 0)."""

    def __init__(self, *, error_percent: int = 25, max_context: int = 256, shares_topk: bool = False) -> None:
        self.config = SimpleNamespace(
            vocab_size=VOCAB, max_position_embeddings=max_context, index_share_for_mtp_iteration=shares_topk
        )
        self.indexer_layers: tuple[bool, ...] = (True, True)
        self.mtp: FakeNextN | None = FakeNextN(error_percent, max_context)

    def forward(
        self, input_ids: torch.Tensor, metadata: SimpleNamespace, caches: tuple[FakeCache, ...], backend: FakeBackend
    ) -> torch.Tensor:
        assert input_ids.shape == metadata.positions.shape
        assert len(caches) == 1
        assert metadata.positions.max() < self.config.max_position_embeddings - 1
        caches[0].values[metadata.slots] = mix(input_ids, metadata.positions)
        state = _sum_visible(caches[0], metadata, backend)
        return torch.stack([state, metadata.positions, torch.zeros_like(state)], dim=1)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits_of(hidden[:, 0])


class FakeNextN:
    """The draft layer: it extends the target's state by the next token, and errs where its cache's hash is low."""

    def __init__(self, error_percent: int, max_context: int) -> None:
        self.error_percent = error_percent
        self.max_context = max_context
        self.num_rows = 0

    def forward(
        self,
        next_ids: torch.Tensor,
        hidden: torch.Tensor,
        metadata: SimpleNamespace,
        cache: FakeCache,
        backend: FakeBackend,
        *,
        shared_topk: torch.Tensor | None = None,
    ) -> SimpleNamespace:
        assert metadata.positions.max() < self.max_context - 1
        assert torch.equal(metadata.positions, hidden[:, 1]), "a hidden state is paired with another position's row"
        self.num_rows += len(next_ids)
        cache.values[metadata.slots] = mix(hidden[:, 0], next_ids)
        if shared_topk is None:
            trace = _sum_visible(cache, metadata, backend)
            topk_slots = metadata.slots.unsqueeze(1).int()
        else:
            assert metadata.batch.mode is ForwardMode.DECODE
            trace = cache.values[shared_topk[:, 0].long()] + metadata.positions
            topk_slots = shared_topk
        following = metadata.positions + 1
        state = hidden[:, 0] + mix(next_ids, following)
        return SimpleNamespace(hidden=torch.stack([state, following, trace], dim=1), topk_slots=topk_slots)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = logits_of(hidden[:, 0])
        errs = mix(hidden[:, 2], hidden[:, 1]).remainder(100) < self.error_percent
        return torch.where(errs.unsqueeze(1), logits.roll(1, dims=1), logits)


class FakeTokenizer:
    """Token 2 is ``a``, token 3 is ``b`` and so on, round the alphabet."""

    bos_id = 0
    eos_ids = (EOS,)

    def encode(self, text: str) -> list[int]:
        return [2 + (ord(letter) - ord("a")) % 28 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + (token - 2) % 26) for token in ids)


def build_core(
    model: FakeModel | None = None,
    *,
    next_n: int = 4,
    max_batch: int = 8,
    num_pages: int = 64,
    prefill_chunk: int = 16,
    page_size: int = 4,
) -> EngineCore:
    """An engine core around a fake model; ``num_pages`` are usable ones."""
    model = FakeModel() if model is None else model
    return EngineCore(
        model,
        FakeBackend(page_size),
        decode=FakeTokenizer().decode,
        eos_ids=(EOS,),
        vocab_size=VOCAB,
        next_n=next_n,
        max_batch=max_batch,
        max_context=model.config.max_position_embeddings,
        cache_tokens=num_pages * page_size,
        prefill_chunk=prefill_chunk,
        page_size=page_size,
        shares_draft_topk=model.config.index_share_for_mtp_iteration,
    )


def build_llm(model: FakeModel | None = None, **options: int) -> LLM:
    """An LLM around a fake model with pages of 4 tokens."""
    model = FakeModel() if model is None else model
    return LLM.from_parts(model, FakeBackend(), FakeTokenizer(), config=EngineConfig(**options))  # type: ignore[arg-type]
