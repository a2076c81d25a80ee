"""The FlashMLA kernel file: what it refuses and why, what it asks of the library, and what it makes of the result."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch

from nextn import ops
from nextn.env import Environment
from nextn.hardware import Arch, pretend_device
from nextn.ops._kernel import OpPlan, choose
from nextn.ops.sparse_mla.cases import CASES
from tests.stand_ins import flash_mla as stand_in

flash_mla = importlib.import_module("nextn.ops.sparse_mla.flash_mla")
BY_NAME = {case.name: case for case in CASES}
HOSTILE = BY_NAME["heads_64_hostile"]
PROBLEM = HOSTILE.problem(pretend_device(Arch.SM90))
NO_SETTINGS = Environment(forced_kernels={}, disabled_kernels=frozenset())


@pytest.fixture
def library(monkeypatch) -> stand_in.Library:
    library = stand_in.Library()
    monkeypatch.setitem(sys.modules, "flash_mla", stand_in.make_module(library))
    return library


def attend(case, plan: OpPlan | None, out: torch.Tensor | None = None):
    inputs = case.inputs()
    return ops.sparse_mla(
        inputs.q, inputs.kv_cache, inputs.indices, scale=inputs.scale, query_offsets=inputs.query_offsets, plan=plan,
        out=out,
    )  # fmt: skip


def plan_of(case) -> OpPlan:
    problem = case.problem(pretend_device(Arch.SM90))
    choice = choose("sparse_mla", problem, environment=replace(NO_SETTINGS, forced_kernels={"sparse_mla": "flash_mla"}))
    return OpPlan(choice=choice, problem=problem, data=flash_mla.plan(problem, device="cpu"))


@pytest.mark.parametrize("name", ["v32_heads", "glm_heads", "heads_64_hostile"])
@pytest.mark.parametrize("gives_out", [False, True])
def test_64_and_128_heads_get_what_the_reference_gives(library, name, gives_out):
    case = BY_NAME[name]
    expected_out, expected_lse = attend(case, None)  # a CPU tensor's own choice: the reference
    assert not library.calls
    given = torch.full_like(expected_out, float("nan")) if gives_out else None
    out, lse = attend(case, plan_of(case), given)
    assert len(library.calls) == 1
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
    assert given is None or out.data_ptr() == given.data_ptr()


def test_a_row_without_a_slot_has_minus_infinity_and_wild_slots_never_reach_the_library(library):
    _, lse = attend(HOSTILE, plan_of(HOSTILE))
    assert (lse[::2] == float("-inf")).all()
    assert ((library.calls[0]["indices"] == -1).sum(dim=2) > 0).all()


def test_the_layers_of_a_forward_share_one_schedule(library):
    plan = plan_of(HOSTILE)
    attend(HOSTILE, plan)
    attend(HOSTILE, plan)
    assert library.calls[0]["schedule"] is library.calls[1]["schedule"] is plan.data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads": 16}, "16 query heads are not 64 or 128; it would pad them"),
        ({"cache": "bf16"}, "latent cache bf16 is not fp8"),
        ({"dtype": "float16"}, "queries are float16, not bfloat16"),
        ({"page_size": 32}, "page_size 32 is not 64"),
        ({"topk": 100}, "k 100 is no multiple of 64"),
        ({"num_rows": 0}, "nothing to attend from: 0 rows"),
        ({"deterministic": True}, "deterministic mode needs splits of a fixed size"),
    ],
)
def test_what_it_cannot_take_is_refused_in_words(library, change, reason):
    assert flash_mla.rejects(PROBLEM) is None
    assert reason in str(flash_mla.rejects(replace(PROBLEM, **change)))


@pytest.mark.parametrize(
    ("heads", "num_rows", "chosen"), [(128, 64, "flash_mla"), (128, 4, "gluon_sm90"), (64, 256, "gluon_sm90")]
)
def test_it_is_chosen_where_it_was_measured_to_be_faster(library, heads, num_rows, chosen):
    problem = replace(PROBLEM, heads=heads, num_rows=num_rows, num_requests=num_rows // 4, next_n=4)
    choice = choose("sparse_mla", problem, environment=NO_SETTINGS)
    assert choice.kernel.name == chosen
    assert {"flash_mla", "gluon_sm90"} <= {chosen, *choice.others}


def test_without_the_library_another_kernel_is_chosen_and_the_reason_kept(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_mla", None)
    choice = choose("sparse_mla", PROBLEM, environment=NO_SETTINGS)
    assert choice.kernel.name != "flash_mla"
    assert "flash_mla" in dict(choice.refusals)


@pytest.mark.parametrize("lacks", ["kernels", "argument"])
def test_a_library_without_kernels_for_hopper_is_refused(monkeypatch, lacks):
    module = stand_in.make_module(stand_in.Library(), has_legacy=lacks != "kernels")
    if lacks == "argument":
        monkeypatch.setattr(module, "flash_mla_with_kvcache", lambda q, k_cache: None)
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    assert "sgl-flash-mla" in str(flash_mla.rejects(PROBLEM))
