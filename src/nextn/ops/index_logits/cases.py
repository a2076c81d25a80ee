"""Named shapes and hostile inputs of ``index_logits``, shared by tests, the compile gate and benchmarks.

Hides how a scenario becomes tensors; a case is sizes and names of what is wrong with its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.cache_format import IndexCacheFormat
from nextn.hardware import DeviceInfo
from nextn.ops.index_logits.problem import IndexLogitsProblem
from nextn.testing.batches import build_batch, fill_index_cache, quantise_blocks
from nextn.testing.poison import WILD_PAGES

HOSTILITIES = ("wild_pages", "nan_keys", "negative_lens", "long_lens", "strided_caches")


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexLogitsInputs:
    """Tensors of one case on one device.

    Attributes:
        arguments: the keyword arguments of ``prepare``, and of ``index_logits`` with ``max_context``, bar ``out``.
        max_context: columns of the logits.
        defined: bool ``[R, max_context]``: columns whose value the contract defines.
        exact_q: float32 ``[R, H, D]``, the queries before they were quantised.
        exact_weights: float32 ``[R, H]``, the head weights without the queries' scales.
        exact_keys: float32 ``[num_pages * page_size, D]``, keys by slot before they were quantised; NaN where unused.
    """

    arguments: dict[str, torch.Tensor]
    max_context: int
    defined: torch.Tensor
    exact_q: torch.Tensor
    exact_weights: torch.Tensor
    exact_keys: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexLogitsCase:
    """One scenario.

    Attributes:
        name: unique name.
        row_counts: rows per request.
        context_lens: cached tokens per request, its rows included.
        heads: index heads.
        dim: values per key.
        page_size: tokens per page.
        spare_columns: columns of the logits past the longest context.
        cache: ``fp8`` or ``fp32``.
        out_dtype: ``float32`` or ``bfloat16``.
        hostile: names from ``HOSTILITIES``.
    """

    name: str
    row_counts: tuple[int, ...]
    context_lens: tuple[int, ...]
    heads: int = 64
    dim: int = 128
    page_size: int = 64
    spare_columns: int = 0
    cache: str = "fp8"
    out_dtype: str = "float32"
    hostile: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name

    @property
    def max_context(self) -> int:
        return max(self.context_lens, default=0) + self.spare_columns

    def problem(self, device: DeviceInfo, *, deterministic: bool = False) -> IndexLogitsProblem:
        """The problem of this case on ``device``."""
        counts = set(self.row_counts)
        return IndexLogitsProblem(
            arch=device.arch,
            num_sms=device.num_sms,
            num_requests=len(self.row_counts),
            num_rows=sum(self.row_counts),
            next_n=self.row_counts[0] if len(counts) == 1 and 0 not in counts else None,
            max_rows=max(self.row_counts, default=0),
            heads=self.heads,
            dim=self.dim,
            page_size=self.page_size,
            max_pages=max(1, -(-self.max_context // self.page_size)),
            max_context=self.max_context,
            cache=self.cache,
            out_dtype=self.out_dtype,
            deterministic=deterministic,
        )

    def inputs(self, device: torch.device | str = "cpu", *, seed: int = 0) -> IndexLogitsInputs:
        """Random tensors of this case; unused cache bytes are NaN and page-table tails wild."""
        generator = torch.Generator().manual_seed(seed)
        batch = build_batch(
            self.row_counts, self.context_lens, page_size=self.page_size, max_context=self.max_context, seed=seed
        )
        num_rows = sum(self.row_counts)
        keys = torch.randn(batch.used_slots.shape[0], self.dim, generator=generator)
        q = torch.randn(num_rows, self.heads, self.dim, generator=generator)
        weights = (torch.randn(num_rows, self.heads, generator=generator) + 0.5) * (self.heads * self.dim) ** -0.5
        cache_format = IndexCacheFormat(name=self.cache, head_dim=self.dim, page_size=self.page_size)
        cache = fill_index_cache(cache_format, batch.num_pages, batch.used_slots, keys)
        exact_keys = torch.full((batch.num_pages * self.page_size, self.dim), float("nan"))
        exact_keys[batch.used_slots] = keys
        arguments = {
            "q": q,
            "weights": weights,
            "index_cache": cache,
            "query_offsets": batch.query_offsets,
            "visible_lens": batch.visible_lens,
            "page_table": batch.page_table,
        }
        if cache_format.is_quantised:
            codes, scales = quantise_blocks(q, self.dim)
            arguments["q"] = codes.view(torch.float8_e4m3fn)
            arguments["weights"] = weights * scales.squeeze(-1)
        columns = torch.arange(self.max_context)
        defined = columns < batch.visible_lens[:, None]
        for name in sorted(self.hostile):
            _SPOILERS[name](arguments, defined, cache_format)
        return IndexLogitsInputs(
            arguments={key: _to_device(tensor, device) for key, tensor in arguments.items()},
            max_context=self.max_context,
            defined=defined.to(device),
            exact_q=q.to(device),
            exact_weights=weights.to(device),
            exact_keys=exact_keys.to(device),
        )


def _to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy that keeps strides, gaps between rows or pages included."""
    if tensor.is_contiguous():
        return tensor.to(device)
    num_rows, row_stride = tensor.shape[0], tensor.stride(0)
    wide = torch.full((num_rows, row_stride), 2**30 if tensor.dtype == torch.int32 else 255, dtype=tensor.dtype)
    view = wide.to(device)[:, : tensor[0].numel()]
    return view.unflatten(1, tensor.shape[1:]).copy_(tensor)


