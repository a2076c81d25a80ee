"""Named shapes and hostile inputs of ``sparse_mla``, shared by tests, the compile gate and benchmarks.

Hides how a scenario becomes tensors; a case is sizes and the name of what its slot lists are like.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from nextn.cache_format import LATENT_ROW_DIM, LatentCacheFormat
from nextn.hardware import DeviceInfo
from nextn.ops.sparse_mla.problem import SparseMlaProblem
from nextn.testing.batches import build_batch, fill_latent_cache

HOSTILITIES = ("holes", "wild_slots", "empty_rows", "duplicates", "strided_pages")


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseMlaInputs:
    """Tensors of one case on one device.

    Attributes:
        q: ``[R, Hq, 576]`` in the case's dtype.
        kv_cache: the cache, NaN in every slot that no row names.
        indices: int32 ``[R, k]``.
        query_offsets: int32 ``[B + 1]``.
        scale: the softmax scale.
        exact_kv: float32 ``[num_pages * page_size, 576]``, rows by slot before they were quantised; NaN where unused.
    """

    q: torch.Tensor
    kv_cache: torch.Tensor
    indices: torch.Tensor
    query_offsets: torch.Tensor
    scale: float
    exact_kv: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseMlaCase:
    """One scenario.

    Attributes:
        name: unique name.
        row_counts: rows per request.
        context_len: cached tokens of every request that has rows.
        heads: query heads.
        topk: k.
        page_size: tokens per page.
        cache: ``fp8``, ``bf16`` or ``fp32``.
        dtype: of the queries and the output.
        overlap: share of a row's slots that all rows of its request name.
        hostile: names from ``HOSTILITIES``.
    """

    name: str
    row_counts: tuple[int, ...]
    context_len: int = 300
    heads: int = 16
    topk: int = 128
    page_size: int = 64
    cache: str = "fp8"
    dtype: str = "bfloat16"
    overlap: float = 0.9
    hostile: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name

    def problem(self, device: DeviceInfo, *, deterministic: bool = False) -> SparseMlaProblem:
        """The problem of this case on ``device``."""
        counts = set(self.row_counts)
        return SparseMlaProblem(
            arch=device.arch,
            num_sms=device.num_sms,
            num_rows=sum(self.row_counts),
            num_requests=len(self.row_counts),
            next_n=self.row_counts[0] if len(counts) == 1 and 0 not in counts else None,
            heads=self.heads,
            topk=self.topk,
            page_size=self.page_size,
            cache=self.cache,
            dtype=self.dtype,
            deterministic=deterministic,
        )

    def inputs(self, device: torch.device | str = "cpu", *, seed: int = 0) -> SparseMlaInputs:
        """Random tensors of this case."""
        generator = torch.Generator().manual_seed(seed)
        lens = tuple(self.context_len if count else 0 for count in self.row_counts)
        batch = build_batch(self.row_counts, lens, page_size=self.page_size, max_context=self.context_len, seed=seed)
        positions = [self._select(count, generator) for count in self.row_counts]
        tables = batch.page_table.to(torch.int64)
        indices = [
            torch.where(
                chosen >= 0, table[chosen.clamp(min=0) // self.page_size] * self.page_size + chosen % self.page_size, -1
            )
            for chosen, table in zip(positions, tables)
        ]
        indices = torch.cat([torch.empty(0, self.topk, dtype=torch.int64), *indices]).to(torch.int32)
        for name in sorted(self.hostile - {"strided_pages"}):
            _SPOILERS[name](indices, batch.num_pages * self.page_size, generator)
        used = indices.unique().to(torch.int64)
        used = used[(used >= 0) & (used < batch.num_pages * self.page_size)]
        latents = torch.randn(used.shape[0], LATENT_ROW_DIM, generator=generator)
        cache_format = LatentCacheFormat(name=self.cache, page_size=self.page_size)
        cache = fill_latent_cache(cache_format, batch.num_pages, used, latents).to(device)
        exact_kv = torch.full((batch.num_pages * self.page_size, LATENT_ROW_DIM), float("nan"))
        exact_kv[used] = latents
        q = torch.randn(sum(self.row_counts), self.heads, LATENT_ROW_DIM, generator=generator)
        return SparseMlaInputs(
            q=q.to(device, getattr(torch, self.dtype)),
            kv_cache=_stride_pages(cache) if "strided_pages" in self.hostile else cache,
            indices=indices.to(device),
            query_offsets=torch.tensor([0, *accumulate(self.row_counts)], dtype=torch.int32, device=device),
            scale=LATENT_ROW_DIM**-0.5,
            exact_kv=exact_kv.to(device),
        )

    def _select(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Ascending positions ``[count, k]``, -1 after them, the rows sharing ``overlap`` of them."""
        num_chosen = min(self.topk, self.context_len)
        num_shared = round(num_chosen * self.overlap)
        order = torch.randperm(self.context_len, generator=generator)
        shared, others = order[:num_shared], order[num_shared:]
        chosen = torch.full((count, self.topk), -1, dtype=torch.int64)
        for row in range(count):
            own = others[torch.randperm(others.shape[0], generator=generator)[: num_chosen - num_shared]]
            chosen[row, :num_chosen] = torch.cat([shared, own]).sort().values
        return chosen


