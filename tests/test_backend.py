"""DSABackend: one plan per forward serves every layer, by whichever kernel, with the same bits.

Head weights are multiples of 1/16 below 1 and 32 heads of 128 dimensions make the fixed factor a power of two, so the
folded weights have few bits and every score is exact in FP64: see tests/stand_ins/exact_inputs.py.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from nextn import ops
from nextn.backend import DSABackend, LayerCache
from nextn.batch import ForwardBatch, ForwardMode
from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.errors import InputError, UnsupportedError
from nextn.hardware import Arch, pretend_device
from nextn.ops._kernel import OPS
from nextn.ops._kernel import choose as choose_kernel
from nextn.plan import DSAMetadata, DSASpec
from tests.stand_ins.install import install_deep_gemm, other_kernels

TOPK, LAYERS, PAGES = 64, 3, 24
SPEC = DSASpec(
    num_heads=4,
    index_heads=32,
    index_topk=TOPK,
    softmax_scale=0.1,
    index_format=IndexCacheFormat(name="fp8"),
    latent_format=LatentCacheFormat(name="fp8"),
)
CONTEXT_LENS = (300, 70, 129)


@pytest.fixture(autouse=True)
def only_deep_gemm_and_references(monkeypatch):
    monkeypatch.setenv("NEXTN_DISABLE_KERNELS", ",".join(other_kernels()))


@dataclass(frozen=True, kw_only=True)
class ForwardOutput:
    """Selected slots of every layer, and what the last one attended to."""

    slots: tuple[torch.Tensor, ...]
    attended: torch.Tensor


def make_rope_table(num_positions: int = 512) -> torch.Tensor:
    angles = torch.arange(num_positions)[:, None] * torch.logspace(0, -4, 32)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def make_backend(arch: Arch | None = None, spec: DSASpec = SPEC) -> DSABackend:
    return DSABackend(spec, make_rope_table(), hardware=None if arch is None else pretend_device(arch))


def make_batch(
    row_counts: Sequence[int],
    mode: ForwardMode = ForwardMode.TARGET_VERIFY,
    context_lens: Sequence[int] = CONTEXT_LENS,
) -> ForwardBatch:
    table = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1)).to(torch.int32).reshape(-1, 8)
    lens = torch.tensor(context_lens, dtype=torch.int32)
    return ForwardBatch.build(
        mode, row_counts=row_counts, context_lens=lens, page_table=table[: len(row_counts)], max_context=300
    )


def fill_caches(spec: DSASpec = SPEC) -> tuple[LayerCache, ...]:
    """Caches with a key at every position of every request, by the backend's own writer."""
    return copy.deepcopy(_fill_caches(spec))


@functools.cache
def _fill_caches(spec: DSASpec) -> tuple[LayerCache, ...]:
    backend = make_backend(spec=spec)
    caches = backend.allocate_caches(PAGES, [True] * LAYERS)
    metadata = backend.init_forward_metadata(make_batch(CONTEXT_LENS, ForwardMode.EXTEND))
    generator = torch.Generator().manual_seed(2)
    for cache in caches:
        write_keys(backend, cache, metadata, generator)
    return caches


def write_keys(backend: DSABackend, cache: LayerCache, metadata: DSAMetadata, generator: torch.Generator) -> None:
    rows = metadata.batch.num_rows
    backend.write_cache(
        cache,
        metadata,
        kv=torch.randn(rows, 576, generator=generator),
        kv_norm_weight=torch.ones(512),
        kv_norm_eps=1e-6,
        index_k=torch.randn(rows, 128, generator=generator),
        index_norm_weight=torch.ones(128),
        index_norm_bias=torch.zeros(128),
    )


def run_forward(
    backend: DSABackend, caches: tuple[LayerCache, ...], batch: ForwardBatch
) -> tuple[DSAMetadata, ForwardOutput]:
    """One forward of all layers; the same batch gets the same inputs whatever the backend."""
    metadata = backend.init_forward_metadata(batch)
    generator = torch.Generator().manual_seed(3)
    outputs: list[torch.Tensor] = []
    for cache in caches:
        write_keys(backend, cache, metadata, generator)
        slots = backend.get_topk_paged(
            cache,
            metadata,
            q=torch.randn(batch.num_rows, 32, 128, generator=generator),
            weights=torch.randint(-15, 16, (batch.num_rows, 32), generator=generator) / 16,
        )
        outputs.append(slots)
    q = torch.randn(batch.num_rows, 4, 576, generator=generator)
    attended = backend.attend(caches[-1], metadata, q=q, topk_slots=outputs[-1])
    return metadata, ForwardOutput(slots=tuple(outputs), attended=attended)


