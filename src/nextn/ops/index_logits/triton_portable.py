"""Index logits in portable Triton: a request's keys are read once for all of its rows, at any depth, ragged or not.

Contract and maths: ``reference.py``; the work list: ``_triton_schedule.py``. Layouts: q [R, H, D], out [R, C], a page
``page_size`` rows of D e4m3 values and then ``page_size`` fp32 scales.

Floor, for B requests of n rows and length L: ``B * L * (D + 4 + 4 * n)`` bytes against ``2 * B * n * L * H * D`` FP8
operations. On an H100 (3.0 TB/s, 1500 TFLOP/s) with 64 heads of 128, bytes rule up to n = 4 and the products beyond.
So a program takes an equal share of all tiles, loads a tile of keys once, several loads ahead, and multiplies it with
the q rows of the request, which stay where the matrix units read them.

Tokens are the rows of each product and (row, head) pairs its columns, so a row's heads lie in one thread quad: their
sum is 16 fused multiply-adds a thread for 64 heads and two shuffles, in an order that no depth changes. A row's columns
share nothing with another row's, hence its bits depend neither on next_n nor on the batch.
"""

# Triton's types describe host values; device code is checked by the compile gate.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton import knobs

from nextn.hardware import Arch
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops.index_logits._triton_schedule import WorkSchedule, allocate_schedule, describe_fill
from nextn.ops.index_logits.problem import IndexLogitsProblem

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
def _locate_output(out, lens_ptr, first_row, last_row, max_context, ROWS: tl.constexpr):
    """Where each row's logits begin and how many it gets, [ROWS] each; none for rows past the last."""
    out_ptr, row_stride = out
    row = _locate_rows(first_row, last_row, ROWS)
    visible = tl.minimum(tl.load(lens_ptr + row), max_context)
    return out_ptr + row * row_stride, tl.where(first_row + tl.arange(0, ROWS) <= last_row, visible, 0)


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
    lens_ptr,
    first_row,
    last_row,
    max_context,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """What one product needs of its rows, for all tiles: queries, weights, where logits go, how many each row gets."""
    q = _to_operand(_load_query(query, first_row, last_row, ROWS, HEADS, DIM), DOT_DTYPE)
    out_ptrs, visible = _locate_output(out, lens_ptr, first_row, last_row, max_context, ROWS)
    return q, _load_weights(weights, first_row, last_row, ROWS, HEADS), out_ptrs, visible


