"""Rotation, Hadamard transform, FP8 scaling and norms against float64 and exact arithmetic, and their bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from nextn.ops._numerics import hadamard, layer_norm, power_of_two_scale, quantise_ue8m0, rms_norm, rotate
from nextn.testing.numerics import assert_same_bits

GENERATOR = torch.Generator().manual_seed(0)
# Every finite e4m3 magnitude in rising order, so that an even index is an even mantissa.
MAGNITUDES = [math.ldexp(m, -9) for m in range(8)] + [
    math.ldexp(8 + m, e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def sylvester(dim: int) -> torch.Tensor:
    """Entry (i, j) is -1 to the number of bits that i and j share."""
    return torch.tensor(
        [[(-1.0) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)], dtype=torch.float64
    )


@pytest.mark.parametrize("dim", [1, 2, 64, 128])
def test_hadamard_is_the_orthonormal_sylvester_product(dim):
    x = random(33, dim)
    expected = x.double() @ sylvester(dim) * dim**-0.5
    error = (hadamard(x).double() - expected).abs().amax(dim=1) / x.abs().amax(dim=1)
    assert error.max() < 2**-22  # one float32 rounding of a value up to sqrt(128) times the largest


def test_hadamard_is_its_own_inverse_and_keeps_dot_products():
    x, y = random(9, 128), random(9, 128)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=2e-6)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(1), (x * y).sum(1), rtol=0, atol=1e-4)


def test_hadamard_rounds_the_exact_sum_of_its_grid_values_once():
    """Large values that cancel and small ones that are left: any inexact partial sum shows in what is left."""
    x = torch.ldexp(random(50, 128), torch.randint(-60, 60, (50, 128), generator=GENERATOR))
    for shift in range(8):
        x[shift, 0::2] = 1.5
        x[shift, 1::2] *= 2.0 ** (-20 - shift) / x[shift, 1::2].abs()
        x[shift, 1::2] *= 1 + torch.rand(64, generator=GENERATOR)
    signs = sylvester(128)
    for row, transformed in zip(x[:12], hadamard(x[:12])):
        offset = 512.0 * row.abs().max().double()
        grid = [Fraction(value) for value in ((row.double() + offset) - offset).tolist()]
        for column in (0, 17, 32, 64, 96, 126):
            exact = sum((value * int(sign) for value, sign in zip(grid, signs[column].tolist())), Fraction(0))
            expected = torch.tensor(float(exact) * 128**-0.5, dtype=torch.float64).float()
            assert transformed[column] == expected


def test_hadamard_keeps_a_nan_or_infinity_in_its_row():
    x = random(4, 3, 128)
    clean = hadamard(x)
    x[1, 2, 5], x[3, 0, 127] = float("nan"), float("inf")
    spoilt = hadamard(x)
    is_spoilt = torch.zeros(4, 3, dtype=torch.bool)
    is_spoilt[1, 2] = is_spoilt[3, 0] = True
    assert spoilt[is_spoilt].isnan().all()
    assert_same_bits(spoilt[~is_spoilt], clean[~is_spoilt])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_turns_each_pair_by_its_angle(interleaved):
    x, angles = random(5, 3, 64), random(5, 1, 32) * 3
    rotated = rotate(x, torch.cat([angles.cos(), angles.sin()], dim=-1), interleaved)
    for pair in range(32):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 32)
        before = torch.complex(x[..., first].double(), x[..., second].double())
        after = before * torch.exp(1j * angles[..., pair].double())
        torch.testing.assert_close(rotated[..., first].double(), after.real, rtol=0, atol=2e-6)
        torch.testing.assert_close(rotated[..., second].double(), after.imag, rtol=0, atol=2e-6)


def test_rotate_computes_bfloat16_in_float32():
    x, angles = random(6, 64).bfloat16(), random(6, 32)
    table_rows = torch.cat([angles.cos(), angles.sin()], dim=-1)
    rotated = rotate(x, table_rows, interleaved=False)
    assert_same_bits(rotated, rotate(x.float(), table_rows, interleaved=False).bfloat16())


def smallest_fitting_power(amax: float) -> float:
    """By exact arithmetic on the float32 quotient, as the format's users compute it."""
    quotient = torch.tensor(max(amax, 1e-4), dtype=torch.float32) / 448.0
    exponent = -140
    while 2.0**exponent < float(quotient):
        exponent += 1
    return 2.0**exponent


