"""Runner: one forward of the target or of the draft layer, over the paged caches.

Hides the caches, and the planning of each forward: exactly one ``init_forward_metadata`` per forward, with the context
bound as tight as the host knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nextn.batch import ForwardBatch, ForwardMode
from nextn.engine.pages import PagePool


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The rows of one request in a forward: positions ``start`` to ``start + num_rows - 1``."""

    owner: int
    start: int
    num_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetOutput:
    """What the target said.

    Attributes:
        hidden: ``[R, hidden]`` after the final norm.
        positions: int64 ``[R]``, each row's position.
    """

    hidden: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftOutput:
    """What the draft layer said.

    Attributes:
        hidden: ``[R, hidden]`` after its own final norm; recycled as the next draft step's input.
        topk_slots: int32 ``[R, topk]``, the cache slots each row attended to.
    """

    hidden: torch.Tensor
    topk_slots: torch.Tensor


class Runner:
    """Runs forwards of one model on its own caches.

    Args:
        model: ``forward(input_ids, metadata, caches, backend)``, ``compute_logits(hidden)``, ``indexer_layers`` and
            ``mtp`` (the draft layer, or None), as DeepseekV32ForCausalLM has them.
        backend: plans forwards, and allocates the caches.
        pool: the pages the caches are made of.
        shares_draft_topk: whether later draft steps reuse the selection of the last accepted row
            (GLM-5.2's ``index_share_for_mtp_iteration``).
    """

    def __init__(self, model: Any, backend: Any, pool: PagePool, *, shares_draft_topk: bool = False) -> None:
        self.pool = pool
        self.shares_draft_topk = shares_draft_topk
        self._model = model
        self._backend = backend
        caches = backend.allocate_caches(pool.num_pages, model.indexer_layers)
        has_draft_layer = model.mtp is not None
        self._target_caches = caches[:-1] if has_draft_layer else caches
        self._draft_cache = caches[-1] if has_draft_layer else None

    @property
    def device(self) -> torch.device:
        return torch.device(self._backend.device)

    @property
    def caches(self) -> tuple[Any, ...]:
        """Every layer's cache, the draft layer's last."""
        return (*self._target_caches, *([] if self._draft_cache is None else [self._draft_cache]))

    def build_batch(self, mode: ForwardMode, spans: Sequence[Span]) -> ForwardBatch:
        """The batch of ``spans``; their pages must be reserved."""
        ends = [span.start + span.num_rows for span in spans]
        table = self.pool.build_table([span.owner for span in spans], num_tokens=max(ends))
        return ForwardBatch.build(
            mode,
            row_counts=[span.num_rows for span in spans],
            context_lens=ends,
            page_table=table,
            page_size=self.pool.page_size,
        )

    def run_target(self, batch: ForwardBatch, input_ids: torch.Tensor) -> TargetOutput:
        """Run the target over int64 ``[R]`` tokens, writing their keys."""
        metadata = self._backend.init_forward_metadata(batch)
        hidden = self._model.forward(input_ids, metadata, self._target_caches, self._backend)
        return TargetOutput(hidden=hidden, positions=metadata.positions)

    def run_draft(
        self,
        batch: ForwardBatch,
        next_ids: torch.Tensor,
        hidden: torch.Tensor,
        *,
        shared_topk: torch.Tensor | None = None,
    ) -> DraftOutput:
        """Run the draft layer over pairs of a hidden state ``[R, hidden]`` and the token after it, int64 ``[R]``."""
        metadata = self._backend.init_forward_metadata(batch)
        output = self._model.mtp.forward(
            next_ids, hidden, metadata, self._draft_cache, self._backend, shared_topk=shared_topk
        )
        return DraftOutput(hidden=output.hidden, topk_slots=output.topk_slots)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 ``[R, vocab]``: the target's logits of the token after each row."""
        return self._model.compute_logits(hidden)

    def compute_draft_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 ``[R, vocab]``: the draft layer's logits of the token after the one each row was paired with."""
        return self._model.mtp.compute_logits(hidden)