@triton.jit
def _store_logits(keys, scales, position, rows, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Score a tile of keys for the rows of one product, and store what each row sees."""
    q, weights, out_ptrs, visible = rows
    logits = _score(keys, scales, q, weights, ROWS, HEADS)
    tl.store(
        out_ptrs[None, :] + position[:, None],
        logits.to(out_ptrs.dtype.element_ty),
        mask=position[:, None] < visible[None, :],
    )


@triton.jit
def _score_tiles(
    query,
    weights,
    cache,
    table,
    out,
    lens_ptr,
    first_row,
    last_row,
    first_tile,
    stop_tile,
    max_context,
    ROWS: tl.constexpr,
    ROWS_PER_DOT: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Score tiles of one request for the rows of one group, ROWS_PER_DOT of them in a product, the rest in a last."""
    keys_ptr, scales_ptr, page_stride, scale_page_stride, num_pages = cache
    table_ptr, max_pages = table
    REST: tl.constexpr = ROWS % ROWS_PER_DOT
    rows, rest = (), ()
    for i in tl.static_range(ROWS // ROWS_PER_DOT):
        row = first_row + i * ROWS_PER_DOT
        rows += (
            _load_rows(query, weights, out, lens_ptr, row, last_row, max_context, ROWS_PER_DOT, HEADS, DIM, DOT_DTYPE),
        )
    if REST > 0:
        row = first_row + (ROWS - REST)
        rest = _load_rows(query, weights, out, lens_ptr, row, last_row, max_context, REST, HEADS, DIM, DOT_DTYPE)
    offs_s = tl.arange(0, TILE)
    token = offs_s % PAGE
    for tile in tl.range(first_tile, stop_tile, num_stages=NUM_STAGES):
        page = _load_page_ids(table_ptr, tile, num_pages, max_pages, TILE, PAGE).to(tl.int64)
        key_offsets = page * page_stride + token * DIM  # [TILE]
        keys = tl.load(keys_ptr + key_offsets[:, None] + tl.arange(0, DIM)[None, :])  # [TILE, DIM]
        scales = tl.load(scales_ptr + (page * scale_page_stride + token))  # [TILE]
        keys = _to_operand(keys, DOT_DTYPE)
        position = tile * TILE + offs_s
        for i in tl.static_range(ROWS // ROWS_PER_DOT):
            _store_logits(keys, scales, position, rows[i], ROWS_PER_DOT, HEADS)
        if REST > 0:
            _store_logits(keys, scales, position, rest, REST, HEADS)


@triton.jit(do_not_specialize=["num_rows", "num_requests", "num_pages", "max_pages", "max_context", "max_groups"])
def _index_logits_kernel(
    programs_ptr,
    groups_ptr,
    q_ptr,
    weights_ptr,
    keys_ptr,
    scales_ptr,
    lens_ptr,
    table_ptr,
    out_ptr,
    q_row_stride,
    q_head_stride,
    weights_row_stride,
    weights_head_stride,
    page_stride,
    scale_page_stride,
    table_row_stride,
    out_row_stride,
    num_rows,
    num_requests,
    num_pages,
    max_pages,
    max_context,
    max_groups,
    ROW_LIMITS: tl.constexpr,
    ROWS_PER_DOT: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
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
        offs_r = tl.arange(0, ROW_BLOCK)
        length = tl.max(tl.load(lens_ptr + first_row + offs_r, mask=first_row + offs_r <= last_row, other=0), 0)
        stop_tile = tl.cdiv(tl.minimum(length, max_context), TILE)
        stop_tile = tl.where(group == last_group, tl.minimum(last_tile, stop_tile), stop_tile)
        if first_tile < stop_tile:
            for v in tl.static_range(len(ROW_LIMITS) - 1):
                if (last_row - first_row >= ROW_LIMITS[v]) & (last_row - first_row < ROW_LIMITS[v + 1]):
                    _score_tiles(
                        (q_ptr, q_row_stride, q_head_stride),
                        (weights_ptr, weights_row_stride, weights_head_stride),
                        (keys_ptr, scales_ptr, page_stride, scale_page_stride, num_pages),
                        (table_ptr + request.to(tl.int64) * table_row_stride, max_pages),
                        (out_ptr, out_row_stride),
                        lens_ptr,
                        first_row,
                        last_row,
                        first_tile,
                        stop_tile,
                        max_context,
                        ROW_LIMITS[v + 1],
                        ROWS_PER_DOT,
                        HEADS,
                        DIM,
                        PAGE,
                        TILE,
                        NUM_STAGES,
                        DOT_DTYPE,
                    )
        first_tile = 0
        row, rows, request = next_row, next_rows, next_request


def rejects(problem: IndexLogitsProblem) -> str | None:
    """Why this kernel cannot take ``problem``; None if it can."""
    if problem.cache != "fp8":
        return f"index cache {problem.cache} is not fp8"
    if problem.heads not in _HEADS:
        return f"{problem.heads} index heads are not one of 8, 16, 32, 64"
    if problem.dim not in _HEAD_DIMS:
        return f"head_dim {problem.dim} is not one of 32, 64, 128"
    if problem.page_size not in _PAGE_SIZES:
        return f"page_size {problem.page_size} is not one of 32, 64"
    return None


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
    config: Config | None = None,
) -> WorkSchedule:
    """Cut the work of one forward into equal shares: two launches, which a CUDA graph can capture.

    Args:
        problem: sizes.
        query_offsets: int32 ``[B + 1]``.
        visible_lens: int32 ``[R]``.
        page_table: int32 ``[B, P]``; only its place in the call's signature matters here.
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
        )
        for launch in launches:
            launch()
    return schedule


def prepare(
    problem: IndexLogitsProblem,
    *,
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
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
    if schedule is None:
        schedule = build_schedule(
            problem, query_offsets=query_offsets, visible_lens=visible_lens, page_table=page_table, config=config
        )
    is_native = problem.arch in _NATIVE_FP8 and not _IS_INTERPRETED
    stored_dtype = torch.float8_e4m3fn if is_native else torch.uint8
    pages = index_cache.view(index_cache.shape[0], -1)
    scales = pages[:, problem.page_size * problem.dim :].view(torch.float32)
    q = q.view(stored_dtype)
    rows_per_dot = max(config.columns // problem.heads, 1)
    arguments = {
        "programs_ptr": schedule.programs,
        "groups_ptr": schedule.groups,
        "q_ptr": q,
        "weights_ptr": weights,
        "keys_ptr": pages.view(stored_dtype),
        "scales_ptr": scales,
        "lens_ptr": visible_lens.contiguous(),
        "table_ptr": page_table,
        "out_ptr": out,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "weights_row_stride": weights.stride(0),
        "weights_head_stride": weights.stride(1),
        "page_stride": pages.stride(0),
        "scale_page_stride": scales.stride(0),
        "table_row_stride": page_table.stride(0),
        "out_row_stride": out.stride(0),
        "num_rows": problem.num_rows,
        "num_requests": problem.num_requests,
        "num_pages": pages.shape[0],
        "max_pages": problem.max_pages,
        "max_context": problem.max_context,
        "max_groups": schedule.groups.shape[0],
        "ROW_LIMITS": _row_limits(problem, rows_per_dot),
        "ROWS_PER_DOT": rows_per_dot,
        "ROW_BLOCK": triton.next_power_of_2(schedule.rows_per_group),
        "HEADS": problem.heads,
        "DIM": problem.dim,
        "PAGE": problem.page_size,
        "TILE": config.tile,
        "NUM_STAGES": 2 * config.key_tiles - 1,
        "DOT_DTYPE": _dot_dtype(problem.arch),
    }
    return Launch(
        function=_index_logits_kernel,
        arguments=arguments,
        grid=(schedule.num_programs,),
        options={"num_warps": config.num_warps, "enable_fp_fusion": True, **_register_limit(config)},
    )


def form(problem: IndexLogitsProblem) -> str:
    """How ``problem`` would run, for ``explain``."""
    is_uniform = problem.next_n is not None
    form = f"native [{problem.num_requests}, {problem.next_n}]" if is_uniform else f"ragged, {problem.num_rows} rows"
    rows = _rows_per_group(problem)
    return form if problem.max_rows <= rows else f"{form}, keys read once per {rows} rows"


def _rows_per_group(problem: IndexLogitsProblem) -> int:
    """Rows that share one reading of the keys: all of a request's, or equal parts of as many as shared memory holds."""
    room = _SHARED_BYTES[problem.arch] - _SCRATCH_BYTES - 2 * _tile_bytes(problem)
    most = min(_MAX_ROWS, room // max(_query_bytes(problem), 1))
    rows = max(problem.next_n or problem.max_rows, 1)
    return triton.cdiv(rows, triton.cdiv(rows, most))


def _value_bytes(problem: IndexLogitsProblem) -> int:
    return 1 if problem.arch in _NATIVE_FP8 else 2


def _query_bytes(problem: IndexLogitsProblem) -> int:
    """Shared memory of one row's queries; AMD's matrix units read them from registers."""
    return 0 if problem.arch.is_rocm else problem.heads * problem.dim * _value_bytes(problem)


def _tile_bytes(problem: IndexLogitsProblem) -> int:
    return _TILE * (problem.dim * _value_bytes(problem) + 4)


def _num_programs(problem: IndexLogitsProblem, config: Config) -> int:
    """Programs to cut the work for: no more than can run at once, or than there can be tiles."""
    most_tiles = _max_groups(problem) * triton.cdiv(problem.max_context, config.tile)
    return min(problem.num_sms * config.programs_per_sm, most_tiles)


def _max_groups(problem: IndexLogitsProblem) -> int:
    rows = _rows_per_group(problem)
    if problem.max_rows <= rows:
        return min(problem.num_requests, problem.num_rows)
    return min(problem.num_rows, problem.num_requests + problem.num_rows // rows)


def _row_limits(problem: IndexLogitsProblem, rows_per_dot: int) -> tuple[int, ...]:
    """Numbers of rows the kernel is specialised to, from 0: a group runs in the smallest that holds it."""
    most = _rows_per_group(problem)
    counts = (most,) if problem.next_n is not None else (2, 4, 6, 8)
    least = triton.cdiv(16, problem.heads)
    return (0, *sorted({_round_up_rows(max(min(rows, most), least), rows_per_dot) for rows in counts}))


def _round_up_rows(num_rows: int, rows_per_dot: int) -> int:
    """As many rows, or a few more, so that the last product has a power of two of them."""
    full, rest = divmod(num_rows, rows_per_dot)
    return full * rows_per_dot + (triton.next_power_of_2(rest) if rest else 0)


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
    rank=lambda problem: _RANK,
    plan=build_schedule,
    form=form,
)
