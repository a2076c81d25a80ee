"""Planning on the device: the rows' launch and the schedule's launch, to the last integer, hostile batches included."""

from __future__ import annotations

from dataclasses import fields
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import IS_INTERPRETING

from nextn.hardware import Arch
from nextn.ops._rows import Fills, RowArrays, locate_rows_in_torch
from nextn.testing.compile_gate import TARGETS, compile_launch, is_interpreting
from nextn.testing.schedules import list_groups, share_out

pytest.importorskip("triton")
from nextn.ops._triton_rows import describe_rows, locate_rows_in_triton
from nextn.ops.index_logits import _triton_schedule as schedules

INT32_MAX, INT32_MIN, INT64_MAX = 2**31 - 1, -(2**31), 2**63 - 1
interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="runs in Triton's interpreter")
fuzzed = settings(max_examples=25, deadline=None, derandomize=True)
row_counts = st.lists(st.sampled_from([0, 1, 2, 3, 8, 9, 150]), min_size=1, max_size=6)
hostile_lens = st.sampled_from([0, -1, 1, 63, 64, 65, 700, INT32_MAX, INT32_MIN])


def int32(values: list[int] | tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@interpreted
@fuzzed
@given(
    counts=row_counts,
    lens=st.lists(st.sampled_from([0, -1, 1, 64, 65, 192, 193, INT32_MAX, INT32_MIN]), min_size=6, max_size=6),
    ids=st.lists(st.sampled_from([0, 5, -1, 2**25 - 1, 2**25, 2**30, INT32_MIN]), min_size=18, max_size=18),
    missing_rows=st.sampled_from([-4, 0, 0, 3]),
    has_own_lens=st.booleans(),
)
def test_triton_rows_equal_their_definition(counts, lens, ids, missing_rows, has_own_lens):
    offsets = list(accumulate(counts, initial=0))
    num_rows = max(offsets[-1] + missing_rows, 0)
    inputs: dict[str, Any] = {
        "query_offsets": int32(offsets),
        "context_lens": int32(lens[: len(counts)]),
        "page_table": int32(ids).view(6, 3)[: len(counts), :2],  # rows further apart than they are long
        "num_rows": num_rows,
        "page_size": 64,
        "visible_lens": torch.arange(num_rows, dtype=torch.int32) if has_own_lens else None,
    }
    ours, theirs = locate_rows_in_triton(**inputs), locate_rows_in_torch(**inputs)
    for field in fields(RowArrays):
        have, want = getattr(ours, field.name), getattr(theirs, field.name)
        assert have.dtype == want.dtype
        assert torch.equal(have, want), field.name


@interpreted
@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("num_fills", [1, 3, 4])
def test_the_triton_rows_launch_fills_workspaces_too(num_rows, num_fills):
    pieces = [
        ((2500,), torch.int64, INT64_MAX),
        ((1,), torch.int32, 1),
        ((3, 7), torch.int32, 0),
        ((2,), torch.int64, -1),
    ]
    fills = Fills(device=torch.device("cpu"))
    memory = [fills.ask(*piece).fill_(77) for piece in pieces[:num_fills]]
    rows = {
        "query_offsets": int32([0, num_rows]), "context_lens": int32([70]), "page_table": int32([4, 5]).view(1, 2),
        "num_rows": num_rows, "page_size": 64,
    }  # fmt: skip
    positions = locate_rows_in_triton(**rows, fills=fills).positions
    assert positions.tolist() == list(range(70 - num_rows, 70))
    assert all(bool((part == value).all()) for part, (_, _, value) in zip(memory, pieces))


def fill(
    offsets: list[int],
    lens: list[int],
    starts: list[int] | None,
    *,
    per_group: int,
    programs: int,
    one_each: bool,
    page_table: torch.Tensor | None = None,
) -> schedules.WorkSchedule:
    schedule = schedules.allocate_schedule(
        torch.device("cpu"), max_groups=len(lens), rows_per_group=per_group, num_programs=programs
    )
    (launch,) = schedules.describe_fill(
        schedule,
        query_offsets=int32(offsets),
        visible_lens=int32(lens),
        max_context=650,
        tile=64,
        row_starts=None if starts is None else int32(starts),
        has_one_group_each=one_each,
        page_table=page_table,
    )
    launch()
    return schedule


def assert_as_defined(schedule: schedules.WorkSchedule, offsets: list[int], lens: list[int], starts=None) -> None:
    groups = list_groups(
        offsets,
        lens,
        rows_per_group=schedule.rows_per_group,
        num_keys=650,
        tile=64,
        starts=starts,
        start_jump=schedules.START_JUMP.value,
    )
    assert [tuple(group) for group in schedule.groups[: len(groups)].tolist()] == groups
    shares = share_out(groups, num_programs=schedule.num_programs, tile_costs=schedule.tile_costs)
    wanted = [(*share, *(groups[share[0]] if share[0] < len(groups) else (0,) * 4)) for share in shares]
    assert [tuple(record) for record in schedule.programs[:, :6].tolist()] == wanted


@interpreted
@fuzzed
@given(
    counts=row_counts,
    data=st.data(),
    per_group=st.sampled_from([1, 3, 4, 8]),
    programs=st.sampled_from([1, 7, 528]),
    one_each=st.booleans(),
)
def test_triton_schedules_equal_their_definition(counts, data, per_group, programs, one_each):
    counts = [min(count, per_group) for count in counts] if one_each else counts
    offsets = list(accumulate(counts, initial=0))
    lens = data.draw(st.lists(hostile_lens, min_size=offsets[-1], max_size=offsets[-1]))
    schedule = fill(offsets, lens, None, per_group=per_group, programs=programs, one_each=one_each)
    assert_as_defined(schedule, offsets, lens)


@interpreted
def test_every_share_notes_its_first_page():
    counts, lens = [2, 3, 0, 1], [600, 650, 65, 66, 67, 129]
    offsets = list(accumulate(counts, initial=0))
    table = torch.arange(100, 100 + 4 * 13, dtype=torch.int32).view(4, 13)[:, :11]
    schedule = fill(offsets, lens, None, per_group=4, programs=5, one_each=True, page_table=table)
    assert_as_defined(schedule, offsets, lens)
    for _, tile, _, _, request, tiles, page, _ in schedule.programs.tolist():
        assert page == (int(table[request, tile]) if tiles else 0)
    assert sum(record[5] > 0 for record in schedule.programs.tolist()) >= 5


@interpreted
@fuzzed
@given(
    spans=st.lists(
        st.tuples(st.sampled_from([0, 3, 256, 257, 520, -7, INT32_MAX, INT32_MIN]), hostile_lens), max_size=30
    ),
    per_group=st.sampled_from([1, 3, 8]),
    programs=st.sampled_from([1, 7, 528]),
)
def test_triton_schedules_of_contiguous_keys_equal_their_definition(spans, per_group, programs):
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    schedule = fill([0, len(spans)], ends, starts, per_group=per_group, programs=programs, one_each=False)
    assert_as_defined(schedule, [0, len(spans)], ends, starts)


@interpreted
def test_more_requests_than_a_block_of_the_triton_schedule_are_listed():
    counts = [row % 3 for row in range(2500)]
    offsets = list(accumulate(counts, initial=0))
    lens = [row % 200 for row in range(offsets[-1])]
    for one_each in (True, False):
        assert_as_defined(fill(offsets, lens, None, per_group=2, programs=396, one_each=one_each), offsets, lens)


def test_plain_schedules_are_those_worked_out_by_hand():
    """Two requests of 3 and 9 rows in groups of 4: 130 keys are 3 tiles, 64 keys 1, 65 keys 2."""
    lens = [10, 130, 0, *[64] * 8, 65]
    groups = list_groups([0, 3, 12], lens, rows_per_group=4, num_keys=1000, tile=64)
    assert groups == [(0, 3, 0, 3), (3, 4, 1, 1), (7, 4, 1, 1), (11, 1, 1, 2)]
    costs = (3, 3, 4, 4)  # 12 + 4 + 4 + 6 = 26, in shares of 13
    assert share_out(groups, num_programs=2, tile_costs=costs) == [(0, 0), (2, 0), (4, 0)]
    assert share_out(groups, num_programs=1, tile_costs=costs) == [(0, 0), (4, 0)]
    assert share_out([], num_programs=2, tile_costs=costs) == [(1, 0)] * 3


def test_plain_groups_of_contiguous_keys_begin_where_starts_jump():
    starts, ends = [0, 0, 0, 300, 301, 301, 301], [70, 71, 0, 400, 400, 365, 366]
    groups = list_groups([], ends, rows_per_group=4, num_keys=400, tile=64, starts=starts)
    assert groups == [(0, 3, 0, 2), (3, 1, 0, 2), (4, 3, 0, 2)]


@pytest.mark.compile
@pytest.mark.skipif(is_interpreting(), reason="needs Triton's compiler")
@pytest.mark.parametrize("arch", [Arch.SM80, Arch.SM90, Arch.SM100, Arch.GFX942], ids=str)
def test_both_launches_compile_without_spilling(arch):
    meta = {"dtype": torch.int32, "device": "meta"}
    rows, _ = describe_rows(
        query_offsets=torch.empty(65, **meta),
        context_lens=torch.empty(64, **meta),
        page_table=torch.empty(64, 9, **meta),
        num_rows=256,
        page_size=64,
    )
    schedule = schedules.allocate_schedule(torch.device("meta"), max_groups=64, rows_per_group=4, num_programs=396)
    (shares,) = schedules.describe_fill(
        schedule,
        query_offsets=torch.empty(65, **meta),
        visible_lens=torch.empty(256, **meta),
        max_context=576,
        tile=64,
        has_one_group_each=True,
    )
    for launch in (rows, shares):
        binary = compile_launch(launch, arch)
        assert binary.stack_bytes == 0
        assert binary.shared_bytes <= TARGETS[arch].shared_bytes
