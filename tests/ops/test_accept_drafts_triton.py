"""The Triton kernel's own claims: how rows are cut leaves no trace, scratch is left ready, offsets may be wild."""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from op_harness import IS_INTERPRETING, plan_for

from nextn.hardware import Arch, pretend_device
from nextn.ops._kernel import OpPlan
from nextn.ops.accept_drafts import ACCEPT, DRAFT, RESAMPLE, SamplingTensors, draw_uniforms, reference, target_probs
from nextn.ops.accept_drafts.cases import CASES, AcceptDraftsCase, Setting
from nextn.testing.poison import poison_output

pytest.importorskip("triton")
import triton
import triton.language as tl

from nextn.ops.accept_drafts import triton_portable
from nextn.ops.accept_drafts._triton_distribution import (
    count_on_edge,
    draw_uniform,
    keep,
    load_logits,
    order_bits,
    scale_logits,
    truncate,
)
from nextn.ops.accept_drafts.triton_portable import AcceptDraftsConfig

KERNEL = triton_portable.KERNEL
NAN, INF = float("nan"), float("inf")
interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="runs in Triton's interpreter")
MIXED = (
    Setting(temperature=1.0),
    Setting(temperature=0.7, top_k=5),
    Setting(),
    Setting(temperature=1.3, top_k=11, top_p=0.7),
)
# Three chunks of the vocabulary to a row, and as many blocks where one program reads it all.
SMALL = AcceptDraftsConfig(chunk=16, block=16, num_warps=1)
CASE = AcceptDraftsCase(name="small", row_counts=(3, 1, 2, 0, 3), vocab=41, settings=MIXED)


def run(
    case: AcceptDraftsCase, arguments: dict[str, Any], *, plan: OpPlan | None = None, **changes: Any
) -> tuple[list[int], list[int]]:
    """Accepted lengths and ids of the kernel, nothing written around them."""
    problem = case.problem(pretend_device(Arch.SM90))
    lens = poison_output((problem.num_requests, 1), torch.int32, "cpu")
    ids = poison_output((problem.num_rows, 1), torch.int64, "cpu")
    out = (lens.view.squeeze(1), ids.view.squeeze(1))
    launch = KERNEL.prepare(problem, **arguments, out=out, plan=plan, config=SMALL)
    dataclasses.replace(launch, arguments={**launch.arguments, **changes})()
    lens.assert_untouched_around()
    ids.assert_untouched_around()
    return out[0].tolist(), out[1].tolist()


def expect(case: AcceptDraftsCase, arguments: dict[str, Any]) -> tuple[list[int], list[int]]:
    problem = case.problem(pretend_device(Arch.SM90))
    out = (torch.empty(problem.num_requests, dtype=torch.int32), torch.empty(problem.num_rows, dtype=torch.int64))
    reference.KERNEL.prepare(problem, **arguments, out=out)()
    return out[0].tolist(), out[1].tolist()


@interpreted
@pytest.mark.parametrize("has_draft_probs", [False, True])
@pytest.mark.parametrize("values", ["normal", "few_levels", "special"])
def test_how_rows_are_cut_leaves_no_trace(values, has_draft_probs):
    case = dataclasses.replace(CASE, values=values, has_draft_probs=has_draft_probs)
    arguments = case.inputs(seed=31)
    assert run(case, arguments, REQUEST_BLOCK=2) == expect(case, arguments)


@interpreted
def test_greedy_ties_across_chunks_go_to_the_lowest_id():
    case = dataclasses.replace(CASE, settings=(), values="few_levels", row_counts=(9,))
    arguments = case.inputs(seed=32)
    arguments["logits"][:5] = 1.0
    arguments["logits"][3] = -INF
    arguments["logits"][4] = NAN
    arguments["draft_ids"][:] = 0
    lens, ids = run(case, arguments)
    assert (lens, ids) == expect(case, arguments)
    assert ids[:5] == [0] * 5


@interpreted
def test_scratch_memory_serves_every_step_and_is_left_ready():
    case = dataclasses.replace(CASE, row_counts=(3, 0, 2))
    plan = plan_for(KERNEL, case.problem(pretend_device(Arch.SM90)), device="cpu", config=SMALL)
    for name in ("largest", "best", "totals", "verdicts", "lists"):
        getattr(plan.data, name).fill_(2**30)
    for seed in (33, 34):
        arguments = case.inputs(seed=seed)
        assert run(case, arguments, plan=plan) == expect(case, arguments)
        assert not plan.data.arrivals.any()


