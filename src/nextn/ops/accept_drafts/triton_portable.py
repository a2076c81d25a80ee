"""Drafts accepted or replaced in portable Triton: one launch for greedy, sampled and mixed batches.

Contract: ``reference.py``. Hides how a row is shared: a program reduces one chunk of the vocabulary, the last program
of a row judges the draft that follows it, the last of a request counts and draws (``_triton_distribution.py``).

Greedy results are the reference's. So are sampled ones, from the same coins, but where a coin falls within float32
rounding of an edge: probabilities differ by about 1e-7 of themselves, as the order of their sums does.

Floor: the logits read once, ``4 R V`` bytes (256 rows of 129280: 132 MB, 44 us at 3.0 TB/s). One program then reads a
truncated row again, three to five times until it is cut, and a sampled request's last row up to twice to draw from it;
a pass that cuts takes 50 to 60 us, mostly for exact quotients, however few rows there are.
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
from nextn.ops.accept_drafts._sampling import ACCEPT, RESAMPLE, SamplingTensors
from nextn.ops.accept_drafts._triton_distribution import (
    NO_EDGE,
    NO_TOKEN,
    count_on_edge,
    draw_uniform,
    keep,
    load_logits,
    order_bits,
    scale_logits,
    truncate,
)
from nextn.ops.accept_drafts.problem import AcceptDraftsProblem

_ACCEPT = tl.constexpr(ACCEPT)
_RESAMPLE = tl.constexpr(RESAMPLE)
_INT32_MAX = tl.constexpr(0x7FFFFFFF)
_REQUEST_BLOCK = 256  # requests whose rows' ends are looked at in one load
_MINUS_INF = tl.constexpr(float("-inf"))


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptDraftsConfig:
    """How one launch is cut.

    Attributes:
        chunk: tokens of a program; a power of two.
        block: tokens at a time where one program reads a whole row; a power of two.
        num_warps: warps of a program.
        max_registers: registers a thread may use, so that more programs fit a multiprocessor; None leaves it to the
            compiler. NVIDIA only.
    """

    chunk: int = 8192
    block: int = 8192
    num_warps: int = 8
    max_registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class AcceptDraftsWorkspace:
    """Scratch memory of one launch at a time.

    Attributes:
        config: the configuration it was sized for.
        arrivals: int32 ``[R + B]``, programs that have finished their part of a row, and rows of a request; zero
            between launches.
        largest: float32 ``[R, S + 1]``, the largest logit of each of S chunks, and then of the row.
        best: int32 ``[R, S + 1]``, its token.
        totals: float64 ``[R, S + 1]``, sums of exponentials.
        verdicts: int32 ``[R, 3]``, whether the draft after the row is accepted, and where the row is cut.
        lists: int32 ``[R, block]``, tokens among which the search for a cut ends; empty if all requests are greedy.
    """

    config: AcceptDraftsConfig
    arrivals: torch.Tensor
    largest: torch.Tensor
    best: torch.Tensor
    totals: torch.Tensor
    verdicts: torch.Tensor
    lists: torch.Tensor


@triton.jit(
    do_not_specialize=["num_rows", "num_requests", "vocab"]
)  # 1 would become a constexpr, which no loop carries
def _accept_drafts_kernel(
    logits_ptr, drafts_ptr, offsets_ptr, probs_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr,
    lens_ptr, ids_ptr, arrivals_ptr, largest_ptr, best_ptr, totals_ptr, verdicts_ptr, lists_ptr,
    num_rows, num_requests, vocab, logits_row_stride, logits_stride, drafts_stride, offsets_stride,
    probs_row_stride, probs_stride, positions_stride, temperature_stride, top_k_stride, top_p_stride, seed_stride,
    lens_stride, ids_stride,
    SAMPLED: tl.constexpr, HAS_PROBS: tl.constexpr, TRUNCATED: tl.constexpr, SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, REQUEST_BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < num_requests:
        first, end = _rows_of(offsets_ptr, offsets_stride, program, num_rows)
        if first >= end:
            tl.store(lens_ptr + program.to(tl.int64) * lens_stride, 0)
    row = program // SPLITS
    split = program % SPLITS
    request = _find_request(row, offsets_ptr, offsets_stride, num_requests, REQUEST_BLOCK)
    start = row * 0
    stop = start
    if request < num_requests:
        start, stop = _rows_of(offsets_ptr, offsets_stride, request, num_rows)
    if (row >= start) & (row < stop):
        row64 = row.to(tl.int64)
        row_ptr = logits_ptr + row64 * logits_row_stride
        temperature = tl.full((), 0.0, tl.float32)
        if SAMPLED:
            temperature = tl.load(temperature_ptr + request.to(tl.int64) * temperature_stride)
        _reduce_chunk(
            row_ptr, logits_stride, vocab, temperature, split, row64 * (SPLITS + 1) + split,
            largest_ptr, best_ptr, totals_ptr, SAMPLED, CHUNK,
        )  # fmt: skip
        if _arrive(arrivals_ptr + row, SPLITS):
            best, largest, total = _merge_chunks(
                row64 * (SPLITS + 1), temperature, largest_ptr, best_ptr, totals_ptr, SAMPLED, SPLITS, SPLIT_BLOCK
            )
            has_draft = row + 1 < stop
            draft = tl.load(drafts_ptr + (row64 + 1) * drafts_stride, mask=has_draft, other=-1)
            is_accepted = has_draft & (draft == best)
            if SAMPLED:
                is_token = has_draft & (draft >= 0) & (draft < vocab)
                is_accepted = _judge_draft(
                    row_ptr, logits_stride, vocab, row64, request.to(tl.int64), draft, is_token, best, largest, total,
                    temperature, top_k_ptr, top_k_stride, top_p_ptr, top_p_stride, seed_ptr, seed_stride,
                    probs_ptr, probs_row_stride, probs_stride, positions_ptr, positions_stride,
                    totals_ptr + row64 * (SPLITS + 1) + SPLITS, verdicts_ptr + row64 * 3, lists_ptr + row64 * BLOCK,
                    HAS_PROBS, TRUNCATED, BLOCK,
                )  # fmt: skip
            tl.store(verdicts_ptr + row64 * 3, is_accepted.to(tl.int32))
            if _arrive(arrivals_ptr + num_rows + request, stop - start):
                _decide(
                    start, stop, request.to(tl.int64), temperature, vocab, logits_ptr, logits_row_stride, logits_stride,
                    drafts_ptr, drafts_stride, probs_ptr, probs_row_stride, probs_stride, positions_ptr,
                    positions_stride, seed_ptr, seed_stride, lens_ptr, lens_stride, ids_ptr, ids_stride,
                    largest_ptr, best_ptr, totals_ptr, verdicts_ptr, SAMPLED, HAS_PROBS, TRUNCATED, SPLITS,
                    SPLIT_BLOCK, CHUNK, BLOCK,
                )  # fmt: skip
    elif (row < num_rows) & (split == 0):
        tl.store(ids_ptr + row.to(tl.int64) * ids_stride, -1)


@triton.jit
def _rows_of(offsets_ptr, stride, request, num_rows):
    """First row of a request and the one past its last, inside the batch whatever the offsets are."""
    place = offsets_ptr + request.to(tl.int64) * stride
    start = tl.minimum(tl.maximum(tl.load(place), 0), num_rows)
    return start, tl.minimum(tl.load(place + stride), num_rows)


@triton.jit
def _find_request(row, offsets_ptr, stride, num_requests, BLOCK: tl.constexpr):
    """The request of a row: how many requests end at or before it."""
    ended = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_requests, BLOCK):
        requests = first + tl.arange(0, BLOCK)
        places = offsets_ptr + (requests + 1).to(tl.int64) * stride
        ended += (tl.load(places, mask=requests < num_requests, other=_INT32_MAX) <= row).to(tl.int32)
    return tl.sum(ended)


@triton.jit
def _arrive(counter, num_parts):
    """Count this program in; True for the last, which also zeroes the counter for the next launch."""
    tl.debug_barrier()  # what other threads of this program stored is counted in with it
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_parts - 1
    if is_last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return is_last


@triton.jit
def _reduce_chunk(
    row_ptr, stride, vocab, temperature, split, place, largest_ptr, best_ptr, totals_ptr,
    SAMPLED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store a chunk's largest logit, its first token, and the sum of exponentials below it."""
    columns = split * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(row_ptr, stride, columns, vocab)
    largest = tl.max(x)
    tl.store(largest_ptr + place, largest)
    tl.store(best_ptr + place, tl.min(tl.where(x == largest, columns, NO_TOKEN)))
    if SAMPLED:  # noqa: SIM102 - compiled away or not
        if temperature > 0:
            is_empty = largest == _MINUS_INF
            scaled = scale_logits(x, tl.where(is_empty, 0.0, largest), temperature, False)
            total = tl.sum(tl.exp(scaled))
            tl.store(totals_ptr + place, tl.where(is_empty, 0.0, total).to(tl.float64))


