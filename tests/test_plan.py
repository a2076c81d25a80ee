"""plan_forward: positions, lengths and slots of every kind of batch, planned once and without reading a tensor."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextn.batch import ForwardBatch, ForwardMode
from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.env import Environment, read_environment
from nextn.errors import ConfigError, InputError, UnsupportedError
from nextn.hardware import Arch, describe_device, pretend_device
from nextn.ops._kernel import choose
from nextn.plan import DSAMetadata, DSASpec, list_problems, plan_forward
from tests.stand_ins.install import install_deep_gemm, other_kernels

CPU = describe_device("cpu")
SETTINGS = Environment(forced_kernels={}, disabled_kernels=other_kernels())
SPEC = DSASpec(
    num_heads=4,
    index_heads=32,
    index_topk=16,
    softmax_scale=0.1,
    index_format=IndexCacheFormat(name="fp8"),
    latent_format=LatentCacheFormat(name="fp8"),
)


def make_batch(
    row_counts, context_lens, *, mode=ForwardMode.TARGET_VERIFY, max_context=None, visible_lens=None
) -> ForwardBatch:
    requests, pages = len(row_counts), 8
    generator = torch.Generator().manual_seed(7)
    table = torch.randperm(requests * pages + 5, generator=generator)[: requests * pages].to(torch.int32)
    lens = torch.tensor(context_lens, dtype=torch.int32)
    return ForwardBatch.build(
        mode,
        row_counts=row_counts,
        context_lens=lens,
        page_table=table.reshape(requests, pages),
        max_context=max(context_lens, default=0) if max_context is None else max_context,
        visible_lens=visible_lens,
    )


def plan(batch: ForwardBatch, **options) -> DSAMetadata:
    return plan_forward(batch, SPEC, options.pop("device", CPU), environment=SETTINGS, **options)


batches = st.lists(
    st.integers(0, 6).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(rows, 500))), min_size=1, max_size=6
)


@given(batches)
@settings(max_examples=60, deadline=None)
def test_every_row_gets_its_requests_position_length_and_slot(requests):
    row_counts, lens = zip(*requests)
    batch = make_batch(row_counts, lens)
    metadata = plan(batch)
    rows = [(b, lens[b] - count + j) for b, count in enumerate(row_counts) for j in range(count)]
    assert metadata.request_of_row.tolist() == [b for b, _ in rows]
    assert metadata.positions.tolist() == [position for _, position in rows]
    assert metadata.visible_lens.tolist() == [position + 1 for _, position in rows]
    table = batch.page_table.tolist()
    assert metadata.slots.tolist() == [table[b][position // 64] * 64 + position % 64 for b, position in rows]


def test_tensors_have_the_dtypes_the_ops_take():
    metadata = plan(make_batch([2, 1], [70, 9]))
    assert metadata.positions.dtype == torch.int64
    assert metadata.visible_lens.dtype == torch.int32
    assert metadata.request_of_row.dtype == torch.int64
    assert metadata.slots.dtype == torch.int64


def test_padding_rows_see_nothing_write_nothing_and_stay_at_position_0():
    metadata = plan(make_batch([4, 4, 4], [70, 0, 2]))
    assert metadata.visible_lens.tolist() == [67, 68, 69, 70, 0, 0, 0, 0, 0, 0, 1, 2]
    assert metadata.positions.tolist() == [66, 67, 68, 69, 0, 0, 0, 0, 0, 0, 0, 1]
    assert metadata.slots[4:10].tolist() == [-1] * 6
    assert (metadata.slots[10:] >= 0).all()


def test_positions_past_the_page_table_write_nothing():
    batch = make_batch([2, 1], [512, 9], max_context=512)
    batch.context_lens[0] = 513
    slots = plan(batch).slots.tolist()
    assert slots[0] == int(batch.page_table[0, 7]) * 64 + 63
    assert slots[1] == -1


def test_a_negative_page_id_writes_nothing():
    batch = make_batch([2], [66])
    batch.page_table[0, 1] = -1
    assert plan(batch).slots.tolist() == [-1, -1]
    batch.page_table[0, 0] = -1
    assert plan(dataclasses.replace(batch, context_lens=torch.tensor([65], dtype=torch.int32))).slots[0] == -1


def test_rows_that_no_request_owns_see_nothing_and_write_nothing():
    """A graph captured for six rows may be replayed with fewer: the offsets then end before the last row."""
    batch = make_batch([4, 2], [70, 9])
    metadata = plan(dataclasses.replace(batch, query_offsets=torch.tensor([0, 3, 4], dtype=torch.int32)))
    assert metadata.positions.tolist() == [67, 68, 69, 8, 0, 0]
    assert metadata.visible_lens.tolist() == [68, 69, 70, 9, 0, 0]
    assert metadata.slots[4:].tolist() == [-1, -1]


@pytest.mark.parametrize("length", [-1, -(2**31), 2**31 - 1])
def test_wild_context_lengths_stay_within_their_dtypes(length):
    batch = make_batch([2, 1], [70, 9])
    batch.context_lens[0] = length
    metadata = plan(batch)
    assert metadata.visible_lens.tolist() == [max(length - 1, 0), max(length, 0), 9]
    assert metadata.slots[:2].tolist() == [-1, -1]


def test_workspaces_that_ask_for_a_value_hold_it_once_the_forward_is_planned():
    """Asked for while kernels are planned, filled with the rows."""

    def plan_topk(problem, *, device, fills):
        return [
            fills.ask((3,), torch.int32, 0),
            fills.ask((2, 2), torch.int64, 2**63 - 1),
            fills.ask((0,), torch.int32, 1),
        ]

    def choose_kernel(op, problem, *, environment):
        choice = choose(op, problem, environment=environment)
        if op != "select_topk":
            return choice
        return dataclasses.replace(choice, kernel=dataclasses.replace(choice.kernel, plan=plan_topk, takes_fills=True))

    zeros, largest, nothing = plan(make_batch([1], [70]), choose_kernel=choose_kernel).select_topk.data
    assert zeros.tolist() == [0, 0, 0]
    assert largest.tolist() == [[2**63 - 1] * 2] * 2
    assert nothing.shape == (0,)


def test_a_hosts_own_lengths_are_used_as_they_are():
    visible = torch.tensor([5, 70], dtype=torch.int32)
    batch = make_batch([2], [70], visible_lens=visible)
    metadata = plan(batch)
    assert metadata.visible_lens is visible
    assert metadata.positions.tolist() == [68, 69]


@pytest.mark.parametrize(("row_counts", "context_lens"), [([], []), ([0, 0], [9, 70])])
def test_a_batch_without_rows_is_planned(row_counts, context_lens):
    metadata = plan(make_batch(row_counts, context_lens, mode=ForwardMode.IDLE))
    for tensor in (metadata.positions, metadata.visible_lens, metadata.request_of_row, metadata.slots):
        assert tensor.shape == (0,)


def test_a_batch_without_rows_is_planned_on_a_gpu_with_deep_gemm(monkeypatch, tmp_path):
    library = install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    metadata = plan(make_batch([0, 0], [9, 70]), device=pretend_device(Arch.SM90))
    assert metadata.index_logits.choice.kernel.name != "deep_gemm"
    assert library.schedules == []


def test_a_context_wider_than_the_table_is_refused():
    batch = dataclasses.replace(make_batch([1], [70]), max_context=513)
    with pytest.raises(InputError, match="max_context 513 does not fit a page table of 8 pages of 64"):
        plan(batch)


def test_a_table_of_another_batch_is_refused():
    batch = dataclasses.replace(make_batch([1], [70]), page_table=torch.zeros(2, 8, dtype=torch.int32))
    with pytest.raises(InputError, match="page_table has 2 rows for 1 requests"):
        plan(batch)


def test_the_plan_is_frozen():
    metadata = plan(make_batch([1], [70]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        metadata.positions = torch.zeros(1)  # pyright: ignore[reportAttributeAccessIssue]


def test_without_a_schedule_the_metadata_says_so():
    metadata = plan(make_batch([2, 2], [70, 80]))
    assert metadata.paged_mqa_ctx_lens_2d is None
    assert metadata.paged_mqa_schedule_metadata is None
    assert not metadata.use_dg_native


@pytest.mark.parametrize(
    ("mode", "row_counts", "shape", "is_native"),
    [
        (ForwardMode.DECODE, [1, 1, 1], (3, 1), True),
        (ForwardMode.TARGET_VERIFY, [2, 2, 2], (3, 2), True),
        (ForwardMode.TARGET_VERIFY, [4, 4, 4], (3, 4), True),
        (ForwardMode.DRAFT_EXTEND, [4, 4, 4], (3, 4), True),
        (ForwardMode.DRAFT_EXTEND, [4, 1, 4], (9, 1), False),
        (ForwardMode.EXTEND, [7, 3, 1], (11, 1), False),
        (ForwardMode.TARGET_VERIFY, [2, 0, 2], (4, 1), False),
    ],
)
def test_rows_not_the_mode_decide_the_form_on_sm100(monkeypatch, tmp_path, mode, row_counts, shape, is_native):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    batch = make_batch(row_counts, [70, 300, 9], mode=mode)
    metadata = plan(batch, device=pretend_device(Arch.SM100))
    assert metadata.paged_mqa_ctx_lens_2d is not None
    assert metadata.paged_mqa_ctx_lens_2d.shape == shape
    assert metadata.paged_mqa_ctx_lens_2d.dtype == torch.int32
    assert metadata.paged_mqa_ctx_lens_2d.is_contiguous()
    assert metadata.use_dg_native is is_native
    assert metadata.index_logits.choice.form.startswith("native" if is_native else "flattened")


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_a_budget_that_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="is not a number of megabytes above 0"):
        read_environment({"NEXTN_LOGITS_BUDGET_MB": text})


def test_the_budget_is_read_in_megabytes_and_512_by_default():
    assert read_environment({}).logits_budget_bytes == 512 * 2**20
    assert read_environment({"NEXTN_LOGITS_BUDGET_MB": "0.5"}).logits_budget_bytes == 2**19


def test_environments_that_differ_are_cached_apart():
    kernels = {"index_logits": "reference", "select_topk": "reference"}
    one, same = (Environment(forced_kernels=dict(items), disabled_kernels=frozenset()) for items in
                 (kernels.items(), reversed(kernels.items())))  # fmt: skip
    assert hash(one) == hash(same)
    assert one == same
    assert len({one, same, dataclasses.replace(one, logits_budget_bytes=1)}) == 2


@pytest.mark.parametrize(("row_counts", "next_n"), [([2, 2], 2), ([2, 1], None)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_listed_problems_are_those_of_the_forward(row_counts, next_n, deterministic):
    batch, device = make_batch(row_counts, [70, 80]), pretend_device(Arch.SM120)
    metadata = plan(batch, device=device, deterministic=deterministic)
    problems = list_problems(batch, SPEC, device, deterministic=deterministic)
    assert problems["index_logits"] == metadata.index_logits.problem
    assert problems["select_topk"] == metadata.select_topk.problem
    assert problems["write_cache"] == metadata.write_cache.problem
    assert problems["prepare_query"] == metadata.prepare_query.problem
    assert problems["sparse_mla"] == metadata.sparse_mla.problem
    assert (problems["sparse_mla"].next_n, problems["sparse_mla"].deterministic) == (next_n, deterministic)
    assert all(problem.arch is Arch.SM120 for problem in problems.values())


@pytest.mark.parametrize("op", ["index_logits", "sparse_mla"])
def test_a_cpu_is_always_deterministic(op):
    assert list_problems(make_batch([2, 2], [70, 80]), SPEC, CPU)[op].deterministic


def test_deterministic_mode_never_takes_deep_gemm(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    metadata = plan(make_batch([2, 2], [70, 80]), device=pretend_device(Arch.SM100), deterministic=True)
    assert "deterministic mode" in dict(metadata.kernels["index_logits"].refusals)["deep_gemm"]


def test_a_forced_kernel_that_cannot_run_stops_the_plan():
    forced = Environment(forced_kernels={"index_logits": "deep_gemm"}, disabled_kernels=frozenset())
    with pytest.raises(UnsupportedError, match="deep_gemm: written for sm90, sm100, sm103; this is a CPU"):
        plan_forward(make_batch([1], [70]), SPEC, CPU, environment=forced)


@pytest.mark.parametrize("row_counts", [[4, 4], [3, 3], [2, 5]])
def test_planning_reads_no_tensor_on_the_host(monkeypatch, row_counts):
    """On meta tensors there is nothing to read, so a plan that reads a length fails."""
    module = ModuleType("deep_gemm")

    def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):
        return context_lens.new_empty(num_sms + 1, 2)

    def fp8_fp4_paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len):
        raise AssertionError("planning does not score")

    module.__dict__.update(
        get_paged_mqa_logits_metadata=get_paged_mqa_logits_metadata, fp8_fp4_paged_mqa_logits=fp8_fp4_paged_mqa_logits
    )
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    batch = make_batch(row_counts, [70, 300])
    moved = {name: getattr(batch, name).to("meta") for name in ("query_offsets", "context_lens", "page_table")}
    metadata = plan(dataclasses.replace(batch, **moved), device=pretend_device(Arch.SM90))
    assert metadata.index_logits.choice.kernel.name == "deep_gemm"
    assert metadata.slots.shape == (sum(row_counts),)