def _spoil_pages(arguments: dict[str, torch.Tensor], defined: torch.Tensor, cache_format: IndexCacheFormat) -> None:
    """Every third page of the first request, though visible, is a wild id; the first of them misses by one."""
    table, offsets = arguments["page_table"], arguments["query_offsets"]
    columns = torch.arange(1, table.shape[1], 3)
    wild = torch.tensor([arguments["index_cache"].shape[0], *WILD_PAGES], dtype=torch.int64).to(torch.int32)
    table[0, columns] = wild[torch.arange(columns.shape[0]) % len(wild)]
    spoilt = torch.isin(torch.arange(defined.shape[1]) // cache_format.page_size, columns)
    defined[: int(offsets[1])] &= ~spoilt


def _spoil_keys(arguments: dict[str, torch.Tensor], defined: torch.Tensor, cache_format: IndexCacheFormat) -> None:
    """The first request's token 5 has NaN values, its token 6 a NaN scale."""
    page = int(arguments["page_table"][0, 0])
    cache = arguments["index_cache"]
    if cache_format.is_quantised:
        cache[page, 5 * cache_format.head_dim : 5 * cache_format.head_dim + 7] = 0x7F
        cache[page, cache_format.scale_offset + 6 * 4 :][:4] = 0xFF
    else:
        cache[page, 5:7] = float("nan")
    defined[: int(arguments["query_offsets"][1]), 5:7] = False


def _spoil_lens(arguments: dict[str, torch.Tensor], defined: torch.Tensor, cache_format: IndexCacheFormat) -> None:
    """The last row's length is the lowest int32 there is; it sees nothing."""
    arguments["visible_lens"][-1] = -(2**31)
    defined[-1] = False


def _stretch_lens(arguments: dict[str, torch.Tensor], defined: torch.Tensor, cache_format: IndexCacheFormat) -> None:
    """The first row's length is far above max_context; columns past its request's tokens stay undefined."""
    arguments["visible_lens"][0] = 2**31 - 1


def _stride_cache(arguments: dict[str, torch.Tensor], defined: torch.Tensor, cache_format: IndexCacheFormat) -> None:
    """Pages lie further apart than they are long."""
    cache = arguments["index_cache"].flatten(1)
    wide = torch.full((cache.shape[0], cache.shape[1] + 256), 255, dtype=torch.uint8)
    wide[:, : cache.shape[1]] = cache
    arguments["index_cache"] = wide[:, : cache.shape[1]]


_SPOILERS = {
    "wild_pages": _spoil_pages,
    "nan_keys": _spoil_keys,
    "negative_lens": _spoil_lens,
    "long_lens": _stretch_lens,
    "strided_caches": _stride_cache,
}

CASES = (
    IndexLogitsCase(name="v32_decode", row_counts=(1,) * 4, context_lens=(300, 64, 1, 129)),
    IndexLogitsCase(name="v32_next2", row_counts=(2,) * 3, context_lens=(257, 65, 128)),
    IndexLogitsCase(name="v32_next3", row_counts=(3,) * 2, context_lens=(255, 66)),
    IndexLogitsCase(name="v32_next4", row_counts=(4,) * 3, context_lens=(256, 63, 4)),
    IndexLogitsCase(name="v32_next8", row_counts=(8,) * 2, context_lens=(200, 8)),
    IndexLogitsCase(
        name="v32_ragged_with_zeros",
        row_counts=(0, 3, 1, 0, 8, 1),
        context_lens=(90, 130, 0, 0, 70, 64),
        spare_columns=7,
    ),
    IndexLogitsCase(name="glm_next4", row_counts=(4,) * 2, context_lens=(190, 64), heads=32),
    IndexLogitsCase(name="prefill_chunk", row_counts=(20,), context_lens=(150,), heads=32),
    IndexLogitsCase(name="tiny_mixed", row_counts=(1, 4, 2), context_lens=(33, 200, 129), heads=32, spare_columns=300),
    IndexLogitsCase(name="long_context", row_counts=(4,), context_lens=(4100,), heads=32),
    IndexLogitsCase(name="few_heads", row_counts=(3, 2), context_lens=(100, 65), heads=8),
    IndexLogitsCase(name="odd_heads", row_counts=(3, 2), context_lens=(100, 65), heads=7),
    IndexLogitsCase(name="small_dim", row_counts=(2, 2), context_lens=(100, 65), heads=16, dim=64),
    IndexLogitsCase(name="smallest_dim", row_counts=(2, 2), context_lens=(100, 65), heads=16, dim=32),
    IndexLogitsCase(name="page_32", row_counts=(4, 4), context_lens=(31, 97), heads=32, page_size=32),
    IndexLogitsCase(name="bfloat16_out", row_counts=(4, 1), context_lens=(100, 65), heads=32, out_dtype="bfloat16"),
    IndexLogitsCase(name="unquantised", row_counts=(4, 1), context_lens=(100, 65), heads=32, cache="fp32"),
    IndexLogitsCase(name="no_requests", row_counts=(), context_lens=(), heads=32),
    IndexLogitsCase(name="no_rows", row_counts=(0, 0), context_lens=(64, 1), heads=32),
    IndexLogitsCase(name="only_padding", row_counts=(1, 1), context_lens=(0, 0), heads=32),
    IndexLogitsCase(
        name="wild_pages", row_counts=(4, 4), context_lens=(500, 300), heads=32, hostile=frozenset({"wild_pages"})
    ),
    IndexLogitsCase(
        name="nan_keys", row_counts=(4, 4), context_lens=(100, 70), heads=32, hostile=frozenset({"nan_keys"})
    ),
    IndexLogitsCase(
        name="hostile_lens",
        row_counts=(2, 3),
        context_lens=(128, 100),
        heads=32,
        hostile=frozenset({"negative_lens", "long_lens"}),
    ),
    IndexLogitsCase(
        name="strided_cache", row_counts=(2, 3), context_lens=(128, 90), heads=32, hostile=frozenset({"strided_caches"})
    ),
)
