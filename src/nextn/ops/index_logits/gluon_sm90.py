"""Index logits on Hopper, in Gluon: one warp copies, three or four warpgroups multiply and sum over heads.

Contract and maths: ``reference.py``; the work list: ``_triton_schedule.py``; sums over heads: ``_gluon_sums.py``.

Floor, for B requests of n rows and length L: ``B * L * (132 + 4 * n)`` bytes against ``2 * B * n * L * H * 128`` FP8
operations; on an H100 (3.0 TB/s, 1500 TFLOP/s) with 64 heads bytes rule up to n = 4 and the products beyond.

One persistent program per multiprocessor walks an equal share of all tiles of 64 keys, a tile being a page. Its share
is cut into segments, the tiles of one group of rows. Of each segment the copying warp writes a note (rows, tiles,
visible lengths), then copies queries and weights, then tiles into a ring; queries and notes have two slots, so the next
segment's wait in shared memory when a warpgroup gets there, and what it takes to find them hides behind the tiles.
A warpgroup keeps one or two rows (of 64 heads) for a segment, their weights in registers. Row groups, of different
rows, all multiply every tile; warpgroups of one row group take tiles in turn. A tile is released when every row group
has multiplied it.

Every product covers all 128 values in one accumulation and sums have one order, so no depth or batch changes a bit.
"""

# Triton's types describe host values; device code is checked by the compile gate.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nextn.hardware import Arch
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops.index_logits import triton_portable
from nextn.ops.index_logits._gluon_sums import LOGITS_LAYOUT, split_heads, sum_lanes, sum_own_heads
from nextn.ops.index_logits._triton_schedule import WorkSchedule, allocate_schedule, describe_fill
from nextn.ops.index_logits.problem import IndexLogitsProblem

# Both were renamed after Triton 3.6.
_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

_PAGE = 64
_DIM = 128
_MAX_ROWS = 8  # rows a tile of keys is read for; more rows are several groups
_KEYS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
_PAGES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=3)
_SCALES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
# A note is 16 int32: tiles (0 ends the share), first tile, first row, five spare, visible lengths of up to eight rows.
_NOTE_LAYOUT = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
_NOTE_WRITE_LAYOUT = gl.BlockedLayout([1], [32], [1], [0])
_NOTE_READ_LAYOUT = gl.BlockedLayout([16], [32], [4], [0])  # every thread of a warpgroup reads all of it


@gluon.constexpr_function
def _item(rows, group):
    return rows[group]


@gluon.constexpr_function
def _sum_of(rows, stop):
    return sum(rows[:stop])


@gluon.jit
def _advance(stage, phase, FIRST: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr):
    """The stage STEP further in a ring, and its phase."""
    is_last = stage >= STAGES - STEP
    return gl.where(is_last, FIRST, stage + STEP), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def _read_share(programs_ptr, max_groups, max_pages):
    """This program's share: its first group and one past its last, first tile, where it ends, and the first record."""
    record_ptr = programs_ptr + gl.program_id(0) * 8
    first_group = gl.maximum(gl.load(record_ptr), 0)
    first_tile = gl.minimum(gl.maximum(gl.load(record_ptr + 1), 0), max_pages)
    record = (gl.load(record_ptr + 2), gl.load(record_ptr + 3), gl.load(record_ptr + 4))
    last_group = gl.load(record_ptr + 8)
    last_tile = gl.load(record_ptr + 9)
    return first_group, gl.minimum(last_group, max_groups - 1) + 1, first_tile, (last_group, last_tile), record


@gluon.jit
def _locate_rows(record, lens_ptr, num_rows, num_requests, max_context, MAX_ROWS: gl.constexpr):
    """A group's first row and request, held within the call's sizes, and its rows' visible lengths as in a note."""
    first_row = gl.minimum(gl.maximum(record[0], 0), num_rows - 1)
    rows = gl.minimum(gl.minimum(gl.maximum(record[1], 1), MAX_ROWS), num_rows - first_row)
    request = gl.minimum(gl.maximum(record[2], 0), num_requests - 1)
    row = gl.arange(0, 16, _NOTE_WRITE_LAYOUT) - 8
    visible = gl.load(lens_ptr + first_row + row, mask=(row >= 0) & (row < rows), other=0)
    return first_row, request, gl.minimum(gl.maximum(visible, 0), max_context)


