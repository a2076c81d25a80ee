"""What choosing a kernel for ``index_logits`` depends on: sizes and formats, no tensors.

Hides how sizes are read off the call's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.cache_format import index_cache_format
from nextn.hardware import Arch, DeviceInfo

CONTIGUOUS = "fp8_contiguous"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexLogitsProblem:
    """Sizes of one ``index_logits`` call.

    Attributes:
        arch: architecture to run on.
        num_sms: its streaming multiprocessors.
        num_requests: B, padding requests included.
        num_rows: R, rows of all requests.
        next_n: rows per request if all have as many, else None.
        max_rows: the most rows of one request, or an upper bound on it.
        heads: index heads.
        dim: values per index key.
        page_size: tokens per page.
        max_pages: columns of the page table.
        max_context: columns of the logits; keys there are, if they are contiguous.
        cache: ``fp8`` or ``fp32`` in pages, or ``fp8_contiguous``: keys in one tensor without pages, of which each row
            sees a span. Its ``page_size`` and ``max_pages`` are 0.
        out_dtype: ``float32`` or ``bfloat16``.
        deterministic: whether only kernels whose bits depend on neither next_n nor the batch may run.
    """

    arch: Arch
    num_sms: int
    num_requests: int
    num_rows: int
    next_n: int | None
    max_rows: int
    heads: int
    dim: int
    page_size: int
    max_pages: int
    max_context: int
    cache: str = "fp8"
    out_dtype: str = "float32"
    deterministic: bool = False


def problem_of(
    device: DeviceInfo,
    *,
    q: torch.Tensor,
    index_cache: torch.Tensor,
    page_table: torch.Tensor,
    max_context: int,
    next_n: int | None = None,
    max_rows: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
) -> IndexLogitsProblem:
    """The problem of a call's tensors; they may be meta tensors.

    Args:
        device: what to run on.
        q: ``[R, H, D]``.
        index_cache: the paged keys.
        page_table: ``[B, P]``.
        max_context: columns of the logits.
        next_n: rows per request if the caller knows that all have as many.
        max_rows: the most rows of one request; R if None.
        out_dtype: dtype of the logits.
        deterministic: as in :class:`IndexLogitsProblem`.
    """
    num_rows, heads, dim = q.shape
    cache_format = index_cache_format(index_cache, dim)
    return IndexLogitsProblem(
        arch=device.arch,
        num_sms=device.num_sms,
        num_requests=page_table.shape[0],
        num_rows=num_rows,
        next_n=next_n,
        max_rows=num_rows if max_rows is None else max_rows,
        heads=heads,
        dim=dim,
        page_size=cache_format.page_size,
        max_pages=page_table.shape[1],
        max_context=max_context,
        cache=cache_format.name,
        out_dtype=str(out_dtype).removeprefix("torch."),
        deterministic=deterministic,
    )
