"""The portable Triton kernel's own claims: bits that depend on no batch, equal shares of work, unfit plans survived."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import IS_INTERPRETING, plan_for

from nextn.hardware import Arch, DeviceInfo, pretend_device
from nextn.ops.index_logits.cases import IndexLogitsCase
from nextn.ops.index_logits.problem import IndexLogitsProblem
from nextn.testing.numerics import assert_same_bits
from nextn.testing.poison import poison_output

pytest.importorskip("triton")
from nextn.ops.index_logits import _triton_schedule, triton_portable

KERNEL = triton_portable.KERNEL
FEW_SMS = DeviceInfo(arch=Arch.SM90, name="three multiprocessors", num_sms=3)
interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="runs in Triton's interpreter")


def make_case(row_counts: tuple[int, ...], context_lens: tuple[int, ...], heads: int = 32) -> IndexLogitsCase:
    return IndexLogitsCase(name="own", row_counts=row_counts, context_lens=context_lens, heads=heads)


def schedule_of(problem: IndexLogitsProblem, arguments: dict[str, torch.Tensor]) -> _triton_schedule.WorkSchedule:
    return triton_portable.build_schedule(
        problem,
        query_offsets=arguments["query_offsets"],
        visible_lens=arguments["visible_lens"],
        page_table=arguments["page_table"],
    )


def run(problem: IndexLogitsProblem, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.full((problem.num_rows, problem.max_context), float("nan"))
    KERNEL.prepare(problem, **arguments, out=out)()
    return out


def make_products_exact(arguments: dict[str, torch.Tensor]) -> None:
    """Queries and keys in -2..2: products are exact in FP32 in any order, so bits show only what the kernel orders."""
    generator = torch.Generator().manual_seed(3)
    q, cache = arguments["q"], arguments["index_cache"]
    arguments["q"] = torch.randint(-2, 3, q.shape, generator=generator).to(torch.float8_e4m3fn)
    keys = torch.randint(-2, 3, (cache.shape[0], 64 * q.shape[2]), generator=generator)
    cache[:, : 64 * q.shape[2]] = keys.to(torch.float8_e4m3fn).view(torch.uint8)
    cache[:, 64 * q.shape[2] :] = torch.rand(cache.shape[0], 64, generator=generator).view(torch.uint8)


@interpreted
@pytest.mark.parametrize(
    ("next_n", "heads"), [(1, 64), (2, 16), (3, 64), (4, 16), (5, 16), (7, 32), (8, 64), (None, 32)]
)
def test_a_row_has_the_same_bits_at_every_depth_and_in_any_batch(next_n, heads):
    inputs = make_case((8,), (140,), heads).inputs()
    make_products_exact(inputs.arguments)
    whole = run(make_case((8,), (140,), heads).problem(FEW_SMS), inputs.arguments)
    counts = [next_n] * (8 // next_n) if next_n else [3, 0, 1, 4]
    num_rows, offsets = sum(counts), list(accumulate(counts, initial=0))
    part = dict(inputs.arguments)
    for name in ("q", "weights", "visible_lens"):
        part[name] = part[name][:num_rows]
    part["query_offsets"] = torch.tensor(offsets, dtype=torch.int32)
    part["page_table"] = part["page_table"].expand(len(counts), -1)
    problem = make_case(tuple(counts), (140,) * len(counts), heads).problem(FEW_SMS)
    hidden = ~inputs.defined[:num_rows]
    assert_same_bits(run(problem, part).masked_fill(hidden, 0), whole[:num_rows].masked_fill(hidden, 0))


@interpreted
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    row_counts=st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 9, 30]), min_size=1, max_size=6),
    prefixes=st.lists(st.sampled_from([0, 1, 63, 64, 700, 2000]), min_size=6, max_size=6),
    num_sms=st.sampled_from([1, 3, 40]),
)
def test_every_tile_is_scored_once_and_the_shares_are_equal(row_counts, prefixes, num_sms):
    context_lens = tuple(prefix + rows for prefix, rows in zip(prefixes, row_counts))
    case = make_case(tuple(row_counts), context_lens, heads=8)
    problem = case.problem(DeviceInfo(arch=Arch.SM90, name="some", num_sms=num_sms))
    arguments = case.inputs().arguments
    schedule = schedule_of(problem, arguments)
    starts, groups = schedule.programs.tolist(), schedule.groups.tolist()
    scored: dict[tuple[int, int], int] = {}
    shares = []
    for start, end in pairwise(starts) if schedule.num_programs else ():
        share = 0
        for group in range(start[0], min(end[0], len(groups) - 1) + 1):
            first_row, rows, _, tiles = groups[group]
            last = end[1] if group == end[0] else tiles
            for tile in range(start[1] if group == start[0] else 0, last):
                share += max((rows + 1) // 2 * 2, 3)
                for row in range(first_row, first_row + rows):
                    scored[row, tile] = scored.get((row, tile), 0) + 1
        shares.append(share)
    visible = arguments["visible_lens"].tolist()
    needed = {(row, tile) for row, length in enumerate(visible) for tile in range(-(-length // 64))}
    assert needed <= set(scored)
    assert set(scored.values()) <= {1}
    assert not shares or max(shares) <= sum(shares) / len(shares) + 8


@interpreted
@pytest.mark.parametrize("kind", ["other lengths", "garbage"])
def test_a_plan_that_does_not_fit_neither_hangs_nor_leaves_the_output(kind):
    case = make_case((3, 1, 4), (200, 130, 70), heads=8)
    problem, inputs = case.problem(FEW_SMS), case.inputs()
    make_products_exact(inputs.arguments)  # scores of NaN keys would look like the poison around the output
    names = ("query_offsets", "visible_lens", "page_table")
    plan = plan_for(KERNEL, problem, **{name: inputs.arguments[name] for name in names})
    if kind == "garbage":
        generator = torch.Generator().manual_seed(0)
        for part in (plan.data.programs, plan.data.groups):
            part.copy_(torch.randint(-(2**31), 2**31 - 1, part.shape, generator=generator, dtype=torch.int32))
    else:
        inputs.arguments["visible_lens"] = torch.tensor([7, 200, 0, 1000, -5, 200, 1, 63], dtype=torch.int32)
        inputs.arguments["page_table"] = torch.full_like(inputs.arguments["page_table"], 2**30)
    output = poison_output((problem.num_rows, case.max_context), torch.float32, "cpu", row_padding=8)
    KERNEL.prepare(problem, **inputs.arguments, out=output.view, plan=plan)()
    output.assert_untouched_around()


def test_prepare_and_plan_take_meta_tensors():
    case = make_case((4, 4), (300, 65))
    problem = case.problem(pretend_device(Arch.SM90))
    arguments = case.inputs("meta").arguments
    launch = KERNEL.prepare(problem, **arguments, out=torch.empty(8, case.max_context, device="meta"))
    assert launch.grid == (min(132 * 3, 2 * 5),)
    assert launch.options["num_warps"] == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cache": "fp32"}, "index cache fp32 is not fp8"),
        ({"heads": 12}, "12 index heads are not one of 8, 16, 32, 64"),
        ({"dim": 256}, "head_dim 256 is not one of 32, 64, 128"),
        ({"page_size": 16}, "page_size 16 is not one of 32, 64"),
    ],
)
def test_says_what_it_does_not_take(change, reason):
    problem = make_case((4,), (100,)).problem(pretend_device(Arch.SM90))
    assert KERNEL.rejects(problem) is None
    assert KERNEL.rejects(replace(problem, **change)) == reason


@pytest.mark.parametrize("arch", sorted(KERNEL.arches, key=str), ids=str)
@pytest.mark.parametrize("next_n", [1, 3, 8, 20])
def test_what_a_program_keeps_fits_its_gpu(arch, next_n):
    problem = make_case((next_n,) * 64, (4096,) * 64, heads=64).problem(pretend_device(arch))
    config = triton_portable.choose_config(problem)
    assert config.programs_per_sm >= 1
    assert config.key_tiles >= 2
    assert 1 <= triton_portable._rows_per_group(problem) <= min(next_n, 8)


def test_explain_says_how_often_keys_are_read():
    hopper = pretend_device(Arch.SM90)
    explain = triton_portable.form
    assert explain(make_case((4, 4), (300, 65)).problem(hopper)) == "native [2, 4]"
    assert explain(make_case((4, 1), (300, 65)).problem(hopper)) == "ragged, 5 rows"
    assert explain(make_case((20,), (300,)).problem(hopper)) == "native [1, 20], keys read once per 7 rows"