def test_scale_is_the_smallest_power_of_two_that_fits():
    edges = [448.0 * 2.0**k * (1 + nudge * 2.0**-23) for k in range(-40, 40, 3) for nudge in (-1, 0, 1)]
    values = [0.0, 1e-30, 1e-4, 9.9e-5, 1.1e-4, 1.0, 3.4e38, *edges, *random(200).abs().tolist()]
    amax = torch.tensor(values, dtype=torch.float32)
    assert power_of_two_scale(amax).tolist() == [smallest_fitting_power(value) for value in amax.tolist()]
    assert power_of_two_scale(torch.tensor([448.0, math.nextafter(448.0, 500)])).tolist() == [1.0, 1.0]
    assert power_of_two_scale(torch.tensor([448.00003])).tolist() == [2.0]


def test_scale_of_nan_is_nan_and_of_infinity_infinite():
    scale = power_of_two_scale(torch.tensor([float("nan"), float("inf"), 1.0]))
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert scale[2] == 2.0**-8


def round_to_e4m3(value: float) -> float:
    """To nearest, ties to the even mantissa; the differences near a value are exact in float64."""
    index = min(range(len(MAGNITUDES)), key=lambda i: (abs(MAGNITUDES[i] - abs(value)), i % 2))
    return math.copysign(MAGNITUDES[index], value)


@pytest.mark.parametrize("block", [64, 128])
def test_quantise_rounds_every_value_to_the_nearest_code(block):
    x = random(2, 128) * torch.tensor([[1.0], [1e-3]])
    x[0, :8] = torch.tensor([0.0, -0.0, 448.0, -448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10])  # ties among them
    codes, scales = quantise_ue8m0(x, block)
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (2, 128 // block)
    for row in range(2):
        for column in range(128):
            scale = smallest_fitting_power(x[row, column // block * block :][:block].abs().max().item())
            assert scales[row, column // block] == scale
            assert codes[row, column].float().item() == round_to_e4m3(x[row, column].item() / scale)


def test_quantise_keeps_nan_in_its_block():
    x = random(3, 256)
    clean_codes, clean_scales = quantise_ue8m0(x, 128)
    x[1, 130] = float("nan")
    codes, scales = quantise_ue8m0(x, 128)
    assert codes[1, 128:].float().isnan().all()
    assert scales[1, 1].isnan()
    codes, clean_codes = codes.view(torch.uint8), clean_codes.view(torch.uint8)
    for row, half in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        assert torch.equal(codes[row, half * 128 : half * 128 + 128], clean_codes[row, half * 128 : half * 128 + 128])
        assert scales[row, half] == clean_scales[row, half]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_float64_norm(dtype):
    x, weight = (random(7, 512) * 1e-3).to(dtype), random(512).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    result = rms_norm(x, weight, 1e-6)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=1e-6 if dtype == torch.float32 else 5e-3, atol=1e-7)


@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_is_the_float64_norm(has_bias):
    x, weight = random(7, 128) * 1e-3 + 0.05, random(128)
    bias = random(128) if has_bias else None
    wide = x.double()
    centred = wide - wide.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    expected = expected + bias.double() if bias is not None else expected
    # The mean is 50 times the spread, so float32 keeps two digits less than it has.
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-6).double(), expected, rtol=1e-4, atol=1e-4)


ROW_WISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "hadamard": lambda x: hadamard(x[:, :128]),
    "rotate": lambda x: rotate(x[:, 3:67], x[:, 64:128], interleaved=False),
    "rotate_interleaved": lambda x: rotate(x[:, 3:67], x[:, 64:128], interleaved=True),
    "codes": lambda x: quantise_ue8m0(x[:, :512], 128)[0].view(torch.uint8),
    "scales": lambda x: quantise_ue8m0(x[:, :512], 128)[1],
    "rms_norm": lambda x: rms_norm(x[:, :512], x[0, :512] * 0 + 1.5, 1e-6),
    "layer_norm": lambda x: layer_norm(x[:, :128], x[0, :128] * 0 + 1.5, None, 1e-6),
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_bits_of_a_row_do_not_depend_on_the_batch_or_the_threads(name):
    function, x = ROW_WISE[name], torch.ldexp(random(1000, 576), torch.randint(-20, 20, (1000, 576)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([function(x[row : row + 1]) for row in range(40)])
        for count in (1, 2):
            torch.set_num_threads(count)
            assert_same_bits(function(x)[:40], alone)
            for rows in range(1, 41):
                assert_same_bits(function(x[40 - rows : 40]), alone[40 - rows :])
    finally:
        torch.set_num_threads(threads)
