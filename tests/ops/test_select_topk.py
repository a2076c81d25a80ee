"""Every select_topk kernel against Python's own sort."""

from __future__ import annotations

import math
from functools import cmp_to_key
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import DEVICE, kernel_case_pairs, plan_for, problem_or_skip

from nextn.errors import InputError
from nextn.ops import select_topk
from nextn.ops.select_topk.cases import CASES, SelectTopkCase, SelectTopkInputs
from nextn.testing.poison import poison_output

every_pair = pytest.mark.parametrize(("kernel", "case"), kernel_case_pairs("select_topk", CASES))


def select_by_sorting(logits: list[float], length: int, k: int) -> list[int]:
    """Positions in ascending order, then -1. Python's sort is stable and compares -0.0 and 0.0 as equal."""
    length = min(max(length, 0), len(logits))

    def compare(x: int, y: int) -> int:
        a, b = logits[x], logits[y]
        if math.isnan(a) or math.isnan(b):
            return int(math.isnan(a)) - int(math.isnan(b))
        return int(a < b) - int(a > b)

    best = sorted(sorted(range(length), key=cmp_to_key(compare))[:k])
    return best + [-1] * (k - len(best))


def expected_of(case: SelectTopkCase, inputs: SelectTopkInputs) -> list[list[int]]:
    rows = []
    for row, (logits, length) in enumerate(zip(inputs.logits.tolist(), inputs.visible_lens.tolist())):
        positions = select_by_sorting(logits, length, case.topk)
        if inputs.page_table is not None:
            table = inputs.page_table[row // case.rows_per_request].tolist()
            size = case.page_size
            positions = [p if p < 0 else table[p // size] * size + p % size for p in positions]
        rows.append(positions)
    return rows


@every_pair
def test_selects_what_sorting_selects(kernel, case):
    problem = problem_or_skip(kernel, case)
    inputs = case.inputs(DEVICE)
    output = poison_output((problem.num_rows, case.topk), torch.int32, DEVICE, row_padding=4)
    plan = plan_for(kernel, problem, device=torch.device(DEVICE))
    kernel.prepare(
        problem,
        logits=inputs.logits,
        visible_lens=inputs.visible_lens,
        query_offsets=inputs.query_offsets,
        page_table=inputs.page_table,
        out=output.view,
        plan=plan,
    )()
    assert output.view.tolist() == expected_of(case, inputs)
    output.assert_untouched_around()


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4028234663852886e38]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), min_size=9, max_size=9),
        min_size=1,
        max_size=5,
    ),
    lens=st.lists(st.integers(-2, 11), min_size=5, max_size=5),
    k=st.integers(1, 12),
)
def test_any_floats_at_any_lengths(rows, lens, k):
    lens = lens[: len(rows)]
    selected = select_topk(torch.tensor(rows), torch.tensor(lens, dtype=torch.int32), k)
    assert selected.tolist() == [select_by_sorting(row, length, k) for row, length in zip(rows, lens)]


def test_a_row_is_selected_alike_alone_and_in_any_batch():
    logits = torch.randn(9, 400, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    lens = torch.tensor([400, 17, 0, 399, 200, 65, 64, 1, 300], dtype=torch.int32)
    together = select_topk(logits, lens, 64)
    for row in range(9):
        width = max(int(lens[row]), 1)
        alone = select_topk(logits[row : row + 1, :width], lens[row : row + 1], 64)
        assert alone.tolist() == together[row : row + 1].tolist()


def test_rows_are_cut_into_blocks_without_a_trace(monkeypatch):
    logits, lens = torch.randn(7, 100), torch.tensor([100, 5, 60, 0, 99, 31, 100], dtype=torch.int32)
    whole = select_topk(logits, lens, 32)
    monkeypatch.setattr(import_module("nextn.ops.select_topk.reference"), "_KEYS_AT_ONCE", 250)
    assert torch.equal(select_topk(logits, lens, 32), whole)


def test_short_rows_are_not_read():
    logits = torch.full((1, 8), math.nan)
    assert select_topk(logits, torch.tensor([5], dtype=torch.int32), 6).tolist() == [[0, 1, 2, 3, 4, -1]]


def test_requests_without_rows_shift_no_table_row():
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 5.0, 0.0]])
    offsets = torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32)
    table = torch.tensor([[90, 91], [10, 20], [92, 93], [30, 7]], dtype=torch.int32)
    slots = select_topk(
        logits, torch.tensor([3, 3, 3], dtype=torch.int32), 2, query_offsets=offsets, page_table=table, page_size=2
    )
    assert slots.tolist() == [[21, 40], [20, 21], [60, 61]]


