"""Exact top-k of every row in Triton: a sample says roughly where the k-th lies, counting in bins finds it.

Contract: ``reference.py``. Hides what a program does with a row, and how launches are cut.

A row that fits a program's registers is searched there (``_triton_search.py``). A longer one is split in up to
``parts``; each program lists what reaches a bound that a sample of the whole row puts just below the k-th, and the last
to finish searches the lists (``_triton_lists.py``). Should the bound leave too few or too many, that program searches
the row itself, block by block.

Floor: every visible logit read once, ``4 * sum(visible_lens)`` bytes (256 rows of 32K: 33.5 MB, 11 us at 3.0 TB/s);
some 6 instructions a logit to list what matters, and 20 for each of up to 8192 that are searched.
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
from nextn.ops._rows import Fills
from nextn.ops.select_topk._triton_lists import arrive, keep, load_lists, read_sizes
from nextn.ops.select_topk._triton_rows import (
    describe_tensors,
    find_request,
    first_places,
    search_and_write,
    write_short_row,
)
from nextn.ops.select_topk._triton_search import (
    bracket,
    count_samples,
    load_block,
    load_samples,
    refine,
    sample_block,
    value_of,
)
from nextn.ops.select_topk._triton_shared import MAX_BINS, MAX_STAGED, allocate, clear, no_counts, prefetch
from nextn.ops.select_topk.problem import SelectTopkProblem

_BULK_COPY_ARCHES = frozenset({Arch.SM90, Arch.SM100, Arch.SM103, Arch.SM120})


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectTopkConfig:
    """How one launch is cut.

    Attributes:
        num_warps: warps of a program.
        tiles: tiles of ``num_warps * 128`` logits a program holds in registers.
        parts: programs that may share a row which exceeds the registers.
        part_len: positions a program gets before a row is split further.
        list_len: logits a program may list of its part; a multiple of 4.
        samples: logits of a long row that set the bound; a multiple of ``num_warps * 32``.
        bins: counters; a power of two, on NVIDIA a multiple of ``num_warps * 128``.
        programs_per_sm: programs a multiprocessor runs at once, where each has a list of its own.
        prefetches: whether a program asks the L2 cache for its whole part at once. Hopper and later.
        max_registers: registers a thread may use, so that more programs fit a multiprocessor; None leaves it to the
            compiler. NVIDIA only.
    """

    num_warps: int = 16
    tiles: int = 4
    parts: int = 1
    part_len: int = 8192
    list_len: int = 4096
    samples: int = 1024
    bins: int = MAX_BINS
    programs_per_sm: int = 2
    prefetches: bool = False
    max_registers: int | None = None

    @property
    def capacity(self) -> int:
        """Logits a program holds at once."""
        return self.tiles * self.num_warps * 128


@dataclass(frozen=True, kw_only=True)
class SelectTopkWorkspace:
    """Scratch memory of one forward, shared by its layers; two launches must not use it at the same time.

    Attributes:
        config: the configuration it was sized for.
        pairs: int32 ``[L, 2]``, bits of the logits that programs list, and their positions.
        counts: int32 ``[R * parts]``, how many logits reached the bound in each part.
        arrivals: int32 ``[R]``, programs that have finished their part of a row; zero between launches.
    """

    config: SelectTopkConfig
    pairs: torch.Tensor
    counts: torch.Tensor
    arrivals: torch.Tensor


@triton.jit(do_not_specialize=["num_rows"])  # 1 would become a constexpr, which has no .to
def _select_topk_kernel(
    logits_ptr, visible_lens_ptr, offsets_ptr, table_ptr, out_ptr, pairs_ptr, counts_ptr, arrivals_ptr,
    num_rows, num_requests, max_len, stride_logits, stride_table, stride_out,
    TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr, BY_PTX: tl.constexpr,
    PREFETCHES: tl.constexpr, ALIGNED: tl.constexpr, IS_LONG: tl.constexpr, PARTS: tl.constexpr, PART_LEN: tl.constexpr,
    LIST_LEN: tl.constexpr, SAMPLES: tl.constexpr, LOG_BINS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    space = allocate(program, BY_PTX)
    clear(space, 1 << LOG_BINS, WARPS * 32, BY_PTX)
    for item in range(program, num_rows * PARTS, tl.num_programs(0)):
        row = item // PARTS
        part = item % PARTS
        visible_len = tl.minimum(tl.maximum(tl.load(visible_lens_ptr + row), 0), max_len)
        logits = logits_ptr + row.to(tl.int64) * stride_logits
        out = out_ptr + row.to(tl.int64) * stride_out
        table_row = table_ptr
        if RETURNS_SLOTS:
            table_row += find_request(offsets_ptr, row, num_requests, 1024).to(tl.int64) * stride_table
        if visible_len > TOPK:
            region = program * 0 + item - part if PARTS > 1 else program
            _select_row(
                logits, visible_len, part, out, table_row, space, pairs_ptr + region.to(tl.int64) * (2 * LIST_LEN),
                counts_ptr + row * PARTS, arrivals_ptr + row,
                TOPK, PAGE_SIZE, RETURNS_SLOTS, BY_PTX, PREFETCHES, ALIGNED, IS_LONG, PARTS, PART_LEN, LIST_LEN,
                SAMPLES, LOG_BINS, TILES, WARPS,
            )  # fmt: skip
        elif part == 0:
            write_short_row(out, visible_len, table_row, TOPK, PAGE_SIZE, RETURNS_SLOTS, WARPS * 32)


@triton.jit
def _select_row(
    logits, n, part, out, table_row, space, pairs, counts_ptr, arrivals_ptr,
    TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr, BY_PTX: tl.constexpr,
    PREFETCHES: tl.constexpr, ALIGNED: tl.constexpr, IS_LONG: tl.constexpr, PARTS: tl.constexpr, PART_LEN: tl.constexpr,
    LIST_LEN: tl.constexpr, SAMPLES: tl.constexpr, LOG_BINS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """List one program's part of a row that sees more than TOPK; if it is the last, or the only one, select."""
    CAPACITY: tl.constexpr = TILES * WARPS * 128
    length = n
    if IS_LONG:  # noqa: SIM102 - compiled away or not
        if n > CAPACITY:
            length = tl.cdiv(tl.maximum(tl.cdiv(n, PARTS), PART_LEN), 128) * 128
    start = part * length
    if start < n:
        block_len = tl.minimum(tl.minimum(length, n - start), CAPACITY)
        live_tiles = tl.cdiv(block_len, WARPS * 128)
        samples = (tl.full((WARPS, 32), float("nan"), tl.float32),) * (SAMPLES // (WARPS * 32))
        if IS_LONG:  # noqa: SIM102 - compiled away or not
            if n > CAPACITY:  # asked for first, since the bound is needed first
                samples = load_samples(logits, n, SAMPLES, WARPS)
        values = load_block(logits + start, block_len, live_tiles, ALIGNED, TILES, WARPS, BY_PTX)
        if PREFETCHES:
            rest = tl.minimum(length, n - start) - CAPACITY
            if rest >= 4:
                prefetch(logits + start + CAPACITY, rest // 4 * 16)
        tl.debug_barrier()  # counters are cleared, and what the row before staged is read
        low, high = _bracket(
            samples, values, n, live_tiles, space, TOPK, BY_PTX, IS_LONG, SAMPLES, LOG_BINS, TILES, WARPS
        )
        num_blocks = n * 0 + 1
        is_last = n > 0
        from_lists = n < 0
        places = first_places(0, live_tiles, TILES, WARPS)
        if IS_LONG:  # noqa: SIM102 - compiled away or not
            if n > CAPACITY:
                num_listed = keep(
                    values, logits, start, tl.minimum(start + length, n), value_of(high),
                    pairs + (part * (2 * LIST_LEN)).to(tl.int64), BY_PTX, ALIGNED, LIST_LEN, TILES, WARPS,
                )  # fmt: skip
                is_last = arrive(counts_ptr, arrivals_ptr, part, num_listed, tl.cdiv(n, length), PARTS)
                if is_last:
                    sizes, from_lists = read_sizes(
                        counts_ptr, num_listed, tl.cdiv(n, length), TOPK, CAPACITY, LIST_LEN, PARTS
                    )
                    num_blocks = tl.where(from_lists, 1, tl.cdiv(n, CAPACITY))
                    if from_lists:
                        values, places, live_tiles = load_lists(pairs, sizes, LIST_LEN, PARTS, TILES, WARPS, BY_PTX)
        if is_last:
            search_and_write(
                logits, values, places, n, live_tiles, num_blocks, low, high, out, table_row, space, pairs, from_lists,
                TOPK, PAGE_SIZE, RETURNS_SLOTS, BY_PTX, ALIGNED, IS_LONG, LOG_BINS, TILES, WARPS,
            )  # fmt: skip


@triton.jit
def _bracket(
    samples, values, n, live_tiles, space, TOPK: tl.constexpr, BY_PTX: tl.constexpr, IS_LONG: tl.constexpr,
    SAMPLES: tl.constexpr, LOG_BINS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Keys between which the TOPK-th best of a row almost surely lies; every program of a row gets the same."""
    counts = no_counts(space, 1 << LOG_BINS, BY_PTX)
    num_samples = tl.cdiv(n, 4)
    if n <= TILES * WARPS * 128:
        counts = sample_block(counts, values, n, live_tiles, LOG_BINS, TILES, WARPS, BY_PTX)
    else:
        counts = count_samples(counts, samples, LOG_BINS, SAMPLES, WARPS, BY_PTX)
        num_samples = n * 0 + SAMPLES
    low, high, rank_in_bin = bracket(counts, space, num_samples, n, n * 0 + TOPK, IS_LONG, LOG_BINS, WARPS * 32, BY_PTX)
    if IS_LONG:  # noqa: SIM102 - compiled away or not
        if (n > TILES * WARPS * 128) & (rank_in_bin > 0):
            first = high - ((1 << (32 - LOG_BINS)) - 1)
            high = refine(samples, space, first, rank_in_bin, LOG_BINS, SAMPLES, WARPS, BY_PTX)
    return low, high


def configure(problem: SelectTopkProblem) -> SelectTopkConfig:
    """The configuration for a problem.

    What the configurations chosen here take stands in benchmarks/results/ops.jsonl.
    """
    columns = problem.visible_columns
    registers = 64 if problem.num_rows > problem.num_sms else None  # two programs to a multiprocessor
    if columns <= 8192:
        return SelectTopkConfig(bins=2048, max_registers=registers)
    bins = MAX_BINS if problem.arch.is_cuda else 2048
    if columns <= 16384:
        return SelectTopkConfig(tiles=8, bins=bins)
    parts = 32
    while parts > 2 and (problem.num_rows * parts > problem.num_sms or parts * 4096 >= columns):
        parts //= 2
    return SelectTopkConfig(
        parts=1 if problem.num_rows > 512 else parts,
        samples=1024 if columns <= 131072 else 4096,
        bins=bins,
        prefetches=problem.num_rows <= problem.num_sms and problem.arch in _BULK_COPY_ARCHES,
        max_registers=registers,
    )


def rejects(problem: SelectTopkProblem) -> str | None:
    """Why this kernel cannot take ``problem``; None if it can."""
    if problem.topk > MAX_STAGED:
        return f"k {problem.topk} is above {MAX_STAGED}, more than its shared memory holds"
    return None


def plan(
    problem: SelectTopkProblem,
    *,
    device: torch.device | str,
    config: SelectTopkConfig | None = None,
    fills: Fills | None = None,
) -> SelectTopkWorkspace:
    """Allocate the scratch memory of a forward.

    Args:
        problem: sizes; must not be rejected.
        device: where the logits will be.
        config: how to cut the launch; chosen by ``configure`` if None.
        fills: asked for memory that must start with one value; filled here if None.
    """
    config = configure(problem) if config is None else config
    assert problem.topk <= config.capacity, "registers must hold the answer"
    assert config.list_len % 4 == 0, "lists are read by fours"
    assert config.samples % (config.num_warps * 32) == 0, "every thread takes as many samples"
    is_long = _is_long(problem, config)
    num_listed = _num_programs(problem, config) * config.list_len if is_long else 0
    num_shared_rows = problem.num_rows if is_long and config.parts > 1 else 0
    if fills is None:
        arrivals = torch.zeros(num_shared_rows, dtype=torch.int32, device=device)
    else:
        arrivals = fills.ask((num_shared_rows,), torch.int32, 0)
    return SelectTopkWorkspace(
        config=config,
        pairs=torch.empty(num_listed, 2, dtype=torch.int32, device=device),
        counts=torch.empty(num_shared_rows * config.parts, dtype=torch.int32, device=device),
        arrivals=arrivals,
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
    arguments = describe_tensors(
        problem,
        logits=logits,
        visible_lens=visible_lens,
        query_offsets=query_offsets,
        page_table=page_table,
        out=out,
    )
    arguments |= {
        "pairs_ptr": workspace.pairs,
        "counts_ptr": workspace.counts,
        "arrivals_ptr": workspace.arrivals,
        "num_rows": problem.num_rows,
        "BY_PTX": problem.arch.is_cuda and isinstance(_select_topk_kernel, triton.JITFunction),
        "PREFETCHES": config.prefetches and arguments["ALIGNED"],
        "IS_LONG": _is_long(problem, config),
        "PARTS": config.parts if _is_long(problem, config) else 1,
        "PART_LEN": config.part_len,
        "LIST_LEN": config.list_len,
        "SAMPLES": config.samples,
        "LOG_BINS": config.bins.bit_length() - 1,
        "TILES": config.tiles,
        "WARPS": config.num_warps,
    }
    # A thread holds one element of each tensor: with two, or two threads to one, sums would be no cheaper.
    num_warps = config.num_warps // 2 if problem.arch.is_rocm else config.num_warps
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
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
    if not _is_long(problem, config):
        return "one program per row, held in registers"
    if config.parts > 1:
        return f"rows beyond {config.capacity} columns split over up to {config.parts} programs"
    return f"one program per row, in blocks of {config.capacity} columns"


def _is_long(problem: SelectTopkProblem, config: SelectTopkConfig) -> bool:
    return problem.visible_columns > config.capacity


def _num_programs(problem: SelectTopkProblem, config: SelectTopkConfig) -> int:
    """A program per row and part; where each needs a list of its own, no more than run at once."""
    if not _is_long(problem, config):
        return problem.num_rows
    num_items = problem.num_rows * config.parts
    return num_items if config.parts > 1 else min(num_items, problem.num_sms * config.programs_per_sm)


KERNEL = Kernel(
    op="select_topk",
    name="triton_portable",
    arches=frozenset(arch for arch in Arch if arch.is_cuda or arch.is_rocm),
    rejects=rejects,
    prepare=prepare,
    configure=configure,
    rank=lambda problem: 20,
    plan=plan,
    form=describe,
    takes_fills=True,
)
