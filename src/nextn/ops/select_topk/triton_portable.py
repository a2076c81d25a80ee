"""Exact top-k of every row in Triton: a row stays in registers while a threshold is searched for by counting.

Contract: ``reference.py``. Hides how rows longer than the registers are cut, split over programs and merged.

A program holds up to ``tiles`` x 4096 logits in registers, finds the threshold (``_triton_search.py``) and writes what
passes. Each tile row owns a contiguous range of positions, so one prefix sum over rows and one along each row give
every selected logit its place in ascending order, with no sort and no atomic.

A longer range is scanned block by block. A block adds what beats the threshold so far (at most its own best k) to a
list, a full list is reduced to its own best k, and the last list is the answer. Few long rows are split over programs;
the last one to finish a row merges the parts, whose order in memory is that of their positions.

Floor: every visible logit read once, ``4 * sum(visible_lens)`` bytes (256 rows of 32K: 33.5 MB, 11 us at 3.0 TB/s),
and 2 to 3 instructions a logit for each of about 7 counting passes and some 20 to write, all on logits already in
registers: about 5 us for 32K logits on one multiprocessor.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nextn.hardware import Arch
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops.select_topk._triton_search import KEY_OF_MINUS_INF, load_block, places, rank_tile, search, tile_index
from nextn.ops.select_topk.problem import SelectTopkProblem

_MAX_TOPK = 2048
_MAX_SPLITS = 8  # 16 took 57 us where 8 took 43: 4 x 128K in benchmarks/results/select_topk_h100.jsonl
_INT32_MAX = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectTopkConfig:
    """How one launch is cut.

    Attributes:
        tiles: tiles a program holds in registers; a power of two is not needed.
        tile_rows: rows of a tile, each over a contiguous range of positions.
        tile_columns: columns of a tile.
        splits: programs that share a long row.
        split_len: positions a program gets before a row is split further.
        list_len: candidates a program collects before it reduces them; at least ``2 * k``.
        programs_per_sm: programs a multiprocessor runs at once, for rows that exceed the registers.
        prefetch_rows: how many rows ahead a program asks the L2 cache to fetch; 0 for none. Hopper and later.
        num_warps: warps of a program.
        max_registers: registers a thread may use, so that more programs fit a multiprocessor; None leaves it to the
            compiler. NVIDIA only.
    """

    tiles: int
    tile_rows: int = 32
    tile_columns: int = 128
    splits: int = 1
    split_len: int = 8192
    list_len: int = 8192
    programs_per_sm: int = 1
    prefetch_rows: int = 0
    num_warps: int = 16
    max_registers: int | None = None

    @property
    def capacity(self) -> int:
        """Logits a program holds at once."""
        return self.tiles * self.tile_rows * self.tile_columns


@dataclass(frozen=True, kw_only=True)
class SelectTopkWorkspace:
    """Scratch memory of one forward, shared by its layers.

    Attributes:
        config: the configuration it was sized for.
        values: float32 ``[N]``, candidates' logits.
        positions: int32 ``[N]``, their positions.
        arrivals: int32 ``[R]``, programs that have finished their part of a row; zero between launches.
    """

    config: SelectTopkConfig
    values: torch.Tensor
    positions: torch.Tensor
    arrivals: torch.Tensor


@triton.jit
def _gather(address, mask, BY_PTX: tl.constexpr):
    """A masked load of int32, -1 where masked off.

    Triton gives scattered loads and stores a layout it thinks coalesced, and moves every operand there through shared
    memory; PTX leaves them where they are.
    """
    if BY_PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, -1; @p ld.global.b32 $0, [$1]; }",
            "=&r,l,r",
            [address.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return tl.load(address, mask=mask, other=-1)


@triton.jit
def _scatter(address, value, mask, BY_PTX: tl.constexpr):
    """A masked store of 32-bit values; see ``_gather``."""
    if BY_PTX:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [address.to(tl.int64), value, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(address, value, mask=mask)


@triton.jit
def _write_slots(
    out, rank, positions, selected, table_row, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr,
    BY_PTX: tl.constexpr,
):  # fmt: skip
    """Store positions, or their cache slots, at their ranks."""
    result = positions
    if RETURNS_SLOTS:
        pages = _gather(table_row + positions // PAGE_SIZE, selected, BY_PTX).to(tl.int64)
        slots = pages * PAGE_SIZE + positions % PAGE_SIZE
        result = tl.where((pages >= 0) & (slots <= _INT32_MAX), slots, -1).to(tl.int32)
    _scatter(out + rank, result, selected, BY_PTX)


@triton.jit
def _write_short_row(
    out, visible_len, table_row, TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every position of a row that sees at most TOPK, then -1."""
    for start in tl.static_range(0, TOPK, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        if RETURNS_SLOTS:
            _write_slots(out, columns, columns, columns < visible_len, table_row, PAGE_SIZE, True, False)
            tl.store(out + columns, -1, mask=(columns >= visible_len) & (columns < TOPK))
        else:
            tl.store(out + columns, tl.where(columns < visible_len, columns, -1), mask=columns < TOPK)


@triton.jit
def _find_request(offsets_ptr, row, num_requests, BLOCK: tl.constexpr):
    """The request of a row: how many requests end at or before it, in one load for up to BLOCK requests."""
    num_ended = tl.zeros((), tl.int32)
    for start in range(0, num_requests, BLOCK):
        requests = start + tl.arange(0, BLOCK)
        ends = tl.load(offsets_ptr + 1 + requests, mask=requests < num_requests, other=_INT32_MAX)
        num_ended += tl.sum((ends <= row).to(tl.int32))
    return tl.minimum(num_ended, num_requests - 1)


@triton.jit
def _prefetch(address, num_bytes):
    """Ask the L2 cache for ``num_bytes``, a multiple of 16, from a 16-byte aligned address: one instruction in all."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r",
        [address, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["num_rows"])  # 1 would become a constexpr, which has no .to
def _select_topk_kernel(
    logits_ptr, visible_lens_ptr, offsets_ptr, table_ptr, out_ptr, values_ptr, positions_ptr, arrivals_ptr,
    num_rows, num_requests, max_len, stride_logits, stride_table, stride_out,
    TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr, BY_PTX: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS_LONG: tl.constexpr, SPLITS: tl.constexpr, SPLIT_LEN: tl.constexpr, LIST_LEN: tl.constexpr,
    PREFETCH_ROWS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    CAPACITY: tl.constexpr = TILES * ROWS * COLUMNS
    program = tl.program_id(0)
    for item in range(program, num_rows * SPLITS, tl.num_programs(0)):
        row = item // SPLITS
        split = item % SPLITS
        visible_len = tl.minimum(tl.maximum(tl.load(visible_lens_ptr + row), 0), max_len)
        logits = logits_ptr + row.to(tl.int64) * stride_logits
        out = out_ptr + row.to(tl.int64) * stride_out
        table_row = table_ptr
        if RETURNS_SLOTS:
            table_row += _find_request(offsets_ptr, row, num_requests, 1024).to(tl.int64) * stride_table
        if PREFETCH_ROWS > 0:  # noqa: SIM102 - compiled away or not
            if row + PREFETCH_ROWS < num_rows:
                next_len = tl.minimum(tl.load(visible_lens_ptr + row + PREFETCH_ROWS), max_len)
                if next_len > TOPK:
                    next_bytes = tl.minimum(next_len, CAPACITY) // 4 * 16
                    _prefetch((logits + PREFETCH_ROWS * stride_logits).to(tl.int64), next_bytes)
        if visible_len <= TOPK:
            if split == 0:
                _write_short_row(out, visible_len, table_row, TOPK, PAGE_SIZE, RETURNS_SLOTS, ROWS * COLUMNS)
        elif IS_LONG:
            _select_long_row(
                logits, visible_len, row, split, out, table_row, values_ptr, positions_ptr, arrivals_ptr, num_rows,
                TOPK, PAGE_SIZE, RETURNS_SLOTS, BY_PTX, ALIGNED, SPLITS, SPLIT_LEN, LIST_LEN,
                TILES, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            _select_short_row(
                logits, visible_len, out, table_row,
                TOPK, PAGE_SIZE, RETURNS_SLOTS, BY_PTX, ALIGNED, TILES, ROWS, COLUMNS,
            )  # fmt: skip


@triton.jit
def _select_short_row(
    logits, n, out, table_row, TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr,
    BY_PTX: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Select from a row that fits the registers."""
    live_tiles = tl.cdiv(n, ROWS * COLUMNS)
    tiles = load_block(logits, n, live_tiles, ALIGNED, TILES, ROWS, COLUMNS)
    floor = tl.full((), KEY_OF_MINUS_INF, tl.int64)
    upper, lower, num_equal, _, _, is_rest = search(tiles, live_tiles, n, n * 0 + TOPK, floor, n >= 0, TILES)
    before = places(tiles, live_tiles, upper, lower, is_rest, TILES, COLUMNS)
    for tile in tl.static_range(TILES):
        if tile < live_tiles:
            selected, rank, before = rank_tile(tiles[tile], before, upper, lower, is_rest, num_equal)
            positions = tile_index(tile, live_tiles, ROWS, COLUMNS)
            _write_slots(out, rank, positions, selected, table_row, PAGE_SIZE, RETURNS_SLOTS, BY_PTX)


@triton.jit
def _select_long_row(
    logits, visible_len, row, split, out, table_row, values_ptr, positions_ptr, arrivals_ptr, num_rows,
    TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr, BY_PTX: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_LEN: tl.constexpr, LIST_LEN: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Select from one program's part of a row of any length, and from all parts if it is the last to finish."""
    CAPACITY: tl.constexpr = TILES * ROWS * COLUMNS
    MERGE_LEN: tl.constexpr = (SPLITS * TOPK + 3) // 4 * 4 if SPLITS > 1 else 0
    # Every part but the last is longer than TOPK, so that the merged candidates lie without gaps.
    part_len = visible_len
    if SPLITS > 1:  # noqa: SIM102 - compiled away or not
        if visible_len > CAPACITY:
            part_len = tl.maximum(tl.cdiv(visible_len, SPLITS), tl.minimum(SPLIT_LEN, visible_len))
            part_len = tl.cdiv(tl.maximum(part_len, TOPK), COLUMNS) * COLUMNS
    num_parts = tl.cdiv(visible_len, part_len)
    merge_base = row.to(tl.int64) * MERGE_LEN
    list_base = num_rows.to(tl.int64) * MERGE_LEN + tl.program_id(0).to(tl.int64) * (2 * LIST_LEN)

    cursor = split * part_len
    end = tl.minimum(cursor + part_len, visible_len)
    start = cursor
    floor = tl.full((), KEY_OF_MINUS_INF, tl.int64)
    filled = cursor * 0  # candidates in the current list
    current = cursor * 0  # which of the two lists
    candidates = list_base
    merging = split < 0
    running = split < num_parts
    while running:
        scans = (cursor < end) & (filled + TOPK <= LIST_LEN)
        is_list = (cursor >= end) | (filled + TOPK > LIST_LEN)
        n = tl.where(scans, tl.minimum(end - cursor, CAPACITY), filled)
        is_last = tl.where(scans, (cursor == start) & (cursor + n >= end), cursor >= end)
        is_answer = is_last & (merging | (num_parts == 1))
        live_tiles = tl.cdiv(n, ROWS * COLUMNS)
        # Every block starts at a multiple of 4; spelled out, since the compiler cannot see it through the loop.
        block_start = cursor // 4 * 4 if ALIGNED else cursor
        source = tl.where(scans, logits + block_start, values_ptr + candidates // 4 * 4)
        tiles = load_block(source, n, live_tiles, ALIGNED, TILES, ROWS, COLUMNS)
        takes_all = (cursor == start) | is_list
        block_floor = tl.where(takes_all, tl.full((), KEY_OF_MINUS_INF, tl.int64), floor)
        upper, lower, num_equal, num_selected, low, is_rest = search(
            tiles, live_tiles, n, tl.minimum(n, TOPK), block_floor, takes_all, TILES
        )
        floor = tl.maximum(floor, low + 1)
        target = list_base + tl.where(scans, current * LIST_LEN + filled, (1 - current) * LIST_LEN)
        target = tl.where(is_last, merge_base + split * TOPK, target)
        before = places(tiles, live_tiles, upper, lower, is_rest, TILES, COLUMNS)
        for tile in tl.static_range(TILES):
            if tile < live_tiles:
                selected, rank, before = rank_tile(tiles[tile], before, upper, lower, is_rest, num_equal)
                positions = tile_index(tile, live_tiles, ROWS, COLUMNS)
                if scans:
                    positions += cursor
                else:
                    positions = _gather(positions_ptr + candidates + positions, selected, BY_PTX)
                if is_answer:
                    _write_slots(out, rank, positions, selected, table_row, PAGE_SIZE, RETURNS_SLOTS, BY_PTX)
                else:
                    _scatter(values_ptr + target + rank, tiles[tile], selected, BY_PTX)
                    _scatter(positions_ptr + target + rank, positions, selected, BY_PTX)
        tl.debug_barrier()  # the stores above are read by other threads below, here or in the last program
        if is_answer:
            running = split < 0
        elif is_last:
            running = _arrive(arrivals_ptr + row, num_parts)
            merging = running
            candidates = merge_base
            last_part = visible_len - (num_parts - 1) * part_len
            filled = (num_parts - 1) * TOPK + tl.minimum(last_part, TOPK)
            cursor = end
        elif scans:
            filled += num_selected
            cursor += n
        else:
            filled = num_selected
            current = 1 - current
        if not merging:
            candidates = list_base + current * LIST_LEN


@triton.jit
def _arrive(counter, num_parts):
    """Count this program in; True for the last, which also zeroes the counter for the next launch."""
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_parts - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


def configure(problem: SelectTopkProblem) -> SelectTopkConfig:
    """The configuration for a problem.

    The best of those timed in benchmarks/results/select_topk_h100.jsonl, or within 8 % of it.
    """
    columns = _visible_columns(problem)
    if columns <= 8192:
        return SelectTopkConfig(tiles=2, num_warps=8)
    if columns <= 16384:
        return SelectTopkConfig(tiles=4, num_warps=16)
    splits = max(1, min(_MAX_SPLITS, problem.num_sms // max(problem.num_rows, 1))) if columns > 32768 else 1
    return SelectTopkConfig(tiles=8, num_warps=16, splits=splits)


def rejects(problem: SelectTopkProblem) -> str | None:
    """Why this kernel cannot take ``problem``; None if it can."""
    if problem.topk > _MAX_TOPK:
        return f"k {problem.topk} is above {_MAX_TOPK}, more than its candidate lists hold"
    return None


def plan(
    problem: SelectTopkProblem, *, device: torch.device | str, config: SelectTopkConfig | None = None
) -> SelectTopkWorkspace:
    """Allocate the scratch memory of a forward.

    Args:
        problem: sizes; must not be rejected.
        device: where the logits will be.
        config: how to cut the launch; chosen by ``configure`` if None.
    """
    config = configure(problem) if config is None else config
    assert 2 * problem.topk <= config.list_len <= config.capacity, "a list must take a block's best and fit a block"
    assert config.splits * problem.topk <= config.capacity, "the merged parts must fit a block"
    num_candidates = 0
    if _is_long(problem, config):
        merge_len = -(-config.splits * problem.topk // 4) * 4 if config.splits > 1 else 0
        num_candidates = problem.num_rows * merge_len + _num_programs(problem, config) * 2 * config.list_len
    return SelectTopkWorkspace(
        config=config,
        values=torch.empty(num_candidates, dtype=torch.float32, device=device),
        positions=torch.empty(num_candidates, dtype=torch.int32, device=device),
        arrivals=torch.zeros(problem.num_rows if config.splits > 1 else 0, dtype=torch.int32, device=device),
    )


def prepare(
    problem: SelectTopkProblem,
    *,
    logits: torch.Tensor,
    visible_lens: torch.Tensor,
    query_offsets: torch.Tensor | None,
    page_table: torch.Tensor | None,
    out: torch.Tensor,
    plan: OpPlan | None = None,
) -> Launch:
    """Describe the call; tensors as in ``select_topk``."""
    workspace = plan.data if plan is not None and plan.data is not None else _plan(problem, device=logits.device)
    config = workspace.config
    arguments: dict[str, Any] = {
        "logits_ptr": logits,
        "visible_lens_ptr": visible_lens,
        "offsets_ptr": visible_lens if query_offsets is None else query_offsets,
        "table_ptr": visible_lens if page_table is None else page_table,
        "out_ptr": out,
        "values_ptr": workspace.values,
        "positions_ptr": workspace.positions,
        "arrivals_ptr": workspace.arrivals,
        "num_rows": problem.num_rows,
        "num_requests": 0 if page_table is None else page_table.shape[0],
        "max_len": _visible_columns(problem),
        "stride_logits": logits.stride(0),
        "stride_table": 0 if page_table is None else page_table.stride(0),
        "stride_out": out.stride(0),
        "TOPK": problem.topk,
        "PAGE_SIZE": problem.page_size,
        "RETURNS_SLOTS": problem.returns_slots,
        "BY_PTX": problem.arch.is_cuda and isinstance(_select_topk_kernel, triton.JITFunction),
        "ALIGNED": _is_aligned(problem, logits),
        "IS_LONG": _is_long(problem, config),
        "SPLITS": config.splits,
        "SPLIT_LEN": config.split_len,
        "LIST_LEN": config.list_len,
        "PREFETCH_ROWS": config.prefetch_rows,
        "TILES": config.tiles,
        "ROWS": config.tile_rows,
        "COLUMNS": config.tile_columns,
    }
    options: dict[str, Any] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    if config.max_registers is not None and problem.arch.is_cuda:
        options["maxnreg"] = config.max_registers
    return Launch(
        function=_select_topk_kernel,
        arguments=arguments,
        grid=(_num_programs(problem, config),),
        options=options,
    )


_plan = plan  # ``prepare`` has an argument of that name


def describe(problem: SelectTopkProblem) -> str:
    """How a problem would be run, for ``explain``."""
    config = configure(problem)
    if config.splits > 1:
        return f"rows beyond {config.capacity} columns split over up to {config.splits} programs"
    if _is_long(problem, config):
        return f"one program per row, in blocks of {config.capacity} columns"
    return "one program per row, held in registers"


def _visible_columns(problem: SelectTopkProblem) -> int:
    """The most positions a row can see."""
    if problem.returns_slots:
        return min(problem.num_columns, problem.max_pages * problem.page_size)
    return problem.num_columns


def _is_long(problem: SelectTopkProblem, config: SelectTopkConfig) -> bool:
    return _visible_columns(problem) > config.capacity


def _num_programs(problem: SelectTopkProblem, config: SelectTopkConfig) -> int:
    """A program per row; where each needs lists of its own, no more than run at once."""
    num_items = problem.num_rows * config.splits
    return min(num_items, problem.num_sms * config.programs_per_sm) if _is_long(problem, config) else num_items


def _is_aligned(problem: SelectTopkProblem, logits: torch.Tensor) -> bool:
    """Whether every group of four logits lies whole inside its row's storage, 16-byte aligned."""
    return problem.num_columns % 4 == 0 and logits.stride(0) % 4 == 0 and logits.data_ptr() % 16 == 0


KERNEL = Kernel(
    op="select_topk",
    name="triton_portable",
    arches=frozenset(arch for arch in Arch if arch.is_cuda or arch.is_rocm),
    rejects=rejects,
    prepare=prepare,
    rank=lambda problem: 20,
    plan=plan,
    form=describe,
)
