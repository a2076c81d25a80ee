"""Index logits on Hopper, in Gluon: one warp copies, three or four warpgroups multiply and sum over heads.

Contract and maths: ``reference.py``; the work list: ``_triton_schedule.py``; the copying warp: ``_gluon_loads.py``;
sums over heads: ``_gluon_sums.py``. Keys lie in pages, or contiguous, of which every row sees a span.

Floor, for B requests of n rows and length L: ``B * L * (132 + 4 * n)`` bytes against ``2 * B * n * L * H * 128`` FP8
operations; on an H100 (3.0 TB/s, 1500 TFLOP/s) with 64 heads bytes rule up to n = 4 and the products beyond.

One persistent program per multiprocessor walks an equal share of all tiles of 64 keys, a tile being a page. Its share
is cut into segments, the tiles of one group of rows, which the copying warp brings: queries, weights, a note of what
the rows see, and tiles in a ring. A warpgroup keeps one or two rows (of 64 heads) for a segment, their weights in
registers. Row groups, of different rows, all multiply every tile; warpgroups of one row group take tiles in turn. A
tile is released when every row group has multiplied it.

Every product covers all 128 values in one accumulation and sums have one order, so no depth or batch changes a bit.

From four rows on, products and sums over heads take turns more than they overlap: at four rows a tile takes 880 cycles,
its products 512, its instructions 372 of each scheduler. The likely cause are the registers' ports, which both need.
"""

# Triton's types describe host values; device code is checked by the compile gate.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nextn.hardware import Arch
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops.index_logits import triton_portable
from nextn.ops.index_logits._contiguous import ContiguousKeys
from nextn.ops.index_logits._gluon_loads import NOTE_LAYOUT, advance, item, load_partition, sum_of
from nextn.ops.index_logits._gluon_sums import LOGITS_LAYOUT, split_heads, sum_lanes, sum_own_heads
from nextn.ops.index_logits._triton_schedule import WorkSchedule, allocate_schedule, describe_fill
from nextn.ops.index_logits.problem import CONTIGUOUS, IndexLogitsProblem

_PAGE = 64
_DIM = 128
_MAX_ROWS = 8  # rows a tile of keys is read for; more rows are several groups
_KEYS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
_PAGES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=3)
_SCALES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.constexpr_function
def _read_layout(size):
    """Every thread of a warpgroup reads all of a note."""
    return gl.BlockedLayout([size], [32], [4], [0])


@gluon.jit
def _read_note(segments, slot, phase):
    """A slot's note, once it and all it announces are there, and its number of tiles."""
    notes, _, _, ready_bars, _ = segments
    mbarrier.wait(ready_bars.index(slot), phase)
    note = notes.index(slot).load(_read_layout(notes.shape[1]))
    return note, _pick(note, 0)


@gluon.jit
def _fields_of(note):
    return gl.arange(0, note.shape[0], _read_layout(note.shape[0]))


@gluon.jit
def _pick(note, which):
    return gl.sum(gl.where(_fields_of(note) == which, note, 0), axis=0)


@gluon.jit
def _load_weights(weights, first_row, layout: gl.constexpr, ROWS: gl.constexpr, HEADS: gl.constexpr):
    """Halved weights of ROWS rows of a slot, split as products are."""
    flat = weights.reshape([weights.shape[0] * HEADS]).slice(first_row * HEADS, ROWS * HEADS)
    halves = flat.load(gl.SliceLayout(0, layout)) * 0.5
    return split_heads(gl.zeros([64, ROWS * HEADS], gl.float32, layout) + halves[None, :], ROWS, HEADS)


@gluon.jit
def _pick_of_lanes(note, lane_row, first, PAIRED: gl.constexpr):
    """A field of a note for the lanes of one row, the next for those of the other row, if there is one."""
    even = _pick(note, first)
    odd = 0
    if PAIRED:
        odd = _pick(note, first + 1)
    return gl.where(lane_row == 0, even, odd)[None, :]