def test_page_ids_no_cache_can_have_give_no_slot():
    table = torch.tensor([[-1, 2**31 - 1, 5, -(2**31)]], dtype=torch.int32)
    slots = select_topk(
        torch.zeros(1, 4),
        torch.tensor([4], dtype=torch.int32),
        4,
        query_offsets=torch.tensor([0, 1], dtype=torch.int32),
        page_table=table,
        page_size=1,
    )
    assert slots.tolist() == [[-1, 2**31 - 1, 5, -1]]
    wide = select_topk(
        torch.zeros(1, 4),
        torch.tensor([4], dtype=torch.int32),
        4,
        query_offsets=torch.tensor([0, 1], dtype=torch.int32),
        page_table=torch.tensor([[2**31 - 1, 2**30 - 1]], dtype=torch.int32),
        page_size=2,
    )
    assert wide.tolist() == [[-1, -1, 2**31 - 2, 2**31 - 1]]


def test_columns_past_the_page_table_are_not_selected():
    slots = select_topk(
        torch.arange(6.0)[None],
        torch.tensor([6], dtype=torch.int32),
        2,
        query_offsets=torch.tensor([0, 1], dtype=torch.int32),
        page_table=torch.tensor([[3, 1]], dtype=torch.int32),
        page_size=2,
    )
    assert slots.tolist() == [[2, 3]]


LOGITS, LENS = torch.zeros(2, 100), torch.tensor([3, 4], dtype=torch.int32)
OFFSETS, TABLE = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": LOGITS.double()}, r"pass float32 \[rows, columns\]"),
        ({"logits": LOGITS[0]}, r"pass float32 \[rows, columns\]"),
        ({"logits": torch.zeros(100, 2).T}, r"column stride 2"),
        ({"logits": torch.empty(2, 1, device="meta").expand(2, 2**31)}, r"column stride 0"),
        ({"visible_lens": LENS.long()}, r"visible_lens is torch.int64"),
        ({"visible_lens": LENS[:1]}, r"pass int32 \[2\]"),
        ({"k": 0}, r"k is 0; select at least 1"),
        ({"page_size": 0}, r"page_size is 0"),
        ({"page_table": TABLE}, r"give both for slots"),
        ({"query_offsets": OFFSETS}, r"give both for slots"),
        ({"query_offsets": OFFSETS, "page_table": TABLE.long()}, r"page_table is torch.int64"),
        ({"query_offsets": OFFSETS, "page_table": torch.zeros(2, 2, dtype=torch.int32).T[:1]}, r"column stride 2"),
        ({"query_offsets": OFFSETS[:1], "page_table": TABLE}, r"pass int32 \[2\]"),
        ({"query_offsets": OFFSETS[:1], "page_table": TABLE[:0]}, r"2 rows but no request"),
        ({"out": torch.zeros(2, 3, dtype=torch.int32)}, r"pass int32 \[2, 4\]"),
        ({"out": torch.zeros(2, 4)}, r"out is torch.float32"),
        ({"visible_lens": LENS.to("meta")}, r"several devices"),
    ],
)
def test_wrong_input_is_refused_with_the_value_and_the_fix(changes, message):
    arguments = {"logits": LOGITS, "visible_lens": LENS, "k": 4, **changes}
    with pytest.raises(InputError, match=message):
        select_topk(**arguments)  # type: ignore[arg-type]
