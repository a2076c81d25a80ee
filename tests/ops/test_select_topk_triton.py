"""The Triton kernel's own claims: how rows are cut leaves no trace, scratch memory is bounded and left clean."""

from __future__ import annotations

import dataclasses
from itertools import cycle

import pytest
import torch
from op_harness import IS_INTERPRETING, plan_for

from nextn.hardware import Arch, pretend_device
from nextn.ops._kernel import OpPlan
from nextn.ops.select_topk import reference
from nextn.ops.select_topk.cases import DISTRIBUTIONS, SelectTopkCase
from nextn.ops.select_topk.problem import SelectTopkProblem
from nextn.testing.poison import poison_output

pytest.importorskip("triton")
from nextn.ops.select_topk import triton_portable
from nextn.ops.select_topk.triton_portable import SelectTopkConfig, SelectTopkWorkspace

KERNEL = triton_portable.KERNEL
interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="runs in Triton's interpreter")

# 128 logits at once, so that few columns take every path.
SMALL = SelectTopkConfig(num_warps=1, tiles=1, part_len=128, list_len=128, samples=64, bins=1024)
CUTS = {
    "registers": dataclasses.replace(SMALL, tiles=3),
    "blocks": SMALL,
    "two_parts": dataclasses.replace(SMALL, parts=2),
    "four_parts": dataclasses.replace(SMALL, parts=4, num_warps=2),
    "short_lists": dataclasses.replace(SMALL, parts=2, list_len=8),  # too short, so that the row is searched in blocks
}


def poisoned_plan(problem: SelectTopkProblem, config: SelectTopkConfig) -> OpPlan:
    """A plan whose scratch memory holds positions far outside every row."""
    plan = plan_for(KERNEL, problem, device="cpu", config=config)
    plan.data.pairs.fill_(2**30)
    plan.data.counts.fill_(2**30)
    return plan