@gluon.jit
def _locate_logits(note, out, row, num_rows, FIRST_ROW: gl.constexpr, ROWS: gl.constexpr, COMPRESSED: gl.constexpr):
    """Of every two of ROWS rows: where logits of a lane's key go, if the first of a tile is key 0, and how many keys
    there are from there on, and how many of those come before the first that the row sees.
    """
    out_ptr, row_stride = out
    token = gl.arange(0, 64, gl.SliceLayout(1, LOGITS_LAYOUT))[:, None]
    lane_row = gl.arange(0, 2, gl.SliceLayout(0, LOGITS_LAYOUT))
    places = ()
    for pair in gl.static_range(0, ROWS, 2):
        left = _pick_of_lanes(note, lane_row, 8 + FIRST_ROW + pair, pair + 1 < ROWS) - token
        logit_row = gl.minimum(row + pair + lane_row, num_rows - 1).to(gl.int64)
        out_ptrs = (out_ptr + logit_row * row_stride)[None, :] + token
        before = 0
        if note.shape[0] == 32:
            start = _pick_of_lanes(note, lane_row, 16 + FIRST_ROW + pair, pair + 1 < ROWS)
            before = start - token
            if COMPRESSED:
                out_ptrs -= start
        places += ((out_ptrs, left, before),)
    return places


@gluon.jit
def _score_tiles(
    note, q_smem, weights, out, ring, turn, stage, phase, num_rows,
    FIRST_ROW: gl.constexpr, ROWS: gl.constexpr, TURN: gl.constexpr, TURNS: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr, COMPRESSED: gl.constexpr,
):  # fmt: skip
    """Score every TURNS-th tile of a segment for ROWS of its rows."""
    keys, scales, ready_bars, empty_bars = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS * HEADS, 32])
    q = q_smem.slice(0, ROWS * HEADS)
    halves = _load_weights(weights, FIRST_ROW, layout, ROWS, HEADS)
    places = _locate_logits(note, out, _pick(note, 2) + FIRST_ROW, num_rows, FIRST_ROW, ROWS, COMPRESSED)
    first_key = _pick(note, 1) + turn * 64
    # Triton 3.6 takes what an outer loop carries for dead if inner loops only begin with it: tiles are counted from 0.
    for i in range(0, gl.cdiv(_pick(note, 0) - turn, TURNS)):
        position = first_key + i * (TURNS * 64)
        mbarrier.wait(ready_bars.index(stage), phase)
        products = gl.zeros([64, ROWS * HEADS], gl.float32, layout)
        products = hopper.warpgroup_mma(keys.index(stage), q.permute((1, 0)), products, use_acc=False, is_async=True)
        scale = scales.index(stage).reshape([64]).load(gl.SliceLayout(1, LOGITS_LAYOUT))
        products = hopper.warpgroup_mma_wait(0, [products])
        mbarrier.arrive(empty_bars.index(stage), count=1)
        stage, phase = advance(stage, phase, TURN, TURNS, STAGES)
        sums = sum_lanes(sum_own_heads(split_heads(products, ROWS, HEADS), halves), ROWS)
        for pair in gl.static_range(len(places)):
            out_ptrs, left, before = places[pair]
            logits = (sums[pair] * scale[:, None]).to(out[0].dtype.element_ty)
            is_seen = position < left
            if note.shape[0] == 32:
                is_seen &= position >= before
            gl.store(out_ptrs + position, logits, mask=is_seen)
    return stage, phase


@gluon.jit
def _skip_tiles(ring, num_tiles, stage, phase, TURN: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr):
    """Release the tiles of a segment that has no row for this warpgroup, each once it is there."""
    _, _, ready_bars, empty_bars = ring
    for _ in range(0, num_tiles):
        mbarrier.wait(ready_bars.index(stage), phase)
        mbarrier.arrive(empty_bars.index(stage), count=1)
        stage, phase = advance(stage, phase, TURN, TURNS, STAGES)
    return stage, phase


@gluon.jit
def _count_rows(note, FIRST_ROW: gl.constexpr, ROWS: gl.constexpr):
    """How many of ROWS rows there are up to the last that sees a key."""
    last = _fields_of(note) - (7 + FIRST_ROW)
    return gl.max(gl.where((last >= 1) & (last <= ROWS) & (note > 0), last, 0), axis=0)


