"""The Hopper kernel's own claims, as far as a machine without a GPU can tell: how it is cut, and what is compiled.

Its values are checked wherever the cases of the op run on a Hopper GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nextn.hardware import Arch, pretend_device
from nextn.ops._kernel import choose
from nextn.ops.index_logits._contiguous import ContiguousKeys
from nextn.ops.index_logits.cases import IndexLogitsCase
from nextn.ops.index_logits.problem import CONTIGUOUS, IndexLogitsProblem
from nextn.testing.compile_gate import TARGETS, Binary, compile_launch, is_interpreting

pytest.importorskip("triton")
from nextn.ops.index_logits import gluon_sm90, triton_portable

KERNEL = gluon_sm90.KERNEL
HOPPER = pretend_device(Arch.SM90)
REGISTERS = 65536  # of a multiprocessor
compiled = pytest.mark.skipif(is_interpreting(), reason="needs Triton's compiler, which its interpreter replaces")


def make_case(row_counts: tuple[int, ...], *, heads: int = 64, context: int = 4096, **options: Any) -> IndexLogitsCase:
    return IndexLogitsCase(
        name="own", row_counts=row_counts, context_lens=(context,) * len(row_counts), heads=heads, **options
    )


def prepare_on_meta(case: IndexLogitsCase, **changes: torch.Tensor):
    inputs = case.inputs("meta")
    out = torch.empty(inputs.defined.shape, dtype=getattr(torch, case.out_dtype), device="meta")
    return KERNEL.prepare(case.problem(HOPPER), **{**inputs.arguments, "out": out, **changes})


def compile_case(row_counts: tuple[int, ...]) -> tuple[Binary, gluon_sm90.Config]:
    case = make_case(row_counts)
    return compile_launch(prepare_on_meta(case), Arch.SM90), gluon_sm90.choose_config(case.problem(HOPPER))


def prepare_contiguous(keys: torch.Tensor, scales: torch.Tensor, *, num_rows: int, is_compressed: bool = False):
    """Rows of 64 heads over all keys, on meta tensors."""
    problem = IndexLogitsProblem(
        arch=Arch.SM90, num_sms=HOPPER.num_sms, num_requests=1, num_rows=num_rows, next_n=None, max_rows=num_rows,
        heads=64, dim=128, page_size=0, max_pages=0, max_context=keys.shape[0], cache=CONTIGUOUS,
    )  # fmt: skip
    bounds = torch.empty(2, num_rows, dtype=torch.int32, device="meta")
    unused = torch.empty(1, 1, dtype=torch.int32, device="meta")
    return KERNEL.prepare(
        problem,
        q=torch.empty(num_rows, 64, 128, dtype=torch.float8_e4m3fn, device="meta"),
        weights=torch.empty(num_rows, 64, device="meta"),
        index_cache=ContiguousKeys(
            values=keys, scales=scales, row_starts=bounds[0], is_compressed=is_compressed
        ),
        query_offsets=unused[0],
        visible_lens=bounds[1],
        page_table=unused,
        out=torch.empty(num_rows, keys.shape[0], device="meta"),
    )  # fmt: skip


def empty_keys(num_keys: int, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(num_keys, width, dtype=torch.float8_e4m3fn, device="meta")[:, :128]
    return values, torch.empty(num_keys, device="meta")


@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize(
    "row_counts", [*((n,) * 4 for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 20)), (0, 8, 3), (0, 1), (30, 2)]
)
def test_every_row_of_a_group_belongs_to_one_row_group(row_counts, heads):
    problem = make_case(row_counts, heads=heads).problem(HOPPER)
    config = gluon_sm90.choose_config(problem)
    assert sum(config.rows) == gluon_sm90._rows_per_group(problem) <= 8
    assert list(config.rows) == sorted(config.rows, reverse=True)
    assert set(config.rows) <= {1, 2, 4}
    assert len(config.rows) * config.turns in (3, 4)


@pytest.mark.parametrize("warpgroups", [3, 4])
def test_the_registers_of_all_warpgroups_fit_a_multiprocessor(warpgroups):
    scoring, at_entry = gluon_sm90._REGISTERS[warpgroups]
    copying = 24  # and four warps' worth of them
    own = (warpgroups + 1) * at_entry - (warpgroups - 1) * scoring - copying  # left to the first warpgroup
    assert (warpgroups + 1) * 128 * at_entry <= REGISTERS
    assert own >= scoring


@pytest.mark.parametrize("heads", [32, 64])
@pytest.mark.parametrize("next_n", range(1, 9))
def test_warpgroups_that_take_turns_see_every_stage_of_theirs_in_every_phase(next_n, heads):
    """A wait for a phase cannot tell it from the one two phases ago, so no stage may change hands."""
    config = gluon_sm90.choose_config(make_case((next_n,), heads=heads).problem(HOPPER))
    assert config.stages % config.turns == 0
    assert config.stages > config.turns


@compiled
@pytest.mark.compile
@pytest.mark.parametrize("row_counts", [(3, 3), (0, 8, 3)])
def test_products_stay_in_registers_and_keys_come_by_bulk_copies(row_counts):
    """Ragged batches have a second product, for a warpgroup that has half of its rows; uniform ones do not."""
    binary, config = compile_case(row_counts)
    per_product = 128 // 32  # FP8 products multiply 32 values deep
    num_ways = 1 if len(set(row_counts)) == 1 else 2
    assert binary.num_products == per_product * len(config.rows) * config.turns * num_ways
    assert binary.stack_bytes <= 128  # scalars of the outer loop; a product is 128 or 256 bytes of a thread
    assert "cp.async.bulk.tensor.3d.shared" in binary.assembly
    assert "setmaxnreg.inc" in binary.assembly
    assert binary.shared_bytes <= TARGETS[Arch.SM90].shared_bytes


@compiled
@pytest.mark.compile
@pytest.mark.parametrize("is_compressed", [False, True])
def test_contiguous_keys_come_by_bulk_copies_too(is_compressed):
    launch = prepare_contiguous(*empty_keys(1000), num_rows=4096, is_compressed=is_compressed)
    binary = compile_launch(launch, Arch.SM90)
    assert binary.num_products == 4 * 4 * 2  # four warpgroups, of two rows or of one
    assert binary.stack_bytes <= 128
    assert "cp.async.bulk.tensor.3d.shared" in binary.assembly
    assert binary.shared_bytes <= TARGETS[Arch.SM90].shared_bytes


def test_contiguous_keys_are_one_page_whose_length_need_not_be_a_multiple_of_anything():
    launch = prepare_contiguous(*empty_keys(1001, width=144), num_rows=20)
    keys, scales = launch.arguments["keys_desc"], launch.arguments["scales_desc"]
    assert (keys.shape, keys.strides) == ([1, 1001, 128], [1001 * 144, 144, 1])
    assert (scales.shape, scales.strides[0] % 4) == ([1, 1001], 0)
    assert launch.arguments["groups_ptr"].shape[0] == 20  # every row may begin far from the next
    assert prepare_contiguous(*empty_keys(1001, width=136), num_rows=20).function is not launch.function


def test_prepare_and_plan_take_meta_tensors():
    launch = prepare_on_meta(make_case((4, 4)))
    assert launch.grid == (2 * 64,)
    assert prepare_on_meta(make_case((4,) * 64)).grid == (HOPPER.num_sms,)
    assert launch.arguments["keys_desc"].block_shape == [1, 64, 128]


@pytest.mark.parametrize("row_counts", [(), (0, 0)])
def test_no_rows_are_nothing_to_launch(row_counts):
    prepare_on_meta(make_case(row_counts, context=64))()


def test_a_cache_that_bulk_copies_cannot_address_is_scored_by_the_portable_kernel():
    case = make_case((4, 4))
    pages = case.inputs("meta").arguments["index_cache"].shape[0]
    wide = torch.empty(pages, 8448 + 4, dtype=torch.uint8, device="meta")
    launch = prepare_on_meta(case, index_cache=wide[:, :8448])
    assert (
        launch.function
        is triton_portable.KERNEL.prepare(
            case.problem(HOPPER), **case.inputs("meta").arguments, out=torch.empty(8, 4096, device="meta")
        ).function
    )
    aligned = torch.empty(pages, 8448 + 16, dtype=torch.uint8, device="meta")
    assert prepare_on_meta(case, index_cache=aligned[:, :8448]).function is not launch.function


def test_queries_and_weights_in_pieces_are_made_contiguous():
    case = make_case((4, 4))
    q = torch.empty(8, 64, 256, dtype=torch.float8_e4m3fn, device="meta")[..., :128]
    weights = torch.empty(8, 65, device="meta")[:, :64]
    launch = prepare_on_meta(case, q=q, weights=weights)
    assert launch.arguments["q_desc"].strides == [128, 1]
    assert launch.arguments["weights_desc"].strides == [64, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cache": "fp32"}, "index cache fp32 is not fp8"),
        ({"heads": 16}, "16 index heads are not one of 32, 64"),
        ({"dim": 64}, "head_dim 64 is not 128"),
        ({"page_size": 32}, "page_size 32 is not 64"),
    ],
)
def test_says_what_it_does_not_take(change, reason):
    problem = make_case((4,)).problem(HOPPER)
    assert KERNEL.rejects(problem) is None
    assert KERNEL.rejects(replace(problem, **change)) == reason


@pytest.mark.parametrize(
    ("next_n", "requests", "context", "others"),
    [
        (1, 1, 131072, "portable and DeepGEMM"),
        (1, 64, 32768, "DeepGEMM"),
        (4, 16, 32768, "DeepGEMM"),
        (4, 64, 32768, ""),
        (3, 1, 8192, "DeepGEMM"),
    ],
)
def test_ranks_above_another_kernel_only_where_it_was_faster(next_n, requests, context, others):
    """DeepGEMM's native calls rank 30; at a depth it has none for, its flattened ones rank below any kernel's."""
    rank = KERNEL.rank(make_case((next_n,) * requests, context=context).problem(HOPPER))
    assert (rank > 30) == (others == "")
    assert (rank > triton_portable.KERNEL.rank(None)) == ("portable" not in others)


def test_in_deterministic_mode_one_kernel_serves_every_depth_and_size():
    def chosen(row_counts: tuple[int, ...], context: int) -> str:
        problem: IndexLogitsProblem = make_case(row_counts, context=context).problem(HOPPER, deterministic=True)
        return choose("index_logits", problem).kernel.name

    names = {chosen((n,) * b, context) for n in range(1, 9) for b in (1, 64) for context in (64, 8192, 131072)}
    assert names == {"gluon_sm90"}
