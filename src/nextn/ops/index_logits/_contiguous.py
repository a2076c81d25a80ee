"""Index logits over contiguous keys, of which every row sees a span: a prompt's keys, gathered before they are scored.

Hides which kernel scores them; the maths stands in ``reference.py``. The kernels are those of the paged cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.hardware import describe_device
from nextn.ops._kernel import choose, require, same_device
from nextn.ops.index_logits.problem import CONTIGUOUS, IndexLogitsProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class ContiguousKeys:
    """What a kernel's ``prepare`` takes as ``index_cache`` when keys are contiguous; ends come as ``visible_lens``.

    Attributes:
        values: e4m3fn ``[N, D]``, rows contiguous inside.
        scales: float32 ``[N]``.
        row_starts: int32 ``[R]``, the first key each row sees.
        is_compressed: whether a row's logits begin in column 0 rather than in the column of its first key.
    """

    values: torch.Tensor
    scales: torch.Tensor
    row_starts: torch.Tensor
    is_compressed: bool


def contiguous_index_logits(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    key_scales: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    max_columns: int | None = None,
) -> torch.Tensor:
    """Score the keys ``row_starts[r] <= s < row_ends[r]`` of every row with the lightning indexer.

    ``out[r, s] = key_scales[s] * sum_h weights[r, h] * max(q[r, h] . keys[s], 0)`` (DeepSeek-V3.2-Exp technical report,
    section 2.1). Other columns are not written. Starts below 0 count as 0 and ends above N as N.

    Args:
        q: e4m3fn ``[R, H, D]``, unit stride in D.
        weights: float32 ``[R, H]``, the query's scale folded in.
        keys: e4m3fn ``[N, D]``, unit stride in D.
        key_scales: float32 ``[N]``.
        row_starts: int32 ``[R]``.
        row_ends: int32 ``[R]``, one past the last key; a row whose end is not above its start sees none.
        out: float32 or bfloat16 ``[R, columns]`` to write into; rows may be further apart. Made if None.
        max_columns: compressed logits of that many columns: key ``s`` goes to column ``s - row_starts[r]``, keys past
            the last column nowhere. If None there are N columns and key ``s`` goes to column ``s``.

    Returns:
        ``out``, or a new float32 ``[R, columns]``.

    Raises:
        InputError: a tensor has the wrong dtype, shape, stride or device.

    Example:
        >>> keys = torch.ones(4, 128).to(torch.float8_e4m3fn)
        >>> start, end = torch.tensor([1], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
        >>> contiguous_index_logits(keys[None, :2], torch.ones(1, 2), keys, torch.ones(4), start, end)[0, 1:3]
        tensor([256., 256.])
    """
    num_columns = keys.shape[0] if max_columns is None else max_columns
    _check(q, weights, keys, key_scales, row_starts, row_ends, num_columns, out)
    if out is None:
        out = torch.empty(q.shape[0], num_columns, device=q.device)
    num_rows, heads, dim = q.shape
    device = describe_device(q.device)
    problem = IndexLogitsProblem(
        arch=device.arch,
        num_sms=device.num_sms,
        num_requests=1,
        num_rows=num_rows,
        next_n=None,
        max_rows=num_rows,
        heads=heads,
        dim=dim,
        page_size=0,
        max_pages=0,
        max_context=keys.shape[0],
        cache=CONTIGUOUS,
        out_dtype=str(out.dtype).removeprefix("torch."),
    )
    kernel = choose("index_logits", problem).kernel
    contiguous = ContiguousKeys(
        values=keys, scales=key_scales, row_starts=row_starts.contiguous(), is_compressed=max_columns is not None
    )
    unused = torch.empty(1, 1, dtype=torch.int32, device=q.device)  # pages and requests: there are none
    kernel.prepare(
        problem,
        q=q,
        weights=weights,
        index_cache=contiguous,
        query_offsets=unused[0],
        visible_lens=row_ends,
        page_table=unused,
        out=out,
    )()
    return out


def _check(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    key_scales: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    num_columns: int,
    out: torch.Tensor | None,
) -> None:
    require(
        q.ndim == 3 and min(q.shape[1:]) > 0 and q.dtype == torch.float8_e4m3fn and q.stride(2) == 1,
        f"q is {q.dtype} {tuple(q.shape)} with strides {q.stride()}; pass float8_e4m3fn [rows, heads, dim], contiguous "
        "in dim",
    )
    num_rows, heads, dim = q.shape
    require(
        weights.dtype == torch.float32 and tuple(weights.shape) == (num_rows, heads),
        f"weights is {weights.dtype} {tuple(weights.shape)}; pass float32 [{num_rows}, {heads}]",
    )
    require(
        keys.dtype == torch.float8_e4m3fn and keys.ndim == 2 and keys.shape[1] == dim and keys.stride(1) == 1,
        f"keys is {keys.dtype} {tuple(keys.shape)} with strides {keys.stride()}; pass float8_e4m3fn [keys, {dim}], "
        "contiguous in dim",
    )
    require(
        key_scales.dtype == torch.float32 and tuple(key_scales.shape) == (keys.shape[0],),
        f"key_scales is {key_scales.dtype} {tuple(key_scales.shape)}; pass float32 [{keys.shape[0]}]",
    )
    for name, bounds in (("row_starts", row_starts), ("row_ends", row_ends)):
        require(
            bounds.dtype == torch.int32 and tuple(bounds.shape) == (num_rows,),
            f"{name} is {bounds.dtype} {tuple(bounds.shape)}; pass int32 [{num_rows}]",
        )
    require(num_columns >= 0, f"max_columns is {num_columns}; pass at least 0")
    if out is not None:
        require(
            out.dtype in (torch.float32, torch.bfloat16)
            and tuple(out.shape) == (num_rows, num_columns)
            and (num_columns < 2 or out.stride(1) == 1)
            and (num_rows < 2 or out.stride(0) >= num_columns),
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; pass float32 or bfloat16 "
            f"[{num_rows}, {num_columns}] with contiguous columns",
        )
    same_device(
        q=q, weights=weights, keys=keys, key_scales=key_scales, row_starts=row_starts, row_ends=row_ends, out=out
    )
