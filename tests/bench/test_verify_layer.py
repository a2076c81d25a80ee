"""``bench verify-layer`` on a CPU: drafts that agree as far as asked, and no time for a layer wrong anywhere."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nextn.bench import verify_layer
from nextn.bench.layer import LayerShape, make_layer, measure_overlap
from nextn.bench.verify_layer import VerifyLayerOptions, bench_layer, bench_verify_layer
from nextn.errors import InputError, UnsupportedError
from nextn.testing.timing import CpuClock

CPU = torch.device("cpu")
SHAPE = LayerShape(requests=2, context=300, next_n=3, heads=4, topk=64)


@pytest.fixture(scope="module")
def layer():
    return make_layer(SHAPE, CPU, drift=0.1)


def spoil_output(monkeypatch, place, spoil):
    """Change one of the tensors our layer returns: 0 logits, 1 slots, 2 attention."""
    real = verify_layer._run_ours

    def run(*arguments):
        result = real(*arguments)
        spoil(result[place])
        return result

    monkeypatch.setattr(verify_layer, "_run_ours", run)


def test_a_right_layer_is_timed_and_says_what_ran(layer):
    [row] = bench_layer(layer, CpuClock(), rounds=2)
    assert row["passed"], row["note"]
    assert row["kernels"] == dict.fromkeys(("index_logits", "select_topk", "sparse_mla"), "reference")
    assert 0 < row["cold_low_us"] <= row["cold_us"] <= row["cold_high_us"]
    assert row["shape"] == "2 x 300 n 3 heads 4"
    json.dumps(row)


@pytest.mark.parametrize(
    ("place", "spoil", "needle"),
    [
        (0, lambda logits: logits[1, :2].mul_(1.5), "logits"),
        (1, lambda slots: slots[0, :1].add_(1), "other slots"),
        (2, lambda out: out[3, 1, 5].add_(1.0), "out"),
    ],
    ids=["scores", "selection", "attention"],
)
def test_a_layer_wrong_in_one_stage_has_no_time(layer, monkeypatch, place, spoil, needle):
    spoil_output(monkeypatch, place, spoil)
    [row] = bench_layer(layer, CpuClock(), rounds=2)
    assert not row["passed"]
    assert needle in row["note"]
    assert row["cold_us"] is None


def test_drafts_agree_the_more_the_less_they_drift():
    overlaps = [measure_overlap(make_layer(SHAPE, CPU, drift))[0] for drift in (0.0, 0.06, 0.5)]
    assert overlaps[0] > 0.98  # each draft sees one token more than the one before it
    assert overlaps[0] > overlaps[1] > overlaps[2]


def test_overlap_and_union_of_a_known_selection(layer):
    first = torch.arange(64, dtype=torch.int32)
    known = dataclasses.replace(layer, selected=torch.stack([first, first + 16, first + 32] * 2))
    assert measure_overlap(known) == (0.75, 96.0)


def test_stored_shapes_are_not_measured_again(tmp_path):
    options = {"device": "cpu", "batch": (1,), "context": (130,), "next_n": (1, 2), "heads": (2,), "topk": 64}
    options |= {"rounds": 1, "commit": "abc", "out": tmp_path}
    rows = bench_verify_layer(VerifyLayerOptions(**options))
    assert [row["sizes"]["next_n"] for row in rows] == [1, 2]
    assert bench_verify_layer(VerifyLayerOptions(**options)) == []


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"context": (2049,)}, "context 2049"),
        ({"next_n": (0,)}, "below 1"),
        ({"drift": 1.5}, "drift 1.5"),
        ({"rounds": 0}, "rounds 0"),
    ],
)
def test_wrong_sizes_are_named(options, needle):
    with pytest.raises(InputError, match=needle):
        bench_verify_layer(VerifyLayerOptions(**{"device": "cpu", **options}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_error_says_what_to_run_instead():
    with pytest.raises(UnsupportedError, match="--device cpu --batch 2"):
        bench_verify_layer(VerifyLayerOptions())