@gluon.jit
def _score_segment(
    note, q_smem, weights, out, ring, turn, stage, phase, num_rows,
    FIRST_ROW: gl.constexpr, ROWS: gl.constexpr, TURN: gl.constexpr, TURNS: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr, COMPRESSED: gl.constexpr,
):  # fmt: skip
    """Score a ragged segment, by products of as many rows as it has, of half as many, or of none."""
    my_rows = _count_rows(note, FIRST_ROW, ROWS)
    if my_rows > ROWS // 2:
        stage, phase = _score_tiles(
            note, q_smem, weights, out, ring, turn, stage, phase, num_rows,
            FIRST_ROW, ROWS, TURN, TURNS, HEADS, STAGES, COMPRESSED,
        )  # fmt: skip
    elif my_rows > 0:
        stage, phase = _score_tiles(
            note, q_smem, weights, out, ring, turn, stage, phase, num_rows,
            FIRST_ROW, (ROWS + 1) // 2, TURN, TURNS, HEADS, STAGES, COMPRESSED,
        )  # fmt: skip
    else:
        stage, phase = _skip_tiles(ring, gl.cdiv(_pick(note, 0) - turn, TURNS), stage, phase, TURN, TURNS, STAGES)
    return stage, phase


@gluon.jit
def _score_partition(
    out, ring, segments, num_rows,
    WARPGROUP: gl.constexpr, ROWS: gl.constexpr, TURNS: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
    IS_RAGGED: gl.constexpr, COMPRESSED: gl.constexpr,
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
            num_rows, sum_of(ROWS, GROUP), item(ROWS, GROUP), TURN, TURNS, HEADS, STAGES, COMPRESSED,
        )  # fmt: skip
        turn = (turn + TURNS - num_tiles % TURNS) % TURNS
        mbarrier.arrive(segment_empty_bars.index(slot), count=1)
        slot, slot_phase = advance(slot, slot_phase, 0, 1, 2)
        note, num_tiles = _read_note(segments, slot, slot_phase)


