"""The Triton kernel's own claims: which bytes are the reference's, hostile rows, odd layouts, many requests."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from op_harness import IS_INTERPRETING

from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.errors import InputError
from nextn.hardware import Arch, pretend_device
from nextn.ops import write_cache
from nextn.ops._pages import decode_e4m3
from nextn.ops.write_cache import problem_of, reference
from nextn.ops.write_cache.cases import WriteCacheCase
from nextn.testing.poison import POISON_BYTE

pytest.importorskip("triton")
from nextn.ops.write_cache import triton_portable
from nextn.ops.write_cache.triton_portable import WriteCacheConfig

KERNEL = triton_portable.KERNEL
interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="runs in Triton's interpreter")
PLAIN = WriteCacheCase(name="plain", has_norms=False, hadamard=False)


def run(kernel: Any, case: WriteCacheCase, inputs: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """All bytes under the caches after a call on copies of them."""
    names = [name for name in ("kv_cache", "index_cache") if inputs[name] is not None]
    copied = {**inputs, **{name: copy_cache(inputs[name]) for name in names}}
    problem = problem_of(
        pretend_device(Arch.SM90),
        **{name: copied[name] for name in ("positions", "kv_cache", "index_k", "index_cache")},
        has_latent_norm=copied["kv_norm_weight"] is not None,
        has_index_norm=copied["index_norm_weight"] is not None,
        has_slots=copied["slots"] is not None,
        interleaved=case.interleaved,
        hadamard=case.hadamard,
    )
    kernel.prepare(problem, **copied, **options)()
    return [memory_of(copied[name]) for name in names]


def memory_of(cache: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=cache.dtype).set_(cache.untyped_storage()).view(torch.uint8)


def copy_cache(cache: torch.Tensor) -> torch.Tensor:
    """The cache in memory of its own, gaps between pages included."""
    memory = torch.empty(0, dtype=cache.dtype).set_(cache.untyped_storage()).clone()
    return memory.as_strided(cache.shape, cache.stride(), cache.storage_offset())


def assert_as_reference(case: WriteCacheCase, inputs: dict[str, Any], **options: Any) -> None:
    actual, expected = run(KERNEL, case, inputs, **options), run(reference.KERNEL, case, inputs)
    for cache, wanted in zip(actual, expected):
        assert torch.equal(cache, wanted)


@interpreted
@pytest.mark.parametrize("latent", ["fp8", "bf16", "fp32"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_without_norm_and_transform_every_byte_is_the_references(latent, interleaved):
    index = "fp32" if latent == "fp32" else "fp8"
    case = dataclasses.replace(PLAIN, latent=latent, index=index, interleaved=interleaved, page_gap=132)
    assert_as_reference(case, case.inputs(seed=21))


@interpreted
def test_with_norm_and_transform_few_codes_are_the_next_one():
    case = WriteCacheCase(name="many", row_counts=(60,), context_lens=(100,), dtype=torch.bfloat16)
    inputs = case.inputs(seed=22)
    for cache, wanted in zip(run(KERNEL, case, inputs), run(reference.KERNEL, case, inputs)):
        apart = (cache.int() - wanted.int()).abs()
        assert apart.max() <= 1
        assert apart.sum() <= 4
        assert (wanted != POISON_BYTE).sum() > 60 * 128


@interpreted
@pytest.mark.parametrize(
    "config",
    [
        WriteCacheConfig(latent_rows=2, index_rows=2, width=32),
        WriteCacheConfig(latent_rows=4, index_rows=16, width=16),
    ],
    ids=["narrow", "wide"],
)
def test_how_rows_are_cut_leaves_no_trace(config):
    case = WriteCacheCase(name="cut")
    inputs = case.inputs(seed=23)
    for first, second in zip(run(KERNEL, case, inputs), run(KERNEL, case, inputs, config=config)):
        assert torch.equal(first, second)


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wild_slots_and_positions_write_nothing(dtype):
    case = dataclasses.replace(PLAIN, row_counts=(8,), context_lens=(20,), has_slots=True)
    inputs = case.inputs(seed=24)
    wild = 2**30 if dtype == torch.int32 else 2**62
    inputs["slots"] = inputs["slots"].to(dtype)
    inputs["slots"][:4] = torch.tensor([wild, -wild, -1, inputs["kv_cache"].shape[0] * 64], dtype=dtype)
    inputs["positions"] = inputs["positions"].to(dtype)
    inputs["positions"][4:7] = torch.tensor([wild, -wild, 1024], dtype=dtype)
    assert_as_reference(case, inputs)
    written = run(KERNEL, case, inputs)[1] != POISON_BYTE
    assert written.sum() == 132, "one row is left"


@interpreted
def test_wild_page_ids_rows_without_a_request_and_positions_past_the_table_write_nothing():
    case = dataclasses.replace(PLAIN, row_counts=(3, 2, 2), context_lens=(70, 64, 9))
    inputs = case.inputs(seed=25)
    inputs["page_table"][0] = 2**31 - 1
    inputs["page_table"][1] = -(2**31)
    inputs["query_offsets"][3] = 6
    inputs["positions"][5] = inputs["page_table"].shape[1] * 64
    assert_as_reference(case, inputs)
    assert all((cache == POISON_BYTE).all() for cache in run(KERNEL, case, inputs))


@interpreted
def test_a_table_without_pages_writes_nothing():
    inputs = PLAIN.inputs(seed=26)
    inputs["page_table"] = inputs["page_table"][:, :0]
    assert all((cache == POISON_BYTE).all() for cache in run(KERNEL, PLAIN, inputs))


@interpreted
def test_caches_of_different_sizes_drop_different_rows():
    case = dataclasses.replace(PLAIN, row_counts=(3,), context_lens=(3,), has_slots=True)
    inputs = case.inputs(seed=27)
    inputs["kv_cache"] = LatentCacheFormat(name="fp8").allocate(1, "cpu")
    inputs["index_cache"] = IndexCacheFormat(name="fp8").allocate(2, "cpu")
    inputs["slots"] = torch.tensor([5, 70, 64])
    assert_as_reference(case, inputs)


@interpreted
def test_a_nan_spoils_its_own_row_or_block_alone():
    case = WriteCacheCase(name="nan", row_counts=(4,), context_lens=(4,), has_slots=True)
    clean = case.inputs(seed=28)
    spoilt = {name: value.clone() if name in ("kv", "index_k") else value for name, value in clean.items()}
    spoilt["kv"][1, 40] = spoilt["kv"][2, 570] = spoilt["index_k"][3, 100] = float("nan")
    (kv, keys), (clean_kv, clean_keys) = run(KERNEL, case, spoilt), run(KERNEL, case, clean)
    slots = clean["slots"].tolist()
    rows, clean_rows = kv.view(-1, 656), clean_kv.view(-1, 656)
    assert decode_e4m3(rows[slots[1], :512]).isnan().all()
    assert torch.equal(rows[slots[1], 528:], clean_rows[slots[1], 528:])
    assert rows[slots[2], 528:].clone().view(torch.bfloat16).isnan().sum() == 2
    assert torch.equal(rows[slots[2], :528], clean_rows[slots[2], :528])
    assert torch.equal(rows[slots[3]], clean_rows[slots[3]])
    pages, clean_pages = keys.view(-1, 8448), clean_keys.view(-1, 8448)
    values, clean_values = (each[:, :8192].reshape(-1, 128) for each in (pages, clean_pages))
    assert decode_e4m3(values[slots[3]]).isnan().all()
    assert torch.equal(values[slots[:3]], clean_values[slots[:3]])


@interpreted
def test_keys_of_64_values_are_written():
    case = dataclasses.replace(PLAIN, latent=None)
    inputs = case.inputs(seed=29)
    inputs["index_k"] = inputs["index_k"][:, :64]
    inputs["index_cache"] = torch.full((inputs["index_cache"].shape[0], 64 * 68), POISON_BYTE, dtype=torch.uint8)
    assert_as_reference(case, inputs)


@interpreted
def test_inputs_may_have_any_strides():
    case = WriteCacheCase(name="strides")
    inputs = case.inputs(seed=30)
    spread = {
        name: inputs[name].repeat_interleave(2)[::2]
        for name in ("positions", "query_offsets", "kv_norm_weight", "index_norm_weight", "index_norm_bias")
    }
    turned = {name: inputs[name].T.contiguous().T for name in ("rope_table", "page_table", "kv", "index_k")}
    for plain, odd in zip(run(KERNEL, case, inputs), run(KERNEL, case, {**inputs, **spread, **turned})):
        assert torch.equal(plain, odd)


@interpreted
def test_a_row_finds_its_request_among_more_than_one_load_of_them():
    counts = (1, 0, 2, 0, 0, 1)
    case = dataclasses.replace(PLAIN, row_counts=counts, context_lens=(5, 0, 66, 0, 0, 64), latent=None)
    inputs = case.inputs(seed=31)
    expected = run(reference.KERNEL, case, inputs)
    problem = case.problem(pretend_device(Arch.SM90))
    launch = KERNEL.prepare(problem, **inputs)
    dataclasses.replace(launch, arguments={**launch.arguments, "REQUEST_BLOCK": 2})()
    assert torch.equal(memory_of(inputs["index_cache"]), expected[0])


@pytest.mark.parametrize("name", ["kv_cache", "index_cache"])
@pytest.mark.parametrize(("start", "gap"), [(2, 0), (0, 2), (1, 3)])
def test_caches_whose_scales_would_not_be_aligned_are_refused(name, start, gap):
    inputs = dataclasses.replace(PLAIN, has_slots=True).inputs()
    cache = inputs[name]
    size = cache[0].numel()
    memory = torch.zeros(start + cache.shape[0] * (size + gap), dtype=torch.uint8)
    strides = (size + gap, *cache.stride()[1:])
    inputs[name] = memory.as_strided(cache.shape, strides, start)
    with pytest.raises(InputError, match=rf"{name} starts {start} bytes.*multiples of 4"):
        write_cache(**inputs)


def prepare_on_meta(case: WriteCacheCase):
    inputs = case.inputs()
    moved = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return KERNEL.prepare(case.problem(pretend_device(Arch.SM90)), **moved)


@pytest.mark.parametrize(
    ("changes", "num_programs"),
    [({}, 7 + 2), ({"latent": None}, 2), ({"index": None}, 7), ({"row_counts": (0,) * 4}, 0)],
)
def test_both_caches_are_written_by_one_launch(changes, num_programs):
    case = dataclasses.replace(PLAIN, **changes)
    launch = prepare_on_meta(case)
    config = WriteCacheConfig(latent_rows=1, index_rows=4)
    assert (launch.arguments["LATENT_ROWS"], launch.arguments["INDEX_ROWS"]) == (config.latent_rows, config.index_rows)
    assert launch.grid == (num_programs,)


@pytest.mark.compile
@pytest.mark.skipif(IS_INTERPRETING, reason="needs Triton's compiler")
def test_nothing_is_spilled_and_rows_are_read_and_written_wide():
    from nextn.testing.compile_gate import compile_launch

    case = WriteCacheCase(name="hot", row_counts=(64,), context_lens=(64,), has_slots=True, dtype=torch.bfloat16)
    binary = compile_launch(prepare_on_meta(case), Arch.SM90)
    assert binary.stack_bytes <= 16
    assert "ld.global.v4.b32" in binary.assembly
    assert "st.global.v4.b32" in binary.assembly