def assert_same_bits(ours: ForwardOutput, theirs: ForwardOutput) -> None:
    assert len(ours.slots) == len(theirs.slots) == LAYERS
    assert all(torch.equal(one, other) for one, other in zip(ours.slots, theirs.slots))
    assert torch.equal(ours.attended, theirs.attended)


@functools.cache
def run_on_reference(row_counts: tuple[int, ...], context_lens: tuple[int, ...] = CONTEXT_LENS) -> ForwardOutput:
    backend = make_backend()
    metadata, outputs = run_forward(backend, fill_caches(), make_batch(row_counts, context_lens=context_lens))
    assert metadata.index_logits.choice.kernel.name == "reference"
    return outputs


@pytest.mark.parametrize(
    ("mode", "next_n"),
    [
        (ForwardMode.TARGET_VERIFY, 2),
        (ForwardMode.TARGET_VERIFY, 3),
        (ForwardMode.TARGET_VERIFY, 4),
        (ForwardMode.DRAFT_EXTEND, 4),
        (ForwardMode.DECODE, 1),
    ],
)
def test_a_native_forward_on_sm100_plans_once_and_matches_the_reference(monkeypatch, tmp_path, mode, next_n):
    library = install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    backend = make_backend(Arch.SM100)
    caches = fill_caches()
    batch = make_batch((next_n,) * 3, mode)
    metadata, outputs = run_forward(backend, caches, batch)
    assert backend.kernels(metadata)["index_logits"] == f"deep_gemm (native [3, {next_n}])"
    assert metadata.use_dg_native
    assert metadata.paged_mqa_ctx_lens_2d is not None
    assert metadata.paged_mqa_ctx_lens_2d.shape == (3, next_n)
    assert len(library.schedules) == 1
    assert len(library.calls) == LAYERS
    for call in library.calls:
        assert call["lens"] is metadata.paged_mqa_ctx_lens_2d
        assert call["schedule"] is metadata.paged_mqa_schedule_metadata
        assert call["table"].data_ptr() == batch.page_table.data_ptr()
        assert call["q"].shape == (3, next_n, 32, 128)
    assert_same_bits(outputs, run_on_reference((next_n,) * 3))


@pytest.mark.parametrize("generation", ["A", "B"])
@pytest.mark.parametrize("next_n", [2, 4])
def test_a_native_forward_on_hopper_matches_the_reference(monkeypatch, tmp_path, generation, next_n):
    library = install_deep_gemm(monkeypatch, tmp_path, generation=generation, arch=Arch.SM90)
    backend = make_backend(Arch.SM90)
    batch = make_batch((next_n,) * 3)
    metadata, outputs = run_forward(backend, fill_caches(), batch)
    assert metadata.use_dg_native
    assert metadata.paged_mqa_schedule_metadata is not None
    assert metadata.paged_mqa_schedule_metadata.shape == ((66 if next_n == 4 else 132) + 1, 2)
    assert len(library.schedules) == 1
    assert all(call["table"].untyped_storage().data_ptr() == batch.page_table.data_ptr() for call in library.calls)
    assert_same_bits(outputs, run_on_reference((next_n,) * 3))


@pytest.mark.parametrize(
    ("mode", "row_counts"),
    [
        (ForwardMode.TARGET_VERIFY, (3, 3, 3)),
        (ForwardMode.TARGET_VERIFY, (2, 5, 1)),
        (ForwardMode.EXTEND, (20, 0, 9)),
    ],
)
def test_a_flattened_forward_repeats_tables_once_and_matches_the_reference(monkeypatch, tmp_path, mode, row_counts):
    library = install_deep_gemm(monkeypatch, tmp_path, generation="B", arch=Arch.SM90)
    backend = make_backend(Arch.SM90)
    batch = make_batch(row_counts, mode)
    metadata, outputs = run_forward(backend, fill_caches(), batch)
    rows = sum(row_counts)
    assert not metadata.use_dg_native
    assert backend.kernels(metadata)["index_logits"].startswith(f"deep_gemm (flattened to [{rows}, 1]: ")
    assert len(library.schedules) == 1
    assert len({call["table"].data_ptr() for call in library.calls}) == 1
    assert library.calls[0]["table"].shape == (rows, 8)
    assert_same_bits(outputs, run_on_reference(row_counts))