@interpreted
def test_requests_of_more_rows_than_are_looked_at_at_once():
    case = AcceptDraftsCase(name="deep", row_counts=(70,), vocab=5)
    arguments = case.inputs(seed=35)
    best = arguments["logits"].argmax(1)
    for num_kept in (70, 33, 32):
        arguments["draft_ids"][1:] = best[:-1]
        arguments["draft_ids"][num_kept:] = -1
        lens, ids = run(case, arguments)
        assert lens == [num_kept]
        assert ids == [*best[:num_kept].tolist(), *[-1] * (70 - num_kept)]


@interpreted
@pytest.mark.parametrize(
    "offsets", [[-5, 2, 2**30, 2**31 - 1], [2**30, 2**30, 1, 0], [0, -(2**31), 6, 3], [4, 3, 2, 1]]
)
def test_wild_offsets_write_nothing_outside(offsets):
    case = dataclasses.replace(CASE, row_counts=(2, 2, 2), settings=MIXED[:1])
    arguments = case.inputs(seed=36)
    arguments["query_offsets"] = torch.tensor(offsets, dtype=torch.int32)
    run(case, arguments)


@interpreted
def test_wild_drafts_are_rejected():
    case = dataclasses.replace(CASE, row_counts=(2,) * 5, settings=MIXED[:1], has_draft_probs=True)
    arguments = case.inputs(seed=37)
    arguments["draft_ids"][1::2] = torch.tensor([-1, 41, 2**62, -(2**62), 2**32])
    lens, ids = run(case, arguments)
    assert (lens, ids) == expect(case, arguments)
    assert lens == [1] * 5


@interpreted
@pytest.mark.parametrize("drawn_from", [[NAN] * 3, [-1.0] * 3, [0.5, 0.0, 0.5], [INF] * 3])
def test_a_draft_that_was_not_drawn_from_anything_is_rejected(drawn_from):
    case = AcceptDraftsCase(name="undrawn", row_counts=(2,) * 3, vocab=3, settings=MIXED[:1], has_draft_probs=True)
    arguments = case.inputs(seed=39)
    arguments["logits"][:] = 0.0
    arguments["draft_ids"][1::2] = 1
    arguments["draft_probs"] = torch.tensor(drawn_from).expand(6, -1)
    lens, ids = run(case, arguments)
    assert lens == [1] * 3
    assert (lens, ids) == expect(case, arguments)


@interpreted
def test_inputs_may_have_any_strides_and_dtypes():
    case = dataclasses.replace(CASE, row_counts=(2, 3), has_draft_probs=True)
    arguments = case.inputs(seed=38)
    arguments["logits"] = arguments["logits"].bfloat16().float()
    odd = {
        "logits": arguments["logits"].half().float().T.contiguous().T,
        "draft_probs": arguments["draft_probs"].T.contiguous().T,
        "draft_ids": arguments["draft_ids"].repeat_interleave(2)[::2],
        "query_offsets": arguments["query_offsets"].repeat_interleave(3)[::3],
        "positions": arguments["positions"].to(torch.int32),
    }
    arguments["logits"] = odd["logits"].contiguous()
    assert run(case, {**arguments, **odd}) == expect(case, arguments)


