"""The shipped measures and poisons, which must themselves be able to fail."""

from __future__ import annotations

import math

import pytest
import torch

from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.testing.batches import build_batch, fill_index_cache, fill_latent_cache, quantise_blocks
from nextn.testing.numerics import assert_rows_match, assert_same_bits, compare_rows
from nextn.testing.poison import WILD_PAGES, poison_output, poison_table_tails


def test_diff_is_the_fields_measure():
    x, y = torch.randn(3, 50).double(), torch.randn(3, 50).double()
    expected = 1 - 2 * (x * y).sum(1) / (x * x + y * y).sum(1)
    torch.testing.assert_close(compare_rows(x, y).diff, expected)


def test_one_wrong_element_in_a_long_row_is_caught():
    expected = torch.ones(2, 100_000)
    actual = expected.clone()
    actual[1, 7] = 1.5
    assert compare_rows(actual, expected).max_diff < 5e-6
    with pytest.raises(AssertionError, match="row 1 has"):
        assert_rows_match(actual, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_or_infinity_is_caught(bad):
    actual = torch.ones(2, 4)
    actual[1, 2] = bad
    with pytest.raises(AssertionError, match="row 1"):
        assert_rows_match(actual, torch.ones(2, 4))


def test_undefined_elements_do_not_count():
    actual, defined = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)
    actual[1, 2] = math.nan
    defined[1, 2] = False
    assert_rows_match(actual, torch.ones(2, 4), defined=defined)


def test_a_value_where_zero_is_expected_is_caught():
    with pytest.raises(AssertionError, match="row 0"):
        assert_rows_match(torch.full((1, 3), 1e-30), torch.zeros(1, 3))


def test_rows_without_elements_match():
    assert_rows_match(torch.zeros(0, 4), torch.zeros(0, 4))
    assert_rows_match(torch.zeros(3, 0), torch.zeros(3, 0))


def test_bits_tell_zeros_apart_and_nans_together():
    assert_same_bits(torch.tensor([math.nan]), torch.tensor([-math.nan]))
    with pytest.raises(AssertionError, match="1 of 1 elements"):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_a_write_outside_an_output_is_caught(dtype):
    output = poison_output((3, 5), dtype, "cpu", row_padding=3)
    output.view.fill_(1)
    output.assert_untouched_around()
    output.view.as_strided((1,), (1,), output.view.storage_offset() + 5).fill_(1)
    with pytest.raises(AssertionError, match="bytes outside"):
        output.assert_untouched_around()


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, math.nan), (torch.bfloat16, -math.nan), (torch.int32, -1)]
)
def test_what_masked_rows_hold_is_caught_outside_an_output_too(dtype, value):
    output = poison_output((2, 5), dtype, "cpu", row_padding=3)
    assert (output.view.contiguous().view(torch.uint8) == 255).all()
    output.view.as_strided((1,), (1,), output.view.storage_offset() + 7).fill_(value)
    with pytest.raises(AssertionError, match="bytes outside"):
        output.assert_untouched_around()


def test_unused_table_entries_are_wild_and_the_first_is_kept():
    table = poison_table_tails(torch.arange(8, dtype=torch.int32).view(2, 4), torch.tensor([2, 0]))
    assert table.tolist() == [[0, 1, WILD_PAGES[2], WILD_PAGES[3]], [4, *WILD_PAGES[1:]]]
    assert table.stride() == (7, 1)


def test_requests_own_distinct_pages():
    batch = build_batch([2, 0, 1], [130, 0, 64], page_size=64, max_context=130)
    assert batch.visible_lens.tolist() == [129, 130, 64]
    assert batch.query_offsets.tolist() == [0, 2, 2, 3]
    assert batch.used_slots.unique().numel() == 194
    assert int(batch.used_slots.max()) < batch.num_pages * 64


def test_scales_are_the_smallest_powers_of_two_that_hold_the_block():
    values = torch.tensor([[448.0, 1.0], [449.0, 1.0], [0.0, 0.0], [1e-9, 0.0]])
    _, scales = quantise_blocks(values, 2)
    assert scales.view(-1).tolist() == [1.0, 2.0, 2.0**-22, 2.0**-22]


@pytest.mark.parametrize("name", ["fp8", "fp32"])
def test_index_slots_that_hold_no_token_are_nan(name):
    cache = fill_index_cache(IndexCacheFormat(name=name), 2, torch.tensor([65]), torch.ones(1, 128))
    if name == "fp32":
        assert cache.isnan().sum() == cache.numel() - 128
        return
    assert (cache[0] == 255).all()
    assert (cache[1] != 255).nonzero().view(-1).tolist() == [*range(128, 256), *range(8196, 8200)]


@pytest.mark.parametrize(("name", "row"), [("fp8", 656), ("bf16", 1152)])
def test_latent_slots_that_hold_no_token_are_nan(name, row):
    cache = fill_latent_cache(LatentCacheFormat(name=name), 2, torch.tensor([65]), torch.ones(1, 576))
    assert (cache != 255).sum() == (cache[1, 1] != 255).sum() == row
