"""Named shapes and hostile inputs of ``write_cache``, shared by tests, the compile gate and benchmarks.

Hides how a scenario becomes tensors: which pages a request owns, and which rows must write nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from nextn.cache_format import LATENT_DIM, LATENT_ROW_DIM, ROPE_DIM, IndexCacheFormat, LatentCacheFormat
from nextn.hardware import DeviceInfo
from nextn.ops.write_cache.problem import WriteCacheProblem
from nextn.testing.batches import build_batch
from nextn.testing.poison import poison_cache

MAX_POSITIONS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteCacheCase:
    """One scenario.

    Attributes:
        name: unique name.
        row_counts: rows per request.
        context_lens: cached tokens per request, its rows included.
        latent: ``fp8``, ``bf16`` or ``fp32``; None to write no latents.
        index: ``fp8`` or ``fp32``; None to write no index keys.
        page_size: tokens per page.
        page_gap: elements between two pages of a cache.
        is_4d: whether caches are passed as 4-D views, as FlashMLA and DeepGEMM take them.
        has_norms: whether norms are applied on the way.
        has_slots: whether slots are given instead of a page table.
        interleaved: as in ``write_cache``.
        hadamard: likewise.
        dtype: dtype of keys and latents.
        spoilt_rows: row to what makes it write nothing: ``position_negative``, ``position_beyond_rope``, with slots
            ``slot_negative`` or ``slot_beyond``, else ``position_beyond_table``, ``page_negative`` or ``page_wild``.
    """

    name: str
    row_counts: tuple[int, ...] = (4, 1, 0, 2)
    context_lens: tuple[int, ...] = (130, 64, 0, 65)
    latent: str | None = "fp8"
    index: str | None = "fp8"
    page_size: int = 64
    page_gap: int = 0
    is_4d: bool = False
    has_norms: bool = True
    has_slots: bool = False
    interleaved: bool = False
    hadamard: bool = True
    dtype: torch.dtype = torch.float32
    spoilt_rows: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def problem(self, device: DeviceInfo) -> WriteCacheProblem:
        """The problem of this case on ``device``."""
        return WriteCacheProblem(
            arch=device.arch,
            num_rows=sum(self.row_counts),
            page_size=self.page_size,
            latent_format=self.latent,
            index_format=self.index,
            index_dim=128 if self.index else 0,
            has_latent_norm=self.latent is not None and self.has_norms,
            has_index_norm=self.index is not None and self.has_norms,
            has_slots=self.has_slots,
            interleaved=self.interleaved,
            hadamard=self.hadamard,
        )

    def inputs(self, device: torch.device | str = "cpu", *, seed: int = 0) -> dict[str, Any]:
        """The arguments of ``write_cache`` but ``interleaved`` and ``hadamard``; caches are poisoned throughout."""
        generator = torch.Generator().manual_seed(seed)
        num_rows = sum(self.row_counts)
        max_context = max(self.context_lens, default=1)
        batch = build_batch(
            self.row_counts, self.context_lens, page_size=self.page_size, max_context=max_context, seed=seed
        )
        angles = torch.rand(MAX_POSITIONS, ROPE_DIM // 2, generator=generator) * 6.3
        arguments: dict[str, Any] = {
            "positions": batch.visible_lens.to(torch.int64) - 1,
            "rope_table": torch.cat([angles.cos(), angles.sin()], dim=1),
            "query_offsets": batch.query_offsets,
            "page_table": batch.page_table,
            "slots": None,
            "kv": None,
            "kv_cache": None,
            "kv_norm_weight": None,
            "kv_norm_eps": 1e-6,
            "index_k": None,
            "index_cache": None,
            "index_norm_weight": None,
            "index_norm_bias": None,
            "index_norm_eps": 1e-6,
        }
        if self.latent is not None:
            arguments["kv"] = _random(generator, num_rows, LATENT_ROW_DIM).to(self.dtype)
            latent_format = LatentCacheFormat(name=self.latent, page_size=self.page_size)
            arguments["kv_cache"] = self._make_cache(latent_format.allocate(batch.num_pages, "cpu"), device)
            if self.has_norms:
                arguments["kv_norm_weight"] = _random(generator, LATENT_DIM) + 1.0
        if self.index is not None:
            arguments["index_k"] = _random(generator, num_rows, 128).to(self.dtype)
            index_format = IndexCacheFormat(name=self.index, page_size=self.page_size)
            arguments["index_cache"] = self._make_cache(index_format.allocate(batch.num_pages, "cpu"), device)
            if self.has_norms:
                arguments["index_norm_weight"] = _random(generator, 128) + 1.0
                arguments["index_norm_bias"] = _random(generator, 128)
        self._spoil(arguments, batch.num_pages)
        return {
            name: value.to(device) if isinstance(value, torch.Tensor) and not name.endswith("_cache") else value
            for name, value in arguments.items()
        }

    def _make_cache(self, cache: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """A poisoned cache like ``cache``, its pages ``page_gap`` elements apart."""
        num_pages, page = cache.shape[0], cache[0].numel()
        memory = poison_cache(torch.empty(num_pages, page + self.page_gap, dtype=cache.dtype, device=device))
        pages = memory[:, :page]
        if not self.is_4d:
            return pages.unflatten(1, cache.shape[1:])
        return pages.unflatten(1, (self.page_size, 1, page // self.page_size))

    def _spoil(self, arguments: dict[str, Any], num_pages: int) -> None:
        """Make the rows of ``spoilt_rows`` ones that write nothing, and derive slots if they are to be given."""
        positions, table = arguments["positions"], arguments["page_table"]
        requests = [b for b, count in enumerate(self.row_counts) for _ in range(count)]
        if self.has_slots:
            columns = positions.clamp(min=0) // self.page_size
            pages = table[torch.tensor(requests, dtype=torch.int64), columns].to(torch.int64)
            arguments["slots"] = pages * self.page_size + positions % self.page_size
            arguments["page_table"] = arguments["query_offsets"] = None
        for row, how in self.spoilt_rows.items():
            column = int(positions[row]) // self.page_size
            if how == "slot_negative":
                arguments["slots"][row] = -1
            elif how == "slot_beyond":
                arguments["slots"][row] = num_pages * self.page_size
            elif how == "position_negative":
                positions[row] = -1
            elif how == "position_beyond_rope":
                positions[row] = MAX_POSITIONS
            elif how == "position_beyond_table":
                positions[row] = table.shape[1] * self.page_size
            elif how == "page_negative":
                table[requests[row], column] = -1
            else:
                assert how == "page_wild", f"unknown way to spoil a row: {how}"
                table[requests[row], column] = 2**30


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


CASES = (
    WriteCacheCase(name="verify"),
    WriteCacheCase(name="bf16_latents", latent="bf16", index=None),
    WriteCacheCase(name="fp32_caches", latent="fp32", index="fp32"),
    WriteCacheCase(name="index_only", latent=None),
    WriteCacheCase(name="latents_only", index=None),
    WriteCacheCase(name="bf16_inputs", dtype=torch.bfloat16),
    WriteCacheCase(name="glm", interleaved=True, hadamard=False),
    WriteCacheCase(name="no_norms", has_norms=False),
    WriteCacheCase(name="slots", has_slots=True),
    WriteCacheCase(name="gaps_4d", page_gap=656, is_4d=True),
    WriteCacheCase(name="gaps", page_gap=132, latent="bf16"),
    WriteCacheCase(name="page_32", page_size=32),
    WriteCacheCase(name="prompt", row_counts=(70,), context_lens=(70,)),
    WriteCacheCase(name="no_rows", row_counts=(0, 0), context_lens=(5, 0)),
    WriteCacheCase(name="padding", row_counts=(1, 2), context_lens=(0, 70)),
    WriteCacheCase(
        name="spoilt_slots", has_slots=True, spoilt_rows={0: "slot_negative", 3: "slot_beyond", 4: "position_negative"}
    ),
    WriteCacheCase(name="spoilt_positions", spoilt_rows={0: "position_negative", 2: "position_beyond_table"}),
    WriteCacheCase(name="spoilt_rope", has_slots=True, spoilt_rows={5: "position_beyond_rope"}),
    WriteCacheCase(name="spoilt_pages", spoilt_rows={0: "page_negative", 4: "page_wild"}),
    WriteCacheCase(
        name="all_spoilt",
        row_counts=(2,),
        context_lens=(9,),
        spoilt_rows={0: "position_negative", 1: "position_beyond_rope"},
    ),
)
