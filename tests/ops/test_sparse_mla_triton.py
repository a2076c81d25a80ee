"""The GPU kernels' own claims: lists that miss and repeat nothing, bits that depend on no batch, cuts by arithmetic."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import DEVICE, IS_INTERPRETING

from nextn.errors import InputError
from nextn.hardware import Arch, DeviceInfo, describe_device, pretend_device
from nextn.ops._kernel import Choice, Kernel, OpPlan
from nextn.ops.sparse_mla import reference
from nextn.ops.sparse_mla.cases import SparseMlaCase, SparseMlaInputs
from nextn.testing.compile_gate import TARGETS, compile_launch
from nextn.testing.numerics import assert_rows_match, assert_same_bits

pytest.importorskip("triton")
from nextn.ops.sparse_mla import _triton_launch, triton_portable, triton_union

H100 = pretend_device(Arch.SM90)
# 16 (row, head) pairs a product: quick to interpret
TINY = DeviceInfo(arch=Arch.SM80, name="one multiprocessor", num_sms=1)
SMALL = SparseMlaCase(name="own", row_counts=(4, 4), heads=4, topk=48, context_len=90)
interpreted = pytest.mark.skipif(not IS_INTERPRETING, reason="runs in Triton's interpreter")


def run(
    kernel: Kernel,
    case: SparseMlaCase,
    inputs: SparseMlaInputs,
    *,
    deterministic: bool = False,
    plan: OpPlan | None = None,
    **config: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel's output and lse; ``config`` changes what it would choose."""
    problem = replace(case.problem(TINY, deterministic=deterministic), num_rows=inputs.q.shape[0])
    out = torch.full((*inputs.q.shape[:2], 512), float("nan"), dtype=inputs.q.dtype)
    lse = torch.full(inputs.q.shape[:2], float("nan"))
    plan = plan_with(kernel, problem, **config) if plan is None else plan
    kernel.prepare(problem, **tensors_of(inputs), query_offsets=inputs.query_offsets, out=out, lse=lse, plan=plan)()
    return out, lse


def plan_with(kernel: Kernel, problem: object, **config: object) -> OpPlan:
    chosen = {"triton_portable": triton_portable, "triton_union": triton_union}[kernel.name].choose_config(problem)  # type: ignore[arg-type]
    data = kernel.plan(problem, device="cpu", config=replace(chosen, **config))  # type: ignore[misc, arg-type]
    return OpPlan(choice=Choice(kernel=kernel, form="", refusals=(), others=()), problem=problem, data=data)


def tensors_of(inputs: SparseMlaInputs) -> dict[str, object]:
    return {name: getattr(inputs, name) for name in ("q", "kv_cache", "indices", "scale")}


def attend_exactly(inputs: SparseMlaInputs) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.zeros(*inputs.q.shape[:2], 512), torch.zeros(inputs.q.shape[:2])
    arguments = {**tensors_of(inputs), "q": inputs.q.float()}
    reference.prepare(None, **arguments, query_offsets=None, out=out, lse=lse)()  # type: ignore[arg-type]
    return out, lse


def assert_close(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert_rows_match(actual[0], expected[0], max_error=2**-7)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)


@interpreted
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(-3, 40), min_size=12, max_size=12), min_size=1, max_size=9),
    tokens=st.integers(2, 5),
    log_buckets=st.sampled_from([1, 3, 13]),
)
def test_every_mention_of_a_slot_is_listed_exactly_once(rows, tokens, log_buckets):
    """Few buckets make slots collide in one table and in both."""
    before = _triton_launch.LOG_BUCKETS
    _triton_launch.LOG_BUCKETS = log_buckets
    try:
        lists = list_mentions(torch.tensor(rows, dtype=torch.int32), tokens, num_slots=32)
    finally:
        _triton_launch.LOG_BUCKETS = before
    for row, slots in enumerate(rows):
        assert lists[row] == Counter(slot for slot in slots if 0 <= slot < 32)