@gluon.jit(
    do_not_specialize=[
        "table_row_stride", "out_row_stride", "num_columns",
        "num_rows", "num_requests", "num_pages", "max_pages", "max_context", "max_groups",
    ]
)  # fmt: skip
def _index_logits_kernel(
    programs_ptr, groups_ptr, q_desc, weights_desc, keys_desc, scales_desc, lens_ptr, starts_ptr, table_ptr,
    out_ptr, table_row_stride, out_row_stride, num_columns, num_rows, num_requests, num_pages, max_pages, max_context,
    max_groups,
    ROWS: gl.constexpr, TURNS: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, IS_RAGGED: gl.constexpr,
    IS_CONTIGUOUS: gl.constexpr, COMPRESSED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    WARPGROUPS: gl.constexpr = len(ROWS) * TURNS
    sizes = (num_rows, num_requests, num_pages, max_pages, max_context, max_groups)
    work = (programs_ptr, groups_ptr, (lens_ptr, starts_ptr, num_columns))
    out = (out_ptr, out_row_stride)
    pages = (table_ptr, table_row_stride, keys_desc, scales_desc)
    given = (work, pages, (q_desc, weights_desc), sizes)
    keys = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 64, 128], _KEYS_LAYOUT)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], _SCALES_LAYOUT)
    ready_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_bars.index(i), count=1)
        mbarrier.init(empty_bars.index(i), count=len(ROWS))
    notes = gl.allocate_shared_memory(gl.int32, [2, 32 if IS_CONTIGUOUS else 16], NOTE_LAYOUT)
    queries = gl.allocate_shared_memory(gl.float8e4nv, [2 * len(ROWS), ROWS[0] * HEADS, 128], _KEYS_LAYOUT)
    weights = gl.allocate_shared_memory(gl.float32, [2, weights_desc.block_type.shape[0], HEADS], _SCALES_LAYOUT)
    segment_ready_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    segment_empty_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(segment_ready_bars.index(i), count=2)  # for the note and for what is copied
        mbarrier.init(segment_empty_bars.index(i), count=WARPGROUPS)
    hopper.fence_async_shared()
    ring = (keys, scales, ready_bars, empty_bars)
    segments = (notes, queries, weights, segment_ready_bars, segment_empty_bars)
    gl.static_assert((WARPGROUPS == 3) or (WARPGROUPS == 4))
    # Tuples are written out, for a constexpr in a named tuple turns into a tensor.
    if WARPGROUPS == 3:
        gl.warp_specialize([
            (_score_partition, (out, ring, segments, num_rows, 0, ROWS, TURNS, HEADS, STAGES, IS_RAGGED, COMPRESSED)),
            (_score_partition, (out, ring, segments, num_rows, 1, ROWS, TURNS, HEADS, STAGES, IS_RAGGED, COMPRESSED)),
            (_score_partition, (out, ring, segments, num_rows, 2, ROWS, TURNS, HEADS, STAGES, IS_RAGGED, COMPRESSED)),
            (load_partition, (given, ring, segments, ROWS, HEADS, STAGES, IS_CONTIGUOUS, COMPRESSED)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_score_partition, (out, ring, segments, num_rows, 0, ROWS, TURNS, HEADS, STAGES, IS_RAGGED, COMPRESSED)),
            (_score_partition, (out, ring, segments, num_rows, 1, ROWS, TURNS, HEADS, STAGES, IS_RAGGED, COMPRESSED)),
            (_score_partition, (out, ring, segments, num_rows, 2, ROWS, TURNS, HEADS, STAGES, IS_RAGGED, COMPRESSED)),
            (_score_partition, (out, ring, segments, num_rows, 3, ROWS, TURNS, HEADS, STAGES, IS_RAGGED, COMPRESSED)),
            (load_partition, (given, ring, segments, ROWS, HEADS, STAGES, IS_CONTIGUOUS, COMPRESSED)),
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

    One row over at most 2048 tiles: the portable kernel starts faster (8.4 us against 9.1 at 1 x 8192). Four rows over
    32768 tiles: 136 us, DeepGEMM's native call 144; over 8192 tiles 43 to 45, and 42 to 43; so they meet near 12000.
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
    if problem.cache not in ("fp8", CONTIGUOUS):
        return f"index cache {problem.cache} is not fp8"
    if problem.heads not in _CUTS:
        return f"{problem.heads} index heads are not one of 32, 64"
    if problem.dim != _DIM:
        return f"head_dim {problem.dim} is not {_DIM}"
    if problem.cache == "fp8" and problem.page_size != _PAGE:
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
    row_starts: torch.Tensor | None = None,
) -> WorkSchedule:
    """Cut the work of one forward into equal shares: one launch, which a CUDA graph can capture.

    Args:
        problem: sizes.
        query_offsets: int32 ``[B + 1]``.
        visible_lens: int32 ``[R]``.
        page_table: int32 ``[B, P]``, of which each share's first page is noted; not read if keys are contiguous.
        row_starts: int32 ``[R]`` of contiguous keys, else None.
    """
    most_tiles = _max_groups(problem) * triton.cdiv(problem.max_context, _PAGE)
    schedule = allocate_schedule(
        visible_lens.device,
        max_groups=_max_groups(problem),
        rows_per_group=_rows_per_group(problem),
        num_programs=min(problem.num_sms, most_tiles),
        tile_costs=_TILE_COSTS,
    )
    if schedule.num_programs and visible_lens.device.type != "meta":
        launches = describe_fill(
            schedule,
            query_offsets=query_offsets.contiguous(),
            visible_lens=visible_lens.contiguous(),
            max_context=problem.max_context,
            tile=_PAGE,
            row_starts=row_starts,
            has_one_group_each=row_starts is None and problem.max_rows <= schedule.rows_per_group,
            page_table=page_table if row_starts is None else None,
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

    Keys that do not begin every 16 bytes, which bulk copies cannot address, are scored by the portable kernel.

    Args:
        config: how to cut the kernel, for tuning; chosen from the sizes if None.
    """
    batch = {"query_offsets": query_offsets, "visible_lens": visible_lens, "page_table": page_table}
    if not _can_copy(index_cache):
        return triton_portable.prepare(problem, q=q, weights=weights, index_cache=index_cache, out=out, **batch)
    row_starts = index_cache.row_starts if isinstance(index_cache, ContiguousKeys) else None
    schedule: WorkSchedule
    schedule = plan.data if plan is not None else build_schedule(problem, **batch, row_starts=row_starts)
    if schedule.num_programs == 0:
        return Launch(function=_do_nothing, arguments={})
    config = choose_config(problem) if config is None else config
    registers, entry_registers = _REGISTERS[len(config.rows) * config.turns]
    lens = visible_lens.contiguous()
    arguments = {
        "programs_ptr": schedule.programs,
        "groups_ptr": schedule.groups,
        **_describe_rows(q, weights, sum(config.rows)),
        **_describe_keys(index_cache),
        "lens_ptr": lens,
        "starts_ptr": lens if row_starts is None else row_starts,
        "table_ptr": page_table,
        "out_ptr": out,
        "table_row_stride": page_table.stride(0),
        "out_row_stride": out.stride(0),
        "num_rows": problem.num_rows,
        "num_requests": problem.num_requests,
        "num_columns": out.shape[1],
        "max_pages": problem.max_pages if row_starts is None else triton.cdiv(problem.max_context, _PAGE),
        "max_context": problem.max_context,
        "max_groups": schedule.groups.shape[0],
        "ROWS": config.rows,
        "TURNS": config.turns,
        "HEADS": problem.heads,
        "STAGES": config.stages,
        "IS_RAGGED": problem.next_n != sum(config.rows),
        "IS_CONTIGUOUS": row_starts is not None,
        "COMPRESSED": isinstance(index_cache, ContiguousKeys) and index_cache.is_compressed,
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


def _can_copy(index_cache: torch.Tensor | ContiguousKeys) -> bool:
    """Whether keys and scales begin at multiples of 16 bytes."""
    if isinstance(index_cache, ContiguousKeys):
        keys = index_cache.values
        return not (keys.data_ptr() % 16 or keys.stride(0) % 16 or index_cache.scales.data_ptr() % 16)
    pages = index_cache.view(index_cache.shape[0], -1)
    return not (pages.data_ptr() % 16 or (pages.shape[0] > 1 and pages.stride(0) % 16))


def _describe_keys(index_cache: torch.Tensor | ContiguousKeys) -> dict[str, Any]:
    """Keys [num_pages, 64, 128] and scales [num_pages, 64], in boxes of a page; contiguous ones are one long page."""
    if isinstance(index_cache, ContiguousKeys):
        keys, scales, num_pages, page_len = index_cache.values, index_cache.scales, 1, index_cache.values.shape[0]
        strides, scale_strides = [page_len * keys.stride(0), keys.stride(0), 1], [triton.cdiv(page_len, 4) * 4, 1]
    else:
        pages = index_cache.view(index_cache.shape[0], -1)
        keys, scales = pages.view(torch.float8_e4m3fn), pages[:, _PAGE * _DIM :].view(torch.float32)
        num_pages, page_len = pages.shape[0], _PAGE
        stride = pages.stride(0) if num_pages > 1 else pages.shape[1]
        strides, scale_strides = [stride, _DIM, 1], [stride // 4, 1]
    return {
        "keys_desc": TensorDescriptor(keys, [num_pages, page_len, _DIM], strides, [1, _PAGE, _DIM], _PAGES_LAYOUT),
        "scales_desc": TensorDescriptor(scales, [num_pages, page_len], scale_strides, [1, _PAGE], _SCALES_LAYOUT),
        "num_pages": num_pages,
    }


def _rows_per_group(problem: IndexLogitsProblem) -> int:
    """Rows that share one reading of the keys: all of a request's, or equal parts of at most eight."""
    rows = max(problem.next_n or problem.max_rows, 1)
    return triton.cdiv(rows, triton.cdiv(rows, _MAX_ROWS))


def _max_groups(problem: IndexLogitsProblem) -> int:
    rows = _rows_per_group(problem)
    if problem.cache == CONTIGUOUS:
        return problem.num_rows  # one each where every row's start is far from the next
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
