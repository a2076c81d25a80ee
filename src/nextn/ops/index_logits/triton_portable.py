"""Index logits in portable Triton: a request's keys are read once for all of its rows, at any depth, ragged or not.

Contract and maths: ``reference.py``; the work list: ``_triton_schedule.py``. Layouts: q [R, H, D], out [R, C], a page
``page_size`` rows of D e4m3 values and then ``page_size`` fp32 scales; or contiguous keys [N, D] and scales [N].

Floor, for B requests of n rows and length L: ``B * L * (D + 4 + 4 * n)`` bytes against ``2 * B * n * L * H * D`` FP8
operations. On an H100 (3.0 TB/s, 1500 TFLOP/s) with 64 heads of 128, bytes rule up to n = 4 and the products beyond.
So a program takes an equal share of all tiles, loads a tile of keys once, several loads ahead, and multiplies it with
the q rows of the request, which stay where the matrix units read them.

Tokens are the rows of each product and (row, head) pairs its columns, so a row's heads lie in one thread quad: their
sum is 16 fused multiply-adds a thread for 64 heads and two shuffles, in an order that no depth changes. A row's columns
share nothing with another row's, hence its bits depend neither on next_n nor on the batch.
"""

# Triton's types describe host values; device code is checked by the compile gate.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from nextn.hardware import Arch
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops.index_logits._contiguous import ContiguousKeys
from nextn.ops.index_logits._triton_schedule import WorkSchedule, allocate_schedule, describe_fill, find_span
from nextn.ops.index_logits.problem import CONTIGUOUS, IndexLogitsProblem

_HEADS = (8, 16, 32, 64)
_HEAD_DIMS = (32, 64, 128)
_PAGE_SIZES = (32, 64)
_TILE = 64
_MAX_ROWS = 8  # rows a tile of keys is read for; more rows are several groups
_MAX_COLUMNS = 128  # (row, head) pairs of one product
_MAX_KEY_TILES = 5
_RANK = 20
_IS_INTERPRETED = knobs.runtime.interpret
_NATIVE_FP8 = frozenset({Arch.SM89, Arch.SM90, Arch.SM100, Arch.SM103, Arch.SM120, Arch.GFX950})
_SHARED_BYTES = {
    Arch.SM80: 99 * 1024,  # of 8.6; 8.0 has 163
    Arch.SM89: 99 * 1024,
    Arch.SM90: 227 * 1024,
    Arch.SM100: 227 * 1024,
    Arch.SM103: 227 * 1024,
    Arch.SM120: 99 * 1024,
    Arch.GFX942: 64 * 1024,
    Arch.GFX950: 160 * 1024,
}
_SCRATCH_BYTES = 2 * 1024  # of a program, for changes of layout and barriers
_REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """How the kernel is cut. Unmeasured, but for the Hopper stages and programs, which a study on one H100 chose.

    Attributes:
        tile: tokens of one product.
        columns: the most (row, head) pairs of one product.
        key_tiles: tiles of keys in shared memory, all but one of them being loaded.
        num_warps: warps of a program.
        programs_per_sm: programs that share a multiprocessor.
        max_registers: registers of a thread, so that the programs fit; None leaves it to the compiler.
    """

    tile: int = _TILE
    columns: int = _MAX_COLUMNS
    key_tiles: int = _MAX_KEY_TILES
    num_warps: int = 4
    programs_per_sm: int = 2
    max_registers: int | None = None


@triton.jit
def _decode_e4m3(codes):
    """Float16 values of uint8 e4m3 codes, exact but for NaN, which becomes 480 (a NaN key may score anything)."""
    codes = codes.to(tl.uint16)
    shifted = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
    return shifted.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _to_operand(values, DOT_DTYPE: tl.constexpr):
    if values.dtype == tl.uint8:
        values = _decode_e4m3(values)
    return values.to(DOT_DTYPE)


