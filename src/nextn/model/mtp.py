"""NextNLayer: the multi-token-prediction layer that drafts.

Hides how a hidden state and the token after it become a prediction of the token after that. The layer has caches of its
own, with the same slot numbers as the target's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from nextn.backend import DSABackend, LayerCache
from nextn.errors import InputError
from nextn.model.config import ModelConfig
from nextn.model.decoder import DecoderLayer, check_rows
from nextn.model.parameters import TensorTarget, linear_target, vector_target
from nextn.model.rowwise import RowLinear, empty_parameter, map_rows
from nextn.ops._numerics import rms_norm
from nextn.plan import DSAMetadata


@dataclass(frozen=True, kw_only=True, slots=True)
class NextNOutput:
    """What one pass of the NextN layer gives.

    Attributes:
        hidden: ``[R, hidden_size]`` after the shared head's norm; both the input of the head and the hidden state the
            next draft step starts from.
        topk_slots: int32 ``[R, k]`` slots attended to, for later draft steps that share the selection.
    """

    hidden: torch.Tensor
    topk_slots: torch.Tensor


class NextNLayer(nn.Module):
    """DeepSeek's NextN layer: ``norm(layer(eh_proj([enorm(embedding), hnorm(hidden)])))``.

    Embedding and head are the target's; checkpoints may repeat them and the copies are compared, not kept.

    Args:
        config: the model.
        embedding: the target's embedding, ``[vocab_size, hidden_size]``.
        head: the target's head.
        device: where the weights lie.
        dtype: dtype of the large weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: nn.Parameter,
        head: RowLinear,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.head = head
        self.embedding_norm = empty_parameter(config.hidden_size, device=device, dtype=torch.float32)
        self.hidden_norm = empty_parameter(config.hidden_size, device=device, dtype=torch.float32)
        self.project_pair = RowLinear(2 * config.hidden_size, config.hidden_size, device=device, dtype=dtype)
        self.layer = DecoderLayer(config, is_sparse_mlp=True, has_indexer=True, device=device, dtype=dtype)
        self.norm = empty_parameter(config.hidden_size, device=device, dtype=torch.float32)

    def forward(
        self,
        next_ids: torch.Tensor,
        hidden: torch.Tensor,
        metadata: DSAMetadata,
        cache: LayerCache,
        backend: DSABackend,
        *,
        shared_topk: torch.Tensor | None = None,
    ) -> NextNOutput:
        """Predict from pairs of a hidden state at position p and the token at p + 1; the row's position is p.

        Args:
            next_ids: int64 ``[R]``, the token after each row's position.
            hidden: ``[R, hidden_size]``, the target's hidden states after its final norm, or those of the previous
                draft step.
            metadata: the plan of this batch.
            cache: this layer's caches.
            backend: runs the kernels.
            shared_topk: int32 ``[R, k]`` slots to attend to instead of running the indexer (GLM's
                ``index_share_for_mtp_iteration``); the index keys of these rows are then not written, which is sound as
                long as draft-extend rewrites them before anything scans them.

        Raises:
            InputError: ids or hidden states do not fit the batch.
        """
        check_rows(next_ids, metadata, "next_ids")
        if tuple(hidden.shape) != (len(next_ids), self.config.hidden_size):
            raise InputError(
                f"hidden is {tuple(hidden.shape)}; pass [{len(next_ids)}, {self.config.hidden_size}], one row per id"
            )
        rope_rows = backend.rope_table.index_select(0, metadata.positions)
        embedded = self.embedding.index_select(0, next_ids)
        (paired,) = map_rows(self._pair, embedded, hidden)
        output, topk_slots = self.layer(paired, rope_rows, metadata, cache, backend, shared_topk)
        (normed,) = map_rows(lambda block: (rms_norm(block, self.norm, self.config.rms_norm_eps),), output)
        return NextNOutput(hidden=normed, topk_slots=topk_slots)

    def _pair(self, embedded: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        eps = self.config.rms_norm_eps
        halves = (rms_norm(embedded, self.embedding_norm, eps), rms_norm(hidden, self.hidden_norm, eps))
        return (self.project_pair(torch.cat(halves, dim=1)),)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Draft logits, float32 ``[R, vocab_size]``, of ``NextNOutput.hidden``."""
        return map_rows(lambda block: (self.head(block).float(),), hidden)[0]

    def targets(self) -> Iterator[TensorTarget]:
        """Every checkpoint tensor of the layer, named as behind ``model.layers.N.``."""
        yield TensorTarget(name="embed_tokens.weight", destination=self.embedding.data, is_copy=True)
        yield linear_target("shared_head.head", self.head, is_copy=True)
        yield vector_target("shared_head.norm.weight", self.norm)
        yield vector_target("enorm.weight", self.embedding_norm)
        yield vector_target("hnorm.weight", self.hidden_norm)
        yield linear_target("eh_proj", self.project_pair)
        yield from self.layer.targets()