def _stride_pages(cache: torch.Tensor) -> torch.Tensor:
    """Pages one row further apart, as FlashMLA's tests have them."""
    wide = torch.full((cache.shape[0], cache.shape[1] + 1, cache.shape[2]), 255, dtype=cache.dtype, device=cache.device)
    wide[:, :-1] = cache
    return wide[:, :-1]


def _make_holes(indices: torch.Tensor, num_slots: int, generator: torch.Generator) -> None:
    """Nearly half the entries are -1, anywhere."""
    indices[torch.rand(indices.shape, generator=generator) < 0.45] = -1


def _make_wild(indices: torch.Tensor, num_slots: int, generator: torch.Generator) -> None:
    """A tenth of the entries lie outside the cache, by one or by far."""
    wild = torch.tensor([num_slots, num_slots + 1, 2**31 - 1, -2, -(2**31), 2**30], dtype=torch.int32)
    where = torch.rand(indices.shape, generator=generator) < 0.1
    indices[where] = wild[torch.randint(0, len(wild), (int(where.sum()),), generator=generator)]


def _make_empty(indices: torch.Tensor, num_slots: int, generator: torch.Generator) -> None:
    """Every other row names nothing."""
    indices[::2] = -1


def _make_duplicates(indices: torch.Tensor, num_slots: int, generator: torch.Generator) -> None:
    """The second half of every row repeats the first."""
    half = indices.shape[1] // 2
    indices[:, half : 2 * half] = indices[:, :half]


_SPOILERS = {
    "holes": _make_holes,
    "wild_slots": _make_wild,
    "empty_rows": _make_empty,
    "duplicates": _make_duplicates,
}

CASES = (
    SparseMlaCase(name="tp8_decode", row_counts=(1, 1, 1)),
    SparseMlaCase(name="tp8_next4", row_counts=(4, 4)),
    SparseMlaCase(name="tp8_next3_low_overlap", row_counts=(3, 3), overlap=0.5),
    SparseMlaCase(name="v32_heads", row_counts=(2, 1), heads=128),
    SparseMlaCase(name="glm_heads", row_counts=(4,), heads=64, topk=256),
    SparseMlaCase(name="v32_topk", row_counts=(2,), context_len=2500, topk=2048),
    SparseMlaCase(name="tiny", row_counts=(4, 1), heads=8, topk=256, dtype="float32"),
    SparseMlaCase(name="ragged_with_zeros", row_counts=(0, 3, 0, 1, 8)),
    SparseMlaCase(name="prefill_chunk", row_counts=(70,), heads=8, dtype="float32"),
    SparseMlaCase(name="context_below_topk", row_counts=(2, 2), context_len=65, topk=128),
    SparseMlaCase(name="odd_sizes", row_counts=(3, 2), heads=5, topk=37, dtype="float32"),
    SparseMlaCase(name="one_slot", row_counts=(2,), heads=1, topk=1, context_len=1, dtype="float32"),
    SparseMlaCase(name="page_32", row_counts=(3, 2), page_size=32),
    SparseMlaCase(name="bf16_cache", row_counts=(4, 2), cache="bf16"),
    SparseMlaCase(name="fp32_cache", row_counts=(4, 2), cache="fp32", dtype="float32"),
    SparseMlaCase(name="float16_rows", row_counts=(2,), cache="bf16", dtype="float16"),
    SparseMlaCase(name="no_requests", row_counts=()),
    SparseMlaCase(name="no_rows", row_counts=(0, 0)),
    SparseMlaCase(name="holes", row_counts=(4, 3), hostile=frozenset({"holes"})),
    SparseMlaCase(name="wild_slots", row_counts=(4, 3), hostile=frozenset({"wild_slots"})),
    SparseMlaCase(name="empty_rows", row_counts=(4, 3), hostile=frozenset({"empty_rows", "holes"})),
    SparseMlaCase(name="duplicates", row_counts=(4,), hostile=frozenset({"duplicates"})),
    SparseMlaCase(name="strided_pages", row_counts=(4, 3), hostile=frozenset({"strided_pages", "holes"})),
    SparseMlaCase(name="strided_bf16_pages", row_counts=(2,), cache="bf16", hostile=frozenset({"strided_pages"})),
    SparseMlaCase(
        name="heads_64_hostile",
        row_counts=(4, 0, 3),
        heads=64,
        hostile=frozenset({"holes", "wild_slots", "empty_rows", "strided_pages"}),
    ),
)
