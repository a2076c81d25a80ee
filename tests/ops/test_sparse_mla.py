"""Every sparse_mla kernel against a loop over slots, and the bits of the reference against the batch around a row."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import DEVICE, kernel_case_pairs, plan_for, problem_or_skip

from nextn.errors import InputError
from nextn.ops import sparse_mla
from nextn.ops.sparse_mla.cases import CASES, SparseMlaCase, SparseMlaInputs
from nextn.testing.numerics import EXACT_MAX_DIFF, MAX_ERROR, assert_rows_match, assert_same_bits
from nextn.testing.poison import poison_output

every_pair = pytest.mark.parametrize(("kernel", "case"), kernel_case_pairs("sparse_mla", CASES))
SMALL = SparseMlaCase(name="small", row_counts=(4, 3), heads=4, topk=32, context_len=70, dtype="float32")
# Rounding the output to its own dtype comes on top of the quantised limit; bfloat16 keeps 8 bits.
MAX_ERRORS = {"float32": MAX_ERROR, "float16": MAX_ERROR, "bfloat16": 2**-8}


def attend_by_loops(case: SparseMlaCase, inputs: SparseMlaInputs, *, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """FP64 output and lse, a row and a slot at a time from the cache's bytes."""
    q, indices = inputs.q.cpu().double(), inputs.indices.tolist()
    num_slots = inputs.exact_kv.shape[0]
    out, lse = torch.zeros(*q.shape[:2], 512).double(), torch.full(q.shape[:2], -math.inf).double()
    latents: dict[int, torch.Tensor] = {}
    for row, slots in enumerate(indices):
        slots = [slot for slot in slots if 0 <= slot < num_slots]
        for slot in slots:
            if slot not in latents:
                stored = inputs.exact_kv[slot].cpu().double()
                latents[slot] = stored if exact else read_latents(case, inputs.kv_cache.cpu(), slot)
        if not slots:
            continue
        keys = torch.stack([latents[slot] for slot in slots])
        scores = q[row] @ keys.T * inputs.scale
        lse[row] = torch.logsumexp(scores, dim=1)
        out[row] = torch.exp(scores - lse[row][:, None]) @ keys[:, :512]
    return out, lse


def read_latents(case: SparseMlaCase, cache: torch.Tensor, slot: int) -> torch.Tensor:
    row = cache[slot // case.page_size, slot % case.page_size]
    if case.cache == "fp32":
        return row.double()
    if case.cache == "bf16":
        return torch.tensor(widen_bfloat16(bytes(row.tolist())), dtype=torch.float64)
    scales = struct.unpack("<4f", bytes(row[512:528].tolist()))
    values = row[:512].view(torch.float8_e4m3fn).double() * torch.tensor(scales).double().repeat_interleave(128)
    rope = torch.tensor(widen_bfloat16(bytes(row[528:].tolist())), dtype=torch.float64)
    return torch.cat([values, rope])


def widen_bfloat16(data: bytes) -> tuple[float, ...]:
    """bfloat16 is the upper half of a float32."""
    halves = struct.unpack(f"<{len(data) // 2}H", data)
    return struct.unpack(f"<{len(halves)}f", struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves)))


