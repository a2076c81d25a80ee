"""Index logits in plain PyTorch: the definition, and the path of every machine without a better kernel.

Hides how rows and keys are cut into blocks; no result depends on it.

For row ``r`` of request ``b`` and a position ``s`` below ``visible_lens[r]``, with
``page = page_table[b, s // page_size]`` and ``offset = s % page_size`` (DeepSeek-V3.2-Exp technical report, section
2.1; DeepGEMM's ``fp8_paged_mqa_logits``)::

    out[r, s] = scale[page, offset] * sum_h weights[r, h] * max(sum_d q[r, h, d] * key[page, offset, d], 0)

Defined cases. A visible length below 0 counts as 0, one above ``max_context`` as ``max_context``. Columns at or past a
row's visible length, and all columns of a row that no request owns, may hold anything; nothing outside ``out`` is
written. A page id outside the cache is never read, and its columns may hold anything. A NaN in a key or its scale
spoils that key's column alone; what the column then holds may differ between kernels (here NaN).

Over contiguous keys (``contiguous_index_logits``) a row sees the keys ``row_starts[r] <= s < row_ends[r]``, both held
between 0 and N; the sum is the same with ``keys[s]`` and ``key_scales[s]``. There every column that is not such a key's
keeps what it held.

Exactness. An e4m3 value is an integer of at most 18 bits times 2^-9, so a product is a multiple of 2^-18 and a sum of
128 of them stays below 2^25: 43 bits, exact in FP64 in every order of summation. Head terms are multiplied in FP64 and
added as a fixed binary tree by element-wise operations, which round alike wherever an element lies, and the result is
rounded to FP32 once. So a row's bits depend on nothing but the row, its weights and the keys it sees: not on next_n,
the batch, the context width or the number of threads. Over an fp32 cache the products round in FP64, and BLAS may order
them by shape: equal to 1e-15 relative before that last rounding, but not proven equal in bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nextn.cache_format import IndexCacheFormat, index_cache_format
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._pages import decode_e4m3, gather_index_keys, guard_pages, request_of_row
from nextn.ops.index_logits._contiguous import ContiguousKeys
from nextn.ops.index_logits.problem import IndexLogitsProblem

# Products held at once. On two cores, 4 rows of 32 heads over 4096 keys take 7 ms in blocks of 1024 keys and 14 in
# blocks of 128; above a few MB the products leave the cache.
_CPU_BLOCK = 2**19
_GPU_BLOCK = 2**25
_KEY_BLOCK = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Rows that are scored together.

    Attributes:
        start: first row.
        pages: int64 ``[G, P]`` guarded page ids. G is 1 if all rows share them, else one list per row.
        stop: one past the last row.
        num_columns: columns to score.
    """

    start: int
    stop: int
    pages: torch.Tensor
    num_columns: int


def prepare(
    problem: IndexLogitsProblem,
    *,
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor | ContiguousKeys,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
    out: torch.Tensor,
    plan: OpPlan | None = None,
) -> Launch:
    """Describe the call; tensors as in ``index_logits``."""
    if isinstance(index_cache, ContiguousKeys):
        spans = {"q": q, "weights": weights, "keys": index_cache, "row_ends": visible_lens, "out": out}
        return Launch(function=_score_spans, arguments=spans)
    arguments = {
        "q": q,
        "weights": weights,
        "index_cache": index_cache,
        "query_offsets": query_offsets,
        "visible_lens": visible_lens,
        "page_table": page_table,
        "out": out,
    }
    return Launch(function=_run, arguments=arguments)


