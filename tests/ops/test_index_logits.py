"""Every index_logits kernel against a loop over bytes, and the bits of the reference against the batch around a row."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from importlib import import_module
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import DEVICE, IS_INTERPRETING, kernel_case_pairs, plan_for, problem_or_skip

from nextn.cache_format import IndexCacheFormat
from nextn.errors import InputError
from nextn.hardware import describe_device
from nextn.ops import index_logits
from nextn.ops._kernel import discover
from nextn.ops._pages import decode_e4m3
from nextn.ops.index_logits.cases import CASES, IndexLogitsCase, IndexLogitsInputs
from nextn.testing.numerics import EXACT_MAX_DIFF, MAX_ERROR, QUANTISED_MAX_DIFF, assert_rows_match, assert_same_bits
from nextn.testing.poison import poison_output

every_pair = pytest.mark.parametrize(("kernel", "case"), kernel_case_pairs("index_logits", CASES))
BATCH = IndexLogitsCase(name="batch", row_counts=(4, 2), context_lens=(150, 70), heads=8)


def value_of_code(code: int) -> float:
    """An e4m3fn code by the format's definition: 1 sign, 4 exponent bits with bias 7, 3 mantissa bits, no infinity."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


E4M3_VALUES = torch.tensor([value_of_code(code) for code in range(256)], dtype=torch.float64)


def request_of(row: int, query_offsets: list[int]) -> int:
    return next(b for b in range(len(query_offsets) - 1) if query_offsets[b] <= row < query_offsets[b + 1])