def call(inputs: SparseMlaInputs, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = {
        "q": inputs.q,
        "kv_cache": inputs.kv_cache,
        "indices": inputs.indices,
        "scale": inputs.scale,
        **changes,
    }
    return sparse_mla(**arguments)  # type: ignore[arg-type]


@every_pair
def test_matches_a_loop_over_the_cache_bytes(kernel, case):
    problem = problem_or_skip(kernel, case)
    inputs = case.inputs(DEVICE)
    output = poison_output((problem.num_rows, case.heads, 512), inputs.q.dtype, DEVICE, row_padding=64)
    lse = poison_output((problem.num_rows, case.heads), torch.float32, DEVICE)
    plan = plan_for(kernel, problem, device=torch.device(DEVICE))
    kernel.prepare(
        problem,
        q=inputs.q,
        kv_cache=inputs.kv_cache,
        indices=inputs.indices,
        scale=inputs.scale,
        query_offsets=inputs.query_offsets,
        out=output.view,
        lse=lse.view,
        plan=plan,
    )()
    output.assert_untouched_around()
    lse.assert_untouched_around()
    expected, expected_lse = attend_by_loops(case, inputs, exact=False)
    assert_rows_match(output.view, expected, max_error=MAX_ERRORS[case.dtype])
    empty = expected_lse == -math.inf
    assert torch.equal(lse.view.cpu() == -math.inf, empty)
    assert_rows_match(lse.view, expected_lse, max_error=1e-4, defined=~empty)
    exact, _ = attend_by_loops(case, inputs, exact=True)
    assert_rows_match(output.view, exact, max_diff=EXACT_MAX_DIFF, max_error=None)


@every_pair
def test_repeats_to_the_last_bit(kernel, case):
    problem = problem_or_skip(kernel, case)
    inputs = case.inputs(DEVICE)
    plan = plan_for(kernel, problem, device=torch.device(DEVICE))
    outputs = []
    for _ in range(3):
        out = torch.zeros(problem.num_rows, case.heads, 512, device=DEVICE, dtype=inputs.q.dtype)
        lse = torch.zeros(problem.num_rows, case.heads, device=DEVICE)
        kernel.prepare(
            problem,
            q=inputs.q,
            kv_cache=inputs.kv_cache,
            indices=inputs.indices,
            scale=inputs.scale,
            query_offsets=inputs.query_offsets,
            out=out,
            lse=lse,
            plan=plan,
        )()
        outputs.append((out, lse))
    for out, lse in outputs[1:]:
        assert_same_bits(out, outputs[0][0])
        assert_same_bits(lse, outputs[0][1])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 17),
    heads=st.sampled_from([1, 4, 5, 8, 16]),
    topk=st.sampled_from([1, 37, 130, 200]),
    cache=st.sampled_from(["fp8", "bf16", "fp32"]),
    num_threads=st.sampled_from([1, 2]),
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(num_rows, heads, topk, cache, num_threads):
    case = SparseMlaCase(
        name="any",
        row_counts=(num_rows,),
        heads=heads,
        topk=topk,
        cache=cache,
        dtype="float32",
        hostile=frozenset({"holes"}),
    )
    inputs = case.inputs()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        out, lse = call(inputs)
    finally:
        torch.set_num_threads(before)
    for row in range(num_rows):
        alone, alone_lse = call(inputs, q=inputs.q[row : row + 1], indices=inputs.indices[row : row + 1])
        assert_same_bits(out[row], alone[0])
        assert_same_bits(lse[row], alone_lse[0])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_number_of_rows_and_threads_changes_no_bit(num_threads):
    inputs = SparseMlaCase(name="any", row_counts=(17,), heads=8, topk=256, dtype="float32").inputs()
    whole, whole_lse = call(inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        # Counted from the end, so that a row stands at every place of its block.
        parts = [call(inputs, q=inputs.q[first:], indices=inputs.indices[first:]) for first in range(17)]
    finally:
        torch.set_num_threads(before)
    for first, (part, part_lse) in enumerate(parts):
        assert_same_bits(part, whole[first:])
        assert_same_bits(part_lse, whole_lse[first:])


@pytest.mark.parametrize("num_rows", [1, 4, 6])
def test_every_product_has_one_aligned_shape(num_rows, monkeypatch):
    """BLAS promises equal bits for equal shapes and alignments only, even where it happens to keep them for others."""
    reference = import_module("nextn.ops.sparse_mla.reference")
    attend, shapes = reference._attend, set()

    def attend_and_note(queries: torch.Tensor, keys: torch.Tensor, *others: object) -> object:
        shapes.add((queries.shape, keys.shape))
        return attend(queries, keys, *others)

    monkeypatch.setattr(reference, "_attend", attend_and_note)
    call(SparseMlaCase(name="any", row_counts=(num_rows,), heads=5, topk=37, dtype="float32").inputs())
    assert shapes == {((4, 5, 576), (4, 48, 576))}


def test_slots_of_other_rows_change_no_bit():
    inputs = SMALL.inputs()
    out, _ = call(inputs)
    others = inputs.indices.clone()
    others[1:] = others[1:].flip(1)
    changed, _ = call(inputs, indices=others)
    assert_same_bits(changed[0], out[0])


def test_reading_without_removing_duplicates_changes_no_bit(monkeypatch):
    """A GPU reads every slot a row names; a CPU reads one that several rows name once."""
    inputs = replace(SMALL, hostile=frozenset({"holes", "wild_slots", "duplicates"})).inputs()
    out, lse = call(inputs)
    reference = import_module("nextn.ops.sparse_mla.reference")

    def keep_everything(slots: torch.Tensor, return_inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return slots, torch.arange(slots.shape[0]) * (slots >= 0)

    monkeypatch.setattr(reference.torch, "unique", keep_everything)
    again, again_lse = call(inputs)
    assert_same_bits(again, out)
    assert_same_bits(again_lse, lse)


def test_nan_in_a_selected_row_spoils_only_the_rows_that_name_it():
    inputs = SMALL.inputs()
    clean, _ = call(inputs)
    slot = int(inputs.indices[0, 3])
    cache = inputs.kv_cache.clone()
    cache[slot // 64, slot % 64, :512] = 0x7F
    dirty, _ = call(inputs, kv_cache=cache)
    named = (inputs.indices == slot).any(dim=1)
    assert named.any()
    assert not named.all()
    assert dirty[named].isnan().all()
    assert_same_bits(dirty[~named], clean[~named])


def test_a_slot_named_twice_counts_twice():
    inputs = SMALL.inputs()
    once = torch.full_like(inputs.indices, -1)
    once[:, :2] = inputs.indices[:, :2]
    twice = once.clone()
    twice[:, 2:4] = inputs.indices[:, :2]
    out, lse = call(inputs, indices=once)
    out_twice, lse_twice = call(inputs, indices=twice)
    torch.testing.assert_close(out_twice, out)
    torch.testing.assert_close(lse_twice, lse + math.log(2))


def test_scores_beyond_the_range_of_exp_stay_finite():
    inputs = SMALL.inputs()
    out, lse = call(inputs, scale=1e4)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_flash_mlas_view_of_the_cache_is_taken():
    inputs = SMALL.inputs()
    viewed, _ = call(inputs, kv_cache=inputs.kv_cache.unsqueeze(2))
    assert_same_bits(viewed, call(inputs)[0])


def test_pages_at_any_distance_are_read():
    """A distance that is no multiple of a row."""
    inputs = SMALL.inputs()
    cache = inputs.kv_cache
    wide = torch.full((cache.shape[0], cache[0].numel() + 16), 255, dtype=torch.uint8)
    wide[:, :-16] = cache.flatten(1)
    strided = wide[:, :-16].unflatten(1, cache.shape[1:])
    assert_same_bits(call(inputs, kv_cache=strided)[0], call(inputs)[0])


def test_the_output_given_is_the_output_returned():
    inputs = SMALL.inputs()
    out = torch.empty(7, 4, 512)
    returned, _ = call(inputs, out=out)
    assert returned is out
    assert_same_bits(out, call(inputs)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(7, 4, 575)}, r"\[rows, heads, 576\]"),
        ({"q": torch.zeros(7, 4, 576, dtype=torch.float64)}, r"q is torch.float64"),
        ({"q": torch.zeros(7, 576, 4).transpose(1, 2)}, r"stride 4"),
        ({"indices": torch.zeros(7, 32, dtype=torch.int64)}, r"indices is torch.int64"),
        ({"indices": torch.zeros(6, 32, dtype=torch.int32)}, r"pass int32 \[7, k\]"),
        ({"indices": torch.zeros(7, 0, dtype=torch.int32)}, r"k at least 1"),
        ({"indices": torch.zeros(32, 7, dtype=torch.int32).T}, r"column stride 7"),
        ({"kv_cache": torch.zeros(3, 64, 655, dtype=torch.uint8)}, r"fits no format"),
        ({"kv_cache": torch.zeros(0, 64, 656, dtype=torch.uint8)}, r"no page"),
        ({"kv_cache": torch.zeros(3, 656, 64, dtype=torch.uint8).transpose(1, 2)}, r"contiguous"),
        ({"query_offsets": torch.zeros(2)}, r"query_offsets is torch.float32"),
        ({"out": torch.zeros(7, 4, 511)}, r"pass torch.float32 \[7, 4, 512\]"),
        ({"out": torch.zeros(7, 4, 512, dtype=torch.bfloat16)}, r"out is torch.bfloat16"),
        ({"indices": torch.zeros(7, 32, dtype=torch.int32, device="meta")}, r"several devices"),
    ],
)
def test_wrong_input_is_refused_with_the_value_and_the_fix(changes, message):
    with pytest.raises(InputError, match=message):
        call(SMALL.inputs(), **changes)
