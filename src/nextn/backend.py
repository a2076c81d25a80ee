"""DSABackend: DeepSeek Sparse Attention as a model's layers call it.

Hides which kernels run and in which bytes keys are cached. A forward is planned once by ``init_forward_metadata``;
after that each layer writes its keys, selects its tokens and attends to them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nextn import ops
from nextn.batch import ForwardBatch
from nextn.cache_format import ROPE_DIM
from nextn.env import read_environment
from nextn.errors import InputError
from nextn.hardware import Arch, DeviceInfo, describe_device
from nextn.ops._kernel import OpPlan, choose
from nextn.plan import DSAMetadata, DSASpec, RowChunk, plan_forward


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """The cached keys of one layer; both tensors share page and slot numbers.

    Attributes:
        kv: latent cache, ``[num_pages, page_size, row]`` (uint8, or float32 for fp32).
        index: index-key cache, uint8 ``[num_pages, page_bytes]`` (or float32 ``[num_pages, page_size, dim]``); None for
            a layer that has no indexer of its own.
    """

    kv: torch.Tensor
    index: torch.Tensor | None


class DSABackend:
    """The attention backend of one model on one device.

    Args:
        spec: sizes of the model's attention.
        rope_table: float32 ``[max_positions, 64]``, 32 cosines then 32 sines per position.
        device: where caches and batches lie.
        hardware: what kernels are chosen for; the device itself if None.
        deterministic: choose only kernels whose rows do not depend on the batch around them; on a CPU always so.
        dtype: of the activations that layers pass, which kernels are planned for; if None float32 on a CPU and bfloat16
            on a GPU. A layer's call with others, or without norm weights, plans for itself, which takes longer.

    Raises:
        InputError: the rope table has another shape or dtype.

    Example:
        >>> from nextn.batch import ForwardMode
        >>> from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
        >>> spec = DSASpec(num_heads=2, index_heads=32, index_topk=8, softmax_scale=0.1,
        ...                index_format=IndexCacheFormat(name="fp8"), latent_format=LatentCacheFormat(name="fp8"))
        >>> backend = DSABackend(spec, torch.ones(128, 64))
        >>> (cache,) = backend.allocate_caches(4, [True])
        >>> batch = ForwardBatch.build(ForwardMode.TARGET_VERIFY, row_counts=[4], context_lens=[70],
        ...                            page_table=torch.tensor([[1, 2]], dtype=torch.int32))
        >>> metadata = backend.init_forward_metadata(batch)
        >>> metadata.positions.tolist(), metadata.slots.tolist()
        ([66, 67, 68, 69], [130, 131, 132, 133])
    """

    def __init__(
        self,
        spec: DSASpec,
        rope_table: torch.Tensor,
        *,
        device: torch.device | str = "cpu",
        hardware: DeviceInfo | None = None,
        deterministic: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if rope_table.ndim != 2 or rope_table.shape[1] != ROPE_DIM or rope_table.dtype != torch.float32:
            raise InputError(
                f"rope_table is {rope_table.dtype} {tuple(rope_table.shape)}; pass float32 [positions, {ROPE_DIM}]"
            )
        self.spec = spec
        self.device = torch.device(device)
        self.rope_table = rope_table.to(self.device)
        self.hardware = describe_device(self.device) if hardware is None else hardware
        self.deterministic = deterministic or self.hardware.arch is Arch.CPU
        self._dtype = None if dtype is None else _name(dtype)
        self._choose = functools.lru_cache(maxsize=1024)(choose)

    def allocate_caches(self, num_pages: int, layers: Sequence[bool]) -> tuple[LayerCache, ...]:
        """Zeroed caches, one per layer.

        Args:
            num_pages: pages in each layer's pool.
            layers: per layer whether it has an indexer of its own, and so an index cache.

        Raises:
            InputError: ``num_pages`` is not positive.
        """
        if num_pages < 1:
            raise InputError(f"num_pages {num_pages} is below 1; a cache needs at least one page")
        return tuple(
            LayerCache(
                kv=self.spec.latent_format.allocate(num_pages, self.device),
                index=self.spec.index_format.allocate(num_pages, self.device) if has_indexer else None,
            )
            for has_indexer in layers
        )

    def init_forward_metadata(self, batch: ForwardBatch) -> DSAMetadata:
        """Plan one forward; every layer is then given the result.

        Raises:
            InputError: the batch's context is longer than its page table or the rope table.
        """
        if batch.max_context > self.rope_table.shape[0]:
            raise InputError(
                f"max_context {batch.max_context} is above the {self.rope_table.shape[0]} positions of the rope table; "
                "pass the batch a lower max_context, or the backend a longer table"
            )
        return plan_forward(
            batch,
            self.spec,
            self.hardware,
            deterministic=self.deterministic,
            dtype=self._dtype,
            choose_kernel=self._choose,
        )

    def write_cache(
        self,
        cache: LayerCache,
        metadata: DSAMetadata,
        *,
        kv: torch.Tensor,
        kv_norm_weight: torch.Tensor | None,
        kv_norm_eps: float = 1e-6,
        index_k: torch.Tensor | None = None,
        index_norm_weight: torch.Tensor | None = None,
        index_norm_bias: torch.Tensor | None = None,
        index_norm_eps: float = 1e-6,
    ) -> None:
        """Normalise, rotate, quantise and store this forward's keys at ``metadata.slots``.

        Args:
            cache: the layer's caches, changed in place.
            metadata: the forward's plan.
            kv: ``[R, 576]``, 512 latents before their norm and 64 rope values before rotation.
            kv_norm_weight: ``[512]`` RMSNorm weight, or None if the latents are normalised already.
            kv_norm_eps: its epsilon.
            index_k: ``[R, index_dim]`` index keys before their norm; None for a layer without an indexer of its own.
            index_norm_weight: ``[index_dim]`` LayerNorm weight, or None if the keys are normalised already.
            index_norm_bias: ``[index_dim]`` LayerNorm bias.
            index_norm_eps: its epsilon.

        Raises:
            InputError: index keys for a layer without an index cache.
        """
        ops.write_cache(
            positions=metadata.positions,
            rope_table=self.rope_table,
            slots=metadata.slots,
            kv=kv,
            kv_cache=cache.kv,
            kv_norm_weight=kv_norm_weight,
            kv_norm_eps=kv_norm_eps,
            index_k=index_k,
            index_cache=None if index_k is None else _require_index(cache),
            index_norm_weight=index_norm_weight,
            index_norm_bias=index_norm_bias,
            index_norm_eps=index_norm_eps,
            interleaved=self.spec.index_rope_interleaved,
            hadamard=self.spec.hadamard,
            plan=self._fit(
                metadata.write_latents if index_k is None else metadata.write_cache,
                has_latent_norm=kv_norm_weight is not None,
                has_index_norm=index_norm_weight is not None,
            ),
        )

    def get_topk_paged(
        self, cache: LayerCache, metadata: DSAMetadata, *, q: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Select each row's tokens: rotate and quantise the index query, score the cache, take the best.

        Args:
            cache: the layer's caches, this forward's keys already written.
            metadata: the forward's plan.
            q: ``[R, index_heads, index_dim]`` index queries before rotation.
            weights: ``[R, index_heads]`` float32 head weights, unscaled.

        Returns:
            int32 ``[R, index_topk]`` cache slots in ascending order of position, -1 after them.

        Raises:
            InputError: the layer has no index cache.
        """
        index_cache = _require_index(cache)
        query, folded = ops.prepare_query(
            q,
            weights,
            metadata.positions,
            self.rope_table,
            interleaved=self.spec.index_rope_interleaved,
            hadamard=self.spec.hadamard,
            quantise=self.spec.index_format.is_quantised,
            plan=self._fit(metadata.prepare_query, dtype=_name(q.dtype)),
        )
        if len(metadata.chunks) == 1:
            return self._select(metadata, metadata.chunks[0], query, folded, index_cache)
        out = torch.empty(q.shape[0], self.spec.index_topk, dtype=torch.int32, device=q.device)
        for chunk in metadata.chunks:
            rows = chunk.rows
            self._select(metadata, chunk, query[rows], folded[rows], index_cache, out=out[rows])
        return out

    def _select(
        self,
        metadata: DSAMetadata,
        chunk: RowChunk,
        query: torch.Tensor,
        folded: torch.Tensor,
        index_cache: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Score and select for the rows of one chunk; its logits live no longer than this call."""
        batch = metadata.batch
        logits = ops.index_logits(
            query,
            folded,
            index_cache,
            chunk.query_offsets,
            chunk.visible_lens,
            batch.page_table,
            max_context=batch.max_context,
            plan=chunk.index_logits,
        )
        return ops.select_topk(
            logits,
            chunk.visible_lens,
            self.spec.index_topk,
            query_offsets=chunk.query_offsets,
            page_table=batch.page_table,
            page_size=self.spec.page_size,
            out=out,
            plan=chunk.select_topk,
        )

    def attend(
        self, cache: LayerCache, metadata: DSAMetadata, *, q: torch.Tensor, topk_slots: torch.Tensor
    ) -> torch.Tensor:
        """Attend from each row to its selected slots.

        Args:
            cache: the layer's caches.
            metadata: the forward's plan.
            q: ``[R, num_heads, 576]`` absorbed queries, rope part rotated.
            topk_slots: int32 ``[R, k]`` from :meth:`get_topk_paged`, this layer's or a sharing layer's.

        Returns:
            ``[R, num_heads, 512]`` in q's dtype; 0 for a row that selects nothing.
        """
        out, _ = ops.sparse_mla(
            q,
            cache.kv,
            topk_slots,
            scale=self.spec.softmax_scale,
            query_offsets=metadata.batch.query_offsets,
            plan=self._fit(metadata.sparse_mla, dtype=_name(q.dtype), topk=topk_slots.shape[1]),
        )
        return out

    def _fit(self, plan: OpPlan, **facts: object) -> OpPlan:
        """The plan if it was made for a call with these facts, else one made now."""
        if all(getattr(plan.problem, name) == fact for name, fact in facts.items()):
            return plan
        problem = replace(plan.problem, **facts)
        choice = self._choose(plan.choice.kernel.op, problem, environment=read_environment())
        data = None if choice.kernel.plan is None else choice.kernel.plan(problem, device=self.device)
        return OpPlan(choice=choice, problem=problem, data=data)

    def kernels(self, metadata: DSAMetadata) -> dict[str, str]:
        """Op name to the kernel that runs it in this forward, in the order of a layer's calls, for display."""
        return {op: str(choice) for op, choice in metadata.kernels.items()}


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_index(cache: LayerCache) -> torch.Tensor:
    if cache.index is None:
        raise InputError("this layer has no index cache; allocate its caches with an indexer of its own")
    return cache.index