def score_by_loops(case: IndexLogitsCase, inputs: IndexLogitsInputs, *, exact: bool) -> torch.Tensor:
    """FP64 logits where the contract defines them, 0 elsewhere, a token at a time from the cache's bytes."""
    tensors = {name: tensor.cpu() for name, tensor in inputs.arguments.items()}
    q, weights = inputs.exact_q.cpu().double(), inputs.exact_weights.cpu().double()
    if case.cache == "fp8" and not exact:
        q, weights = E4M3_VALUES[tensors["q"].view(torch.uint8).int()], tensors["weights"].double()
    offsets, table, defined = tensors["query_offsets"].tolist(), tensors["page_table"].tolist(), inputs.defined.cpu()
    logits = torch.zeros(q.shape[0], inputs.max_context, dtype=torch.float64)
    found: dict[int, tuple[torch.Tensor, float]] = {}
    for row in range(q.shape[0]):
        table_row = table[request_of(row, offsets)]
        positions = defined[row].nonzero().view(-1).tolist()
        slots = [table_row[p // case.page_size] * case.page_size + p % case.page_size for p in positions]
        for slot in set(slots) - found.keys():
            exact_key = inputs.exact_keys[slot].cpu().double()
            found[slot] = (exact_key, 1.0) if exact else read_key(case, tensors["index_cache"], slot)
        if slots:
            keys = torch.stack([found[slot][0] for slot in slots])
            scales = torch.tensor([found[slot][1] for slot in slots], dtype=torch.float64)
            logits[row, positions] = scales * (weights[row] @ (q[row] @ keys.T).clamp(min=0))
    return logits


def read_key(case: IndexLogitsCase, cache: torch.Tensor, slot: int) -> tuple[torch.Tensor, float]:
    page, offset = divmod(slot, case.page_size)
    if case.cache == "fp32":
        return cache[page, offset].double(), 1.0
    codes = cache[page, offset * case.dim : (offset + 1) * case.dim]
    scale_at = case.page_size * case.dim + offset * 4
    (scale,) = struct.unpack("<f", bytes(cache[page, scale_at : scale_at + 4].tolist()))
    return E4M3_VALUES[codes.int()], scale


def call(inputs: IndexLogitsInputs, **changes: object) -> torch.Tensor:
    arguments = {**inputs.arguments, "max_context": inputs.max_context, **changes}
    return index_logits(**arguments)  # type: ignore[arg-type]


@every_pair
def test_matches_a_loop_over_the_cache_bytes(kernel, case):
    problem = problem_or_skip(kernel, case)
    inputs = case.inputs(DEVICE)
    output = poison_output((problem.num_rows, case.max_context), getattr(torch, case.out_dtype), DEVICE, row_padding=8)
    schedule = {name: inputs.arguments[name] for name in ("query_offsets", "visible_lens", "page_table")}
    plan = plan_for(kernel, problem, **schedule)
    kernel.prepare(problem, **inputs.arguments, out=output.view, plan=plan)()
    output.assert_untouched_around()
    limits = {"max_diff": QUANTISED_MAX_DIFF, "max_error": MAX_ERROR}
    if case.out_dtype == "bfloat16":
        limits = {"max_diff": 3e-5, "max_error": 2**-7 if IS_INTERPRETING else 2**-8}  # Triton's interpreter truncates
    quantised = score_by_loops(case, inputs, exact=False)
    assert_rows_match(output.view, quantised, defined=inputs.defined, **limits)
    if case.cache == "fp8":
        is_long = inputs.defined.sum(dim=1, keepdim=True) >= 32  # a few columns may all be near a zero crossing
        exact = score_by_loops(case, inputs, exact=True)
        assert_rows_match(output.view, exact, max_diff=EXACT_MAX_DIFF, max_error=None, defined=inputs.defined & is_long)


@every_pair
def test_repeats_to_the_last_bit(kernel, case):
    problem = problem_or_skip(kernel, case)
    inputs = case.inputs(DEVICE)
    schedule = {name: inputs.arguments[name] for name in ("query_offsets", "visible_lens", "page_table")}
    plan = plan_for(kernel, problem, **schedule)
    outputs = []
    for _ in range(3):
        out = torch.zeros(problem.num_rows, case.max_context, device=DEVICE, dtype=getattr(torch, case.out_dtype))
        kernel.prepare(problem, **inputs.arguments, out=out, plan=plan)()
        outputs.append(out.masked_fill_(~inputs.defined, 0))
    assert_same_bits(outputs[1], outputs[0])
    assert_same_bits(outputs[2], outputs[0])


def test_decoding_gives_every_e4m3_value():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert_same_bits(decode_e4m3(codes), E4M3_VALUES.float())


def test_products_are_exact_at_the_extremes_of_e4m3():
    """128 products of the largest and smallest values: any sum in FP32 would lose the small ones."""
    case = replace(BATCH, row_counts=(1,), context_lens=(3,), heads=1)
    inputs = case.inputs()
    codes = torch.full((1, 1, 128), 0x7E, dtype=torch.uint8)  # 448
    codes[..., 64:] = 0x01  # 2^-9
    keys = codes.view(-1).clone()
    keys[:32] |= 0x80  # half of the large products cancel the other half; 64 products of 2^-18 remain
    page = int(inputs.arguments["page_table"][0, 0])
    cache = inputs.arguments["index_cache"]
    cache[page, :128] = keys
    cache[page, 8192:8196] = torch.tensor([1.0]).view(torch.uint8)
    logits = call(inputs, q=codes.view(torch.float8_e4m3fn), weights=torch.ones(1, 1))
    assert logits[0, 0].item() == 64 * 2.0**-18


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    row_counts=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    prefixes=st.lists(st.sampled_from([0, 1, 55, 63, 64, 200, 1023, 1100]), min_size=4, max_size=4),
    heads=st.sampled_from([1, 5, 8, 32]),
    spare=st.sampled_from([0, 500]),
    num_threads=st.sampled_from([1, 2]),
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(row_counts, prefixes, heads, spare, num_threads):
    context_lens = tuple(prefix + rows for prefix, rows in zip(prefixes, row_counts))
    case = IndexLogitsCase(
        name="any", row_counts=tuple(row_counts), context_lens=context_lens, heads=heads, spare_columns=spare
    )
    inputs = case.inputs()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = call(inputs)
    finally:
        torch.set_num_threads(before)
    arguments, offsets = inputs.arguments, list(accumulate(row_counts, initial=0))
    for row in range(sum(row_counts)):
        request, length = request_of(row, offsets), int(arguments["visible_lens"][row])
        alone = index_logits(
            arguments["q"][row : row + 1],
            arguments["weights"][row : row + 1],
            arguments["index_cache"],
            torch.tensor([0, 1], dtype=torch.int32),
            arguments["visible_lens"][row : row + 1],
            arguments["page_table"][request : request + 1],
            max_context=length,
        )
        assert_same_bits(together[row, :length], alone[0])


@pytest.mark.parametrize("next_n", range(1, 9))
def test_a_token_has_the_same_bits_at_every_draft_depth(next_n):
    tokens = IndexLogitsCase(name="eight", row_counts=(8,), context_lens=(1030,), heads=32).inputs()
    whole = call(tokens)
    for first in range(0, 8, next_n):
        rows = slice(first, min(first + next_n, 8))
        part = call(
            tokens,
            q=tokens.arguments["q"][rows],
            weights=tokens.arguments["weights"][rows],
            visible_lens=tokens.arguments["visible_lens"][rows],
            query_offsets=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
        )
        visible = tokens.defined[rows]
        assert_same_bits(part.masked_fill(~visible, 0), whole[rows].masked_fill(~visible, 0))


def test_the_padding_around_a_context_changes_no_bit():
    inputs = replace(BATCH, spare_columns=2 * 150).inputs()
    table = inputs.arguments["page_table"]
    narrow = call(inputs, max_context=150, page_table=table[:, :3])
    wide = call(inputs)
    visible = inputs.defined[:, :150]
    assert_same_bits(narrow.masked_fill(~visible, 0), wide[:, :150].masked_fill(~visible, 0))


def test_blocks_found_on_the_device_give_the_bits_of_blocks_found_on_the_host(monkeypatch):
    reference = import_module("nextn.ops.index_logits.reference")
    case = IndexLogitsCase(name="any", row_counts=(3, 0, 8, 1), context_lens=(90, 5, 1300, 0), heads=8)
    inputs = case.inputs()
    on_host = call(inputs)
    monkeypatch.setattr(reference, "_groups_by_request", reference._groups_by_block)
    monkeypatch.setattr(reference, "_GPU_BLOCK", 5 * 1024 * 128)
    on_device = call(inputs)
    assert_same_bits(on_device.masked_fill(~inputs.defined, 0), on_host.masked_fill(~inputs.defined, 0))


def test_rows_that_no_request_owns_are_left_alone():
    inputs = BATCH.inputs()
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)  # row 5 is nobody's
    out = torch.full((6, BATCH.max_context), 7.0)
    call(inputs, query_offsets=offsets, out=out)
    assert (out[5] == 7.0).all()
    assert (out[4, : int(inputs.arguments["visible_lens"][4])] != 7.0).any()


def test_deep_gemms_view_of_the_cache_is_taken():
    inputs = BATCH.inputs()
    cache = inputs.arguments["index_cache"]
    viewed = call(inputs, index_cache=cache.view(cache.shape[0], 64, 1, 132))
    assert_same_bits(viewed.masked_fill(~inputs.defined, 0), call(inputs).masked_fill(~inputs.defined, 0))


def test_a_nan_key_spoils_its_own_column_alone():
    spoilt = replace(BATCH, hostile=frozenset({"nan_keys"}))
    clean, dirty = BATCH.inputs(), spoilt.inputs()
    keep = dirty.defined
    assert_same_bits(call(dirty).masked_fill(~keep, 0), call(clean).masked_fill(~keep, 0))
    assert call(dirty)[:4, 5:7].isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(6, 8, 128)}, r"q is torch.float32 over a fp8 cache; pass torch.float8_e4m3fn"),
        ({"q": torch.zeros(6, 128).to(torch.float8_e4m3fn)}, r"pass \[rows, heads, dim\]"),
        ({"weights": torch.zeros(6, 9)}, r"pass float32 \[6, 8\]"),
        ({"weights": torch.zeros(6, 8, dtype=torch.float64)}, r"weights is torch.float64"),
        ({"index_cache": torch.zeros(4, 8449, dtype=torch.uint8)}, r"fits no format for head_dim 128"),
        ({"index_cache": torch.zeros(0, 8448, dtype=torch.uint8)}, r"no page"),
        ({"index_cache": torch.zeros(8448, 4, dtype=torch.uint8).T}, r"contiguous"),
        ({"index_cache": torch.zeros(33794, dtype=torch.uint8)[2:].view(4, 8448)}, r"starts 2 bytes.*multiple of 4"),
        ({"query_offsets": torch.zeros(2, dtype=torch.int32)}, r"pass int32 \[3\]"),
        ({"query_offsets": torch.zeros(3, dtype=torch.int64)}, r"query_offsets is torch.int64"),
        ({"visible_lens": torch.zeros(5, dtype=torch.int32)}, r"pass int32 \[6\]"),
        ({"page_table": torch.zeros(2, 3, dtype=torch.int64)}, r"page_table is torch.int64"),
        ({"page_table": torch.zeros(3, 2, dtype=torch.int32).T}, r"column stride 2"),
        ({"max_context": 193}, r"max_context 193 is not within 0 and 192"),
        ({"max_context": -1}, r"max_context -1"),
        ({"out": torch.zeros(6, 149)}, r"pass float32 or bfloat16 \[6, 150\]"),
        ({"out": torch.zeros(150, 6).T}, r"columns contiguous"),
        ({"out": torch.zeros(1, 150).expand(6, 150)}, r"at least 150 apart"),
        ({"visible_lens": torch.zeros(6, dtype=torch.int32, device="meta")}, r"several devices"),
    ],
)
def test_wrong_input_is_refused_with_the_value_and_the_fix(changes, message):
    with pytest.raises(InputError, match=message):
        call(BATCH.inputs(), **changes)