@gluon.jit
def _load_page_id(table_row_ptr, tile, max_pages):
    return gl.load(table_row_ptr + gl.minimum(tile, max_pages - 1))


@gluon.jit
def _announce(segments, slot, phase, note):
    """Write a segment's note into a slot, once that is free; its barrier is still to be completed."""
    notes, _, _, _, empty_bars = segments
    mbarrier.wait(empty_bars.index(slot), phase)
    notes.index(slot).store(note)
    _barrier()


@gluon.jit
def _copy_rows(segments, slot, q_desc, weights_desc, first_row, ROWS: gl.constexpr, HEADS: gl.constexpr):
    """Copy queries and weights of a segment. Rows past its last are other requests' or zeros, and nothing is stored."""
    _, queries, weights, ready_bars, _ = segments
    ready_bar = ready_bars.index(slot)
    mbarrier.expect(ready_bar, _sum_of(ROWS, len(ROWS)) * HEADS * 128 + weights.shape[1] * HEADS * 4)
    for group in gl.static_range(len(ROWS)):
        for row in gl.static_range(_item(ROWS, group)):
            q_smem = queries.index(slot * len(ROWS) + group).slice(row * HEADS, HEADS)
            _copy_tile(q_desc, [(first_row + _sum_of(ROWS, group) + row) * HEADS, 0], ready_bar, q_smem)
    _copy_tile(weights_desc, [first_row, 0], ready_bar, weights.index(slot))


@gluon.jit
def _load_partition(
    work, pages, rows, ring, segments, sizes, ROWS: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr
):
    programs_ptr, groups_ptr, lens_ptr = work
    table_ptr, table_row_stride, keys_desc, scales_desc = pages
    q_desc, weights_desc = rows
    keys, scales, ready_bars, empty_bars = ring
    num_rows, num_requests, num_pages, max_pages, max_context, max_groups = sizes
    field = gl.arange(0, 16, _NOTE_WRITE_LAYOUT)
    stage = 0
    phase = 1
    slot = 0
    slot_phase = 1
    first_group, stop_group, begin, end, record = _read_share(programs_ptr, max_groups, max_pages)
    for group in range(first_group, stop_group):
        first_tile = gl.where(group == first_group, begin, 0)
        first_row, request, visible = _locate_rows(
            record, lens_ptr, num_rows, num_requests, max_context, _sum_of(ROWS, len(ROWS))
        )
        table_row_ptr = table_ptr + request.to(gl.int64) * table_row_stride
        page = _load_page_id(table_row_ptr, first_tile, max_pages)
        stop_tile = gl.cdiv(gl.max(visible, axis=0), 64)
        stop_tile = gl.where(group == end[0], gl.minimum(end[1], stop_tile), stop_tile)
        if first_tile < stop_tile:
            place = gl.where(field == 0, stop_tile - first_tile, gl.where(field == 1, first_tile, first_row))
            _announce(segments, slot, slot_phase, gl.where(field < 8, place, visible))
            _copy_rows(segments, slot, q_desc, weights_desc, first_row, ROWS, HEADS)
            slot, slot_phase = _advance(slot, slot_phase, 0, 1, 2)
            for tile in range(first_tile, stop_tile):
                next_page = _load_page_id(table_row_ptr, tile + 1, max_pages)  # ahead of a wait, which hides it
                ready_bar = ready_bars.index(stage)
                mbarrier.wait(empty_bars.index(stage), phase)
                mbarrier.expect(ready_bar, 64 * 128 + 64 * 4)
                page = gl.where((page >= 0) & (page < num_pages), page, 0)  # in the cache whatever the table says
                _copy_tile(keys_desc, [page, 0, 0], ready_bar, keys.index(stage))
                _copy_tile(scales_desc, [page, 0], ready_bar, scales.index(stage))
                page = next_page
                stage, phase = _advance(stage, phase, 0, 1, STAGES)
        record_ptr = groups_ptr + gl.minimum(group + 1, max_groups - 1) * 4
        record = (gl.load(record_ptr), gl.load(record_ptr + 1), gl.load(record_ptr + 2))
    _announce(segments, slot, slot_phase, field * 0)
    mbarrier.arrive(segments[3].index(slot), count=1)


