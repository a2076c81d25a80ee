"""Every prepare_query kernel against float64 with an explicit Hadamard matrix and explicit rotation pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import DEVICE, kernel_case_pairs, problem_or_skip

from nextn.errors import InputError
from nextn.ops import prepare_query
from nextn.ops._pages import decode_e4m3
from nextn.ops.prepare_query import reference
from nextn.ops.prepare_query.cases import CASES, PrepareQueryCase
from nextn.testing.batches import quantise_blocks
from nextn.testing.numerics import assert_same_bits
from nextn.testing.poison import poison_output

every_pair = pytest.mark.parametrize(("kernel", "case"), kernel_case_pairs("prepare_query", CASES))
BATCH = PrepareQueryCase(name="batch", num_rows=40, heads=4)


def sylvester(dim: int) -> torch.Tensor:
    return torch.tensor(
        [[(-1.0) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)], dtype=torch.float64
    )


def transform_by_pairs(case: PrepareQueryCase, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rotated and transformed queries in float64, a pair at a time."""
    q = inputs["q"].cpu().double().clone()
    for row, position in enumerate(inputs["positions"].tolist()):
        table_row = inputs["rope_table"][position].cpu().double()
        for pair in range(32):
            cos, sin = table_row[pair], table_row[32 + pair]
            a, b = (2 * pair, 2 * pair + 1) if case.interleaved else (pair, pair + 32)
            first, second = q[row, :, a].clone(), q[row, :, b].clone()
            q[row, :, a] = first * cos - second * sin
            q[row, :, b] = second * cos + first * sin
    return q @ sylvester(case.dim) * case.dim**-0.5 if case.hadamard else q


def run(kernel: Any, case: PrepareQueryCase, inputs: dict[str, torch.Tensor], **changes: Any) -> tuple[Any, Any]:
    problem = problem_or_skip(kernel, case)
    dtype = torch.float8_e4m3fn if case.quantise else torch.float32
    prepared = poison_output((case.num_rows, case.heads, case.dim), dtype, DEVICE)
    folded = poison_output((case.num_rows, case.heads), torch.float32, DEVICE)
    kernel.prepare(problem, **inputs, **changes, out=(prepared.view, folded.view))()
    prepared.assert_untouched_around()
    folded.assert_untouched_around()
    return prepared.view.cpu(), folded.view.cpu()


@every_pair
def test_matches_float64_and_quantises_by_the_rule(kernel, case):
    inputs = case.inputs(DEVICE, seed=3)
    prepared, folded = run(kernel, case, inputs)
    exact = transform_by_pairs(case, inputs)
    weights = inputs["weights"].cpu().double() * (case.heads * case.dim) ** -0.5
    largest = exact.abs().amax(-1, keepdim=True)
    if not case.quantise:
        assert ((prepared.double() - exact).abs() <= largest * 1e-6).all()
        torch.testing.assert_close(folded.double(), weights, rtol=1e-6, atol=0)
        return
    _, scales = quantise_blocks(exact.float(), case.dim)
    assert torch.equal(folded.double() == 0, weights == 0)
    used_scales = folded.double() / weights
    # A largest value at the edge of a power of two may round to either side.
    powers = (largest.squeeze(-1) / 448).log2()
    is_clear = (powers - powers.round()).abs() > 1e-5
    torch.testing.assert_close(used_scales[is_clear], scales.squeeze(-1).double()[is_clear], rtol=1e-6, atol=0)
    values = decode_e4m3(prepared.view(torch.uint8)).double() * used_scales[..., None]
    # Half a unit of a 4-bit significand, or half of the smallest subnormal, beside float32's own error.
    tolerance = (exact.abs() * 2**-4).maximum(used_scales[..., None] * 2**-10) + largest * 1e-6
    assert ((values - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.quantise], ids=str)
def test_codes_are_those_of_the_unquantised_result(case):
    inputs = case.inputs(DEVICE, seed=4)
    prepared, folded = run(reference.KERNEL, case, inputs)
    values, unscaled = prepare_query(**inputs, interleaved=case.interleaved, hadamard=case.hadamard, quantise=False)
    codes, scales = quantise_blocks(values.cpu(), case.dim)
    assert torch.equal(prepared.view(torch.uint8), codes)
    assert_same_bits(folded, unscaled.cpu() * scales.squeeze(-1))