@triton.jit
def _locate_keys(
    cache, table, first_key, tile, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Where a tile's keys and scales begin, [TILE] each, inside the cache whatever tables and lengths say."""
    keys_ptr, scales_ptr, key_stride, scale_stride, num_units = cache
    table_ptr, max_pages = table
    offs_s = tl.arange(0, TILE)
    if PAGE == 0:  # contiguous keys: strides are of a key, and there are num_units of them
        key = tl.minimum(first_key + tile * TILE + offs_s, num_units - 1).to(tl.int64)
        key_offsets, scale_offsets = key * key_stride, key * scale_stride
    else:
        page = _load_page_ids(table_ptr, tile, num_units, max_pages, TILE, PAGE).to(tl.int64)
        token = offs_s % PAGE
        key_offsets, scale_offsets = page * key_stride + token * DIM, page * scale_stride + token
    return keys_ptr + key_offsets, scales_ptr + scale_offsets


@triton.jit
def _load_page_ids(page_table_ptr, tile, num_pages, max_pages, TILE: tl.constexpr, PAGE: tl.constexpr):
    """Page of each token of a tile, or of the tile if it is one page; inside the cache whatever the table says."""
    if PAGE == TILE:
        page = tl.load(page_table_ptr + tl.minimum(tile, max_pages - 1))
    else:
        column = tile * (TILE // PAGE) + tl.arange(0, TILE) // PAGE  # [TILE]
        page = tl.load(page_table_ptr + tl.minimum(column, max_pages - 1))
    return tl.where((page >= 0) & (page < num_pages), page, 0)


@triton.jit
def _locate_rows(first_row, last_row, ROWS: tl.constexpr):
    """Row ids [ROWS], int64; ids past the last row repeat it."""
    return tl.minimum(first_row + tl.arange(0, ROWS), last_row).to(tl.int64)


@triton.jit
def _locate_pairs(first_row, last_row, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Row ids, int64, and heads of the (row, head) pairs of a product, [ROWS * HEADS] each."""
    offs_n = tl.arange(0, ROWS * HEADS)
    return tl.minimum(first_row + offs_n // HEADS, last_row).to(tl.int64), offs_n % HEADS


@triton.jit
def _load_query(query, first_row, last_row, ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Queries [ROWS * HEADS, DIM] as stored."""
    q_ptr, row_stride, head_stride = query
    row, head = _locate_pairs(first_row, last_row, ROWS, HEADS)
    return tl.load(q_ptr + (row * row_stride + head * head_stride)[:, None] + tl.arange(0, DIM)[None, :])


@triton.jit
def _load_weights(weights, first_row, last_row, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Halved head weights [ROWS * HEADS]."""
    weights_ptr, row_stride, head_stride = weights
    row, head = _locate_pairs(first_row, last_row, ROWS, HEADS)
    return tl.load(weights_ptr + row * row_stride + head * head_stride) * 0.5


@triton.jit
def _locate_output(
    out, spans, first_row, last_row, ROWS: tl.constexpr, HAS_STARTS: tl.constexpr, COMPRESSED: tl.constexpr
):  # fmt: skip
    """Where each row's logits of key 0 would be, and the first and last + 1 key it gets, [ROWS] each.

    Rows past the last get none. Compressed logits of a row begin with its first key and end with its last column.
    """
    out_ptr, row_stride, num_columns = out
    lens_ptr, starts_ptr, num_keys = spans
    row = _locate_rows(first_row, last_row, ROWS)
    is_row = first_row + tl.arange(0, ROWS) <= last_row
    start, stop = find_span(lens_ptr, starts_ptr, row, is_row, num_keys, HAS_STARTS)
    out_ptrs = out_ptr + row * row_stride
    if COMPRESSED:
        stop = tl.minimum(stop, start.to(tl.int64) + num_columns).to(tl.int32)
        out_ptrs -= start
    return out_ptrs, start, stop


@triton.jit
def _score(keys, scales, q, weights, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Logits [TILE, ROWS] of keys [TILE, DIM] with scales [TILE] for queries [ROWS * HEADS, DIM]."""
    products = tl.dot(keys, tl.trans(q))  # [TILE, ROWS * HEADS]
    # x + |x| is twice the ReLU, exactly, and the weights are halved: an add with a free absolute value, which the
    # multiply-add units take at twice the rate of a maximum.
    terms = (products + tl.abs(products)) * weights[None, :]
    return tl.sum(tl.reshape(terms, (keys.shape[0], ROWS, HEADS)), axis=2) * scales[:, None]


@triton.jit
def _load_rows(
    query,
    weights,
    out,
    spans,
    first_row,
    last_row,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    COMPRESSED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """What one product needs of its rows, for all tiles: queries, weights, where logits go, which keys are seen."""
    q = _to_operand(_load_query(query, first_row, last_row, ROWS, HEADS, DIM), DOT_DTYPE)
    out_ptrs, start, stop = _locate_output(out, spans, first_row, last_row, ROWS, HAS_STARTS, COMPRESSED)
    return q, _load_weights(weights, first_row, last_row, ROWS, HEADS), out_ptrs, start, stop


@triton.jit
def _store_logits(keys, scales, position, rows, ROWS: tl.constexpr, HEADS: tl.constexpr, HAS_STARTS: tl.constexpr):
    """Score a tile of keys for the rows of one product, and store what each row sees."""
    q, weights, out_ptrs, start, stop = rows
    logits = _score(keys, scales, q, weights, ROWS, HEADS)
    mask = position[:, None] < stop[None, :]
    if HAS_STARTS:
        mask &= position[:, None] >= start[None, :]
    tl.store(out_ptrs[None, :] + position[:, None], logits.to(out_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _score_tiles(
    query,
    weights,
    cache,
    table,
    out,
    spans,
    first_row,
    last_row,
    first_key,
    first_tile,
    stop_tile,
    ROWS: tl.constexpr,
    ROWS_PER_DOT: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    COMPRESSED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Score tiles of one request for the rows of one group, ROWS_PER_DOT of them in a product, the rest in a last."""
    REST: tl.constexpr = ROWS % ROWS_PER_DOT
    HAS_STARTS: tl.constexpr = PAGE == 0
    rows, rest = (), ()
    for i in tl.static_range(ROWS // ROWS_PER_DOT):
        row = first_row + i * ROWS_PER_DOT
        rows += (
            _load_rows(
                query, weights, out, spans, row, last_row, ROWS_PER_DOT, HEADS, DIM, HAS_STARTS, COMPRESSED, DOT_DTYPE
            ),
        )
    if REST > 0:
        row = first_row + (ROWS - REST)
        rest = _load_rows(
            query, weights, out, spans, row, last_row, REST, HEADS, DIM, HAS_STARTS, COMPRESSED, DOT_DTYPE
        )
    for tile in tl.range(first_tile, stop_tile, num_stages=NUM_STAGES):
        key_ptrs, scale_ptrs = _locate_keys(cache, table, first_key, tile, DIM, PAGE, TILE)
        keys = tl.load(key_ptrs[:, None] + tl.arange(0, DIM)[None, :])  # [TILE, DIM]
        scales = tl.load(scale_ptrs)  # [TILE]
        keys = _to_operand(keys, DOT_DTYPE)
        position = tile * TILE + tl.arange(0, TILE)
        if HAS_STARTS:
            position += first_key
        for i in tl.static_range(ROWS // ROWS_PER_DOT):
            _store_logits(keys, scales, position, rows[i], ROWS_PER_DOT, HEADS, HAS_STARTS)
        if REST > 0:
            _store_logits(keys, scales, position, rest, REST, HEADS, HAS_STARTS)


@triton.jit(
    do_not_specialize=["num_rows", "num_requests", "num_units", "max_pages", "num_keys", "num_columns", "max_groups"]
)
def _index_logits_kernel(
    programs_ptr,
    groups_ptr,
    q_ptr,
    weights_ptr,
    keys_ptr,
    scales_ptr,
    lens_ptr,
    starts_ptr,
    table_ptr,
    out_ptr,
    q_row_stride,
    q_head_stride,
    weights_row_stride,
    weights_head_stride,
    key_stride,
    scale_stride,
    table_row_stride,
    out_row_stride,
    num_rows,
    num_requests,
    num_units,
    max_pages,
    num_keys,
    num_columns,
    max_groups,
    ROW_LIMITS: tl.constexpr,
    ROWS_PER_DOT: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    COMPRESSED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    record_ptr = programs_ptr + tl.program_id(0) * 8
    first_group = tl.load(record_ptr)
    first_tile = tl.load(record_ptr + 1)
    row = tl.load(record_ptr + 2)
    rows = tl.load(record_ptr + 3)
    request = tl.load(record_ptr + 4)
    last_group = tl.load(record_ptr + 8)
    last_tile = tl.load(record_ptr + 9)
    first_tile = tl.maximum(first_tile, 0)
    for group in tl.range(tl.maximum(first_group, 0), tl.minimum(last_group, max_groups - 1) + 1, num_stages=1):
        next_ptr = groups_ptr + tl.minimum(group + 1, max_groups - 1) * 4
        next_row = tl.load(next_ptr)
        next_rows = tl.load(next_ptr + 1)
        next_request = tl.load(next_ptr + 2)
        first_row = tl.minimum(tl.maximum(row, 0), num_rows - 1)
        last_row = tl.minimum(first_row + tl.maximum(rows, 1), num_rows) - 1
        request = tl.minimum(tl.maximum(request, 0), num_requests - 1)
        offs_r = first_row + tl.arange(0, ROW_BLOCK)
        start, stop = find_span(lens_ptr, starts_ptr, offs_r, offs_r <= last_row, num_keys, PAGE == 0)
        first_key, last_key = 0, tl.max(stop, 0)
        if PAGE == 0:
            first_key = tl.minimum(tl.min(tl.where(stop > 0, start, num_keys), 0), last_key)
        stop_tile = tl.cdiv(last_key - first_key, TILE)
        stop_tile = tl.where(group == last_group, tl.minimum(last_tile, stop_tile), stop_tile)
        if first_tile < stop_tile:
            for v in tl.static_range(len(ROW_LIMITS) - 1):
                if (last_row - first_row >= ROW_LIMITS[v]) & (last_row - first_row < ROW_LIMITS[v + 1]):
                    _score_tiles(
                        (q_ptr, q_row_stride, q_head_stride),
                        (weights_ptr, weights_row_stride, weights_head_stride),
                        (keys_ptr, scales_ptr, key_stride, scale_stride, num_units),
                        (table_ptr + request.to(tl.int64) * table_row_stride, max_pages),
                        (out_ptr, out_row_stride, num_columns),
                        (lens_ptr, starts_ptr, num_keys),
                        first_row, last_row, first_key, first_tile, stop_tile,
                        ROW_LIMITS[v + 1], ROWS_PER_DOT, HEADS, DIM, PAGE, TILE, NUM_STAGES, COMPRESSED, DOT_DTYPE,
                    )  # fmt: skip
        first_tile = 0
        row, rows, request = next_row, next_rows, next_request


def rejects(problem: IndexLogitsProblem) -> str | None:
    """Why this kernel cannot take ``problem``; None if it can."""
    if problem.cache not in ("fp8", CONTIGUOUS):
        return f"index cache {problem.cache} is not fp8"
    if problem.heads not in _HEADS:
        return f"{problem.heads} index heads are not one of 8, 16, 32, 64"
    if problem.dim not in _HEAD_DIMS:
        return f"head_dim {problem.dim} is not one of 32, 64, 128"
    if problem.cache == "fp8" and problem.page_size not in _PAGE_SIZES:
        return f"page_size {problem.page_size} is not one of 32, 64"
    return None


@functools.lru_cache(maxsize=256)
def choose_config(problem: IndexLogitsProblem) -> Config:
    """How to cut the kernel for ``problem``: five tiles of keys, fewer where shared memory is small."""
    shared = _SHARED_BYTES[problem.arch]
    rows = _rows_per_group(problem)
    fixed_bytes = _SCRATCH_BYTES + rows * _query_bytes(problem)
    tile_bytes = _tile_bytes(problem)
    most = 2 if problem.arch.is_rocm else _MAX_KEY_TILES
    key_tiles = max(2, min(most, (shared - fixed_bytes) // tile_bytes))
    wanted = 4 if rows <= 2 else 3 if rows <= 4 else 2
    programs = max(1, min(wanted, shared // (fixed_bytes + key_tiles * tile_bytes)))
    limit = min(_REGISTERS // (programs * 128) // 8 * 8, 255) if problem.arch.is_cuda else None
    return Config(key_tiles=key_tiles, programs_per_sm=programs, max_registers=limit)


def build_schedule(
    problem: IndexLogitsProblem,
    *,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
    row_starts: torch.Tensor | None = None,
    config: Config | None = None,
) -> WorkSchedule:
    """Cut the work of one forward into equal shares: one launch, which a CUDA graph can capture.

    Args:
        problem: sizes.
        query_offsets: int32 ``[B + 1]``.
        visible_lens: int32 ``[R]``.
        page_table: int32 ``[B, P]``; only its place in the call's signature matters here.
        row_starts: int32 ``[R]`` of contiguous keys, else None.
        config: as given to :func:`prepare`.
    """
    config = choose_config(problem) if config is None else config
    schedule = allocate_schedule(
        visible_lens.device,
        max_groups=_max_groups(problem),
        rows_per_group=_rows_per_group(problem),
        num_programs=_num_programs(problem, config),
    )
    if schedule.num_programs and visible_lens.device.type != "meta":
        launches = describe_fill(
            schedule,
            query_offsets=query_offsets.contiguous(),
            visible_lens=visible_lens.contiguous(),
            max_context=problem.max_context,
            tile=config.tile,
            row_starts=row_starts,
            has_one_group_each=row_starts is None and problem.max_rows <= schedule.rows_per_group,
        )
        for launch in launches:
            launch()
    return schedule


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
    config: Config | None = None,
) -> Launch:
    """Describe the launch; tensors as in ``index_logits``. Without a plan one is built here, for this call alone.

    Args:
        config: how to cut the kernel, for tuning; chosen from the sizes if None.
    """
    config = choose_config(problem) if config is None else config
    schedule: WorkSchedule | None = plan.data if plan is not None else None
    row_starts = index_cache.row_starts if isinstance(index_cache, ContiguousKeys) else None
    if schedule is None:
        schedule = build_schedule(
            problem,
            query_offsets=query_offsets,
            visible_lens=visible_lens,
            page_table=page_table,
            row_starts=row_starts,
            config=config,
        )
    is_native = problem.arch in _NATIVE_FP8 and not _IS_INTERPRETED
    stored_dtype = torch.float8_e4m3fn if is_native else torch.uint8
    q, lens = q.view(stored_dtype), visible_lens.contiguous()
    rows_per_dot = max(config.columns // problem.heads, 1)
    arguments = {
        "programs_ptr": schedule.programs,
        "groups_ptr": schedule.groups,
        "q_ptr": q,
        "weights_ptr": weights,
        "lens_ptr": lens,
        "starts_ptr": lens if row_starts is None else row_starts,
        "table_ptr": page_table,
        "out_ptr": out,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "weights_row_stride": weights.stride(0),
        "weights_head_stride": weights.stride(1),
        "table_row_stride": page_table.stride(0),
        "out_row_stride": out.stride(0),
        "num_rows": problem.num_rows,
        "num_requests": problem.num_requests,
        "max_pages": problem.max_pages,
        "num_keys": problem.max_context,
        "num_columns": out.shape[1],
        "max_groups": schedule.groups.shape[0],
        "ROW_LIMITS": _row_limits(problem, rows_per_dot),
        "ROWS_PER_DOT": rows_per_dot,
        "ROW_BLOCK": 1 << (schedule.rows_per_group - 1).bit_length(),
        "HEADS": problem.heads,
        "DIM": problem.dim,
        "TILE": config.tile,
        # Where a key lies is known a page id earlier over contiguous keys, so its load takes half the stages.
        "NUM_STAGES": 2 * config.key_tiles - 1 if row_starts is None else config.key_tiles,
        "DOT_DTYPE": _dot_dtype(problem.arch),
        **_describe_keys(problem, index_cache, stored_dtype),
    }
    return Launch(
        function=_index_logits_kernel,
        arguments=arguments,
        grid=(schedule.num_programs,),
        options={"num_warps": config.num_warps, "enable_fp_fusion": True, **_register_limit(config)},
    )


def _describe_keys(
    problem: IndexLogitsProblem, index_cache: torch.Tensor | ContiguousKeys, stored_dtype: torch.dtype
) -> dict[str, Any]:
    """The kernel's arguments that say where keys lie: in pages, or one after the other."""
    if isinstance(index_cache, ContiguousKeys):
        keys, scales, page = index_cache.values, index_cache.scales, 0
    else:
        keys = index_cache.view(index_cache.shape[0], -1)
        scales, page = keys[:, problem.page_size * problem.dim :].view(torch.float32), problem.page_size
    return {
        "keys_ptr": keys.view(stored_dtype),
        "scales_ptr": scales,
        "key_stride": keys.stride(0),
        "scale_stride": scales.stride(0),
        "num_units": keys.shape[0],
        "PAGE": page,
        "COMPRESSED": isinstance(index_cache, ContiguousKeys) and index_cache.is_compressed,
    }


def form(problem: IndexLogitsProblem) -> str:
    """How ``problem`` would run, for ``explain``."""
    if problem.cache == CONTIGUOUS:
        return f"contiguous keys, {problem.num_rows} rows"
    is_uniform = problem.next_n is not None
    form = f"native [{problem.num_requests}, {problem.next_n}]" if is_uniform else f"ragged, {problem.num_rows} rows"
    rows = _rows_per_group(problem)
    return form if problem.max_rows <= rows else f"{form}, keys read once per {rows} rows"


@functools.lru_cache(maxsize=256)
def _rows_per_group(problem: IndexLogitsProblem) -> int:
    """Rows that share one reading of the keys: all of a request's, or equal parts of as many as shared memory holds."""
    room = _SHARED_BYTES[problem.arch] - _SCRATCH_BYTES - 2 * _tile_bytes(problem)
    most = min(_MAX_ROWS, room // max(_query_bytes(problem), 1))
    rows = max(problem.next_n or problem.max_rows, 1)
    return _cdiv(rows, _cdiv(rows, most))


def _cdiv(size: int, block: int) -> int:
    """Triton's own, called from the host, takes several microseconds."""
    return -(-size // block)


def _value_bytes(problem: IndexLogitsProblem) -> int:
    return 1 if problem.arch in _NATIVE_FP8 else 2


def _query_bytes(problem: IndexLogitsProblem) -> int:
    """Shared memory of one row's queries; AMD's matrix units read them from registers."""
    return 0 if problem.arch.is_rocm else problem.heads * problem.dim * _value_bytes(problem)


def _tile_bytes(problem: IndexLogitsProblem) -> int:
    return _TILE * (problem.dim * _value_bytes(problem) + 4)


def _num_programs(problem: IndexLogitsProblem, config: Config) -> int:
    """Programs to cut the work for: no more than can run at once, or than there can be tiles."""
    most_tiles = _max_groups(problem) * _cdiv(problem.max_context, config.tile)
    return min(problem.num_sms * config.programs_per_sm, most_tiles)


def _max_groups(problem: IndexLogitsProblem) -> int:
    rows = _rows_per_group(problem)
    if problem.cache == CONTIGUOUS:
        return problem.num_rows  # one each where every row's start is far from the next
    if problem.max_rows <= rows:
        return min(problem.num_requests, problem.num_rows)
    return min(problem.num_rows, problem.num_requests + problem.num_rows // rows)


@functools.lru_cache(maxsize=256)
def _row_limits(problem: IndexLogitsProblem, rows_per_dot: int) -> tuple[int, ...]:
    """Numbers of rows the kernel is specialised to, from 0: a group runs in the smallest that holds it."""
    most = _rows_per_group(problem)
    counts = (most,) if problem.next_n is not None else (2, most) if problem.cache == CONTIGUOUS else (2, 4, 6, 8)
    least = _cdiv(16, problem.heads)
    return (0, *sorted({_round_up_rows(max(min(rows, most), least), rows_per_dot) for rows in counts}))


def _round_up_rows(num_rows: int, rows_per_dot: int) -> int:
    """As many rows, or a few more, so that the last product has a power of two of them."""
    full, rest = divmod(num_rows, rows_per_dot)
    return full * rows_per_dot + (1 << (rest - 1).bit_length() if rest else 0)


def _register_limit(config: Config) -> dict[str, int]:
    return {} if config.max_registers is None else {"maxnreg": config.max_registers}


def _dot_dtype(arch: Arch) -> tl.dtype:
    """Products of e4m3 values; exact in float16 too, and the interpreter has only float32."""
    if _IS_INTERPRETED:
        return tl.float32
    return tl.float8e4nv if arch in _NATIVE_FP8 else tl.float16


KERNEL = Kernel(
    op="index_logits",
    name="triton_portable",
    arches=frozenset(_SHARED_BYTES),
    rejects=rejects,
    prepare=prepare,
    configure=choose_config,
    rank=lambda problem: _RANK,
    plan=build_schedule,
    form=form,
)