def test_rows_without_a_request_are_refused():
    empty = {"query_offsets": torch.zeros(1, dtype=torch.int32), "page_table": torch.zeros(0, 3, dtype=torch.int32)}
    with pytest.raises(InputError, match="6 rows but no request"):
        call(BATCH.inputs(), **empty)


def test_a_plan_of_another_batch_is_refused():
    kernel = next(kernel for kernel in discover("index_logits") if kernel.name == "reference")
    other = replace(BATCH, row_counts=(4, 3)).problem(describe_device("cpu"))
    with pytest.raises(InputError, match="plan again"):
        call(BATCH.inputs(), plan=plan_for(kernel, other))


def test_preparing_reads_no_tensor():
    """Meta tensors have no data, so a read of one would raise."""
    kernel = next(kernel for kernel in discover("index_logits") if kernel.name == "reference")
    arguments = {name: tensor.to("meta") for name, tensor in BATCH.inputs().arguments.items()}
    out = torch.empty(6, BATCH.max_context, device="meta")
    assert kernel.prepare(BATCH.problem(describe_device("cpu")), **arguments, out=out).grid is None


def test_unquantised_format_takes_float32_queries_only():
    cache = IndexCacheFormat(name="fp32").allocate(3, "cpu")
    with pytest.raises(InputError, match=r"pass torch\.float32"):
        call(BATCH.inputs(), index_cache=cache)
