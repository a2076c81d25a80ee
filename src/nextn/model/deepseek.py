"""DeepseekV32ForCausalLM: the DeepSeek-V3.2 and GLM-5 model over a paged cache.

Hides which layers share a selection and that the NextN layer reads the target's embedding and head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nextn.backend import DSABackend, LayerCache
from nextn.errors import InputError
from nextn.model.config import ModelConfig
from nextn.model.decoder import DecoderLayer, check_rows
from nextn.model.mtp import NextNLayer
from nextn.model.parameters import TensorTarget, linear_target, vector_target, with_prefix
from nextn.model.rowwise import RowLinear, empty_parameter, map_rows
from nextn.ops._numerics import rms_norm
from nextn.plan import DSAMetadata


class DeepseekV32ForCausalLM(nn.Module):
    """The target model and, if the checkpoint has one, its NextN layer.

    Weights are not initialised; :func:`nextn.model.weights.load_model` fills them.

    Args:
        config: the model.
        device: where the weights lie.
        dtype: dtype of the large weights and of the residual stream; norms, router and indexer head weights stay in
            float32.

    Attributes:
        mtp: the NextN layer, or None.
        indexer_layers: whether each cache layer has an indexer of its own, the NextN layer last.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embedding = empty_parameter(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config, is_sparse_mlp=mlp == "sparse", has_indexer=indexer == "full", device=device, dtype=dtype
            )
            for mlp, indexer in zip(config.mlp_layer_types, config.indexer_types)
        )
        self.norm = empty_parameter(config.hidden_size, device=device, dtype=torch.float32)
        self.head = RowLinear(config.hidden_size, config.vocab_size, device=device, dtype=dtype)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding
        self.mtp = (
            NextNLayer(config, self.embedding, self.head, device=device, dtype=dtype)
            if config.num_nextn_predict_layers
            else None
        )

    @property
    def indexer_layers(self) -> tuple[bool, ...]:
        return self.config.indexer_layers

    def forward(
        self,
        input_ids: torch.Tensor,
        metadata: DSAMetadata,
        caches: Sequence[LayerCache],
        backend: DSABackend,
    ) -> torch.Tensor:
        """Run all layers on one batch's rows and write their keys.

        Args:
            input_ids: int64 ``[R]``, each row's token.
            metadata: the plan of this batch.
            caches: one per layer; an entry for the NextN layer may follow and is not touched.
            backend: runs the kernels.

        Returns:
            Hidden states after the final norm, ``[R, hidden_size]``.

        Raises:
            InputError: ids or caches do not fit the batch or the model.
        """
        check_rows(input_ids, metadata, "input_ids")
        if len(caches) < len(self.layers):
            raise InputError(f"{len(caches)} caches for {len(self.layers)} layers; allocate one per layer")
        rope_rows = backend.rope_table.index_select(0, metadata.positions)
        hidden = self.embedding.index_select(0, input_ids)
        topk_slots: torch.Tensor | None = None
        for layer, cache in zip(self.layers, caches):
            assert isinstance(layer, DecoderLayer)
            shared = None if layer.attention.has_indexer else topk_slots
            hidden, topk_slots = layer(hidden, rope_rows, metadata, cache, backend, shared)
        return map_rows(lambda block: (rms_norm(block, self.norm, self.config.rms_norm_eps),), hidden)[0]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits, float32 ``[R, vocab_size]``, of hidden states ``[R, hidden_size]``."""
        return map_rows(lambda block: (self.head(block).float(),), hidden)[0]

    def targets(self) -> Iterator[TensorTarget]:
        """Every tensor a checkpoint of this model must or may hold."""
        embedding = self.embedding.data
        yield TensorTarget(name="model.embed_tokens.weight", destination=embedding)
        yield vector_target("model.norm.weight", self.norm)
        yield linear_target("lm_head", self.head, is_copy=self.config.tie_word_embeddings)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from with_prefix(f"model.layers.{number}", layer.targets())
        if self.mtp is not None:
            prefix = f"model.layers.{self.config.num_hidden_layers}"
            yield from with_prefix(prefix, self.mtp.targets())