@triton.jit
def _merge_chunks(
    place, temperature, largest_ptr, best_ptr, totals_ptr,
    SAMPLED: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's best token, its logit and the sum of exponentials; also stored behind those of its chunks."""
    splits = tl.arange(0, SPLIT_BLOCK)
    is_chunk = splits < SPLITS
    chunks = tl.load(largest_ptr + place + splits, mask=is_chunk, other=_MINUS_INF)
    tokens = tl.load(best_ptr + place + splits, mask=is_chunk, other=NO_TOKEN)
    largest = tl.max(chunks)
    best = tl.min(tl.where(chunks == largest, tokens, NO_TOKEN))
    tl.store(best_ptr + place + SPLITS, best)
    total = tl.full((), 0.0, tl.float64)
    if SAMPLED:
        tl.store(largest_ptr + place + SPLITS, largest)
        if temperature > 0:
            totals = tl.load(totals_ptr + place + splits, mask=is_chunk, other=0.0)
            # A chunk without a finite logit has total 0, and so no part whatever its weight.
            scaled = scale_logits(chunks, tl.where(largest == _MINUS_INF, 0.0, largest), temperature, True)
            weights = tl.where(totals > 0, tl.exp(scaled), 0.0)
            total = tl.sum(totals * weights.to(tl.float64))
            tl.store(totals_ptr + place + SPLITS, total)
    return best, largest, total


@triton.jit
def _judge_draft(
    row_ptr, stride, vocab, row, request, draft, is_token, best, largest, total, temperature, top_k_ptr, top_k_stride,
    top_p_ptr, top_p_stride, seed_ptr, seed_stride, probs_ptr, probs_row_stride, probs_stride,
    positions_ptr, positions_stride, total_ptr, verdict_ptr, list_ptr,
    HAS_PROBS: tl.constexpr, TRUNCATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether a row's coin accepts the draft after it; stores where the row is cut, and the sum over what is left."""
    prob = (draft == best).to(tl.float32)
    if (temperature > 0) & (largest > _MINUS_INF):
        edge = tl.full((), NO_EDGE, tl.int32)
        num_edge = vocab
        if TRUNCATED:
            top_k = tl.load(top_k_ptr + request * top_k_stride)
            top_p = tl.load(top_p_ptr + request * top_p_stride)
            if (top_k > 0) | (top_p < 1):
                edge, num_edge, total = truncate(
                    row_ptr, stride, vocab, largest, temperature, total, top_k, top_p, list_ptr, BLOCK
                )
                tl.store(total_ptr, total)
            tl.store(verdict_ptr + 1, edge)
            tl.store(verdict_ptr + 2, num_edge)
        if is_token:
            x = load_logits(row_ptr, stride, draft.to(tl.int32), vocab)
            scaled = scale_logits(x, largest, temperature, True)
            bits = order_bits(scaled)
            rank = vocab * 0
            if TRUNCATED:  # noqa: SIM102 - compiled away or not
                if (bits == edge) & (num_edge < vocab):
                    rank = count_on_edge(row_ptr, stride, draft.to(tl.int32), largest, temperature, edge, BLOCK)
            prob = tl.div_rn(tl.exp(scaled), total.to(tl.float32))
            prob = tl.where(keep(bits, edge, num_edge, rank), prob, 0.0)
    drafted = tl.full((), 1.0, tl.float64)
    if HAS_PROBS:
        place = probs_ptr + (row + 1) * probs_row_stride + draft.to(tl.int64) * probs_stride
        drafted = tl.load(place, mask=is_token, other=0.0).to(tl.float64)
    seed = tl.load(seed_ptr + request * seed_stride)
    position = tl.load(positions_ptr + row * positions_stride).to(tl.int64)
    coin = draw_uniform(seed, position, _ACCEPT)
    return is_token & (coin * drafted < prob.to(tl.float64)) & (drafted > 0)


@triton.jit
def _decide(
    start, stop, request, temperature, vocab, logits_ptr, logits_row_stride, logits_stride,
    drafts_ptr, drafts_stride, probs_ptr, probs_row_stride, probs_stride, positions_ptr, positions_stride,
    seed_ptr, seed_stride, lens_ptr, lens_stride, ids_ptr, ids_stride,
    largest_ptr, best_ptr, totals_ptr, verdicts_ptr,
    SAMPLED: tl.constexpr, HAS_PROBS: tl.constexpr, TRUNCATED: tl.constexpr, SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count a request's accepted drafts, draw the token after them, and store both."""
    last = stop - 1  # the last row has no draft to reject
    for first in range(start, stop, 32):
        rows = first + tl.arange(0, 32)
        verdicts = tl.load(verdicts_ptr + rows.to(tl.int64) * 3, mask=rows < stop, other=1)
        last = tl.minimum(last, tl.min(tl.where(verdicts == 0, rows, stop)))
    tl.store(lens_ptr + request * lens_stride, last - start + 1)
    last64 = last.to(tl.int64)
    token = tl.load(best_ptr + last64 * (SPLITS + 1) + SPLITS)
    if SAMPLED:
        largest = tl.load(largest_ptr + last64 * (SPLITS + 1) + SPLITS)
        if (temperature > 0) & (largest > _MINUS_INF):
            total = tl.load(totals_ptr + last64 * (SPLITS + 1) + SPLITS).to(tl.float32)
            is_rejected = last + 1 < stop
            draft = tl.load(drafts_ptr + (last64 + 1) * drafts_stride, mask=is_rejected, other=-1)
            edge = tl.full((), NO_EDGE, tl.int32)
            num_edge = vocab
            if TRUNCATED:
                edge = tl.load(verdicts_ptr + last64 * 3 + 1)
                num_edge = tl.load(verdicts_ptr + last64 * 3 + 2)
            seed = tl.load(seed_ptr + request * seed_stride)
            position = tl.load(positions_ptr + last64 * positions_stride).to(tl.int64)
            token = _draw_token(
                logits_ptr + last64 * logits_row_stride, logits_stride, vocab, largest, temperature, total, edge,
                num_edge, draft, probs_ptr + (last64 + 1) * probs_row_stride if HAS_PROBS else logits_ptr, probs_stride,
                is_rejected, draw_uniform(seed, position, _RESAMPLE), largest_ptr + last64 * (SPLITS + 1),
                totals_ptr + last64 * (SPLITS + 1), HAS_PROBS, TRUNCATED, SPLITS, SPLIT_BLOCK, CHUNK, BLOCK,
            )  # fmt: skip
    for first in range(start, stop, 32):
        rows = first + tl.arange(0, 32)
        # Every kept row but the last commits the draft that the row after it consumed.
        drafts = tl.load(drafts_ptr + (rows + 1).to(tl.int64) * drafts_stride, mask=rows < last, other=-1)
        ids = tl.where(rows == last, token.to(tl.int64), drafts)
        tl.store(ids_ptr + rows.to(tl.int64) * ids_stride, ids, mask=rows < stop)


@triton.jit
def _load_weights(
    row_ptr, stride, columns, vocab, largest, temperature, total, edge, num_edge, num_before, draft, probs_row_ptr,
    probs_stride, is_rejected, is_cut, HAS_PROBS: tl.constexpr, TRUNCATED: tl.constexpr,
):  # fmt: skip
    """Probabilities of a block of tokens, what is left of them after the draft's, and the tokens on the edge so far."""
    x = load_logits(row_ptr, stride, columns, vocab)
    scaled = scale_logits(x, largest, temperature, TRUNCATED)
    target = tl.exp(scaled) * (1.0 / total)
    if TRUNCATED:
        bits = order_bits(scaled)
        if is_cut:  # on the edge itself, which takes a place for every token there
            on_edge = ((bits == edge) & (columns < vocab)).to(tl.int32)
            rank = num_before + tl.cumsum(on_edge) - on_edge
            target = tl.where(keep(bits, edge, num_edge, rank), target, 0.0)
            num_before += tl.sum(on_edge)
        else:
            target = tl.where(bits <= edge, target, 0.0)
    if HAS_PROBS:
        mask = columns < tl.where(is_rejected, vocab, 0)
        drafted = tl.load(probs_row_ptr + columns.to(tl.int64) * probs_stride, mask=mask, other=0.0).to(tl.float32)
        left = tl.maximum(target - tl.where(drafted > 0, drafted, 0.0), 0.0)
    else:
        left = tl.where(columns == draft, 0.0, target)
    return target, left, num_before


@triton.jit
def _draw_token(
    row_ptr, stride, vocab, largest, temperature, total, edge, num_edge, draft, probs_row_ptr, probs_stride,
    is_rejected, coin, chunk_largest_ptr, chunk_totals_ptr, HAS_PROBS: tl.constexpr, TRUNCATED: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token at which the cumulative sum of what is left passes the coin's share of it; of the target if nothing."""
    uses_left = is_rejected
    reached = tl.full((), 0.0, tl.float64)
    threshold = reached
    start = vocab * 0
    stop = vocab
    is_found = edge < 0
    is_cut = num_edge < vocab
    if not HAS_PROBS:  # noqa: SIM102 - compiled away or not
        if edge == NO_EDGE:
            is_found, uses_left, start, reached, threshold = _find_chunk(
                row_ptr, stride, vocab, largest, temperature, total, draft, is_rejected, coin, chunk_largest_ptr,
                chunk_totals_ptr, SPLITS, SPLIT_BLOCK, CHUNK,
            )  # fmt: skip
    if not is_found:
        target_sum = tl.full((), 0.0, tl.float64)
        left_sum = tl.full((), 0.0, tl.float64)
        num_passed = vocab * 0
        for chunk in range(0, SPLITS):
            target, left, num_passed = _load_weights(
                row_ptr, stride, chunk * CHUNK + tl.arange(0, CHUNK), vocab, largest, temperature, total, edge,
                num_edge, num_passed, draft, probs_row_ptr, probs_stride, is_rejected, is_cut, HAS_PROBS, TRUNCATED,
            )  # fmt: skip
            of_target = tl.sum(target).to(tl.float64)
            of_left = tl.sum(left).to(tl.float64)
            target_sum += of_target
            left_sum += of_left
            tl.store(chunk_totals_ptr + chunk, tl.where(is_rejected, of_left, of_target))
        uses_left = is_rejected & (left_sum > 0)
        threshold = coin * tl.where(uses_left, left_sum, target_sum)
        reached = tl.full((), 0.0, tl.float64)
        start = vocab * 0
        # Places on a cut edge are counted from the row's start, and sums of the target are not kept beside the others.
        is_found = (is_cut == 0) & (uses_left == is_rejected)
        if is_found:
            tl.debug_barrier()  # other threads load what one stored
            chunks = tl.arange(0, SPLIT_BLOCK)
            sums = tl.load(chunk_totals_ptr + chunks, mask=chunks < SPLITS, other=0.0)
            chunk, reached = _pick_chunk(sums, threshold, SPLITS, SPLIT_BLOCK)
            start = chunk * CHUNK
    if is_found:
        stop = tl.minimum(start + CHUNK, vocab)
    token = vocab * 0 + NO_TOKEN
    latest = start  # a token of some probability, should rounding leave the threshold out of reach
    num_before = vocab * 0
    while (start < stop) & (token == NO_TOKEN):
        columns = start + tl.arange(0, BLOCK)
        target, left, num_before = _load_weights(
            row_ptr, stride, columns, stop, largest, temperature, total, edge, num_edge,
            num_before, draft, probs_row_ptr, probs_stride, is_rejected, is_cut, HAS_PROBS, TRUNCATED,
        )  # fmt: skip
        weights = tl.where(uses_left, left, target)
        block_sum = tl.sum(weights).to(tl.float64)
        if reached + block_sum > threshold:
            passed = (reached + tl.cumsum(weights.to(tl.float64)) > threshold) & (weights > 0)
            token = tl.min(tl.where(passed, columns, NO_TOKEN))
        latest = tl.maximum(latest, tl.max(tl.where(weights > 0, columns, 0)))
        reached += block_sum
        start += BLOCK
    return tl.where(token == NO_TOKEN, latest, token)


@triton.jit
def _find_chunk(
    row_ptr, stride, vocab, largest, temperature, total, draft, is_rejected, coin, chunk_largest_ptr,
    chunk_totals_ptr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Where in a row of which nothing is cut, and from which at most the draft is taken, the coin falls.

    Returns:
        Whether the sums are good enough to tell, which they are not if the draft was nearly all of its chunk; whether
        the draft is taken out, the first token of the chunk, the sum before it, and the coin's share of all.
    """
    chunks = tl.arange(0, SPLIT_BLOCK)
    is_chunk = chunks < SPLITS
    maxima = tl.load(chunk_largest_ptr + chunks, mask=is_chunk, other=_MINUS_INF)
    sums = tl.load(chunk_totals_ptr + chunks, mask=is_chunk, other=0.0)
    sums = tl.where(sums > 0, sums * tl.exp(scale_logits(maxima, largest, temperature, True)).to(tl.float64), 0.0)
    sums = sums / total.to(tl.float64)
    is_token = is_rejected & (draft >= 0) & (draft < vocab)
    token = tl.where(is_token, draft, 0).to(tl.int32)
    prob = tl.exp(scale_logits(load_logits(row_ptr, stride, token, vocab), largest, temperature, True)) / total
    of_draft = tl.where(is_token, prob, 0.0).to(tl.float64)
    left = sums - tl.where(chunks == token // CHUNK, of_draft, 0.0)
    is_known = tl.min(tl.where(left < sums * 1e-3, 0, 1)) == 1
    threshold = coin * tl.sum(left)
    chunk, before = _pick_chunk(left, threshold, SPLITS, SPLIT_BLOCK)
    return is_known, is_rejected, chunk * CHUNK, before, threshold


@triton.jit
def _pick_chunk(sums, threshold, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr):
    """The chunk in which the cumulative sum passes the threshold, and the sum before it."""
    chunks = tl.arange(0, SPLIT_BLOCK)
    chunk = tl.min(tl.where((tl.cumsum(sums) > threshold) & (sums > 0), chunks, SPLITS - 1))
    return chunk, tl.sum(tl.where(chunks < chunk, sums, 0.0))


def configure(problem: AcceptDraftsProblem) -> AcceptDraftsConfig:
    """The configuration for a problem: more warps where one program may have to read whole rows.

    Greedy: within 2 % of the best of those timed in benchmarks/results/small_ops_h100.jsonl.
    """
    chunk = min(8192, max(triton.next_power_of_2(problem.vocab), 16))
    return AcceptDraftsConfig(chunk=chunk, block=chunk, num_warps=8 if problem.is_greedy else 16)


def plan(
    problem: AcceptDraftsProblem, *, device: torch.device | str, config: AcceptDraftsConfig | None = None
) -> AcceptDraftsWorkspace:
    """Allocate the scratch memory of a launch; launches that share it must not run at the same time.

    Args:
        problem: sizes.
        device: where the logits will be.
        config: how to cut the launch; chosen by ``configure`` if None.
    """
    config = configure(problem) if config is None else config
    rows, columns = problem.num_rows, triton.cdiv(problem.vocab, config.chunk) + 1
    return AcceptDraftsWorkspace(
        config=config,
        arrivals=torch.zeros(rows + problem.num_requests, dtype=torch.int32, device=device),
        largest=torch.empty(rows, columns, device=device),
        best=torch.empty(rows, columns, dtype=torch.int32, device=device),
        totals=torch.empty(rows, columns, dtype=torch.float64, device=device),
        verdicts=torch.empty(rows, 3, dtype=torch.int32, device=device),
        lists=torch.empty(0 if problem.is_greedy else rows, config.block, dtype=torch.int32, device=device),
    )


_plan = plan  # ``prepare`` has an argument of that name


def prepare(
    problem: AcceptDraftsProblem,
    *,
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    query_offsets: torch.Tensor,
    sampling: SamplingTensors | None,
    draft_probs: torch.Tensor | None,
    positions: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor],
    plan: OpPlan | None = None,
    config: AcceptDraftsConfig | None = None,
) -> Launch:
    """Describe the call; ``out`` is the accepted lengths and the committed ids, both written.

    Args:
        plan: holds the scratch memory; without one it is allocated here, for this launch alone.
        config: how to cut a launch that has no plan, for tuning; chosen by ``configure`` if None.
    """
    workspace: AcceptDraftsWorkspace | None = plan.data if plan is not None else None
    if workspace is None:
        workspace = _plan(problem, device=logits.device, config=config)
    config = workspace.config
    splits = triton.cdiv(problem.vocab, config.chunk)
    lens, ids = out
    arguments = {
        "logits_ptr": logits,
        "drafts_ptr": draft_ids,
        "offsets_ptr": query_offsets,
        "lens_ptr": lens,
        "ids_ptr": ids,
        "arrivals_ptr": workspace.arrivals,
        "largest_ptr": workspace.largest,
        "best_ptr": workspace.best,
        "totals_ptr": workspace.totals,
        "verdicts_ptr": workspace.verdicts,
        "lists_ptr": workspace.lists,
        "num_rows": problem.num_rows,
        "num_requests": problem.num_requests,
        "vocab": problem.vocab,
        "logits_row_stride": logits.stride(0),
        "logits_stride": logits.stride(1),
        "drafts_stride": draft_ids.stride(0),
        "offsets_stride": query_offsets.stride(0),
        "lens_stride": lens.stride(0),
        "ids_stride": ids.stride(0),
        **_describe_sampling(sampling, draft_probs, positions),
        "SPLITS": splits,
        "SPLIT_BLOCK": triton.next_power_of_2(splits),
        "CHUNK": config.chunk,
        "BLOCK": config.block,
        "REQUEST_BLOCK": _REQUEST_BLOCK,
    }
    options: dict[str, Any] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    if config.max_registers is not None and problem.arch.is_cuda:
        options["maxnreg"] = config.max_registers
    return Launch(
        function=_accept_drafts_kernel,
        arguments=arguments,
        grid=(max(problem.num_rows * splits, problem.num_requests),),
        options=options,
    )


def _describe_sampling(
    sampling: SamplingTensors | None, draft_probs: torch.Tensor | None, positions: torch.Tensor | None
) -> dict[str, Any]:
    """The arguments that only sampled requests need; None where they are not read."""
    if sampling is None:
        draft_probs = positions = None
    fields = {name: getattr(sampling, name, None) for name in ("temperature", "top_k", "top_p", "seed")}
    return {
        **{f"{name}_ptr": field for name, field in fields.items()},
        **{f"{name}_stride": 0 if field is None else field.stride(0) for name, field in fields.items()},
        "probs_ptr": draft_probs,
        "probs_row_stride": 0 if draft_probs is None else draft_probs.stride(0),
        "probs_stride": 0 if draft_probs is None else draft_probs.stride(1),
        "positions_ptr": positions,
        "positions_stride": 0 if positions is None else positions.stride(0),
        "SAMPLED": sampling is not None,
        "HAS_PROBS": draft_probs is not None,
        "TRUNCATED": sampling is not None and sampling.is_truncated,
    }


KERNEL = Kernel(
    op="accept_drafts",
    name="triton_portable",
    arches=frozenset(arch for arch in Arch if arch.is_cuda or arch.is_rocm),
    rejects=lambda problem: None,
    prepare=prepare,
    configure=configure,
    rank=lambda problem: 20,
    plan=plan,
)
