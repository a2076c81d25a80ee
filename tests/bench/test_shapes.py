"""Floors against numbers worked out by hand, and the grids."""

from __future__ import annotations

import pytest

from nextn.bench.shapes import (
    GRIDS,
    IndexLogitsShape,
    SelectTopkShape,
    SmallOpShape,
    SparseMlaShape,
    list_shapes,
)
from nextn.ops._kernel import OPS


@pytest.mark.parametrize(
    ("requests", "context", "next_n", "floor"),
    [
        (64, 32768, 1, 95),
        (64, 32768, 2, 98),
        (64, 32768, 3, 101),
        (64, 32768, 4, 103),
        (64, 32768, 6, 137),
        (64, 32768, 8, 183),
        (128, 16384, 8, 183),
        (16, 32768, 6, 34.4),
        (4, 65536, 3, 12.6),
        (1, 131072, 8, 11.5),
        (1, 8192, 1, 0.4),
    ],
)
def test_floors_of_the_scores_are_the_published_ones(requests, context, next_n, floor):
    shape = IndexLogitsShape(requests=requests, context=context, next_n=next_n)
    assert shape.cost.floor_us == pytest.approx(floor, abs=0.51 if floor > 50 else 0.051)


def test_bytes_and_products_of_the_scores_by_hand():
    cost = IndexLogitsShape(requests=64, context=32768, next_n=8).cost
    assert cost.num_bytes == 64 * 32768 * 132 + 512 * 32768 * 4
    assert cost.num_flops == 2 * 512 * 32768 * 64 * 128


def test_a_ragged_batch_has_a_mean_of_four_rows_and_skips_the_keys_of_requests_without_any():
    shape = IndexLogitsShape(requests=64, context=32768, next_n=None)
    assert sum(shape.row_counts) == 4 * 64
    assert (min(shape.row_counts), max(shape.row_counts)) == (0, 8)
    assert shape.cost.num_bytes == 56 * 32768 * 132 + 256 * 32768 * 4
    assert shape.name == "64 x 32768 ragged"


@pytest.mark.parametrize(
    ("rows", "length", "floor"),
    [(4, 131072, 0.7), (16, 65536, 1.4), (64, 32768, 3.0), (256, 8192, 3.5), (256, 32768, 11.9), (512, 16384, 12.6)],
)
def test_floors_of_the_selection_are_the_published_ones(rows, length, floor):
    assert SelectTopkShape(rows=rows, length=length).cost.floor_us == pytest.approx(floor, abs=0.051)


def test_the_attention_floor_is_bytes_for_few_heads_and_products_for_many():
    few = SparseMlaShape(requests=64, next_n=4, heads=16).cost
    num_slots = 64 * (1843 + 4 * 205)
    assert few.num_bytes == num_slots * 656 + 256 * (16 * 1088 * 2 + 16 * 4 + 2048 * 4)
    assert few.floor_us == pytest.approx(few.num_bytes / 3e6)
    many = SparseMlaShape(requests=64, next_n=4, heads=128).cost
    assert many.num_flops == 2 * 256 * 128 * 2048 * 1088
    assert many.floor_us == pytest.approx(182.5, abs=0.1)


def test_bytes_of_the_small_ops_grow_with_the_rows():
    for op in ("prepare_query", "write_cache", "accept_drafts"):
        one, many = (SmallOpShape(op=op, rows=rows).cost.num_bytes for rows in (1, 64))
        assert many == 64 * one > 0


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_covers_every_op_and_names_each_shape_once(grid):
    shapes = list_shapes(grid, OPS)
    assert {shape.op for shape in shapes} == set(OPS)
    names = [(shape.op, shape.name) for shape in shapes]
    assert len(names) == len(set(names))
    assert all(shape.cost.floor_us > 0 for shape in shapes)


def test_the_full_grid_has_every_depth_and_ragged_ones_and_two_numbers_of_heads():
    shapes = list_shapes("full", ["index_logits"])
    assert {shape.next_n for shape in shapes} == {None, *range(1, 9)}
    assert {shape.heads for shape in shapes} == {32, 64}
