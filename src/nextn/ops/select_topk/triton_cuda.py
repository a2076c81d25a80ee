"""Exact top-k of long rows on NVIDIA GPUs: a program per row, which keeps its candidates in shared memory.

Contract: ``reference.py``. Hides how a row is streamed; what is done with its candidates is ``_triton_pool.py``'s.

A program asks for as much of its row as its registers hold, spread over all of it. What comes first is a sample, which
says between which two keys the k-th best lies almost surely. Every warp then reads a contiguous range on its own,
without a barrier: what is better than both keys is marked in a bit per position at once, what lies between them goes to
a pool. At the end the pool is counted in bins, the bin of the k-th is looked up, what the pool has before it is marked
too, and the bits are written out in order. Bounds that leave too few or too many, as where neighbours are alike, are
tried once more from a sample scattered over the row; a row that still does not fit, or has more equals than the pool
tells apart, is searched block by block (``_triton_rows.py``).

Floor: every visible logit read once, ``4 * sum(visible_lens)`` bytes (256 rows of 32K: 33.5 MB, 11 us at 3.0 TB/s);
some 14 instructions a logit. Where the L2 cache must first write back what lies in it, as in our measurements, a kernel
that only reads these rows takes 20 us.
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
from nextn.ops.select_topk._triton_pool import (
    KEY_SHIFT,
    LOG_SEARCH_BINS,
    MAX_POSITIONS,
    NEAR_LEN,
    NUM_BINS,
    POOL_LEN,
    add_above,
    allocate_pool,
    anew,
    clear_pool,
    count_bits,
    count_key,
    count_pairs,
    count_threads,
    drain,
    find_counter,
    keep_four,
    key_pairs,
    load_bits,
    load_samples,
    mark_near,
    mark_pairs,
    mark_position,
    note_positions,
    num_above,
    num_reserved,
    pool_address,
    put_pair,
    read_found,
    read_staged,
    reserve,
    sort_four,
    stage_marked,
    store_bits,
    sum_all,
    thread_index,
)
from nextn.ops.select_topk._triton_rows import (
    describe_tensors,
    find_request,
    first_places,
    search_and_write,
    slots_on,
    write_short_row,
)
from nextn.ops.select_topk._triton_search import (
    BEST_KEY,
    WORST_KEY,
    key_of,
    load_block,
    shift_for,
    value_of,
)
from nextn.ops.select_topk._triton_shared import MAX_STAGED, clear, load4
from nextn.ops.select_topk.problem import SelectTopkProblem

_INT32_MAX = tl.constexpr(0x7FFFFFFF)
_KEY_OF_LEAST = tl.constexpr(0x7F800000)  # of minus infinity
_CROWD = tl.constexpr(3000)  # logits between the bounds that call for finer bins; the pool holds some more
_POOL_LEN = tl.constexpr(POOL_LEN)
_MAX_PASSES = tl.constexpr(8)  # five are enough
_FALLBACK_TILES = tl.constexpr(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectTopkStreamConfig:
    """How a program reads its row.

    Attributes:
        num_warps: warps of a program; 4, 8, 16 or 32.
        tiles: groups of 128 logits that a warp holds at once; 8 or 16.
        max_registers: registers a thread may use, so that more programs fit a multiprocessor.
    """

    num_warps: int = 16
    tiles: int = 8
    max_registers: int | None = 64


@triton.jit
def _select_topk_stream_kernel(
    logits_ptr, visible_lens_ptr, offsets_ptr, table_ptr, out_ptr,
    num_requests, max_len, stride_logits, stride_table, stride_out,
    TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr, ALIGNED: tl.constexpr,
    NUM_WORDS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    space = allocate_pool(row)
    visible_len = tl.minimum(tl.maximum(tl.load(visible_lens_ptr + row), 0), max_len)
    logits = logits_ptr + row.to(tl.int64) * stride_logits
    out = out_ptr + row.to(tl.int64) * stride_out
    if visible_len > TOPK:
        _select_row(
            logits, visible_len, row, out, offsets_ptr, table_ptr, num_requests, stride_table, space,
            TOPK, PAGE_SIZE, RETURNS_SLOTS, ALIGNED, NUM_WORDS, TILES, WARPS,
        )  # fmt: skip
    else:
        table_row = table_ptr
        if RETURNS_SLOTS:
            table_row += find_request(offsets_ptr, row, num_requests, 1024).to(tl.int64) * stride_table
        write_short_row(out, visible_len, table_row, TOPK, PAGE_SIZE, RETURNS_SLOTS, WARPS * 32)


@triton.jit
def _select_row(
    logits, n, row, out, offsets_ptr, table_ptr, num_requests, stride_table, space,
    TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr, RETURNS_SLOTS: tl.constexpr, ALIGNED: tl.constexpr,
    NUM_WORDS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Select from a row that sees more than TOPK."""
    THREADS: tl.constexpr = WARPS * 32
    num_tiles = tl.cdiv(n, WARPS * 128)  # of each warp
    num_rounds = tl.cdiv(num_tiles, TILES)
    num_fours = n // 4 * 4
    lane = tl.arange(0, 32)[None, :] * 4
    start_of_warp = tl.arange(0, WARPS)[:, None] * (num_tiles * 128)
    first = start_of_warp + lane
    remaining = tl.minimum(num_fours - start_of_warp, num_tiles * 128) - lane
    source = logits + first
    values = _load_tiles(source, remaining, num_rounds, ALIGNED, TILES)
    last = num_fours + thread_index(WARPS)
    rest = load_bits(logits + last, last < n, 0x7FFFFFFF).to(tl.float32, bitcast=True)
    clear_pool(space, WARPS)
    table_row = table_ptr
    if RETURNS_SLOTS:
        num_ended = tl.zeros((WARPS, 32), tl.int32)
        for start in range(0, num_requests, THREADS):
            request = start + thread_index(WARPS)
            ends = tl.load(offsets_ptr + 1 + request, mask=request < num_requests, other=_INT32_MAX)
            num_ended += count_threads(ends <= row)
        table_row += tl.minimum(num_ended, num_requests - 1).to(tl.int64) * stride_table
    tl.debug_barrier()
    samples = ()
    for i in tl.static_range(TILES // 2):
        samples = samples + (values[4 * i + i % 4],)  # noqa: RUF005
    low = n * 0
    high = n * 0
    num_listed = n * 0
    num_tries = n * 0
    is_trying = n > 0
    num_sure = n * 0
    shift = n * 0
    is_solved = n < 0
    while is_trying:
        low, high = _bracket(samples, remaining, num_rounds, num_tries > 0, space, n, TOPK, TILES, WARPS)
        shift = shift_for((high - low).to(tl.uint32, bitcast=True), LOG_SEARCH_BINS)
        bound = value_of(high)
        bound = tl.where(bound == bound, bound, float("-inf"))
        # Beyond minus infinity lies NaN only, before which all others are sure; before the best key lies nothing.
        sure_bound = tl.where(low > BEST_KEY, value_of(tl.minimum(low - 1, _KEY_OF_LEAST)), float("nan"))
        sure_count = _stream(
            source, values, first, remaining, num_rounds, num_tiles, bound, sure_bound, space, ALIGNED, TILES, WARPS
        )
        if n % 4 != 0:
            is_sure = rest >= sure_bound
            is_listed = (rest >= bound) & (is_sure == 0)
            place, end = reserve(space, is_listed.to(tl.int32))
            put_pair(space, place, rest, last, is_listed & (end <= _POOL_LEN))
            sure_count += is_sure.to(tl.int32)
        add_above(space, sure_count)
        tl.debug_barrier()
        num_listed = num_reserved(space)
        num_sure = num_above(space)
        is_solved = (num_sure < TOPK) & (num_sure + num_listed >= TOPK) & (num_listed <= _POOL_LEN)
        is_trying = (is_solved == 0) & (num_tries == 0)
        num_tries += 1
        if is_trying:
            tl.debug_barrier()
            clear_pool(space, WARPS)
            samples = load_samples(logits, anew(n), TILES // 2 * THREADS, WARPS)
            values = _load_tiles(source, remaining, num_rounds, ALIGNED, TILES)
            tl.debug_barrier()
        elif n % 4 != 0:
            mark_position(space, last, rest >= sure_bound)
    if is_solved:
        key_pairs(space, num_listed, low, shift, WARPS)
        tl.debug_barrier()
        is_solved = _select_from_pool(
            num_listed, num_sure, low, high, shift, out, table_row, space, TOPK, PAGE_SIZE, RETURNS_SLOTS, NUM_WORDS,
            WARPS,
        )  # fmt: skip
    if is_solved == 0:
        whole_row = table_ptr
        if RETURNS_SLOTS:
            whole_row += find_request(offsets_ptr, row, num_requests, 1024).to(tl.int64) * stride_table
        _select_in_blocks(logits, n, low, high, out, whole_row, space, TOPK, PAGE_SIZE, RETURNS_SLOTS, ALIGNED, WARPS)


@triton.jit
def _offset_of(tile: tl.constexpr, num_rounds, TILES: tl.constexpr):
    """Where a warp's tile of the first round lies; those of the first few loads are spread over all its range."""
    if TILES == 16:
        return (((tile & 1) << 3) | ((tile & 2) << 1) | ((tile & 4) >> 1) | (tile >> 3)) * (num_rounds * 128)
    else:
        return (((tile & 1) << 2) | (tile & 2) | (tile >> 2)) * (num_rounds * 128)


@triton.jit
def _load_tiles(source, remaining, num_rounds, ALIGNED: tl.constexpr, TILES: tl.constexpr):
    """Each thread's fours of one round, NaN from ``remaining`` on."""
    num_rounds = anew(num_rounds)
    values = ()
    for tile in tl.static_range(TILES):
        offset = _offset_of(tile, num_rounds, TILES)
        values = values + load4(source + offset, offset, remaining, ALIGNED, True)
    return values


@triton.jit
def _stream(
    source, values, position, remaining, num_rounds, num_tiles, bound, sure_bound, space,
    ALIGNED: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Mark what reaches ``sure_bound``, and put what reaches only ``bound`` into the pool.

    Args:
        source: each thread's first logit.
        values: those of the first round.
        position: position of the first.
        remaining: the position from ``position`` on at which the thread has nothing more.

    Returns:
        How many logits of each thread reach ``sure_bound``.
    """
    sure_count = tl.zeros((WARPS, 32), tl.int32)
    NUM: tl.constexpr = TILES // 8  # what the tiles say takes as many times 32 bits
    for round_number in range(0, num_rounds):
        words = ()
        for half in tl.static_range(NUM):
            reaching = tl.zeros((WARPS, 32), tl.int32)
            sure = tl.zeros((WARPS, 32), tl.int32)
            for i in tl.static_range(8):
                reaching, sure = sort_four(
                    reaching, sure, values[32 * half + 4 * i], values[32 * half + 4 * i + 1],
                    values[32 * half + 4 * i + 2], values[32 * half + 4 * i + 3],
                    bound, sure_bound, 4 * (((i & 1) << 2) | (i & 2) | (i >> 2)),
                )  # fmt: skip
            listed = reaching & ~sure
            place, end = reserve(space, count_bits(listed))
            listed = tl.where(end <= _POOL_LEN, listed, 0)
            address = pool_address(space, place)
            for tile in tl.static_range(8):  # in the order of their bits, as their positions are
                address = keep_four(
                    address, listed, values, 32 * half + 4 * (((tile & 1) << 2) | (tile & 2) | (tile >> 2)), 4 * tile
                )
            words = words + (listed, sure, place)  # noqa: RUF005
        source += 128
        remaining -= 128
        if round_number + 1 < num_rounds:
            values = _load_tiles(source, remaining, num_rounds, ALIGNED, TILES)
        spacing = anew(num_rounds) * (NUM * 128)
        for half in tl.static_range(NUM):
            listed, sure, place = words[3 * half], words[3 * half + 1], words[3 * half + 2]
            start = position + half * num_rounds * 128
            num_live = tl.cdiv(num_tiles - round_number - half * num_rounds, num_rounds * NUM)
            store_bits(space, sure, start, spacing, num_live)
            sure_count += count_bits(sure)
            note_positions(space, listed, place, start, spacing)
        position += 128
    return sure_count


@triton.jit
def _bracket(
    samples, remaining, num_rounds, is_scattered, space, n, TOPK: tl.constexpr, TILES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Keys between which the TOPK-th best of a row almost surely lies.

    Args:
        samples: ``TILES // 2`` of each thread's logits.
        remaining: says which of them there are, if they are not scattered over the row.

    Returns:
        best, worst: its better and its worse end; either fails once in 300 000 rows whose neighbours have nothing in
            common.
    """
    BINS: tl.constexpr = NUM_BINS
    SHIFT: tl.constexpr = KEY_SHIFT
    SAMPLES: tl.constexpr = TILES // 2 * WARPS * 32
    num_rounds = anew(num_rounds)
    n = anew(n)
    for i in tl.static_range(TILES // 2):
        is_sample = is_scattered | (_offset_of(i, num_rounds, TILES) < remaining)
        count_key(space, (key_of(samples[i]) >> SHIFT) + (BINS >> 1), is_sample)
    tl.debug_barrier()
    words, before, upto = drain(space, WARPS)
    share = TOPK / n.to(tl.float32)
    expected = share * sum_all(space, WARPS).to(tl.float32)
    deviation = tl.sqrt(expected * (1.0 - share))
    rank_best = (expected - 4.5 * deviation).to(tl.int32)
    rank_worst = (expected + 4.5 * deviation).to(tl.int32) + 2
    find_counter(space, words, before, upto, rank_best, 0, WARPS)
    find_counter(space, words, before, upto, rank_worst, 1, WARPS)
    tl.debug_barrier()
    has_best, bin_best, num_better, _ = read_found(space, 0)
    has_worst, bin_worst, num_before_worst, num_worst = read_found(space, 1)
    num_better = tl.where(has_best, num_better, 0)
    low = tl.where(has_best, (bin_best - (BINS >> 1)) << SHIFT, BEST_KEY)
    high = tl.where(has_worst, ((bin_worst - (BINS >> 1) + 1) << SHIFT) - 1, WORST_KEY)
    # Bins are fractions of a power of 2: logits far from 0 crowd in few of them, and then those need finer ones.
    num_between = num_before_worst + num_worst - num_better
    if has_worst & (num_between * (n // SAMPLES + 1) > _CROWD):
        width = (high - low).to(tl.uint32, bitcast=True)
        shift = shift_for(width, LOG_SEARCH_BINS)
        for i in tl.static_range(TILES // 2):
            distance = (key_of(samples[i]) - low).to(tl.uint32, bitcast=True)
            is_sample = is_scattered | (_offset_of(i, num_rounds, TILES) < remaining)
            count_key(space, (distance >> shift).to(tl.int32) * 2, is_sample & (distance <= width))
        tl.debug_barrier()
        words, before, upto = drain(space, WARPS)
        find_counter(space, words, before, upto, rank_best - num_better, 0, WARPS)
        find_counter(space, words, before, upto, rank_worst - num_better, 1, WARPS)
        tl.debug_barrier()
        has_best, bin_best, _, _ = read_found(space, 0)
        has_worst, bin_worst, _, _ = read_found(space, 1)
        first = low
        low = tl.where(has_best, first + ((bin_best >> 1) << shift), first)
        past = tl.minimum((((bin_worst >> 1) + 1) << shift).to(tl.uint32, bitcast=True) - 1, width)
        high = tl.where(has_worst, first + past.to(tl.int32), high)
    return low, high


@triton.jit
def _select_from_pool(
    num_listed, num_sure, low, high, shift, out, table_row, space, TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr,
    RETURNS_SLOTS: tl.constexpr, NUM_WORDS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Write the ``num_sure`` marked and the best of the pool, TOPK in all; returns whether that could be done."""
    THREADS: tl.constexpr = WARPS * 32
    thread = thread_index(WARPS)
    want = TOPK - num_sure
    num_kept = num_listed * 0
    num_near = num_listed * 0
    num_passes = num_listed * 0
    is_searching = num_listed > 0
    is_solved = num_listed < 0
    while is_searching:
        words, before, upto = drain(space, WARPS)
        find_counter(space, words, before, upto, want, 0, WARPS)
        tl.debug_barrier()
        found, bin_index, num_before, num_in_bin = read_found(space, 0)
        is_searching = num_listed < 0
        if found:
            offset = (bin_index >> 1) << shift
            width = (high - low).to(tl.uint32, bitcast=True)
            span = tl.minimum(((1 << shift) - 1).to(tl.uint32), width - offset.to(tl.uint32))
            low += offset
            high = low + span.to(tl.int32)
            num_kept = want - num_before
            num_near = tl.where(num_kept == num_in_bin, 0, num_in_bin)
            is_solved = num_near <= NEAR_LEN
            is_searching = (num_near > NEAR_LEN) & (shift > 0) & (num_passes < _MAX_PASSES)
        if is_searching:
            width = (high - low).to(tl.uint32, bitcast=True)
            shift = shift_for(width, LOG_SEARCH_BINS)
            add_above(space, count_pairs(space, num_listed, low, width, shift, WARPS))
            tl.debug_barrier()
            want = TOPK - num_sure - num_above(space)
            num_passes += 1
    if is_solved:
        marked = tl.where(num_near > 0, tl.maximum(low, BEST_KEY + 1) - 1, high)
        mark_pairs(space, num_listed, marked, high, WARPS)
        tl.debug_barrier()
        if num_near > 0:
            mark_near(space, num_near, num_kept, WARPS)
        tl.debug_barrier()
        stage_marked(space, NUM_WORDS, WARPS)
        tl.debug_barrier()
        positions = ()
        for start in tl.static_range(0, TOPK, THREADS):
            positions = positions + (read_staged(space, start + thread, start + thread < TOPK),)  # noqa: RUF005
        slots = ()
        for i in tl.static_range((TOPK + THREADS - 1) // THREADS):
            slot = positions[i]
            if RETURNS_SLOTS:
                page = slot.to(tl.uint32, bitcast=True) // PAGE_SIZE
                slot = load_bits(table_row + page, i * THREADS + thread < TOPK, -1)
            slots = slots + (slot,)  # noqa: RUF005
        for i in tl.static_range((TOPK + THREADS - 1) // THREADS):
            slot = slots[i]
            if RETURNS_SLOTS:
                slot = slots_on(slot, positions[i], PAGE_SIZE)
            tl.store(out + i * THREADS + thread, slot, mask=i * THREADS + thread < TOPK)
    return is_solved


@triton.jit
def _select_in_blocks(
    logits, n, low, high, out, table_row, space, TOPK: tl.constexpr, PAGE_SIZE: tl.constexpr,
    RETURNS_SLOTS: tl.constexpr, ALIGNED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Write the TOPK best of a row in passes over all of it."""
    CAPACITY: tl.constexpr = _FALLBACK_TILES * WARPS * 128
    tl.debug_barrier()
    clear(space, 4096, WARPS * 32, True)
    block_len = tl.minimum(n, CAPACITY)
    live_tiles = tl.cdiv(block_len, WARPS * 128)
    values = load_block(logits, block_len, live_tiles, ALIGNED, _FALLBACK_TILES, WARPS, True)
    tl.debug_barrier()
    search_and_write(
        logits, values, first_places(n * 0, live_tiles, _FALLBACK_TILES, WARPS), n, live_tiles,
        tl.cdiv(n, CAPACITY), low, high, out, table_row, space, out, n < 0,
        TOPK, PAGE_SIZE, RETURNS_SLOTS, True, ALIGNED, True, 12, _FALLBACK_TILES, WARPS,
    )  # fmt: skip


def configure(problem: SelectTopkProblem) -> SelectTopkStreamConfig:
    """The configuration for a problem.

    Times of these choices stand in benchmarks/results/ops.jsonl. On an H100, cold, 512 rows of 16K took 27.8 us with 8
    warps, 29.4 with 16 and 35.2 with 4. In a version that took 29.5 for 256 rows of 32K with 16 warps, 32 took 32.6 and
    8 took 39.4.
    """
    if problem.num_rows <= problem.num_sms:
        return SelectTopkStreamConfig(num_warps=32)  # a program has a multiprocessor to itself
    return SelectTopkStreamConfig(num_warps=8 if problem.visible_columns <= 16384 else 16)


def rejects(problem: SelectTopkProblem) -> str | None:
    """Why this kernel cannot take ``problem``; None if it can."""
    if not isinstance(_select_topk_stream_kernel, triton.JITFunction):
        return "Triton's interpreter does not run PTX"
    if problem.topk > MAX_STAGED:
        return f"k {problem.topk} is above {MAX_STAGED}, more than its shared memory holds"
    if problem.visible_columns > MAX_POSITIONS:
        return f"rows see up to {problem.visible_columns} columns; it has bits for {MAX_POSITIONS}"
    return None


def plan(
    problem: SelectTopkProblem, *, device: torch.device | str, config: SelectTopkStreamConfig | None = None
) -> SelectTopkStreamConfig:
    """The configuration of a forward; it needs no memory."""
    return configure(problem) if config is None else config


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
    config = plan.data if plan is not None and plan.data is not None else configure(problem)
    columns = problem.visible_columns
    arguments = describe_tensors(
        problem,
        logits=logits,
        visible_lens=visible_lens,
        query_offsets=query_offsets,
        page_table=page_table,
        out=out,
    )
    arguments |= {
        "TILES": config.tiles,
        "NUM_WORDS": max(1, -(-columns // (config.num_warps * 1024))),
        "WARPS": config.num_warps,
    }
    options: dict[str, Any] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return Launch(function=_select_topk_stream_kernel, arguments=arguments, grid=(problem.num_rows,), options=options)


def _rank(problem: SelectTopkProblem) -> int:
    """Above the portable kernel where it was faster: short rows fit that one's registers, few long ones it splits.

    On an H100 (benchmarks/results/ops.jsonl): 26 us against 44 at 256 x 32K, 16.1 against 17.4 at 16 x 64K, 16.8
    against 16.1 at 256 x 8K.
    """
    columns = problem.visible_columns
    if columns <= 16384:
        return 30 if columns > 8192 and problem.num_rows > 2 * problem.num_sms else 10
    return 30 if columns <= 32768 or problem.num_rows >= 16 else 10


KERNEL = Kernel(
    op="select_topk",
    name="triton_cuda",
    arches=frozenset(arch for arch in Arch if arch.is_cuda),
    rejects=rejects,
    prepare=prepare,
    rank=_rank,
    plan=plan,
    configure=configure,
    form=lambda problem: "one program per row, candidates in shared memory",
)
