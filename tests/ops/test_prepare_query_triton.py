"""The Triton kernel's own claims: which bytes are the reference's, odd layouts, and what stays out of shared memory."""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from op_harness import IS_INTERPRETING

from nextn.hardware import Arch, pretend_device
from nextn.ops._pages import decode_e4m3
from nextn.ops.prepare_query import reference
from nextn.ops.prepare_query.cases import CASES, PrepareQueryCase
from nextn.testing.numerics import assert_same_bits

pytest.importorskip("triton")
import triton
import triton.language as tl

from nextn.ops._triton_numerics import bfloat16_bits, e4m3_bytes, power_of_two_scale
from nextn.ops.prepare_query import triton_portable
from nextn.ops.prepare_query.triton_portable import PrepareQueryConfig

KERNEL = triton_portable.KERNEL
NAN, INF = float("nan"), float("inf")
interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="runs in Triton's interpreter")
SMALL = PrepareQueryCase(name="small", num_rows=2, heads=6)


def prepare_with(
    kernel: Any, case: PrepareQueryCase, inputs: dict[str, torch.Tensor], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float8_e4m3fn if case.quantise else torch.float32
    out = (torch.empty(case.num_rows, case.heads, case.dim, dtype=dtype), torch.empty(case.num_rows, case.heads))
    kernel.prepare(case.problem(pretend_device(Arch.SM90)), **inputs, out=out, **options)()
    return out


@interpreted
@pytest.mark.parametrize("case", [c for c in CASES if not c.hadamard], ids=str)
def test_without_the_transform_every_bit_is_the_references(case):
    inputs = case.inputs(seed=11)
    for actual, expected in zip(prepare_with(KERNEL, case, inputs), prepare_with(reference.KERNEL, case, inputs)):
        actual, expected = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (actual, expected))
        assert_same_bits(actual, expected)