def test_a_padding_request_changes_nothing_for_the_others(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    backend = make_backend(Arch.SM100)
    _, outputs = run_forward(backend, fill_caches(), make_batch((2, 2, 2), context_lens=(300, 0, 129)))
    assert_same_bits(outputs, run_on_reference((2, 2, 2), (300, 0, 129)))
    assert all((slots[2:4] == -1).all() for slots in outputs.slots)
    assert (outputs.attended[2:4] == 0).all()


@pytest.mark.parametrize(("generation", "arch", "reason"), [("B", Arch.SM100, "MX-scaled"), ("A", Arch.GFX942, "AMD")])
def test_the_reference_runs_where_deep_gemm_cannot_and_says_why(monkeypatch, tmp_path, generation, arch, reason):
    library = install_deep_gemm(monkeypatch, tmp_path, generation=generation, arch=arch)
    backend = make_backend(arch)
    metadata, outputs = run_forward(backend, fill_caches(), make_batch([2, 2, 2]))
    assert metadata.index_logits.choice.kernel.name == "reference"
    assert reason in dict(metadata.kernels["index_logits"].refusals)["deep_gemm"]
    assert library.calls == []
    assert_same_bits(outputs, run_on_reference((2, 2, 2)))


@pytest.mark.parametrize("arch", [None, Arch.SM90])
def test_an_idle_forward_runs_through_every_call(monkeypatch, tmp_path, arch):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    backend = make_backend(arch)
    caches = fill_caches()
    before = [cache.kv.clone() for cache in caches]
    _, outputs = run_forward(backend, caches, make_batch([], ForwardMode.IDLE, []))
    assert outputs.slots[0].shape == (0, TOPK)
    assert outputs.attended.shape == (0, 4, 512)
    assert all(torch.equal(cache.kv, kept) for cache, kept in zip(caches, before))


def test_the_schedule_is_built_anew_for_every_forward(monkeypatch, tmp_path):
    library = install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    backend = make_backend(Arch.SM100)
    first = backend.init_forward_metadata(make_batch([2, 2, 2]))
    second = backend.init_forward_metadata(make_batch([2, 2, 2], context_lens=[100, 70, 129]))
    assert len(library.schedules) == 2
    assert first.paged_mqa_ctx_lens_2d is not second.paged_mqa_ctx_lens_2d


def test_selected_slots_are_the_best_of_the_rows_own_request():
    """Against scores computed here, from the unquantised formats, through the public calls alone."""
    spec = replace(SPEC, index_format=IndexCacheFormat(name="fp32"), latent_format=LatentCacheFormat(name="fp32"))
    backend = make_backend(spec=spec)
    caches = fill_caches(spec)
    batch = make_batch([1, 1, 1], ForwardMode.DECODE)
    metadata, outputs = run_forward(backend, caches, batch)
    assert metadata.index_logits.choice.kernel.name == "reference"
    slots = outputs.slots[0]
    for request, length in enumerate(CONTEXT_LENS):
        chosen = slots[request][slots[request] >= 0]
        pages = batch.page_table[request].tolist()
        owned = {pages[position // 64] * 64 + position % 64: position for position in range(length)}
        positions = [owned[slot] for slot in chosen.tolist()]
        assert len(positions) == min(TOPK, length)
        assert positions == sorted(set(positions))


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_is_chosen_for_the_backends_hardware_and_mode(monkeypatch, deterministic):
    problems = []
    attend = ops.sparse_mla

    def sparse_mla(*arguments, plan, **options):
        problems.append(plan.problem)
        return attend(*arguments, plan=plan, **options)

    monkeypatch.setattr(ops, "sparse_mla", sparse_mla)
    hardware = pretend_device(Arch.SM90)
    backend = DSABackend(SPEC, make_rope_table(), hardware=hardware, deterministic=deterministic)
    run_forward(backend, fill_caches(), make_batch((2, 2, 2)))
    (problem,) = problems
    assert (problem.arch, problem.next_n, problem.deterministic) == (Arch.SM90, 2, deterministic)


def count_choices(monkeypatch) -> list[str]:
    """Ops in the order they were chosen for, from now on."""
    chosen: list[str] = []

    def choose(op, problem, **options):
        chosen.append(op)
        return choose_kernel(op, problem, **options)

    monkeypatch.setattr("nextn.backend.choose", choose)
    for op in OPS:
        monkeypatch.setattr(sys.modules[f"nextn.ops.{op}"], "choose", choose)  # the name also names the function
    return chosen


def test_every_op_is_chosen_in_the_plan_and_no_layer_chooses(monkeypatch):
    chosen = count_choices(monkeypatch)
    backend, caches, batch = make_backend(), fill_caches(), make_batch((2, 2, 2))
    chosen.clear()
    metadata = backend.init_forward_metadata(batch)
    ops_of_a_layer = ["write_cache", "prepare_query", "index_logits", "select_topk", "sparse_mla"]
    assert sorted(chosen) == sorted([*ops_of_a_layer, "write_cache"])  # once more, for layers without an indexer
    assert list(metadata.kernels) == ops_of_a_layer
    chosen.clear()
    generator = torch.Generator().manual_seed(3)
    for cache in caches:
        write_keys(backend, cache, metadata, generator)
        slots = backend.get_topk_paged(cache, metadata, q=torch.randn(6, 32, 128), weights=torch.randn(6, 32))
        backend.attend(cache, metadata, q=torch.randn(6, 4, 576), topk_slots=slots)
    backend.write_cache(caches[0], metadata, kv=torch.randn(6, 576), kv_norm_weight=torch.ones(512))
    assert chosen == []
    for _ in range(2):
        backend.write_cache(caches[0], metadata, kv=torch.randn(6, 576), kv_norm_weight=None)
    assert chosen == ["write_cache"]  # not what was planned: chosen for once


def test_a_size_seen_before_is_not_chosen_for_again(monkeypatch):
    chosen = count_choices(monkeypatch)
    backend = make_backend()
    first = backend.init_forward_metadata(make_batch((2, 2, 2)))
    chosen.clear()
    second = backend.init_forward_metadata(make_batch((2, 2, 2), context_lens=(9, 300, 70)))
    assert chosen == []
    assert second.index_logits.choice is first.index_logits.choice
    backend.init_forward_metadata(make_batch((2, 1, 2)))
    assert chosen != []


def test_a_setting_changed_between_forwards_is_heeded(monkeypatch):
    backend = make_backend()
    backend.init_forward_metadata(make_batch((2, 2, 2)))
    monkeypatch.setenv("NEXTN_DISABLE_KERNELS", "reference")
    with pytest.raises(UnsupportedError, match="disabled by NEXTN_DISABLE_KERNELS"):
        backend.init_forward_metadata(make_batch((2, 2, 2)))


def test_activations_of_another_dtype_than_planned_are_planned_for_with_the_same_mode():
    """Planned for bfloat16 on a GPU; float32 queries must not be read as bfloat16, nor lose deterministic mode."""
    backend = DSABackend(SPEC, make_rope_table(), hardware=pretend_device(Arch.SM90), deterministic=True)
    metadata = backend.init_forward_metadata(make_batch((2, 2, 2)))
    assert metadata.sparse_mla.problem.dtype == metadata.prepare_query.problem.dtype == "bfloat16"
    fitted = backend._fit(metadata.sparse_mla, dtype="float32")
    assert (fitted.problem.dtype, fitted.problem.deterministic) == ("float32", True)
    assert backend._fit(metadata.sparse_mla, dtype="bfloat16") is metadata.sparse_mla
    told = DSABackend(SPEC, make_rope_table(), hardware=pretend_device(Arch.SM90), dtype=torch.float32)
    assert told.init_forward_metadata(make_batch((2, 2, 2))).prepare_query.problem.dtype == "float32"


@pytest.mark.parametrize("rows_at_once", [1, 3, 8, 20])
@pytest.mark.parametrize("row_counts", [(20, 1, 9), (4, 4, 4), (0, 29, 0)])
def test_a_small_budget_scores_in_parts_and_selects_the_same(monkeypatch, row_counts, rows_at_once):
    """300 columns are padded to 512, so a row takes 2 KB; borders fall inside requests and between them."""
    whole = run_on_reference(row_counts)
    monkeypatch.setenv("NEXTN_LOGITS_BUDGET_MB", str(rows_at_once * 2048 / 2**20))
    largest: list[int] = []
    score = ops.index_logits

    def index_logits(*arguments, **options):
        logits = score(*arguments, **options)
        largest.append(logits.shape[0])
        return logits

    monkeypatch.setattr(ops, "index_logits", index_logits)
    metadata, parts = run_forward(make_backend(), fill_caches(), make_batch(row_counts, ForwardMode.EXTEND))
    assert max(largest) <= rows_at_once
    assert sum(largest) == LAYERS * sum(row_counts)
    assert [row for chunk in metadata.chunks for row in range(*chunk.rows.indices(99))] == list(range(sum(row_counts)))
    assert_same_bits(parts, whole)


def test_a_budget_of_the_whole_forward_leaves_it_whole(monkeypatch):
    monkeypatch.setenv("NEXTN_LOGITS_BUDGET_MB", str(6 * 2048 / 2**20))
    metadata = make_backend().init_forward_metadata(make_batch((2, 2, 2)))
    assert len(metadata.chunks) == 1
    assert metadata.chunks[0].query_offsets is metadata.batch.query_offsets
    assert metadata.index_logits.problem.next_n == 2


def test_uniform_requests_are_not_cut_apart_where_the_budget_holds_one(monkeypatch):
    monkeypatch.setenv("NEXTN_LOGITS_BUDGET_MB", str(7 * 2048 / 2**20))
    metadata = make_backend().init_forward_metadata(make_batch((4, 4, 4)))
    assert [(chunk.rows.start, chunk.rows.stop) for chunk in metadata.chunks] == [(0, 4), (4, 8), (8, 12)]
    assert [chunk.query_offsets.tolist() for chunk in metadata.chunks] == [[0, 4, 4, 4], [0, 0, 4, 4], [0, 0, 0, 4]]


def test_a_prompts_logits_fit_the_default_budget():
    """4096 rows over 128K columns would be 2 GB; on meta tensors, as nothing of it is needed here."""
    batch = ForwardBatch.build(
        ForwardMode.EXTEND,
        row_counts=[4096],
        context_lens=torch.empty(1, dtype=torch.int32, device="meta"),
        page_table=torch.empty(1, 2048, dtype=torch.int32, device="meta"),
    )
    moved = replace(batch, query_offsets=batch.query_offsets.to("meta"))
    backend = DSABackend(
        SPEC, torch.empty(131072, 64, device="meta"), device="meta", hardware=pretend_device(Arch.SM90)
    )
    chunks = backend.init_forward_metadata(moved).chunks
    assert [chunk.rows.stop - chunk.rows.start for chunk in chunks] == [1024] * 4


def test_a_layer_without_an_indexer_has_no_index_cache_and_says_so():
    backend = make_backend()
    with_indexer, without = backend.allocate_caches(4, [True, False])
    assert with_indexer.index is not None
    assert with_indexer.index.shape == (4, 8448)
    assert with_indexer.kv.shape == (4, 64, 656)
    assert without.index is None
    metadata = backend.init_forward_metadata(make_batch([1, 1, 1]))
    with pytest.raises(InputError, match="this layer has no index cache"):
        backend.get_topk_paged(without, metadata, q=torch.zeros(3, 32, 128), weights=torch.zeros(3, 32))
    with pytest.raises(InputError, match="this layer has no index cache"):
        write_keys(backend, without, metadata, torch.Generator())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DSABackend(SPEC, torch.ones(8, 32)), "rope_table is torch.float32 \\(8, 32\\)"),
        (lambda: DSABackend(SPEC, torch.ones(8, 64).double()), "rope_table is torch.float64"),
        (lambda: make_backend().allocate_caches(0, [True]), "num_pages 0 is below 1"),
    ],
)
def test_a_wrong_backend_is_refused(build, words):
    with pytest.raises(InputError, match=words):
        build()


def test_a_context_beyond_the_rope_table_is_refused():
    backend = DSABackend(SPEC, make_rope_table(299))
    with pytest.raises(InputError, match="max_context 300 is above the 299 positions"):
        backend.init_forward_metadata(make_batch([1, 1, 1]))