def list_mentions(indices: torch.Tensor, tokens: int, num_slots: int) -> list[Counter[int]]:
    """How often each row's list names each slot for it."""
    num_rows, topk = indices.shape
    case = SparseMlaCase(name="lists", row_counts=(num_rows,), topk=topk)
    config = _triton_launch.AttendConfig(tokens=tokens, depth=num_rows)
    problem = replace(case.problem(H100), page_size=num_slots)
    workspace = _triton_launch.allocate_union(problem, config, "cpu")
    for tensor in (workspace.slots, workspace.masks, workspace.counts):
        assert tensor is not None
        tensor.fill_(2**30)
    lists, launches = _triton_launch.describe_union(problem, workspace, indices, torch.empty(1, num_slots, 656))
    for launch in launches:
        launch()
    assert lists.masks is not None
    assert lists.counts is not None
    found = [Counter() for _ in range(num_rows)]
    for row in range(num_rows):
        number, token = divmod(row, tokens)
        for part in range(tokens):
            places = slice(part * topk, part * topk + int(lists.counts[number, part]))
            chosen = (lists.masks[number, places] >> token) & 1 == 1
            found[row].update(lists.slots[number, places][chosen].tolist())
    return found


@interpreted
def test_rows_with_the_same_slots_share_one_list():
    indices = torch.arange(16, dtype=torch.int32).expand(4, 16).contiguous()
    case = SparseMlaCase(name="lists", row_counts=(4,), topk=16)
    problem = case.problem(H100)
    workspace = _triton_launch.allocate_union(problem, _triton_launch.AttendConfig(tokens=4, depth=4), "cpu")
    lists, launches = _triton_launch.describe_union(problem, workspace, indices, torch.empty(1, 64, 656))
    for launch in launches:
        launch()
    assert lists.counts is not None
    assert lists.masks is not None
    assert lists.counts.tolist() == [[16, 0, 0, 0]]
    assert lists.slots[0, :16].tolist() == list(range(16))
    assert lists.masks[0, :16].tolist() == [0b1111] * 16


@interpreted
def test_a_workspace_used_again_for_other_slots_holds_nothing_back():
    plan = plan_with(triton_union.KERNEL, SMALL.problem(TINY), tokens=4, depth=4, group=4)
    for seed in (0, 1):
        inputs = SMALL.inputs(seed=seed)
        assert_close(run(triton_union.KERNEL, SMALL, inputs, plan=plan), attend_exactly(inputs))


