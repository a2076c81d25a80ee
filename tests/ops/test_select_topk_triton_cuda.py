"""The NVIDIA kernel's own claims; its PTX is run thread by thread in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_harness import IS_INTERPRETING, plan_for
from ptx_threads import PtxThreads

from nextn.hardware import Arch
from nextn.ops._kernel import choose
from nextn.ops.select_topk import reference
from nextn.ops.select_topk.problem import SelectTopkProblem
from nextn.testing.poison import poison_output

pytest.importorskip("triton")
from nextn.ops.select_topk import triton_cuda
from nextn.ops.select_topk.triton_cuda import SelectTopkStreamConfig

KERNEL = triton_cuda.KERNEL
interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="runs in Triton's interpreter")

SMALL = SelectTopkStreamConfig(num_warps=4)
CONFIGS = {
    "4_warps": SMALL,
    "8_warps_16_tiles": SelectTopkStreamConfig(num_warps=8, tiles=16),
    "16_warps": SelectTopkStreamConfig(num_warps=16),
    "32_warps": SelectTopkStreamConfig(num_warps=32),
}


def make_problem(
    num_rows: int, num_columns: int, topk: int = 2048, *, max_pages: int = 0, arch: Arch = Arch.SM90
) -> SelectTopkProblem:
    return SelectTopkProblem(
        arch=arch, num_sms=132, num_rows=num_rows, num_columns=num_columns, topk=topk, returns_slots=max_pages > 0,
        max_pages=max_pages,
    )  # fmt: skip


def select(
    threads: PtxThreads, logits: torch.Tensor, length: int, topk: int, config: SelectTopkStreamConfig, *,
    returns_slots: bool = False,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """What the kernel and the reference select from one row, past whose length lies what would win."""
    num_columns = logits.shape[0]
    row = logits.clone()[None]
    row[:, length:] = float("inf")
    offsets = table = None
    if returns_slots:
        offsets = torch.tensor([0, 1], dtype=torch.int32)
        table = torch.randperm(-(-num_columns // 64), generator=torch.Generator().manual_seed(1)).to(torch.int32)[None]
    problem = make_problem(1, num_columns, topk, max_pages=0 if table is None else table.shape[1])
    tensors = {
        "logits": row, "visible_lens": torch.tensor([length], dtype=torch.int32), "query_offsets": offsets,
        "page_table": table,
    }  # fmt: skip
    output = poison_output((1, topk), torch.int32, "cpu", row_padding=4)
    plan = plan_for(KERNEL, problem, device="cpu", config=config)
    KERNEL.prepare(problem, **tensors, out=output.view, plan=plan)()
    output.assert_untouched_around()
    expected = torch.empty(1, topk, dtype=torch.int32)
    reference.KERNEL.prepare(problem, **tensors, out=expected)()
    return output.view[0].tolist(), expected[0].tolist()


def random_row(num_columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_columns, generator=torch.Generator().manual_seed(seed))


def clusters(row: torch.Tensor, width: int) -> torch.Tensor:
    """The row with neighbours alike, so that a few loads tell little of the rest."""
    shifts = 3 * random_row(-(-row.shape[0] // width), seed=9)
    return row + shifts.repeat_interleave(width)[: row.shape[0]]


ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda row: row,
    "far_from_zero": lambda row: row + 1000,
    "clustered": lambda row: clusters(row, 128),
    "better_half": lambda row: row + 9 * (torch.arange(row.shape[0]) < row.shape[0] // 2),
    "ascending": lambda row: row.sort().values,
    "descending": lambda row: row.sort(descending=True).values,
    "fine_levels": lambda row: (row * 200).round() / 200,
    "few_levels": lambda row: (row * 2).round(),
    "equal": lambda row: torch.full_like(row, -0.25),
    "signed_zeros": lambda row: torch.where(row > 0, 0.0, -0.0),
    "mostly_nan": lambda row: torch.where(row < 1, float("nan"), row),
    "mostly_least": lambda row: torch.where(row < 1.6, float("-inf"), row),
    "infinities": lambda row: torch.where(row > 1.2, float("inf"), row),
}


@pytest.fixture
def run_ptx(monkeypatch):
    def make(config: SelectTopkStreamConfig) -> PtxThreads:
        threads = PtxThreads(config.num_warps * 32)
        threads.install(monkeypatch)
        return threads

    return make


@interpreted
@pytest.mark.parametrize("values", ROWS)
@pytest.mark.parametrize("name", ["4_warps", "8_warps_16_tiles"])
def test_selects_what_the_reference_selects(run_ptx, name, values):
    config = CONFIGS[name]
    row = ROWS[values](random_row(9004))
    selected, expected = select(run_ptx(config), row, 9001, 512, config, returns_slots=name != "4_warps")
    assert selected == expected


@interpreted
@pytest.mark.parametrize("name", ["16_warps", "32_warps"])
def test_the_widest_rows_are_marked_in_the_bits_there_are(run_ptx, name):
    config = CONFIGS[name]
    selected, expected = select(run_ptx(config), random_row(65536), 65536, 2048, config)
    assert selected == expected


@interpreted
@pytest.mark.parametrize("length", [65, 66, 127, 128, 129, 511, 512, 513, 1021])
def test_lengths_around_every_edge_are_read_to_their_end_only(run_ptx, length):
    selected, expected = select(run_ptx(SMALL), random_row(1024, seed=length), length, 64, SMALL, returns_slots=True)
    assert selected == expected


@interpreted
def test_a_row_without_room_for_vectors_is_read_to_its_end_only(run_ptx):
    selected, expected = select(run_ptx(SMALL), random_row(2051), 2051, 100, SMALL)
    assert selected == expected


def took_blocks(threads: PtxThreads) -> bool:
    """Whether the row was searched block by block, with counters of 32 bits."""
    return any("mad.lo.s32 t, t, 4, $9" in text for text in threads.texts)


@interpreted
@pytest.mark.parametrize("values", ["normal", "far_from_zero", "clustered", "better_half", "ascending", "fine_levels"])
def test_logits_that_differ_are_found_in_the_pool(run_ptx, values):
    threads = run_ptx(SMALL)
    select(threads, ROWS[values](random_row(9004)), 9001, 512, SMALL)
    assert not took_blocks(threads), "the bounds are of no use"


@interpreted
def test_more_equals_than_the_pool_tells_apart_are_taken_in_order(run_ptx):
    threads = run_ptx(SMALL)
    selected, expected = select(threads, ROWS["equal"](random_row(9004)), 9001, 512, SMALL)
    assert selected == expected == list(range(512))
    assert took_blocks(threads)


@interpreted
@pytest.mark.parametrize("length", [2049, 2050, 2051])
def test_the_few_logits_of_a_row_of_nan_are_found(run_ptx, length):
    """The bounds then lie beyond minus infinity, and the last logits are no whole four."""
    config = CONFIGS["16_warps"]
    row = torch.full((2052,), float("nan"))
    row[5::50] = random_row(row[5::50].shape[0])
    row[2044:] = 1.0
    selected, expected = select(run_ptx(config), row, length, 2048, config)
    assert selected == expected


@pytest.mark.skipif(IS_INTERPRETING, reason="the interpreter does not run it")
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "name"),
    [
        (256, 32768, "triton_cuda"), (512, 16384, "triton_cuda"), (1, 32768, "triton_cuda"), (16, 65536, "triton_cuda"),
        (256, 8192, "triton_portable"), (64, 16384, "triton_portable"), (4, 65536, "triton_portable"),
        (4, 131072, "triton_portable"), (600, 131072, "triton_portable"),
    ],
)  # fmt: skip
def test_each_size_gets_the_kernel_that_was_faster(num_rows, num_columns, name):
    assert choose("select_topk", make_problem(num_rows, num_columns)).kernel.name == name


def test_what_it_cannot_take_is_refused_with_the_limit():
    if IS_INTERPRETING:
        assert "PTX" in (KERNEL.rejects(make_problem(1, 32768)) or "")
        return
    assert KERNEL.rejects(make_problem(1, 65536)) is None
    assert "2048" in (KERNEL.rejects(make_problem(1, 65536, topk=2049)) or "")
    assert "65536" in (KERNEL.rejects(make_problem(1, 65537)) or "")
    assert KERNEL.rejects(make_problem(1, 1 << 20, max_pages=1024)) is None


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETING, reason="needs Triton's compiler")
@pytest.mark.parametrize(("num_rows", "num_columns"), [(256, 32768), (512, 16384), (64, 32768)])
def test_logits_stay_in_registers_and_are_read_by_vectors(num_rows, num_columns):
    from nextn.testing.compile_gate import compile_launch

    problem = make_problem(num_rows, num_columns, max_pages=num_columns // 64)
    launch = KERNEL.prepare(
        problem,
        logits=torch.empty(num_rows, num_columns, device="meta"),
        visible_lens=torch.empty(num_rows, dtype=torch.int32, device="meta"),
        query_offsets=torch.empty(num_rows // 4 + 1, dtype=torch.int32, device="meta"),
        page_table=torch.empty(num_rows // 4, num_columns // 64, dtype=torch.int32, device="meta"),
        out=torch.empty(num_rows, problem.topk, dtype=torch.int32, device="meta"),
    )
    binary = compile_launch(launch, Arch.SM90)
    assert binary.registers <= 64, "programs wait for registers"
    assert binary.shared_bytes <= 1024, "static shared memory leaves no more of 48 KB"
    assert binary.stack_bytes <= 160, "logits were spilled"
    assert binary.assembly.count("@p ld.global.v4.b32") >= triton_cuda.configure(problem).tiles


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETING, reason="needs Triton's compiler")
@pytest.mark.parametrize("num_columns", [7, 301, 12345, 32767])
@pytest.mark.parametrize("num_rows", [2, 300])
def test_unaligned_rows_stay_within_the_shared_memory_that_needs_no_asking(num_rows, num_columns):
    from nextn.ops.select_topk._triton_pool import NUM_BYTES
    from nextn.testing.compile_gate import compile_launch

    problem = make_problem(num_rows, num_columns, topk=37)
    launch = KERNEL.prepare(
        problem,
        logits=torch.empty(num_rows, num_columns, device="meta"),
        visible_lens=torch.empty(num_rows, dtype=torch.int32, device="meta"),
        query_offsets=None,
        page_table=None,
        out=torch.empty(num_rows, problem.topk, dtype=torch.int32, device="meta"),
    )
    # Static and dynamic together: Triton asks for more than 48 KB by the dynamic part alone.
    assert NUM_BYTES + compile_launch(launch, Arch.SM90).shared_bytes <= 48 * 1024
