"""Every write_cache kernel against float64 a row at a time, and every byte that must stay as it was."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import DEVICE, kernel_case_pairs, problem_or_skip

from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.errors import InputError
from nextn.ops import write_cache
from nextn.ops._pages import decode_e4m3, gather_index_keys, gather_latent_rows
from nextn.ops.write_cache.cases import CASES, MAX_POSITIONS, WriteCacheCase
from nextn.testing.batches import quantise_blocks
from nextn.testing.numerics import assert_same_bits
from nextn.testing.poison import POISON_BYTE

every_pair = pytest.mark.parametrize(("kernel", "case"), kernel_case_pairs("write_cache", CASES))


def memory_of(cache: torch.Tensor) -> torch.Tensor:
    """All bytes under a cache, gaps between its pages included: uint8 ``[num_pages, stride]`` on the CPU."""
    num_pages, stride = cache.shape[0], cache.stride(0)
    flat = torch.empty(0, dtype=cache.dtype, device=cache.device).set_(cache.untyped_storage())
    assert flat.numel() == num_pages * stride
    return flat.view(torch.uint8).view(num_pages, -1).cpu()


def find_slots(case: WriteCacheCase, inputs: dict[str, Any]) -> list[int | None]:
    """The slot of each row, a row at a time; None for a row that writes nothing."""
    cache = inputs["kv_cache"] if case.latent else inputs["index_cache"]
    num_slots = cache.shape[0] * case.page_size
    requests = [b for b, count in enumerate(case.row_counts) for _ in range(count)]
    slots: list[int | None] = []
    for row, position in enumerate(inputs["positions"].tolist()):
        slot = -1
        if case.has_slots:
            slot = int(inputs["slots"][row])
        elif 0 <= position < inputs["page_table"].shape[1] * case.page_size:
            page = int(inputs["page_table"][requests[row], position // case.page_size])
            slot = page * case.page_size + position % case.page_size
        is_written = 0 <= slot < num_slots and 0 <= position < MAX_POSITIONS
        slots.append(slot if is_written else None)
    return slots


def rotate_pairs(values: torch.Tensor, table_row: torch.Tensor, interleaved: bool) -> torch.Tensor:
    turned = values.clone()
    for pair in range(32):
        cos, sin = table_row[pair], table_row[32 + pair]
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 32)
        turned[a] = values[a] * cos - values[b] * sin
        turned[b] = values[b] * cos + values[a] * sin
    return turned


def latent_row(case: WriteCacheCase, inputs: dict[str, Any], row: int) -> torch.Tensor:
    """What a row of latents should hold, float64 [576]."""
    values = inputs["kv"][row].cpu().double()
    latents, rope = values[:512], values[512:]
    if case.has_norms:
        weight = inputs["kv_norm_weight"].cpu().double()
        latents = latents / math.sqrt(latents.square().mean() + inputs["kv_norm_eps"]) * weight
    table_row = inputs["rope_table"][inputs["positions"][row]].cpu().double()
    return torch.cat([latents, rotate_pairs(rope, table_row, interleaved=True)])


def index_key(case: WriteCacheCase, inputs: dict[str, Any], row: int) -> torch.Tensor:
    """What an index key should be, float64 [128]."""
    key = inputs["index_k"][row].cpu().double()
    if case.has_norms:
        weight, bias = inputs["index_norm_weight"].cpu().double(), inputs["index_norm_bias"].cpu().double()
        centred = key - key.mean()
        key = centred / math.sqrt(centred.square().mean() + inputs["index_norm_eps"]) * weight + bias
    table_row = inputs["rope_table"][inputs["positions"][row]].cpu().double()
    key = torch.cat([rotate_pairs(key[:64], table_row, case.interleaved), key[64:]])
    if not case.hadamard:
        return key
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(128)] for i in range(128)]
    return torch.tensor(signs, dtype=torch.float64) @ key * 128**-0.5


def assert_quantised(codes: torch.Tensor, scale: float, expected: torch.Tensor) -> None:
    """Check that e4m3 codes and their scale hold float64 values, by the rule for scales and to half a unit."""
    assert scale == 2.0 ** math.ceil(math.log2(max(float(expected.abs().max()), 1e-4) / 448))
    error = (decode_e4m3(codes).double() * scale - expected).abs()
    tolerance = (expected.abs() * 2**-4).clamp(min=scale * 2**-10) + float(expected.abs().max()) * 1e-6
    assert (error <= tolerance).all()


def check_latent_bytes(case: WriteCacheCase, row_bytes: torch.Tensor, expected: torch.Tensor) -> None:
    if case.latent != "fp8":
        dtype = torch.bfloat16 if case.latent == "bf16" else torch.float32
        values = row_bytes.clone().view(dtype).double()
        torch.testing.assert_close(values, expected, rtol=2**-8 if case.latent == "bf16" else 1e-5, atol=2e-6)
        return
    for block, scale in enumerate(struct.unpack("<4f", bytes(row_bytes[512:528].tolist()))):
        assert_quantised(row_bytes[block * 128 : block * 128 + 128], scale, expected[block * 128 : block * 128 + 128])
    rope = row_bytes[528:].clone().view(torch.bfloat16).double()
    torch.testing.assert_close(rope, expected[512:], rtol=2**-8, atol=1e-6)


def check_index_bytes(case: WriteCacheCase, parts: list[torch.Tensor], expected: torch.Tensor) -> None:
    if case.index == "fp32":
        torch.testing.assert_close(parts[0].clone().view(torch.float32).double(), expected, rtol=1e-5, atol=2e-6)
    else:
        assert_quantised(parts[0], struct.unpack("<f", bytes(parts[1].tolist()))[0], expected)


@every_pair
def test_written_rows_hold_the_maths_and_all_other_bytes_stay(kernel, case):
    inputs = case.inputs(DEVICE, seed=2)
    before = {name: memory_of(inputs[name]).clone() for name in ("kv_cache", "index_cache") if inputs[name] is not None}
    kernel.prepare(problem_or_skip(kernel, case), **inputs)()
    slots = find_slots(case, inputs)
    assert all(slots[row] is None for row in case.spoilt_rows)
    written = {row: slot for row, slot in enumerate(slots) if slot is not None}
    if case.latent is not None:
        memory, size = memory_of(inputs["kv_cache"]), LatentCacheFormat(name=case.latent).row_bytes
        for row, slot in written.items():
            page, start = slot // case.page_size, slot % case.page_size * size
            check_latent_bytes(case, memory[page, start : start + size], latent_row(case, inputs, row))
            memory[page, start : start + size] = before["kv_cache"][page, start : start + size]
        assert torch.equal(memory, before["kv_cache"])
    if case.index is not None:
        memory, size = memory_of(inputs["index_cache"]), 128 if case.index == "fp8" else 512
        for row, slot in written.items():
            page, offset = divmod(slot, case.page_size)
            places = [slice(offset * size, offset * size + size)]
            if case.index == "fp8":
                scale_at = case.page_size * 128 + 4 * offset
                places.append(slice(scale_at, scale_at + 4))
            check_index_bytes(case, [memory[page, place] for place in places], index_key(case, inputs, row))
            for place in places:
                memory[page, place] = before["index_cache"][page, place]
        assert torch.equal(memory, before["index_cache"])


def caches_like(inputs: dict[str, Any], latent: str, index: str) -> dict[str, Any]:
    num_pages = inputs["kv_cache"].shape[0]
    return {
        **inputs,
        "kv_cache": LatentCacheFormat(name=latent).allocate(num_pages, "cpu"),
        "index_cache": IndexCacheFormat(name=index).allocate(num_pages, "cpu"),
    }


def test_every_format_rounds_the_same_float32_values():
    case = WriteCacheCase(name="formats", row_counts=(40,), context_lens=(90,))
    inputs = case.inputs(seed=3)
    exact, fp8, bf16 = (caches_like(inputs, *names) for names in (("fp32", "fp32"), ("fp8", "fp8"), ("bf16", "fp8")))
    for arguments in (exact, fp8, bf16):
        write_cache(**arguments)
    slots = torch.tensor(find_slots(case, inputs))
    rows = exact["kv_cache"].view(-1, 576)[slots]
    codes, scales = quantise_blocks(rows[:, :512], 128)
    expected = torch.cat([codes, scales.view(torch.uint8), rows[:, 512:].bfloat16().view(torch.uint8)], dim=1)
    assert torch.equal(fp8["kv_cache"].view(-1, 656)[slots], expected)
    assert torch.equal(bf16["kv_cache"].view(-1, 1152)[slots], rows.bfloat16().view(torch.uint8))
    codes, scales = quantise_blocks(exact["index_cache"].view(-1, 128)[slots], 128)
    pages = fp8["index_cache"]
    assert torch.equal(pages[:, :8192].reshape(-1, 128)[slots], codes)
    assert torch.equal(pages[:, 8192:].reshape(-1, 4)[slots], scales.view(torch.uint8))


def test_the_readers_of_the_other_ops_find_what_was_written():
    case = WriteCacheCase(name="readers", row_counts=(30, 5), context_lens=(100, 64))
    inputs = case.inputs(seed=4)
    write_cache(**inputs)
    slots = torch.tensor(find_slots(case, inputs))
    latent_format, index_format = LatentCacheFormat(name="fp8"), IndexCacheFormat(name="fp8")
    latents = gather_latent_rows(inputs["kv_cache"], latent_format, slots)
    keys, scales = gather_index_keys(inputs["index_cache"], index_format, torch.arange(inputs["index_cache"].shape[0]))
    assert scales is not None
    keys = keys[slots] * scales[slots, None]
    for row in range(35):
        torch.testing.assert_close(latents[row].double(), latent_row(case, inputs, row), rtol=0.07, atol=0.02)
        torch.testing.assert_close(keys[row].double(), index_key(case, inputs, row), rtol=0.07, atol=0.02)


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 39), max_size=6, unique=True).map(sorted),
    threads=st.sampled_from([1, 2]),
    has_spoilt_rows=st.booleans(),
)
def test_bytes_of_a_row_do_not_depend_on_the_batch_or_the_threads(cuts, threads, has_spoilt_rows):
    case = WriteCacheCase(name="bits", row_counts=(40,), context_lens=(90,), has_slots=True)
    whole, parts = case.inputs(seed=5), case.inputs(seed=5)
    if has_spoilt_rows:
        whole["slots"][::3] = parts["slots"][::3] = -1
    write_cache(**whole)
    row_wise = ("positions", "slots", "kv", "index_k")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for start, stop in zip([0, *cuts], [*cuts, 40]):
            write_cache(**{name: value[start:stop] if name in row_wise else value for name, value in parts.items()})
    finally:
        torch.set_num_threads(before)
    assert torch.equal(parts["kv_cache"], whole["kv_cache"])
    assert torch.equal(parts["index_cache"], whole["index_cache"])


def test_a_nan_spoils_its_own_row_alone():
    case = WriteCacheCase(name="nan", row_counts=(6,), context_lens=(20,))
    clean, spoilt = case.inputs(seed=6), case.inputs(seed=6)
    spoilt["kv"][2, 40] = spoilt["index_k"][3, 100] = float("nan")
    for inputs in (clean, spoilt):
        write_cache(**inputs)
    slots = torch.tensor(find_slots(case, clean))
    rows = [gather_latent_rows(i["kv_cache"], LatentCacheFormat(name="fp8"), slots) for i in (spoilt, clean)]
    assert rows[0][2, :512].isnan().all()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert_same_bits(rows[0][others], rows[1][others])
    pages = torch.arange(clean["index_cache"].shape[0])
    keys = [gather_index_keys(i["index_cache"], IndexCacheFormat(name="fp8"), pages)[0] for i in (spoilt, clean)]
    assert keys[0][slots[3]].isnan().all()
    others = slots[torch.tensor([0, 1, 2, 4, 5])]
    assert_same_bits(keys[0][others], keys[1][others])


def test_a_nan_in_normalised_latents_spoils_its_block_alone():
    case = WriteCacheCase(name="nan_block", row_counts=(2,), context_lens=(2,), index=None, has_norms=False)
    inputs = case.inputs(seed=7)
    inputs["kv"][0, 130] = float("nan")
    write_cache(**inputs)
    slots = torch.tensor(find_slots(case, inputs))
    rows = gather_latent_rows(inputs["kv_cache"], LatentCacheFormat(name="fp8"), slots)
    is_nan = torch.zeros(2, 576, dtype=torch.bool)
    is_nan[0, 128:256] = True
    assert torch.equal(rows.isnan(), is_nan)


def test_rows_that_no_request_owns_write_nothing():
    case = WriteCacheCase(name="unowned", row_counts=(4,), context_lens=(10,))
    owned, unowned = case.inputs(seed=8), case.inputs(seed=8)
    unowned["query_offsets"] = torch.tensor([0, 3], dtype=torch.int32)
    for inputs in (owned, unowned):
        write_cache(**inputs)
    last = find_slots(case, owned)[3]
    owned["kv_cache"].view(-1, 656)[last] = POISON_BYTE
    assert torch.equal(unowned["kv_cache"], owned["kv_cache"])


def test_caches_of_different_sizes_drop_different_rows():
    case = WriteCacheCase(name="sizes", row_counts=(3,), context_lens=(3,), has_slots=True)
    inputs = case.inputs(seed=8)
    kv_cache = LatentCacheFormat(name="fp8").allocate(1, "cpu")
    index_cache = IndexCacheFormat(name="fp8").allocate(2, "cpu")
    slots = torch.tensor([5, 70, 64])
    write_cache(**{**inputs, "slots": slots, "kv_cache": kv_cache, "index_cache": index_cache})
    assert kv_cache.view(-1, 656).any(dim=1).nonzero().view(-1).tolist() == [5]
    assert index_cache[:, :8192].reshape(-1, 128).any(dim=1).nonzero().view(-1).tolist() == [5, 64, 70]


def test_all_zero_keys_get_the_smallest_scale_and_no_nan():
    case = WriteCacheCase(name="zeros", row_counts=(1,), context_lens=(1,), has_norms=False)
    inputs = case.inputs(seed=9)
    inputs["kv"].zero_()
    inputs["index_k"].zero_()
    write_cache(**inputs)
    slot = find_slots(case, inputs)[0]
    assert inputs["kv_cache"].view(-1, 656)[slot, 512:528].clone().view(torch.float32).tolist() == [2.0**-22] * 4
    assert not inputs["kv_cache"].view(-1, 656)[slot, :512].any()


POSITIONS, ROPE = torch.tensor([0, 1]), torch.zeros(8, 64)
KV, KEYS = torch.zeros(2, 576), torch.zeros(2, 128)
KV_CACHE, INDEX_CACHE = torch.zeros(1, 64, 656, dtype=torch.uint8), torch.zeros(1, 8448, dtype=torch.uint8)
TABLE, OFFSETS = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": POSITIONS.float()}, r"positions is torch.float32"),
        ({"positions": POSITIONS[None]}, r"pass int64 \[rows\]"),
        ({"rope_table": ROPE[:, :8]}, r"pass float32 \[max_positions, 64\]"),
        ({"rope_table": ROPE[:0]}, r"\(0, 64\)"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, r"pass int64 \[2\]"),
        ({"slots": torch.zeros(2)}, r"slots is torch.float32"),
        ({"slots": None}, r"pass slots, or those two"),
        ({"slots": None, "page_table": TABLE}, r"pass slots, or those two"),
        ({"slots": None, "page_table": TABLE.long(), "query_offsets": OFFSETS}, r"page_table is torch.int64"),
        ({"slots": None, "page_table": TABLE, "query_offsets": OFFSETS[:1]}, r"pass int32 \[2\]"),
        ({"slots": None, "page_table": TABLE[:0], "query_offsets": OFFSETS[:1]}, r"2 rows but no request"),
        ({"kv": None}, r"kv and kv_cache go together"),
        ({"kv_cache": None}, r"kv and kv_cache go together"),
        ({"index_k": None}, r"index_k and index_cache go together"),
        ({"kv": KV[:, :512]}, r"pass float32 or bfloat16 \[2, 576\]"),
        ({"kv": KV.double()}, r"kv is torch.float64"),
        ({"index_k": torch.zeros(2, 96)}, r"\[2, 64 or 128\]"),
        ({"kv_norm_weight": torch.ones(576)}, r"pass float32 or bfloat16 \[512\]"),
        ({"index_norm_weight": torch.ones(64)}, r"pass float32 or bfloat16 \[128\]"),
        ({"index_norm_bias": torch.ones(128)}, r"without index_norm_weight"),
        ({"kv_cache": torch.zeros(1, 64, 600, dtype=torch.uint8)}, r"fits no format"),
        ({"index_cache": torch.zeros(1, 8447, dtype=torch.uint8)}, r"fits no format"),
        ({"kv_cache": KV_CACHE[:0]}, r"kv_cache has no page"),
        ({"index_cache": INDEX_CACHE[:0]}, r"index_cache has no page"),
        ({"kv_cache": torch.zeros(1, 656, 64, dtype=torch.uint8).mT}, r"keep each page"),
        ({"kv_cache": KV_CACHE.expand(2, -1, -1)}, r"at least 41984 elements apart"),
        ({"index_cache": torch.zeros(1, 4224, dtype=torch.uint8)}, r"pages of \[32, 64\] tokens"),
        ({"kv": KV.to("meta")}, r"several devices"),
    ],
)
def test_wrong_input_is_refused_with_the_value_and_the_fix(changes, message):
    arguments = {
        "positions": POSITIONS,
        "rope_table": ROPE,
        "slots": POSITIONS,
        "kv": KV,
        "kv_cache": KV_CACHE,
        "index_k": KEYS,
        "index_cache": INDEX_CACHE,
        **changes,
    }
    with pytest.raises(InputError, match=message):
        write_cache(**arguments)