@triton.jit
def _distribution_kernel(
    logits_ptr, probs_ptr, coins_ptr, list_ptr, temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr, vocab,
    BLOCK: tl.constexpr, LIST: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    largest = tl.max(load_logits(logits_ptr, 1, columns, vocab))
    temperature = tl.load(temperature_ptr)
    x = load_logits(logits_ptr, 1, columns, vocab)
    whole = tl.sum(tl.exp(scale_logits(x, largest, temperature, True)).to(tl.float64))
    edge, num_edge, total = truncate(
        logits_ptr, 1, vocab, largest, temperature, whole, tl.load(top_k_ptr), tl.load(top_p_ptr), list_ptr, LIST
    )
    for index in range(0, vocab):
        column = tl.full((), 0, tl.int32) + index
        scaled = scale_logits(load_logits(logits_ptr, 1, column, vocab), largest, temperature, True)
        rank = count_on_edge(logits_ptr, 1, column, largest, temperature, edge, SEEN)
        prob = tl.where(keep(order_bits(scaled), edge, num_edge, rank), tl.exp(scaled) / total, 0.0)
        tl.store(probs_ptr + column, prob)
    seed = tl.load(seed_ptr)
    for purpose in tl.static_range(3):
        tl.store(coins_ptr + purpose, draw_uniform(seed, seed * 7 + 3, purpose))


ROWS = {
    "plain": [0.3, -1.0, 2.0, 0.0, 1.9, -3.0, 0.1],
    "ties": [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0],
    "special": [NAN, 1.0, -INF, 0.5, NAN, 0.5, 0.5],
    "zeros": [0.0, -0.0, 0.0, -0.0, -1.0, -0.0, 0.0],
    "far": [900.0, -900.0, 899.0, 0.0, 898.5, 700.0, 2.0],
}


def cut(logits: torch.Tensor, setting: SamplingTensors, **sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and coins of one row; nothing is written past its list."""
    vocab, list_len = logits.shape[0], sizes["LIST"]
    probs, coins = torch.empty(vocab), torch.empty(3, dtype=torch.float64)
    fields = (setting.temperature, setting.top_k, setting.top_p, setting.seed)
    listed = torch.full((list_len + 4,), 0x12345678, dtype=torch.int32)
    _distribution_kernel[(1,)](logits, probs, coins, listed, *fields, vocab, **sizes)
    assert (listed[list_len:] == 0x12345678).all()
    expected = target_probs(logits[None], setting)[0]
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs, expected, rtol=1e-6, atol=0)
    return probs, coins


def make_setting(temperature: float, top_k: int, top_p: float, seed: int) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.tensor([temperature]),
        top_k=torch.tensor([top_k], dtype=torch.int32),
        top_p=torch.tensor([top_p]),
        seed=torch.tensor([seed]),
    )


@interpreted
@pytest.mark.parametrize("list_len", [2, 8])  # the search ends in a list of so many tokens
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 3, 1.0), (0.5, 0, 0.6), (2.0, 0, 0.125), (1.0, 5, 0.7), (1.0, 6, 0.0), (0.3, 9, 0.999), (1.0, 1, 0.5)],
)
def test_top_k_and_top_p_cut_where_sorting_cuts(name, temperature, top_k, top_p, list_len):
    logits = torch.tensor(ROWS[name])
    setting = make_setting(temperature, top_k, top_p, seed=top_k + len(logits))
    _, coins = cut(logits, setting, BLOCK=8, LIST=list_len, SEEN=4)
    for purpose, coin in zip((DRAFT, ACCEPT, RESAMPLE), coins):
        assert coin == draw_uniforms(setting.seed, setting.seed * 7 + 3, purpose)


@interpreted
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (100, 1.0), (21, 0.8)])
@pytest.mark.parametrize("num_alike", [0, 30])
def test_a_list_serves_long_rows_and_tokens_that_share_a_column(top_k, top_p, num_alike):
    """A list of 128 has columns of 16, to which the tokens at a distance of 8 go."""
    logits = torch.randn(256, generator=torch.Generator().manual_seed(top_k))
    if num_alike:
        logits -= 9
        logits[5 : 5 + 8 * num_alike : 8] = 1 + torch.arange(num_alike) * 1e-6
    cut(logits, make_setting(1.0, top_k, top_p, seed=1), BLOCK=256, LIST=128, SEEN=64)


def plan_on_meta(case: AcceptDraftsCase) -> OpPlan:
    return plan_for(KERNEL, case.problem(pretend_device(Arch.SM90)), device="meta")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scratch_memory_is_a_small_part_of_the_logits(case):
    workspace = plan_on_meta(case).data
    tensors = (
        workspace.largest,
        workspace.best,
        workspace.totals,
        workspace.verdicts,
        workspace.lists,
        workspace.arrivals,
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert size <= 4 * case.num_rows * (case.vocab // 12 + 120) + 4 * len(case.row_counts)


@pytest.mark.parametrize(("row_counts", "num_programs"), [((4, 4), 8 * 16), ((), 0), ((0,) * 300, 300), ((1,), 16)])
def test_every_chunk_and_every_request_has_a_program(row_counts, num_programs):
    case = AcceptDraftsCase(name="grid", row_counts=row_counts, vocab=129280)
    problem = case.problem(pretend_device(Arch.SM90))
    out = (
        torch.empty(problem.num_requests, dtype=torch.int32, device="meta"),
        torch.empty(problem.num_rows, dtype=torch.int64, device="meta"),
    )
    tensors = {
        "logits": torch.empty(problem.num_rows, case.vocab, device="meta"),
        "draft_ids": torch.empty(problem.num_rows, dtype=torch.int64, device="meta"),
        "query_offsets": torch.empty(problem.num_requests + 1, dtype=torch.int32, device="meta"),
    }
    launch = KERNEL.prepare(
        problem, **tensors, sampling=None, draft_probs=None, positions=None, out=out, plan=plan_on_meta(case)
    )
    assert launch.grid == (num_programs,)