def test_the_hadamard_transform_leaves_logits_as_they_are():
    case = PrepareQueryCase(name="dots", num_rows=6, heads=4, quantise=False)
    inputs = case.inputs(seed=5)
    keys = torch.randn(10, 128, generator=torch.Generator().manual_seed(1))
    key_inputs = {**inputs, "q": keys[:, None], "weights": torch.ones(10, 1), "positions": torch.arange(10)}
    logits = []
    for hadamard in (False, True):
        q, folded = prepare_query(**inputs, interleaved=False, hadamard=hadamard, quantise=False)
        k, _ = prepare_query(**key_inputs, interleaved=False, hadamard=hadamard, quantise=False)
        scores = torch.einsum("rhd,sd->rhs", q.double(), k[:, 0].double()).clamp(min=0)
        logits.append(torch.einsum("rh,rhs->rs", folded.double(), scores))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_spoils_its_own_row_and_head_alone(value):
    inputs = BATCH.inputs(seed=6)
    clean_q, clean_weights = prepare_query(**inputs, interleaved=False)
    inputs["q"][3, 2, 100] = value
    q, folded = prepare_query(**inputs, interleaved=False)
    is_spoilt = torch.zeros(40, 4, dtype=torch.bool)
    is_spoilt[3, 2] = True
    assert q.float()[is_spoilt].isnan().all()
    assert folded[is_spoilt].isnan().all()
    assert torch.equal(q.view(torch.uint8)[~is_spoilt], clean_q.view(torch.uint8)[~is_spoilt])
    assert_same_bits(folded[~is_spoilt], clean_weights[~is_spoilt])


def test_positions_outside_the_table_read_its_ends():
    inputs = BATCH.inputs(seed=7)
    last = inputs["rope_table"].shape[0] - 1
    longer = torch.cat([inputs["rope_table"], torch.full((5, 64), 3.0)])
    inside = {**inputs, "positions": torch.tensor([0, 0, last, last] * 10), "rope_table": longer}
    outside = {**inputs, "positions": torch.tensor([-1, -(2**40), last + 1, 2**40] * 10)}
    for expected, actual in zip(prepare_query(**inside, interleaved=True), prepare_query(**outside, interleaved=True)):
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 39), count=st.integers(1, 40), threads=st.sampled_from([1, 2]), seed=st.integers(0, 5))
def test_bits_of_a_row_do_not_depend_on_the_batch_or_the_threads(start, count, threads, seed):
    inputs = BATCH.inputs(seed=seed)
    whole_q, whole_weights = prepare_query(**inputs, interleaved=False)
    part = {name: tensor if name == "rope_table" else tensor[start : start + count] for name, tensor in inputs.items()}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        q, folded = prepare_query(**part, interleaved=False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(q.view(torch.uint8), whole_q[start : start + count].view(torch.uint8))
    assert_same_bits(folded, whole_weights[start : start + count])


Q, WEIGHTS = torch.zeros(2, 4, 128), torch.zeros(2, 4)
POSITIONS, TABLE = torch.tensor([0, 1]), torch.zeros(8, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q.double()}, r"q is torch.float64"),
        ({"q": Q[0]}, r"pass float32, bfloat16 or float16 \[rows, heads, 64 or 128\]"),
        ({"q": torch.zeros(2, 4, 96)}, r"\(2, 4, 96\)"),
        ({"q": torch.zeros(2, 0, 128), "weights": torch.zeros(2, 0)}, r"\(2, 0, 128\)"),
        ({"weights": WEIGHTS[:, :3]}, r"pass float32 \[2, 4\]"),
        ({"weights": WEIGHTS.int()}, r"weights is torch.int32"),
        ({"positions": POSITIONS.float()}, r"positions is torch.float32"),
        ({"positions": POSITIONS[:1]}, r"pass int64 \[2\]"),
        ({"rope_table": TABLE[:, :32]}, r"pass float32 \[max_positions, 64\]"),
        ({"rope_table": TABLE[:0]}, r"\(0, 64\)"),
        ({"rope_table": TABLE.bfloat16()}, r"rope_table is torch.bfloat16"),
        ({"positions": POSITIONS.to("meta")}, r"several devices"),
    ],
)
def test_wrong_input_is_refused_with_the_value_and_the_fix(changes, message):
    arguments = {"q": Q, "weights": WEIGHTS, "positions": POSITIONS, "rope_table": TABLE, **changes}
    with pytest.raises(InputError, match=message):
        prepare_query(**arguments, interleaved=False)
