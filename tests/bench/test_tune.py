"""Trying configurations, as far as a machine without a GPU can."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nextn.bench import tune
from nextn.bench.shapes import SelectTopkShape
from nextn.bench.tune import TuneOptions, parse_config, tune_kernel, tune_shape
from nextn.errors import InputError, UnsupportedError
from nextn.hardware import has_module
from nextn.ops._kernel import OPS, discover
from nextn.ops.select_topk import reference
from nextn.testing.timing import CpuClock

CPU = torch.device("cpu")
SHAPE = SelectTopkShape(rows=3, length=300, topk=64)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Of a kernel that is right with one value only."""

    surplus: int = 0


def kernel_of(seen):
    """The reference, wrong by ``surplus``; every configuration it runs under is appended to ``seen``."""

    def prepare(problem, *, config, out, **arguments):
        launch = reference.KERNEL.prepare(problem, out=out, **arguments)

        def run():
            seen.append(config.surplus)
            launch()
            out.add_(config.surplus)

        return run

    return dataclasses.replace(
        reference.KERNEL, name="tunable", plan=None, prepare=prepare, configure=lambda _: Config()
    )


def test_every_combination_of_values_is_tried_in_order():
    assert parse_config("a=1|2 b=(2,2)|None") == [
        {"a": 1, "b": (2, 2)},
        {"a": 1, "b": None},
        {"a": 2, "b": (2, 2)},
        {"a": 2, "b": None},
    ]


@pytest.mark.parametrize("text", ["stages", "=4", "stages=four", "stages=4|"])
def test_a_part_that_is_no_field_and_value_is_named(text):
    with pytest.raises(InputError, match="in config"):
        parse_config(text)


def test_a_configuration_that_is_wrong_or_unknown_has_no_time_and_stops_no_other():
    seen = []
    rows = list(tune_shape(kernel_of(seen), SHAPE, [{}, {"surplus": 1}, {"depth": 2}], CPU, CpuClock(), rounds=3))
    right, wrong, unknown = rows
    assert (right["passed"], right["chosen"], right["config"]) == (True, True, {})
    assert right["cold_us"] > 0
    assert (wrong["passed"], wrong["cold_us"], wrong["config"]) == (False, None, {"surplus": 1})
    assert "no fields ['depth']; it has ['surplus']" in unknown["note"]
    assert set(seen) == {0, 1}


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"op": "softmax", "kernel": "x"}, "softmax"),
        ({"op": "select_topk", "kernel": "reference"}, "reference"),
        ({"op": "select_topk", "kernel": "no_such"}, "no_such"),
    ],
)
def test_what_cannot_be_tuned_is_named(options, needle):
    with pytest.raises(InputError, match=needle):
        tune_kernel(TuneOptions(**options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(tune, "discover", lambda op: (kernel_of([]),))
    with pytest.raises(UnsupportedError, match="finds no GPU"):
        tune_kernel(TuneOptions(op="select_topk", kernel="tunable"))


@pytest.mark.skipif(not has_module("triton"), reason="needs triton")
def test_every_triton_kernel_says_how_it_would_cut_a_problem():
    kernels = [kernel for op in OPS for kernel in discover(op) if kernel.name.startswith(("triton", "gluon"))]
    assert len(kernels) >= len(OPS)
    assert all(kernel.configure is not None for kernel in kernels)