@interpreted
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 256.0])
def test_a_spoiled_scale_spoils_only_the_rows_that_name_its_slot(scale):
    inputs = SMALL.inputs()
    slot = next(s for s in inputs.indices[0].tolist() if s not in inputs.indices[1].tolist())
    clean, _ = run(triton_union.KERNEL, SMALL, inputs, tokens=4, depth=4, group=4)
    inputs.kv_cache[slot // 64, slot % 64, 516:520] = torch.tensor([scale]).view(torch.uint8)
    dirty, _ = run(triton_union.KERNEL, SMALL, inputs, tokens=4, depth=4, group=4)
    named = (inputs.indices == slot).any(dim=1)
    assert named.any()
    assert dirty[named].isnan().all()
    assert_same_bits(dirty[~named], clean[~named])


@interpreted
@pytest.mark.parametrize("kernel", [triton_portable.KERNEL, triton_union.KERNEL], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("transposed", [False, True])
def test_lists_in_more_splits_than_tiles_are_put_together(kernel, transposed):
    inputs = SMALL.inputs()
    inputs.indices[1] = -1
    inputs.indices[2, 5:] = -1
    config = {"splits": 4, "transposed": transposed, "group": 4}
    if kernel is triton_union.KERNEL:
        config |= {"tokens": 4, "depth": 4}
    assert_close(run(kernel, SMALL, inputs, **config), attend_exactly(inputs))


@interpreted
def test_lists_never_reach_into_the_next_request():
    """Seven rows, lists of at most three: three, three and one of each request."""
    case = replace(SMALL, row_counts=(7, 7), heads=2)
    inputs = case.inputs()
    actual = run(triton_union.KERNEL, case, inputs, tokens=3, depth=7, group=2, splits=2)
    assert_close(actual, attend_exactly(inputs))


@interpreted
def test_deterministic_bits_depend_on_neither_batch_nor_depth():
    case = replace(SMALL, row_counts=(3,), topk=520, context_len=600)
    inputs = case.inputs()
    whole, whole_lse = run(triton_portable.KERNEL, case, inputs, deterministic=True)
    for row in range(3):
        alone = replace(inputs, q=inputs.q[row : row + 1], indices=inputs.indices[row : row + 1])
        out, lse = run(triton_portable.KERNEL, replace(case, row_counts=(1,)), alone, deterministic=True)
        assert_same_bits(out[0], whole[row])
        assert_same_bits(lse[0], whole_lse[row])


def make_problem(requests: int, next_n: int, heads: int, *, deterministic: bool = False) -> object:
    case = SparseMlaCase(name="any", row_counts=(next_n,) * requests, heads=heads, topk=2048)
    return case.problem(H100, deterministic=deterministic)


def test_deterministic_cuts_are_the_same_in_every_batch():
    gluon_sm90 = pytest.importorskip("nextn.ops.sparse_mla.gluon_sm90")
    for module in (triton_portable, gluon_sm90):
        cuts = {
            module.choose_config(make_problem(requests, next_n, 16, deterministic=True))
            for requests in (1, 7, 256)
            for next_n in (1, 4, 8)
        }
        assert len(cuts) == 1
    reason = triton_union.rejects(make_problem(4, 4, 16, deterministic=True))  # type: ignore[arg-type]
    assert reason is not None
    assert "bits" in reason


@pytest.mark.parametrize(
    ("requests", "next_n", "heads", "tokens"),
    [
        (64, 4, 16, 4),
        (64, 8, 8, 4),
        (64, 2, 16, 2),
        (16, 4, 16, 4),
        (64, 4, 32, 2),
        (64, 4, 64, 1),
        (64, 4, 128, 1),
        (64, 1, 16, 1),
        (1, 4, 16, 1),
    ],
)
def test_rows_share_a_list_where_that_makes_fewer_gathers(requests, next_n, heads, tokens):
    gluon_sm90 = pytest.importorskip("nextn.ops.sparse_mla.gluon_sm90")
    assert gluon_sm90.choose_config(make_problem(requests, next_n, heads)).tokens == tokens


def test_a_small_batch_is_split_over_the_multiprocessors():
    gluon_sm90 = pytest.importorskip("nextn.ops.sparse_mla.gluon_sm90")
    config = gluon_sm90.choose_config(make_problem(1, 4, 128))
    assert 64 <= config.num_lists(4) * 2 * config.splits <= H100.num_sms


def test_products_without_room_for_a_second_row_refuse_to_share():
    problem = SparseMlaCase(name="any", row_counts=(4,), heads=16).problem(pretend_device(Arch.SM89))
    reason = triton_union.rejects(problem)
    assert reason is not None
    assert "16 heads of one row" in reason


def test_pages_no_multiple_of_16_bytes_apart_are_refused():
    inputs = SMALL.inputs()
    wide = torch.zeros(inputs.kv_cache.shape[0], 64 * 656 + 8, dtype=torch.uint8)
    cache = wide[:, :-8].unflatten(1, (64, 656))
    out, lse = torch.zeros(8, 4, 512, dtype=torch.bfloat16), torch.zeros(8, 4)
    arguments = {**tensors_of(inputs), "kv_cache": cache, "query_offsets": None, "out": out, "lse": lse}
    with pytest.raises(InputError, match="multiple of 16"):
        triton_portable.prepare(SMALL.problem(H100), **arguments)  # type: ignore[arg-type]


@pytest.mark.compile
@pytest.mark.skipif(IS_INTERPRETING, reason="the interpreter turns the compiler off")
def test_the_hopper_kernels_of_a_shared_list_fit_and_spill_next_to_nothing():
    gluon_sm90 = pytest.importorskip("nextn.ops.sparse_mla.gluon_sm90")
    unite, attend, combine = gluon_sm90.KERNEL.prepare(make_problem(64, 4, 16), **meta_tensors()).arguments["launches"]
    stages = {"unite": unite, "attend": attend, "combine": combine}
    binaries = {name: compile_launch(launch, Arch.SM90) for name, launch in stages.items()}
    assert binaries["attend"].num_products > 0
    assert max(binary.shared_bytes for binary in binaries.values()) <= TARGETS[Arch.SM90].shared_bytes
    assert max(binary.stack_bytes for binary in binaries.values()) <= 80  # Triton 3.6: none; 3.9: 80
    # The hash tables' PTX takes them to lie at the beginning of shared memory: nothing else is there.
    assert binaries["unite"].shared_bytes == 4 * 4 * 4 * 2048


@pytest.mark.skipif(describe_device(DEVICE).arch is not Arch.SM90, reason="Gluon runs on its own GPU only")
@pytest.mark.parametrize("kind", ["random", "near", "repeated", "all_one", "beyond_keys"])
@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_a_hopper_list_names_every_mention_once_and_always_in_one_order(kind, tokens):
    gluon_sm90 = pytest.importorskip("nextn.ops.sparse_mla.gluon_sm90")
    indices = make_indices(kind).to(DEVICE)
    num_slots = 2**31 - 2 if kind == "beyond_keys" else 8000
    lists = [list_on_hopper(gluon_sm90, indices, tokens, num_slots) for _ in range(20)]
    assert all(again == lists[0] for again in lists[1:])
    for row, slots in enumerate(indices.tolist()):
        number, token = row // 4 * -(-4 // tokens) + row % 4 // tokens, row % 4 % tokens
        named = [slot for slot, mask in lists[0][number] if mask >> token & 1]
        assert Counter(named) == Counter(slot for slot in slots if 0 <= slot < num_slots)
    if kind == "near":
        assert max(len(entries) for entries in lists[0]) <= 2330  # 2300 slots, and some that found no cell


def make_indices(kind: str) -> torch.Tensor:
    """Slots of five requests of four rows, int32 ``[20, 2048]``; most kinds name some outside a cache of 8000."""
    generator = torch.Generator().manual_seed(5)
    indices = torch.randint(-5, 9000, (20, 2048), generator=generator, dtype=torch.int32)
    if kind == "near":
        return torch.stack([torch.randperm(2300, generator=generator)[:2048] for _ in range(20)]).to(torch.int32)
    if kind == "repeated":
        return indices[:, torch.arange(2048) // 2].contiguous()
    if kind == "all_one":
        return torch.zeros_like(indices)
    return indices.clamp(min=0) + (2**31 - 2**14) if kind == "beyond_keys" else indices


def list_on_hopper(module: Any, indices: torch.Tensor, tokens: int, num_slots: int) -> list[list[tuple[int, int]]]:
    """The (slot, mask) pairs of each list."""
    problem = replace(SparseMlaCase(name="lists", row_counts=(4,) * 5, topk=2048).problem(H100), page_size=num_slots)
    config = replace(module.choose_config(problem), tokens=tokens, depth=4, splits=1)
    workspace = module.plan(problem, device=indices.device, config=config)
    for tensor in (workspace.slots, workspace.masks, workspace.counts):
        tensor.fill_(2**30)
    lists, launches = module._describe_union(problem, workspace, indices, torch.empty(1, device="meta"))
    for launch in launches:
        launch()
    columns = [tensor.tolist() for tensor in (lists.slots, lists.masks, lists.counts.sum(dim=1))]
    return [list(zip(slots[:count], masks)) for slots, masks, count in zip(*columns)]


def meta_tensors() -> dict[str, object]:
    """What 64 requests of 4 rows, 16 heads and 2048 slots pass; the tensors hold nothing."""
    return {
        "q": torch.empty(256, 16, 576, dtype=torch.bfloat16, device="meta"),
        "kv_cache": torch.empty(4096, 64, 656, dtype=torch.uint8, device="meta"),
        "indices": torch.empty(256, 2048, dtype=torch.int32, device="meta"),
        "scale": 0.1,
        "query_offsets": None,
        "out": torch.empty(256, 16, 512, dtype=torch.bfloat16, device="meta"),
        "lse": torch.empty(256, 16, device="meta"),
    }
