"""DeepGEMM's attention logits by nextn's kernels: the same functions, signatures and contracts, for more shapes.

Hides how padded batches and request ids become ragged rows. The signatures are those of DeepGEMM's main branch of June
2026. Taken here and not there: any next_n and ``indices`` on every architecture, heads 8, 16, 32 and 64, head_dim 32,
64 and 128, pages of 32 and 64 tokens, lengths of 0, any page id, and tensors on a CPU, which the reference scores.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from nextn.cache_format import index_cache_format
from nextn.env import read_environment
from nextn.errors import InputError, UnsupportedError
from nextn.hardware import DeviceInfo, describe_device, list_devices
from nextn.ops._kernel import Choice, OpPlan, choose, require
from nextn.ops.index_logits import IndexLogitsProblem, contiguous_index_logits, index_logits, problem_of

__all__ = [
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
    "set_num_sms",
]

_ROW_ALIGNMENT = 256  # columns, as DeepGEMM's outputs have it
_FORMATS = (torch.float32, torch.bfloat16)


@dataclass(kw_only=True, slots=True)
class _Limits:
    """What :func:`set_num_sms` was last given; 0 for all there are."""

    num_sms: int = 0


_limits = _Limits()


def get_num_sms() -> int:
    """Multiprocessors that work is cut for: those of the first GPU, 1 without one, or what was set."""
    return _limits.num_sms or list_devices()[0].num_sms


def set_num_sms(num_sms: int) -> None:
    """Cut work for so many multiprocessors; 0 for all there are.

    Raises:
        InputError: the number is negative.
    """
    require(num_sms >= 0, f"num_sms is {num_sms}; pass at least 0")
    _limits.num_sms = num_sms


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, block_kv: int, num_sms: int, indices: torch.Tensor | None = None
) -> torch.Tensor:
    """A schedule of DeepGEMM's shape, which holds nothing: every call here cuts its own work, by the lengths it gets.

    So a schedule made for other lengths does no harm.

    Args:
        context_lens: int32 ``[B, next_n]``.
        block_kv: tokens per page.
        num_sms: multiprocessors.
        indices: int32 ``[B]`` request of each row, with next_n 1.

    Returns:
        int32 ``[num_sms + 1, 2]`` of zeros.

    Raises:
        InputError: the lengths have another shape or dtype, or a number is not positive.
    """
    _check_lens(context_lens, None)
    require(block_kv > 0, f"block_kv is {block_kv}; pass the tokens of a page")
    require(num_sms > 0, f"num_sms is {num_sms}; pass at least 1")
    if indices is not None:
        _check_indices(indices, *context_lens.shape)
    return torch.zeros(num_sms + 1, 2, dtype=torch.int32, device=context_lens.device)


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Index logits over the paged cache.

    Row ``b * next_n + j`` holds, for every ``s < context_lens[b, j]``,
    ``scale[s] * sum_h weights[row, h] * max(q[b, j, h] . key[s], 0)`` with key ``s`` of request ``b``. Whether all
    lengths of a request are its longest or each row has its own, these columns are the same. Columns past a row's own
    length may hold anything; DeepGEMM writes some of them, so consumers of either must mask them.

    Args:
        q: e4m3fn ``[B, next_n, H, D]``.
        kv_cache: uint8 ``[num_pages, page_size, 1, D + 4]``: a page's values, then its scales.
        weights: float32 ``[B * next_n, H]``.
        context_lens: int32 ``[B, next_n]``; below 0 counts as 0, above ``max_context_len`` as that.
        block_table: int32 ``[B, P]``, unit column stride. Columns of pages that do not exist may hold anything.
        schedule_meta: from :func:`get_paged_mqa_logits_metadata`, or None; not read.
        max_context_len: columns of the result.
        clean_logits: must be False.
        indices: int32 ``[B]`` request of each row, with next_n 1: rows with equal neighbours are one request, and their
            rows of ``block_table`` are equal.

    Returns:
        float32 ``[B * next_n, max_context_len]``, rows ``align(max_context_len, 256)`` apart.

    Raises:
        InputError: a tensor has the wrong dtype, shape, stride or device, or ``clean_logits`` is set.
        UnsupportedError: no kernel takes these sizes, or the queries are FP4.

    Example:
        >>> q, cache = torch.ones(1, 2, 32, 128).to(torch.float8_e4m3fn), torch.zeros(3, 64, 1, 132, dtype=torch.uint8)
        >>> lens, table = torch.tensor([[99, 100]], dtype=torch.int32), torch.tensor([[2, 1]], dtype=torch.int32)
        >>> logits = fp8_paged_mqa_logits(q, cache, torch.ones(2, 32), lens, table, None, 128)
        >>> logits.shape, logits.stride()
        (torch.Size([2, 128]), (256, 1))
    """
    return _score_paged(q, kv_cache, weights, context_lens, block_table, max_context_len, clean_logits, indices)