@gluon.jit
def _read_note(segments, slot, phase):
    """A slot's note, once it and all it announces are there, and its number of tiles."""
    notes, _, _, ready_bars, _ = segments
    mbarrier.wait(ready_bars.index(slot), phase)
    note = notes.index(slot).load(_NOTE_READ_LAYOUT)
    return note, _pick(note, 0)


@gluon.jit
def _pick(note, which):
    return gl.sum(gl.where(gl.arange(0, 16, _NOTE_READ_LAYOUT) == which, note, 0), axis=0)


@gluon.jit
def _load_weights(weights, first_row, layout: gl.constexpr, ROWS: gl.constexpr, HEADS: gl.constexpr):
    """Halved weights of ROWS rows of a slot, split as products are."""
    flat = weights.reshape([weights.shape[0] * HEADS]).slice(first_row * HEADS, ROWS * HEADS)
    halves = flat.load(gl.SliceLayout(0, layout)) * 0.5
    return split_heads(gl.zeros([64, ROWS * HEADS], gl.float32, layout) + halves[None, :], ROWS, HEADS)


@gluon.jit
def _locate_logits(note, out, row, num_rows, FIRST_ROW: gl.constexpr, ROWS: gl.constexpr):
    """Where the first logits of a lane's key go and how many there are from there on, of every two of ROWS rows."""
    out_ptr, row_stride = out
    token = gl.arange(0, 64, gl.SliceLayout(1, LOGITS_LAYOUT))[:, None]
    lane_row = gl.arange(0, 2, gl.SliceLayout(0, LOGITS_LAYOUT))
    places = ()
    for pair in gl.static_range(0, ROWS, 2):
        even = _pick(note, 8 + FIRST_ROW + pair)
        odd = 0
        if pair + 1 < ROWS:
            odd = _pick(note, 9 + FIRST_ROW + pair)
        left = gl.where(lane_row == 0, even, odd)[None, :] - token
        logit_row = gl.minimum(row + pair + lane_row, num_rows - 1).to(gl.int64)
        places += (((out_ptr + logit_row * row_stride)[None, :] + token, left),)
    return places