def select(case: SelectTopkCase, plan: OpPlan, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """What the kernel and the reference select."""
    inputs = case.inputs(seed=seed)
    tensors = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    output = poison_output((plan.problem.num_rows, case.topk), torch.int32, "cpu", row_padding=4)
    KERNEL.prepare(plan.problem, **tensors, out=output.view, plan=plan)()
    output.assert_untouched_around()
    expected = torch.empty(plan.problem.num_rows, case.topk, dtype=torch.int32)
    reference.KERNEL.prepare(plan.problem, **tensors, out=expected)()
    return output.view.tolist(), expected.tolist()


@interpreted
@pytest.mark.parametrize(("cut", "values"), [*zip(cycle(CUTS), DISTRIBUTIONS), *((cut, "few_levels") for cut in CUTS)])
def test_how_a_row_is_cut_leaves_no_trace(cut, values):
    lens, topk = (300, 12, 131), 13
    case = SelectTopkCase(
        name="cut", lens=lens, num_columns=304, topk=topk, values=values, rows_per_request=3, page_size=8
    )
    problem = case.problem(pretend_device(Arch.SM90))
    selected, expected = select(case, poisoned_plan(problem, CUTS[cut]), seed=len(cut))
    assert selected == expected


@interpreted
def test_scratch_memory_serves_every_layer_and_is_left_ready():
    case = SelectTopkCase(name="layers", lens=(400, 130, 0), num_columns=400, topk=16)
    plan = poisoned_plan(case.problem(pretend_device(Arch.SM90)), CUTS["four_parts"])
    for seed in range(2):
        selected, expected = select(case, plan, seed)
        assert selected == expected
        assert not plan.data.arrivals.any()


@interpreted
def test_rows_without_room_for_vectors_are_read_to_their_end_only():
    case = SelectTopkCase(name="odd", lens=(197, 196, 195), num_columns=197, topk=7)
    problem = case.problem(pretend_device(Arch.SM90))
    selected, expected = select(case, poisoned_plan(problem, SMALL), seed=5)
    assert selected == expected


def select_from(row: list[float], topk: int, config: SelectTopkConfig) -> tuple[list[int], list[int]]:
    """What the kernel and the reference select from one row."""
    logits, lens = torch.tensor([row]), torch.tensor([len(row)], dtype=torch.int32)
    problem = SelectTopkProblem(arch=Arch.SM90, num_sms=4, num_rows=1, num_columns=len(row), topk=topk)
    expected = torch.empty(1, topk, dtype=torch.int32)
    tensors = {"logits": logits, "visible_lens": lens, "query_offsets": None, "page_table": None}
    output = poison_output((1, topk), torch.int32, "cpu", row_padding=8)
    KERNEL.prepare(problem, **tensors, out=output.view, plan=poisoned_plan(problem, config))()
    output.assert_untouched_around()
    reference.KERNEL.prepare(problem, **tensors, out=expected)()
    return output.view[0].tolist(), expected[0].tolist()


@interpreted
@pytest.mark.parametrize("exponent", [-140, 100])
def test_logits_of_any_size_are_told_apart(exponent):
    generator = torch.Generator().manual_seed(exponent)
    logits = torch.ldexp(torch.randn(200, generator=generator), torch.tensor(exponent))
    logits[::7] = -0.0
    selected, expected = select_from(logits.tolist(), 90, CUTS["registers"])
    assert selected == expected


@interpreted
@pytest.mark.parametrize("cut", ["registers", "blocks"])
def test_minus_zeros_far_below_the_few_best_are_found(cut):
    row = [-0.0] * 220
    row[3::40] = [1.0] * 6
    selected, expected = select_from(row, 13, CUTS[cut])
    assert selected == expected


@interpreted
@pytest.mark.parametrize("cut", ["blocks", "two_parts"])
def test_best_that_no_sample_shows_are_found(cut):
    """The k best all stand together, so that a sample finds few of them or many."""
    row = [position / 1000 for position in range(300)]
    row[130:150] = [5.0] * 20
    selected, expected = select_from(row, 13, CUTS[cut])
    assert selected == expected == list(range(130, 143))


@interpreted
def test_logits_far_from_zero_are_thinned_out_like_others():
    generator = torch.Generator().manual_seed(2)
    logits = 1000 + torch.randn(1, 300, generator=generator)
    problem = SelectTopkProblem(arch=Arch.SM90, num_sms=4, num_rows=1, num_columns=300, topk=13)
    plan = poisoned_plan(problem, CUTS["two_parts"])
    out = torch.empty(1, 13, dtype=torch.int32)
    lens = torch.tensor([300], dtype=torch.int32)
    KERNEL.prepare(problem, logits=logits, visible_lens=lens, query_offsets=None, page_table=None, out=out, plan=plan)()
    assert out.tolist() == logits.topk(13).indices.sort().values.tolist()
    assert 13 <= plan.data.counts.sum() <= 100, "the bound is too low to be of use"


@interpreted
@pytest.mark.parametrize("value", [0.5, float("nan"), float("-inf")])
def test_equals_spread_over_blocks_are_taken_in_order(value):
    row = [value] * 400
    row[399] = 1.0
    selected, expected = select_from(row, 13, CUTS["blocks"])
    assert selected == expected == [*range(12), 399]


def make_problem(
    num_rows: int, num_columns: int, topk: int = 2048, arch: Arch = Arch.SM90, num_sms: int = 132
) -> SelectTopkProblem:
    return SelectTopkProblem(arch=arch, num_sms=num_sms, num_rows=num_rows, num_columns=num_columns, topk=topk)


def plan_on_meta(problem: SelectTopkProblem) -> SelectTopkWorkspace:
    return plan_for(KERNEL, problem, device="meta").data


def test_more_than_2048_columns_of_result_are_refused_with_the_limit():
    assert KERNEL.rejects(make_problem(1, 65536)) is None
    assert "2048" in (KERNEL.rejects(make_problem(1, 65536, topk=2049)) or "")


@pytest.mark.parametrize("num_rows", [0, 1, 3, 64, 132, 133, 8192])
@pytest.mark.parametrize("num_columns", [0, 1, 8192, 8193, 32768, 32769, 163840, 1 << 20])
def test_every_size_gets_a_plan_with_bounded_scratch_memory(num_rows, num_columns):
    workspace = plan_on_meta(make_problem(num_rows, num_columns))
    assert workspace.pairs.numel() * 4 <= 32 << 20
    assert (workspace.pairs.numel() == 0) == (num_columns <= 16384 or num_rows == 0)


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_programs"),
    [(7, 8192, 7), (600, 163840, 264), (256, 32768, 512), (4, 163840, 128), (1, 1 << 20, 32)],
)
def test_programs_do_not_grow_with_the_columns_a_row_may_have(num_rows, num_columns, num_programs):
    assert prepare_on_meta(make_problem(num_rows, num_columns)).grid == (num_programs,)


def test_a_row_that_is_no_multiple_of_four_is_not_read_by_vectors():
    assert prepare_on_meta(make_problem(2, 8192)).arguments["ALIGNED"]
    assert not prepare_on_meta(make_problem(2, 8190)).arguments["ALIGNED"]


def prepare_on_meta(problem: SelectTopkProblem):
    return KERNEL.prepare(
        problem,
        logits=torch.empty(problem.num_rows, problem.num_columns, device="meta"),
        visible_lens=torch.empty(problem.num_rows, dtype=torch.int32, device="meta"),
        query_offsets=None,
        page_table=None,
        out=torch.empty(problem.num_rows, problem.topk, dtype=torch.int32, device="meta"),
    )


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETING, reason="needs Triton's compiler")
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 8192), (256, 8192), (256, 32768)])
def test_logits_stay_in_registers_and_are_read_by_vectors(num_rows, num_columns):
    from nextn.testing.compile_gate import compile_launch

    problem = make_problem(num_rows, num_columns)
    launch = prepare_on_meta(problem)
    binary = compile_launch(launch, Arch.SM90)
    assert launch.grid is not None
    programs_per_sm = 65536 // (binary.registers * 32 * launch.options["num_warps"])
    assert programs_per_sm >= min(-(-launch.grid[0] // problem.num_sms), 2), "programs wait for registers"
    assert binary.shared_bytes <= 1024, "operands travel through shared memory"
    assert binary.stack_bytes <= 160, "logits were spilled"
    assert binary.assembly.count("@p ld.global.v4.b32") >= triton_portable.configure(problem).tiles
