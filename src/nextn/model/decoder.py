"""DecoderLayer: one layer of the decoder, the target's and the NextN layer's alike.

Hides the order of a layer's halves and which rows run in blocks. Keys, selection and attention are the backend's;
everything else in a layer depends on its own row only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.backend import DSABackend, LayerCache
from nextn.errors import InputError
from nextn.model.attention import SparseAttention
from nextn.model.config import ModelConfig
from nextn.model.mlp import GatedMLP, MixtureOfExperts
from nextn.model.parameters import TensorTarget, vector_target, with_prefix
from nextn.model.rowwise import empty_parameter, map_rows
from nextn.ops._numerics import rms_norm
from nextn.plan import DSAMetadata


class DecoderLayer(nn.Module):
    """One layer: sparse attention, then a dense MLP or experts, each behind its norm and beside its residual."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        is_sparse_mlp: bool,
        has_indexer: bool,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_norm = empty_parameter(config.hidden_size, device=device, dtype=torch.float32)
        self.mlp_norm = empty_parameter(config.hidden_size, device=device, dtype=torch.float32)
        self.attention = SparseAttention(config, has_indexer=has_indexer, device=device, dtype=dtype)
        self.mlp: GatedMLP | MixtureOfExperts
        if is_sparse_mlp:
            self.mlp = MixtureOfExperts(config, device=device, dtype=dtype)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, device=device, dtype=dtype)

    def forward(
        self,
        hidden: torch.Tensor,
        rope_rows: torch.Tensor,
        metadata: DSAMetadata,
        cache: LayerCache,
        backend: DSABackend,
        shared_topk: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer.

        Args:
            hidden: ``[R, hidden_size]``, the residual stream.
            rope_rows: float32 ``[R, 64]``, the rope table at each row's position.
            metadata: the forward's plan.
            cache: the layer's caches.
            backend: runs the kernels.
            shared_topk: int32 ``[R, k]`` slots to attend to instead of running the indexer, or None.

        Returns:
            The residual stream, and the slots attended to.
        """
        entered = map_rows(self._enter, hidden, rope_rows)
        latents, topk_slots = self.attention.attend(entered, metadata, cache, backend, shared_topk)
        hidden, *routed = map_rows(self._leave, hidden, latents)
        if routed:
            normed, beside, chosen, weights = routed
            hidden = hidden + (self.mlp(normed, chosen, weights) + beside)
        return hidden, topk_slots

    def _enter(self, hidden: torch.Tensor, rope_rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.attention.enter(rms_norm(hidden, self.input_norm, self.eps), rope_rows)

    def _leave(self, hidden: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All that follows attention, except the routed experts, which see other rows together."""
        hidden = hidden + self.attention.leave(latents)
        normed = rms_norm(hidden, self.mlp_norm, self.eps)
        if isinstance(self.mlp, GatedMLP):
            return (hidden + self.mlp(normed),)
        return hidden, normed, self.mlp.shared(normed), *self.mlp.route(normed)

    def targets(self) -> Iterator[TensorTarget]:
        """Every checkpoint tensor of the layer, named as behind ``model.layers.N.``."""
        yield vector_target("input_layernorm.weight", self.input_norm)
        yield vector_target("post_attention_layernorm.weight", self.mlp_norm)
        yield from with_prefix("self_attn", self.attention.targets())
        yield from with_prefix("mlp", self.mlp.targets())


def check_rows(tensor: torch.Tensor, metadata: DSAMetadata, name: str) -> None:
    """Raise InputError unless ``tensor`` is int64 with one entry per row of the batch."""
    num_rows = metadata.batch.num_rows
    if tensor.dtype != torch.int64 or tuple(tensor.shape) != (num_rows,):
        raise InputError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; pass int64 [{num_rows}], one per row")