@interpreted
def test_with_the_transform_few_codes_are_the_next_one():
    case = PrepareQueryCase(name="many", num_rows=16, heads=64, dtype=torch.bfloat16)
    inputs = case.inputs(seed=12)
    (actual, folded), (expected, weights) = (prepare_with(k, case, inputs) for k in (KERNEL, reference.KERNEL))
    apart = (actual.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-4
    assert_same_bits(folded, weights)


@interpreted
@pytest.mark.parametrize(
    "config",
    [PrepareQueryConfig(heads=heads, width=width) for heads, width in ((4, 16), (32, 16), (2, 32))],
    ids=lambda config: f"{config.heads}x{config.width}",
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_how_heads_are_cut_leaves_no_trace(config, interleaved):
    case = dataclasses.replace(SMALL, interleaved=interleaved)
    inputs = case.inputs(seed=13)
    results = [prepare_with(KERNEL, case, inputs, config=each) for each in (PrepareQueryConfig(), config)]
    for first, second in zip(*results):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@interpreted
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("quantise", [True, False])
def test_a_value_that_is_not_finite_spoils_its_own_row_and_head_alone(value, quantise):
    case = dataclasses.replace(SMALL, quantise=quantise)
    inputs = case.inputs(seed=14)
    clean, clean_weights = prepare_with(KERNEL, case, inputs)
    inputs["q"][1, 2, 100] = value
    q, folded = prepare_with(KERNEL, case, inputs)
    is_spoilt = torch.zeros(2, 6, dtype=torch.bool)
    is_spoilt[1, 2] = True
    assert q.float()[is_spoilt].isnan().all()
    assert torch.equal(folded.isnan(), is_spoilt & quantise)
    assert torch.equal(q.float()[~is_spoilt], clean.float()[~is_spoilt])
    assert_same_bits(folded[~is_spoilt], clean_weights[~is_spoilt])


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_outside_the_table_read_its_ends(dtype):
    case = dataclasses.replace(SMALL, num_rows=4, interleaved=True, hadamard=False)
    inputs = case.inputs(seed=15)
    last = inputs["rope_table"].shape[0] - 1
    wild = 2**30 if dtype == torch.int32 else 2**62
    results = [
        prepare_with(KERNEL, case, {**inputs, "positions": torch.tensor(positions, dtype=dtype)})
        for positions in ([0, 0, last, last], [-1, -wild, last + 1, wild])
    ]
    for inside, outside in zip(*results):
        assert torch.equal(inside.view(torch.uint8), outside.view(torch.uint8))


@interpreted
def test_inputs_may_have_any_strides():
    inputs = SMALL.inputs(seed=16)
    strided = {
        "q": inputs["q"].permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "weights": inputs["weights"].T.contiguous().T,
        "positions": inputs["positions"].repeat_interleave(3)[::3],
        "rope_table": inputs["rope_table"].T.contiguous().T,
    }
    for plain, odd in zip(prepare_with(KERNEL, SMALL, inputs), prepare_with(KERNEL, SMALL, strided)):
        assert torch.equal(plain.view(torch.uint8), odd.view(torch.uint8))


@triton.jit
def _convert_kernel(x_ptr, codes_ptr, halves_ptr, scales_ptr, inverses_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places)
    tl.store(codes_ptr + places, e4m3_bytes(x, False))
    tl.store(halves_ptr + places, bfloat16_bits(x))
    scale, inverse = power_of_two_scale(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(scales_ptr + places, scale)
    tl.store(inverses_ptr + places, inverse)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of signalling NaN
def test_integers_round_every_float_as_torch_does():
    """Every float of 11 bits of mantissa, and its neighbours: all codes, all ties and what lies just beside them."""
    bits = torch.arange(-(2**20), 2**20, dtype=torch.int32) << 11
    x = torch.cat([bits - 1, bits, bits + 1]).view(torch.float32)
    codes, halves = torch.empty(len(x), dtype=torch.uint8), torch.empty(len(x), dtype=torch.int16)
    scales, inverses = torch.empty(len(x)), torch.empty(len(x))
    block = 2**18
    _convert_kernel[(len(x) // block,)](x, codes, halves, scales, inverses, BLOCK=block)
    is_small = ~(x.abs() > 448)
    expected = x[is_small].to(torch.float8_e4m3fn).view(torch.uint8)
    assert_same_bits(decode_e4m3(codes[is_small]), decode_e4m3(expected))
    assert torch.equal(codes[x.abs() <= 448], expected[x[is_small].abs() <= 448])
    assert_same_bits(halves.view(torch.bfloat16), x.to(torch.bfloat16))
    wanted = reference_scale(x.abs())
    assert_same_bits(scales, wanted)
    assert_same_bits(inverses, torch.where(wanted == INF, 0.0, 1.0 / wanted))


def reference_scale(amax: torch.Tensor) -> torch.Tensor:
    from nextn.ops._numerics import power_of_two_scale as in_torch

    return in_torch(amax)


def prepare_on_meta(case: PrepareQueryCase, arch: Arch = Arch.SM90):
    inputs = case.inputs("meta")
    inputs["q"] = torch.empty(case.num_rows, case.heads, case.dim, dtype=case.dtype, device="meta")
    dtype = torch.float8_e4m3fn if case.quantise else torch.float32
    out = (
        torch.empty(inputs["q"].shape, dtype=dtype, device="meta"),
        torch.empty(case.num_rows, case.heads, device="meta"),
    )
    return KERNEL.prepare(case.problem(pretend_device(arch)), **inputs, out=out)


@pytest.mark.parametrize(("num_rows", "heads"), [(0, 64), (1, 1), (4096, 64), (3, 33)])
def test_every_head_has_a_program_and_none_is_left_over(num_rows, heads):
    launch = prepare_on_meta(PrepareQueryCase(name="grid", num_rows=num_rows, heads=heads))
    block = launch.arguments["HEADS"]
    assert launch.grid == (num_rows, -(-heads // block))


def test_e4m3_is_rounded_in_hardware_only_where_there_is_some():
    case = PrepareQueryCase(name="native", num_rows=1)
    native = {arch for arch in KERNEL.arches if prepare_on_meta(case, arch).arguments["NATIVE"]}
    assert native == (set() if IS_INTERPRETING else {Arch.SM89, Arch.SM90, Arch.SM100, Arch.SM103, Arch.SM120})


@pytest.mark.compile
@pytest.mark.skipif(IS_INTERPRETING, reason="needs Triton's compiler")
@pytest.mark.parametrize(("hadamard", "shared_bytes"), [(True, 2048), (False, 0)])
def test_queries_stay_in_registers_and_are_read_wide(hadamard, shared_bytes):
    from nextn.testing.compile_gate import compile_launch

    case = PrepareQueryCase(
        name="hot", num_rows=4096, heads=64, dtype=torch.bfloat16, hadamard=hadamard, interleaved=not hadamard
    )
    binary = compile_launch(prepare_on_meta(case), Arch.SM90)
    assert binary.shared_bytes <= shared_bytes, "values travel through shared memory"
    assert binary.stack_bytes == 0, "values were spilled"
    assert binary.assembly.count("ld.global.v4.b32") >= 8, "queries are not read 16 bytes at a time"
