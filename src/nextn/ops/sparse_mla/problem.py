"""What choosing a kernel for ``sparse_mla`` depends on: sizes and formats, no tensors.

Hides how sizes are read off the call's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.cache_format import latent_cache_format
from nextn.hardware import Arch, DeviceInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseMlaProblem:
    """Sizes of one ``sparse_mla`` call.

    Attributes:
        arch: architecture to run on.
        num_sms: its streaming multiprocessors.
        num_rows: R, rows of all requests.
        num_requests: B if the call says which rows share a request, else None.
        next_n: rows per request if all have as many, else None.
        heads: query heads.
        topk: k, slots per row.
        page_size: tokens per page.
        cache: ``fp8``, ``bf16`` or ``fp32``.
        dtype: dtype of the queries and of the output: ``float32``, ``bfloat16`` or ``float16``.
        deterministic: whether only kernels whose bits depend on neither next_n nor the batch may run.
    """

    arch: Arch
    num_sms: int
    num_rows: int
    num_requests: int | None
    next_n: int | None
    heads: int
    topk: int
    page_size: int = 64
    cache: str = "fp8"
    dtype: str = "bfloat16"
    deterministic: bool = False


def problem_of(
    device: DeviceInfo,
    *,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    query_offsets: torch.Tensor | None = None,
    next_n: int | None = None,
    deterministic: bool = False,
) -> SparseMlaProblem:
    """The problem of a call's tensors; they may be meta tensors.

    Args:
        device: what to run on.
        q: ``[R, Hq, 576]``.
        kv_cache: the paged latents.
        indices: ``[R, k]``.
        query_offsets: ``[B + 1]`` if known.
        next_n: rows per request if the caller knows that all have as many.
        deterministic: as in :class:`SparseMlaProblem`.
    """
    cache_format = latent_cache_format(kv_cache)
    return SparseMlaProblem(
        arch=device.arch,
        num_sms=device.num_sms,
        num_rows=q.shape[0],
        num_requests=None if query_offsets is None else query_offsets.shape[0] - 1,
        next_n=next_n,
        heads=q.shape[1],
        topk=indices.shape[1],
        page_size=cache_format.page_size,
        cache=cache_format.name,
        dtype=str(q.dtype).removeprefix("torch."),
        deterministic=deterministic,
    )