@gluon.jit
def _score_tiles(
    note, q_smem, weights, out, ring, turn, stage, phase, num_rows,
    FIRST_ROW: gl.constexpr, ROWS: gl.constexpr, TURN: gl.constexpr, TURNS: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Score every TURNS-th tile of a segment for ROWS of its rows."""
    keys, scales, ready_bars, empty_bars = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS * HEADS, 32])
    q = q_smem.slice(0, ROWS * HEADS)
    halves = _load_weights(weights, FIRST_ROW, layout, ROWS, HEADS)
    places = _locate_logits(note, out, _pick(note, 2) + FIRST_ROW, num_rows, FIRST_ROW, ROWS)
    first_tile = _pick(note, 1) + turn
    # Triton 3.6 takes what an outer loop carries for dead if inner loops only begin with it: tiles are counted from 0.
    for i in range(0, gl.cdiv(_pick(note, 0) - turn, TURNS)):
        position = (first_tile + i * TURNS) * 64
        mbarrier.wait(ready_bars.index(stage), phase)
        products = gl.zeros([64, ROWS * HEADS], gl.float32, layout)
        products = hopper.warpgroup_mma(keys.index(stage), q.permute((1, 0)), products, use_acc=False, is_async=True)
        scale = scales.index(stage).reshape([64]).load(gl.SliceLayout(1, LOGITS_LAYOUT))
        products = hopper.warpgroup_mma_wait(0, [products])
        mbarrier.arrive(empty_bars.index(stage), count=1)
        stage, phase = _advance(stage, phase, TURN, TURNS, STAGES)
        sums = sum_lanes(sum_own_heads(split_heads(products, ROWS, HEADS), halves), ROWS)
        for pair in gl.static_range(len(places)):
            out_ptrs, left = places[pair]
            logits = (sums[pair] * scale[:, None]).to(out[0].dtype.element_ty)
            gl.store(out_ptrs + position, logits, mask=position < left)
    return stage, phase


@gluon.jit
def _skip_tiles(ring, num_tiles, stage, phase, TURN: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr):
    """Release the tiles of a segment that has no row for this warpgroup, each once it is there."""
    _, _, ready_bars, empty_bars = ring
    for _ in range(0, num_tiles):
        mbarrier.wait(ready_bars.index(stage), phase)
        mbarrier.arrive(empty_bars.index(stage), count=1)
        stage, phase = _advance(stage, phase, TURN, TURNS, STAGES)
    return stage, phase


@gluon.jit
def _count_rows(note, FIRST_ROW: gl.constexpr, ROWS: gl.constexpr):
    """How many of ROWS rows there are up to the last that sees a key."""
    last = gl.arange(0, 16, _NOTE_READ_LAYOUT) - (7 + FIRST_ROW)
    return gl.max(gl.where((last >= 1) & (last <= ROWS) & (note > 0), last, 0), axis=0)


@gluon.jit
def _score_segment(
    note, q_smem, weights, out, ring, turn, stage, phase, num_rows,
    FIRST_ROW: gl.constexpr, ROWS: gl.constexpr, TURN: gl.constexpr, TURNS: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Score a ragged segment, by products of as many rows as it has, of half as many, or of none."""
    my_rows = _count_rows(note, FIRST_ROW, ROWS)
    if my_rows > ROWS // 2:
        stage, phase = _score_tiles(
            note, q_smem, weights, out, ring, turn, stage, phase, num_rows,
            FIRST_ROW, ROWS, TURN, TURNS, HEADS, STAGES,
        )  # fmt: skip
    elif my_rows > 0:
        stage, phase = _score_tiles(
            note, q_smem, weights, out, ring, turn, stage, phase, num_rows,
            FIRST_ROW, (ROWS + 1) // 2, TURN, TURNS, HEADS, STAGES,
        )  # fmt: skip
    else:
        stage, phase = _skip_tiles(ring, gl.cdiv(_pick(note, 0) - turn, TURNS), stage, phase, TURN, TURNS, STAGES)
    return stage, phase


@gluon.jit
def _score_partition(
    out, ring, segments, num_rows,
    WARPGROUP: gl.constexpr, ROWS: gl.constexpr, TURNS: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
    IS_RAGGED: gl.constexpr,
):  # fmt: skip
    _, queries, weights, _, segment_empty_bars = segments
    TURN: gl.constexpr = WARPGROUP % TURNS
    GROUP: gl.constexpr = WARPGROUP // TURNS
    score: gl.constexpr = _score_segment if IS_RAGGED else _score_tiles
    stage = TURN
    phase = 0
    turn = TURN  # tiles until it is this warpgroup's turn
    slot = 0
    slot_phase = 0
    note, num_tiles = _read_note(segments, slot, slot_phase)
    while num_tiles > 0:
        stage, phase = score(
            note, queries.index(slot * len(ROWS) + GROUP), weights.index(slot), out, ring, turn, stage, phase,
            num_rows, _sum_of(ROWS, GROUP), _item(ROWS, GROUP), TURN, TURNS, HEADS, STAGES,
        )  # fmt: skip
        turn = (turn + TURNS - num_tiles % TURNS) % TURNS
        mbarrier.arrive(segment_empty_bars.index(slot), count=1)
        slot, slot_phase = _advance(slot, slot_phase, 0, 1, 2)
        note, num_tiles = _read_note(segments, slot, slot_phase)


@gluon.jit(
    do_not_specialize=[
        "table_row_stride", "out_row_stride",
        "num_rows", "num_requests", "num_pages", "max_pages", "max_context", "max_groups",
    ]
)  # fmt: skip
def _index_logits_kernel(
    programs_ptr, groups_ptr, q_desc, weights_desc, keys_desc, scales_desc, lens_ptr, table_ptr, out_ptr,
    table_row_stride, out_row_stride, num_rows, num_requests, num_pages, max_pages, max_context, max_groups,
    ROWS: gl.constexpr, TURNS: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, IS_RAGGED: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    WARPGROUPS: gl.constexpr = len(ROWS) * TURNS
    sizes = (num_rows, num_requests, num_pages, max_pages, max_context, max_groups)
    work = (programs_ptr, groups_ptr, lens_ptr)
    out = (out_ptr, out_row_stride)
    pages = (table_ptr, table_row_stride, keys_desc, scales_desc)
    rows = (q_desc, weights_desc)
    keys = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 64, 128], _KEYS_LAYOUT)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], _SCALES_LAYOUT)
    ready_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_bars.index(i), count=1)
        mbarrier.init(empty_bars.index(i), count=len(ROWS))
    notes = gl.allocate_shared_memory(gl.int32, [2, 16], _NOTE_LAYOUT)
    queries = gl.allocate_shared_memory(gl.float8e4nv, [2 * len(ROWS), ROWS[0] * HEADS, 128], _KEYS_LAYOUT)
    weights = gl.allocate_shared_memory(gl.float32, [2, weights_desc.block_type.shape[0], HEADS], _SCALES_LAYOUT)
    segment_ready_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    segment_empty_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(segment_ready_bars.index(i), count=1)
        mbarrier.init(segment_empty_bars.index(i), count=WARPGROUPS)
    hopper.fence_async_shared()
    ring = (keys, scales, ready_bars, empty_bars)
    segments = (notes, queries, weights, segment_ready_bars, segment_empty_bars)
    gl.static_assert((WARPGROUPS == 3) or (WARPGROUPS == 4))
    # Tuples are written out, for a constexpr in a named tuple turns into a tensor.
    if WARPGROUPS == 3:
        gl.warp_specialize([
            (_score_partition, (out, ring, segments, num_rows, 0, ROWS, TURNS, HEADS, STAGES, IS_RAGGED)),
            (_score_partition, (out, ring, segments, num_rows, 1, ROWS, TURNS, HEADS, STAGES, IS_RAGGED)),
            (_score_partition, (out, ring, segments, num_rows, 2, ROWS, TURNS, HEADS, STAGES, IS_RAGGED)),
            (_load_partition, (work, pages, rows, ring, segments, sizes, ROWS, HEADS, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_score_partition, (out, ring, segments, num_rows, 0, ROWS, TURNS, HEADS, STAGES, IS_RAGGED)),
            (_score_partition, (out, ring, segments, num_rows, 1, ROWS, TURNS, HEADS, STAGES, IS_RAGGED)),
            (_score_partition, (out, ring, segments, num_rows, 2, ROWS, TURNS, HEADS, STAGES, IS_RAGGED)),
            (_score_partition, (out, ring, segments, num_rows, 3, ROWS, TURNS, HEADS, STAGES, IS_RAGGED)),
            (_load_partition, (work, pages, rows, ring, segments, sizes, ROWS, HEADS, STAGES)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """How the kernel is cut.

    Attributes:
        rows: query rows of each row group, powers of two and at least as many as those of the next; with ``turns``,
            three or four warpgroups.
        turns: warpgroups of each row group, which take tiles in turn.
        stages: tiles of keys in shared memory, a multiple of ``turns``; 8 were faster than 4, 6 or 12 (as below).
    """

    rows: tuple[int, ...]
    turns: int
    stages: int = 8


# By heads and rows of a group: row groups and turns. A product is at most 128 columns wide, so that it and its weights
# fit a thread's registers. More warpgroups of narrower products were slower: 151.8 us, not 142.3, as (1, 1, 1, 1) x 1
# at 64 x 32768 and four rows, 203.0, not 186.1, as (2, 2, 1, 1) x 1 at six (benchmarks/results/gluon_tuning.jsonl).
_CUTS = {
    64: {
        1: ((1,), 4),
        2: ((2,), 4),
        3: ((2, 1), 2),
        4: ((2, 2), 2),
        5: ((2, 2, 1), 1),
        6: ((2, 2, 2), 1),
        7: ((2, 2, 2, 1), 1),
        8: ((2, 2, 2, 2), 1),
    },
    32: {
        1: ((1,), 4),
        2: ((2,), 4),
        3: ((2, 1), 2),
        4: ((4,), 4),
        5: ((4, 1), 2),
        6: ((4, 2), 2),
        7: ((4, 2, 1), 1),
        8: ((4, 4), 2),
    },
}
_REGISTERS = {3: (160, 128), 4: (112, 96)}  # by warpgroups: a scoring thread's, and what all threads start with
# Time of a tile by the rows of its group; 148.5 us at 64 x 32768 of 0 to 8 rows, 163.2 by (3, 3, 4, 4, ..) (same file).
_TILE_COSTS = (26, 30, 32, 36, 42, 48, 55, 62)
_RANK = 25  # between DeepGEMM's native calls and the portable kernel


def rank(problem: IndexLogitsProblem) -> int:
    """Preference, by what was timed side by side with 64 heads on an H100 (benchmarks/results/ops.jsonl).

    One row over at most 2048 tiles: the portable kernel starts faster (7.2 us against 8.3 at 1 x 8192). Four rows over
    32768 tiles: 137 us, DeepGEMM's native call 142; over 8192 tiles 43 to 45, and 41 to 42; so they meet near 12000.
    In deterministic mode one kernel serves every depth.
    """
    num_tiles = problem.num_requests * triton.cdiv(problem.max_context, _PAGE)
    if problem.deterministic:
        return _RANK
    if problem.max_rows == 1 and num_tiles <= 2048:
        return 15
    return 35 if problem.next_n == 4 and problem.heads == 64 and num_tiles > 12000 else _RANK


def rejects(problem: IndexLogitsProblem) -> str | None:
    """Why this kernel cannot take ``problem``; None if it can."""
    if problem.cache != "fp8":
        return f"index cache {problem.cache} is not fp8 in pages"
    if problem.heads not in _CUTS:
        return f"{problem.heads} index heads are not one of 32, 64"
    if problem.dim != _DIM:
        return f"head_dim {problem.dim} is not {_DIM}"
    if problem.page_size != _PAGE:
        return f"page_size {problem.page_size} is not {_PAGE}"
    return None


def choose_config(problem: IndexLogitsProblem) -> Config:
    """How to cut the kernel for ``problem``."""
    rows, turns = _CUTS[problem.heads][_rows_per_group(problem)]
    return Config(rows=rows, turns=turns)


def build_schedule(
    problem: IndexLogitsProblem,
    *,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
) -> WorkSchedule:
    """Cut the work of one forward into equal shares: one launch, which a CUDA graph can capture.

    Args:
        problem: sizes.
        query_offsets: int32 ``[B + 1]``.
        visible_lens: int32 ``[R]``.
        page_table: int32 ``[B, P]``; only its place in the call's signature matters here.
    """
    most_tiles = _max_groups(problem) * triton.cdiv(problem.max_context, _PAGE)
    schedule = allocate_schedule(
        visible_lens.device,
        max_groups=_max_groups(problem),
        rows_per_group=_rows_per_group(problem),
        num_programs=min(problem.num_sms, most_tiles),
    )
    if schedule.num_programs and visible_lens.device.type != "meta":
        launches = describe_fill(
            schedule,
            query_offsets=query_offsets.contiguous(),
            visible_lens=visible_lens.contiguous(),
            max_context=problem.max_context,
            tile=_PAGE,
            has_one_group_each=problem.max_rows <= schedule.rows_per_group,
            tile_costs=_TILE_COSTS,
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

    Pages that do not begin every 16 bytes, which bulk copies cannot address, are scored by the portable kernel.

    Args:
        config: how to cut the kernel, for tuning; chosen from the sizes if None.
    """
    batch = {"query_offsets": query_offsets, "visible_lens": visible_lens, "page_table": page_table}
    pages = index_cache.view(index_cache.shape[0], -1)
    if pages.data_ptr() % 16 or (pages.shape[0] > 1 and pages.stride(0) % 16):
        return triton_portable.prepare(problem, q=q, weights=weights, index_cache=index_cache, out=out, **batch)
    schedule: WorkSchedule = plan.data if plan is not None else build_schedule(problem, **batch)
    if schedule.num_programs == 0:
        return Launch(function=_do_nothing, arguments={})
    config = choose_config(problem) if config is None else config
    registers, entry_registers = _REGISTERS[len(config.rows) * config.turns]
    arguments = {
        "programs_ptr": schedule.programs,
        "groups_ptr": schedule.groups,
        **_describe_rows(q, weights, sum(config.rows)),
        **_describe_pages(pages),
        "lens_ptr": visible_lens.contiguous(),
        "table_ptr": page_table,
        "out_ptr": out,
        "table_row_stride": page_table.stride(0),
        "out_row_stride": out.stride(0),
        "num_rows": problem.num_rows,
        "num_requests": problem.num_requests,
        "num_pages": pages.shape[0],
        "max_pages": problem.max_pages,
        "max_context": problem.max_context,
        "max_groups": schedule.groups.shape[0],
        "ROWS": config.rows,
        "TURNS": config.turns,
        "HEADS": problem.heads,
        "STAGES": config.stages,
        "IS_RAGGED": problem.next_n != sum(config.rows),
        "REGISTERS": registers,
    }
    return Launch(
        function=_index_logits_kernel,
        arguments=arguments,
        grid=(schedule.num_programs,),
        options={"num_warps": 4, "maxnreg": entry_registers, "enable_fp_fusion": True},
    )


def _do_nothing() -> None:
    """The launch of a call without rows."""


def _align(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, contiguous from a multiple of 16 bytes on, as bulk copies need it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _describe_rows(q: torch.Tensor, weights: torch.Tensor, max_rows: int) -> dict[str, TensorDescriptor]:
    """Queries [R * H, 128] in boxes of a row, weights [R, H] in boxes of a group's rows."""
    q, weights = _align(q), _align(weights)
    num_rows, heads = weights.shape
    box = [triton.next_power_of_2(max_rows), heads]
    return {
        "q_desc": TensorDescriptor(
            q.view(num_rows * heads, _DIM), [num_rows * heads, _DIM], [_DIM, 1], [heads, _DIM], _KEYS_LAYOUT
        ),
        "weights_desc": TensorDescriptor(weights, [num_rows, heads], [heads, 1], box, _SCALES_LAYOUT),
    }


def _describe_pages(pages: torch.Tensor) -> dict[str, TensorDescriptor]:
    """Keys [num_pages, 64, 128] and scales [num_pages, 64], in boxes of a page."""
    num_pages = pages.shape[0]
    stride = pages.stride(0) if num_pages > 1 else pages.shape[1]
    keys, scales = pages.view(torch.float8_e4m3fn), pages[:, _PAGE * _DIM :].view(torch.float32)
    return {
        "keys_desc": TensorDescriptor(
            keys, [num_pages, _PAGE, _DIM], [stride, _DIM, 1], [1, _PAGE, _DIM], _PAGES_LAYOUT
        ),
        "scales_desc": TensorDescriptor(scales, [num_pages, _PAGE], [stride // 4, 1], [1, _PAGE], _SCALES_LAYOUT),
    }


def _rows_per_group(problem: IndexLogitsProblem) -> int:
    """Rows that share one reading of the keys: all of a request's, or equal parts of at most eight."""
    rows = max(problem.next_n or problem.max_rows, 1)
    return triton.cdiv(rows, triton.cdiv(rows, _MAX_ROWS))


def _max_groups(problem: IndexLogitsProblem) -> int:
    rows = _rows_per_group(problem)
    if problem.max_rows <= rows:
        return min(problem.num_requests, problem.num_rows)
    return min(problem.num_rows, problem.num_requests + problem.num_rows // rows)


KERNEL = Kernel(
    op="index_logits",
    name="gluon_sm90",
    arches=frozenset({Arch.SM90}),
    rejects=rejects,
    prepare=prepare,
    configure=choose_config,
    rank=rank,
    plan=build_schedule,
    form=triton_portable.form,
)