def _run(
    *,
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    cache_format = index_cache_format(index_cache, q.shape[2])
    find_groups = _groups_by_request if q.device.type == "cpu" else _groups_by_block
    for group in find_groups(q, query_offsets, visible_lens, page_table, index_cache.shape[0], out.shape[1]):
        _score_group(group, q, weights, index_cache, cache_format, out)


def _groups_by_request(
    q: torch.Tensor,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
    num_pages: int,
    max_context: int,
) -> Iterator[_Group]:
    """One group per request, as wide as its longest row: reading lengths costs nothing on a CPU."""
    offsets = query_offsets.tolist()
    for request, (start, stop) in enumerate(itertools.pairwise(offsets)):
        start, stop = max(start, 0), min(stop, q.shape[0])
        num_columns = min(int(visible_lens[start:stop].max()), max_context) if start < stop else 0
        if num_columns > 0:
            pages = guard_pages(page_table[request : request + 1], num_pages)
            yield _Group(start=start, stop=stop, pages=pages, num_columns=num_columns)


def _groups_by_block(
    q: torch.Tensor,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
    num_pages: int,
    max_context: int,
) -> Iterator[_Group]:
    """Blocks of rows, each row with its own list of pages and all columns: nothing on the device is read here."""
    num_rows, heads, dim = q.shape
    requests = request_of_row(query_offsets, num_rows)
    block = max(1, _GPU_BLOCK // (_KEY_BLOCK * max(heads, dim)))
    for start in range(0, num_rows if max_context else 0, block):
        stop = min(start + block, num_rows)
        pages = guard_pages(page_table[requests[start:stop]], num_pages)
        yield _Group(start=start, stop=stop, pages=pages, num_columns=max_context)


def _score_group(
    group: _Group,
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    cache_format: IndexCacheFormat,
    out: torch.Tensor,
) -> None:
    num_lists = group.pages.shape[0]
    rows_per_list = (group.stop - group.start) // num_lists
    _, heads, dim = q.shape
    queries = q[group.start : group.stop].to(torch.float64).view(num_lists, rows_per_list, heads, dim)
    head_weights = weights[group.start : group.stop].to(torch.float64).view(num_lists, rows_per_list, heads, 1)
    pages_per_block = max(1, _KEY_BLOCK // cache_format.page_size)
    rows_per_block = max(1, _CPU_BLOCK // (_KEY_BLOCK * heads))
    for first in range(0, group.num_columns, pages_per_block * cache_format.page_size):
        last = min(first + pages_per_block * cache_format.page_size, group.num_columns)
        page_columns = slice(first // cache_format.page_size, -(-last // cache_format.page_size))
        keys, scales = _read_keys(index_cache, cache_format, group.pages[:, page_columns], last - first)
        for row in range(0, rows_per_list, rows_per_block):
            rows = slice(row, row + rows_per_block)
            logits = _score(queries[:, rows], head_weights[:, rows], keys, scales).flatten(0, 1)
            top = group.start + row
            out[top : top + logits.shape[0], first:last] = logits


def _read_keys(
    index_cache: torch.Tensor, cache_format: IndexCacheFormat, pages: torch.Tensor, num_keys: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Float64 keys ``[G, num_keys, D]`` and scales ``[G, 1, num_keys]``."""
    keys, scales = gather_index_keys(index_cache, cache_format, pages.reshape(-1))
    keys = keys.view(pages.shape[0], -1, cache_format.head_dim)[:, :num_keys].to(torch.float64)
    if scales is not None:
        scales = scales.view(pages.shape[0], 1, -1)[..., :num_keys].to(torch.float64)
    return keys, scales


def _score(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Float64 logits ``[G, M, S]`` of queries ``[G, M, H, D]``, weights ``[G, M, H, 1]``, keys ``[G, S, D]``."""
    num_lists, num_rows, heads, _ = q.shape
    products = torch.bmm(q.flatten(1, 2), keys.transpose(1, 2)).view(num_lists, num_rows, heads, -1)
    terms = products.clamp_(min=0).mul_(weights)
    while heads > 1:
        half = heads // 2
        terms[:, :, :half] += terms[:, :, heads - half : heads]
        heads -= half
    logits = terms[:, :, 0]
    return logits if scales is None else logits * scales


def _score_spans(
    *, q: torch.Tensor, weights: torch.Tensor, keys: ContiguousKeys, row_ends: torch.Tensor, out: torch.Tensor
) -> None:
    """Blocks of rows against all keys; on a CPU against those that a row of the block sees."""
    num_keys = keys.values.shape[0]
    starts, ends = keys.row_starts.clamp(0, num_keys), row_ends.clamp(0, num_keys)
    values = decode_e4m3(keys.values.view(torch.uint8)).to(torch.float64)
    scales = keys.scales.to(torch.float64)
    block = max(1, _CPU_BLOCK // (_KEY_BLOCK * q.shape[1]))
    columns = torch.arange(out.shape[1], device=q.device)
    for top in range(0, q.shape[0] if num_keys else 0, block):
        rows = slice(top, min(top + block, q.shape[0]))
        first, last = 0, num_keys
        if q.device.type == "cpu":
            first, last = int(starts[rows].min()), int(ends[rows].max())
        logits = torch.zeros(rows.stop - top, num_keys, device=q.device)
        queries, head_weights = q[None, rows].to(torch.float64), weights[None, rows, :, None].to(torch.float64)
        for key in range(first, last, _KEY_BLOCK):
            span = slice(key, min(key + _KEY_BLOCK, last))
            logits[:, span] = _score(queries, head_weights, values[None, span], scales[None, None, span])[0].float()
        start, end = starts[rows, None], ends[rows, None]
        key_of_column = columns + start if keys.is_compressed else columns.expand(logits.shape[0], -1)
        is_seen = (key_of_column >= start) & (key_of_column < end)
        placed = logits.gather(1, key_of_column.clamp(max=num_keys - 1)).to(out.dtype)
        out[rows] = torch.where(is_seen, placed, out[rows])


KERNEL = Kernel(
    op="index_logits",
    name="reference",
    rejects=lambda problem: None,
    prepare=prepare,
    rank=lambda problem: 0,
)