def fp8_fp4_paged_mqa_logits(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`fp8_paged_mqa_logits` with queries as ``(values, None)`` and logits in float32 or bfloat16.

    Raises:
        InputError: as there, or ``logits_dtype`` is neither.
        UnsupportedError: as there; queries with scales are FP4, which no kernel takes yet.
    """
    values = _require_fp8(q)
    _check_dtype(logits_dtype)
    return _score_paged(
        values, kv_cache, weights, context_lens, block_table, max_context_len, clean_logits, indices, logits_dtype
    )


def fp8_mqa_logits(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> torch.Tensor:
    """Index logits over contiguous keys, of which row ``m`` sees ``start[m] <= s < end[m]``.

    Args:
        q: e4m3fn ``[M, H, D]``.
        kv: e4m3fn keys ``[N, D]`` and their float32 scales ``[N]``.
        weights: float32 ``[M, H]``.
        cu_seq_len_k_start: int32 ``[M]``.
        cu_seq_len_k_end: int32 ``[M]``.
        clean_logits: whether other columns are minus infinity; they hold anything if not.
        max_seqlen_k: above 0, columns of compressed logits: key ``s`` of row ``m`` in column ``s - start[m]``. Then
            ``clean_logits`` must be False.

    Returns:
        float32 ``[M, N]``, rows ``align(N + 256, 256)`` apart, or ``[M, max_seqlen_k]``, rows
        ``align(max_seqlen_k, 256)`` apart.

    Raises:
        InputError: a tensor has the wrong dtype, shape, stride or device, or the options contradict each other.
        UnsupportedError: no kernel takes these sizes.

    Example:
        >>> keys, ends = torch.ones(3, 128).to(torch.float8_e4m3fn), torch.tensor([2], dtype=torch.int32)
        >>> fp8_mqa_logits(keys[None, :2], (keys, torch.ones(3)), torch.ones(1, 2), ends - 1, ends)
        tensor([[-inf, 256., -inf]])
    """
    return _score_contiguous(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k)


def fp8_fp4_mqa_logits(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """:func:`fp8_mqa_logits` with queries as ``(values, None)`` and logits in float32 or bfloat16.

    Raises:
        InputError: as there, or ``logits_dtype`` is neither.
        UnsupportedError: as there; queries with scales are FP4, which no kernel takes yet.
    """
    values = _require_fp8(q)
    _check_dtype(logits_dtype)
    return _score_contiguous(
        values, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k, logits_dtype
    )


def _score_paged(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    clean_logits: bool,
    indices: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    _check_paged(q, kv_cache, context_lens, block_table, max_context_len, clean_logits)
    num_requests, next_n, heads, dim = q.shape
    num_rows = num_requests * next_n
    rows, lens = q.reshape(num_rows, heads, dim), context_lens.reshape(-1)
    if indices is None:
        offsets = torch.arange(0, num_rows + 1, max(next_n, 1), dtype=torch.int32, device=q.device)
    else:
        _check_indices(indices, num_requests, next_n)
        offsets = _find_offsets(indices)
    out = _allocate(num_rows, max_context_len, _align(max_context_len), dtype, q.device)
    # Pages past the table hold no token that a length may name.
    width = min(max_context_len, block_table.shape[1] * kv_cache.shape[1])
    is_uniform = indices is None and next_n > 0
    problem = problem_of(
        _describe(q.device),
        q=rows,
        index_cache=kv_cache,
        page_table=block_table,
        max_context=width,
        next_n=next_n if is_uniform else None,
        max_rows=next_n if is_uniform else None,
        out_dtype=dtype,
    )
    choice = _choose(problem)
    data = None
    if choice.kernel.plan is not None:
        data = choice.kernel.plan(problem, query_offsets=offsets, visible_lens=lens, page_table=block_table)
    plan = OpPlan(choice=choice, problem=problem, data=data)
    index_logits(rows, weights, kv_cache, offsets, lens, block_table, max_context=width, out=out[:, :width], plan=plan)
    return out


def _score_contiguous(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    clean_logits: bool,
    max_seqlen_k: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    require(
        isinstance(kv, (tuple, list)) and len(kv) == 2,
        f"kv is a {type(kv).__name__}; pass the pair of keys [N, D] and scales [N]",
    )
    require(max_seqlen_k >= 0, f"max_seqlen_k is {max_seqlen_k}; pass 0 for one column per key, or the columns")
    require(
        not (max_seqlen_k and clean_logits),
        f"clean_logits is set with max_seqlen_k {max_seqlen_k}; compressed logits cannot be cleaned: pass False and "
        "mask each row past its length",
    )
    keys, scales = kv
    num_columns = max_seqlen_k or keys.shape[0]
    row_stride = _align(max_seqlen_k) if max_seqlen_k else _align(num_columns + _ROW_ALIGNMENT)
    out = _allocate(q.shape[0], num_columns, row_stride, dtype, q.device)
    if clean_logits:
        out.fill_(float("-inf"))
    return contiguous_index_logits(q, weights, keys, scales, starts, ends, out=out, max_columns=max_seqlen_k or None)


def _find_offsets(indices: torch.Tensor) -> torch.Tensor:
    """Offsets by which row b, if it begins a run of equal ids, is a request that owns the run, and else owns no row."""
    num_rows = indices.shape[0]
    rows = torch.arange(num_rows + 1, dtype=torch.int32, device=indices.device)
    begins = torch.ones(num_rows + 1, dtype=torch.bool, device=indices.device)
    begins[1:num_rows] = indices[1:] != indices[:-1]
    return torch.where(begins, rows, num_rows).flip(0).cummin(0).values.flip(0).to(torch.int32)


def _describe(device: torch.device) -> DeviceInfo:
    found = describe_device(device)
    return replace(found, num_sms=_limits.num_sms) if _limits.num_sms else found


@functools.lru_cache(maxsize=1024)
def _choose(problem: IndexLogitsProblem) -> Choice:
    """Any kernel but DeepGEMM itself, in whose place this module may stand."""
    environment = read_environment()
    disabled = environment.disabled_kernels | {"deep_gemm"}
    return choose("index_logits", problem, environment=replace(environment, disabled_kernels=disabled))


def _allocate(rows: int, columns: int, row_stride: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(rows, row_stride, dtype=dtype, device=device)[:, :columns]


def _align(columns: int) -> int:
    return -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


def _require_fp8(q: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    values, scales = q if isinstance(q, (tuple, list)) else (q, None)
    if scales is not None or values.dtype in (torch.int8, torch.uint8):
        given = "with scales" if scales is not None else f"in {values.dtype}"
        raise UnsupportedError(
            f"queries {given} are FP4, which no kernel takes; quantise them to float8_e4m3fn, fold their scales into "
            "the weights, and pass (values, None)"
        )
    return values


def _check_dtype(logits_dtype: torch.dtype) -> None:
    require(logits_dtype in _FORMATS, f"logits_dtype is {logits_dtype}; pass torch.float32 or torch.bfloat16")


def _check_paged(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    clean_logits: bool,
) -> None:
    require(
        q.ndim == 4 and q.dtype == torch.float8_e4m3fn,
        f"q is {q.dtype} {tuple(q.shape)}; pass float8_e4m3fn [requests, next_n, heads, dim]",
    )
    num_requests, next_n, _, dim = q.shape
    require(
        kv_cache.dtype == torch.uint8 and kv_cache.ndim == 4 and tuple(kv_cache.shape[2:]) == (1, dim + 4),
        f"kv_cache is {kv_cache.dtype} {tuple(kv_cache.shape)}; pass uint8 [pages, page_size, 1, {dim + 4}]",
    )
    index_cache_format(kv_cache, dim)
    _check_lens(context_lens, (num_requests, next_n))
    require(
        block_table.ndim == 2 and block_table.shape[0] == num_requests,
        f"block_table has shape {tuple(block_table.shape)}; pass [{num_requests}, pages], a row per request",
    )
    require(max_context_len >= 0, f"max_context_len is {max_context_len}; pass at least 0")
    if clean_logits:
        raise InputError("clean_logits is set; paged logits are not cleaned: pass False and mask by each row's length")


def _check_lens(context_lens: torch.Tensor, shape: tuple[int, int] | None) -> None:
    require(
        context_lens.dtype == torch.int32 and context_lens.ndim == 2 and shape in (None, tuple(context_lens.shape)),
        f"context_lens is {context_lens.dtype} {tuple(context_lens.shape)}; pass int32 "
        f"{'[requests, next_n]' if shape is None else list(shape)}: a length for every row",
    )


def _check_indices(indices: torch.Tensor, num_rows: int, next_n: int) -> None:
    require(
        next_n == 1 and indices.dtype == torch.int32 and tuple(indices.shape) == (num_rows,),
        f"indices is {indices.dtype} {tuple(indices.shape)} with next_n {next_n}; pass int32 [{num_rows}], and one row "
        "per request of q",
    )
