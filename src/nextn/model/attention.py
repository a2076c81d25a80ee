"""Attention of one layer: absorbed multi-head latent attention over the tokens its lightning indexer selects.

Hides the projections on both sides of the backend: what enters it (absorbed queries, raw latents, index queries and
keys) and how its latent output becomes hidden states again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nextn.backend import DSABackend, LayerCache
from nextn.cache_format import LATENT_DIM, LATENT_ROW_DIM
from nextn.model.config import INDEX_DIM, ModelConfig
from nextn.model.parameters import TensorTarget, linear_target, stacked_targets, vector_target, with_prefix
from nextn.model.rowwise import RowLinear, empty_parameter
from nextn.ops._numerics import rms_norm, rotate
from nextn.plan import DSAMetadata

_INDEX_NORM_EPS = 1e-6  # of the index key's LayerNorm in every release, whatever rms_norm_eps is


class SparseAttention(nn.Module):
    """The projections of one attention layer, and its indexer's unless it reuses an earlier layer's selection.

    Matrices that read the same input are stacked: ``project_hidden`` holds q_a, kv_a and the indexer's wk;
    ``project_query`` holds q_b and the indexer's wq_b. The indexer's head weights stay in float32, since their small
    differences decide near ties of the selection.
    """

    def __init__(
        self, config: ModelConfig, *, has_indexer: bool, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.has_indexer = has_indexer
        heads, latents = config.num_attention_heads, config.q_lora_rank
        self._hidden_splits = [latents, LATENT_ROW_DIM] + [INDEX_DIM] * has_indexer
        self._query_splits = [heads * config.qk_head_dim] + [config.index_n_heads * INDEX_DIM] * has_indexer
        placed = {"device": device, "dtype": dtype}
        exact = {"device": device, "dtype": torch.float32}
        self.project_hidden = RowLinear(config.hidden_size, sum(self._hidden_splits), **placed)
        self.project_query = RowLinear(latents, sum(self._query_splits), **placed)
        self.kv_b = empty_parameter(heads, config.qk_nope_head_dim + config.v_head_dim, LATENT_DIM, **placed)
        self.project_out = RowLinear(heads * config.v_head_dim, config.hidden_size, **placed)
        self.q_norm = empty_parameter(latents, **exact)
        self.kv_norm = empty_parameter(LATENT_DIM, **exact)
        if has_indexer:
            self.index_weights = RowLinear(config.hidden_size, config.index_n_heads, **exact)
            self.index_norm_weight = empty_parameter(INDEX_DIM, **exact)
            self.index_norm_bias = empty_parameter(INDEX_DIM, **exact)

    def enter(self, hidden: torch.Tensor, rope_rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Row-wise half before the cache.

        Args:
            hidden: ``[R, hidden_size]`` after the layer's input norm.
            rope_rows: float32 ``[R, 64]``, the rope table at each row's position.

        Returns:
            Absorbed queries ``[R, heads, 576]`` and raw latents ``[R, 576]``; with an indexer also index keys
            ``[R, 128]``, index queries ``[R, index_heads, 128]`` and head weights float32 ``[R, index_heads]``.
        """
        config, num_rows = self.config, hidden.shape[0]
        query_latent, kv, *index_key = self.project_hidden(hidden).split(self._hidden_splits, dim=1)
        query_latent = rms_norm(query_latent, self.q_norm, config.rms_norm_eps)
        queries, *index_query = self.project_query(query_latent).split(self._query_splits, dim=1)
        queries = queries.view(num_rows, config.num_attention_heads, config.qk_head_dim)
        unrotated, rope_part = queries.split([config.qk_nope_head_dim, queries.shape[2] - config.qk_nope_head_dim], 2)
        key_up = self.kv_b[:, : config.qk_nope_head_dim]  # [heads, nope, latents]
        absorbed = torch.bmm(unrotated.transpose(0, 1), key_up).transpose(0, 1)
        rotated = rotate(rope_part, rope_rows.unsqueeze(1), interleaved=True)
        queries = torch.cat((absorbed, rotated.to(absorbed.dtype)), dim=2)
        if not self.has_indexer:
            return queries, kv
        index_queries = index_query[0].view(num_rows, config.index_n_heads, INDEX_DIM)
        return queries, kv, index_key[0], index_queries, self.index_weights(hidden.float())

    def leave(self, latents: torch.Tensor) -> torch.Tensor:
        """Row-wise half after the cache: attended latents ``[R, heads, 512]`` to hidden states ``[R, hidden_size]``."""
        value_up = self.kv_b[:, self.config.qk_nope_head_dim :].transpose(1, 2)  # [heads, latents, v]
        values = torch.bmm(latents.transpose(0, 1), value_up).transpose(0, 1)
        return self.project_out(values.reshape(latents.shape[0], -1))

    def attend(
        self,
        entered: tuple[torch.Tensor, ...],
        metadata: DSAMetadata,
        cache: LayerCache,
        backend: DSABackend,
        shared_topk: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write this forward's keys, select, and attend.

        The index keys are written also where the selection is certain (contexts within top-k): later rows need them.

        Args:
            entered: what :meth:`enter` returned, for all rows.
            metadata: the forward's plan.
            cache: the layer's caches.
            backend: runs the kernels.
            shared_topk: int32 ``[R, k]`` slots to attend to instead of selecting; then no index key is written either.

        Returns:
            Attended latents ``[R, heads, 512]`` and the slots attended to, int32 ``[R, k]``.
        """
        queries, kv, *index = entered
        written = {"kv": kv, "kv_norm_weight": self.kv_norm, "kv_norm_eps": self.config.rms_norm_eps}
        if shared_topk is None:
            assert index, "a layer without an indexer needs an earlier layer's selection"
            written |= {"index_k": index[0], "index_norm_eps": _INDEX_NORM_EPS}
            written |= {"index_norm_weight": self.index_norm_weight, "index_norm_bias": self.index_norm_bias}
        backend.write_cache(cache, metadata, **written)
        if shared_topk is None:
            shared_topk = backend.get_topk_paged(cache, metadata, q=index[1], weights=index[2])
        return backend.attend(cache, metadata, q=queries, topk_slots=shared_topk), shared_topk

    def targets(self) -> Iterator[TensorTarget]:
        """Every checkpoint tensor of the layer, named as behind ``self_attn.``."""
        hidden_names = ("q_a_proj", "kv_a_proj_with_mqa", "indexer.wk")
        query_names = ("q_b_proj", "indexer.wq_b")
        yield from stacked_targets(self.project_hidden, *zip(hidden_names, self._hidden_splits))
        yield from stacked_targets(self.project_query, *zip(query_names, self._query_splits))
        yield TensorTarget(name="kv_b_proj.weight", destination=self.kv_b.data.view(-1, LATENT_DIM))
        yield linear_target("o_proj", self.project_out)
        yield vector_target("q_a_layernorm.weight", self.q_norm)
        yield vector_target("kv_a_layernorm.weight", self.kv_norm)
        if self.has_indexer:
            yield from with_prefix("indexer", self._indexer_targets())

    def _indexer_targets(self) -> Iterator[TensorTarget]:
        yield linear_target("weights_proj", self.index_weights)
        yield vector_target("k_norm.weight", self.index_norm_weight)
        yield vector_target("k_norm.bias", self.index_norm_bias)
