"""``bench ops`` on a CPU: no time without a passed check, rows that say everything, and going on where it stopped."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nextn.bench import ops, peers, workloads
from nextn.bench.ops import OpsOptions, bench_ops, bench_shape
from nextn.bench.shapes import SelectTopkShape, list_shapes
from nextn.errors import InputError, UnsupportedError
from nextn.ops._kernel import OPS, Launch
from nextn.testing.timing import CpuClock

CPU = torch.device("cpu")
SHAPE = SelectTopkShape(rows=2, length=300, topk=16)
FIELDS = {
    *("stage", "op", "shape", "sizes", "kernel", "kind", "chosen", "passed", "diff", "error", "note", "absent"),
    *("cold_us", "cold_low_us", "cold_high_us", "warm_us", "warm_low_us", "warm_high_us", "num_runs"),
    *("bytes", "flops", "floor_us", "ratio", "overhead_us"),
    *("gpu", "torch", "cuda", "triton", "python", "nextn", "commit", "time"),
}


def measure(tmp_path=None, **options):
    options = {"device": "cpu", "ops": ("select_topk",), "rounds": 2, "commit": "abc", **options}
    return bench_ops(OpsOptions(out=tmp_path, **options))


def spoil_kernel(monkeypatch, op, spoil):
    """Add a kernel to an op that is right but for what ``spoil`` does to its output; it is tried first."""
    real = workloads.discover
    reference = next(kernel for kernel in real(op) if kernel.name == "reference")

    def prepare(problem, *, out, **arguments):
        right = reference.prepare(problem, out=out, **arguments)

        def launch():
            right()
            spoil(out)

        return Launch(function=launch, arguments={})

    wrong = dataclasses.replace(reference, name="wrong", prepare=prepare)
    monkeypatch.setattr(workloads, "discover", lambda name: (wrong, *real(name)) if name == op else real(name))


@pytest.mark.parametrize("op", OPS)
def test_the_small_grid_passes_and_is_timed_on_a_cpu(op):
    rows = measure(ops=(op,))
    assert {row["shape"] for row in rows} == {shape.name for shape in list_shapes("small", [op])}
    for row in rows:
        assert set(row) == FIELDS
        assert row["passed"], row["note"]
        assert 0 < row["cold_low_us"] <= row["cold_us"] <= row["cold_high_us"]
        floor_us = max(row["bytes"] / 3.0e6, row["flops"] / (0.8e9 if op == "sparse_mla" else 1.5e9))
        assert row["floor_us"] == pytest.approx(floor_us, abs=0.006)
        assert row["ratio"] == pytest.approx(row["cold_us"] / floor_us, rel=0.01)
        assert row["num_runs"] == 2
        assert row["chosen"] == (row["kernel"] == "reference")
        json.dumps(row)


def add_one(out):
    out[0, 3] += 1


def leave_unwritten(out):
    out[-1, -1] = -77


@pytest.mark.parametrize("spoil", [add_one, leave_unwritten])
def test_a_wrong_result_has_a_note_and_no_time(monkeypatch, spoil):
    spoil_kernel(monkeypatch, "select_topk", spoil)
    rows = {row["kernel"]: row for row in bench_shape(SHAPE, CPU, CpuClock(), rounds=2)}
    assert not rows["wrong"]["passed"]
    assert "selected differ" in rows["wrong"]["note"]
    assert rows["wrong"]["cold_us"] is rows["wrong"]["warm_us"] is rows["wrong"]["ratio"] is None
    assert rows["reference"]["passed"]
    assert rows["reference"]["cold_us"] > 0


def test_a_slightly_wrong_logit_has_no_time(monkeypatch):
    def nudge(out):
        out[1, 7] += 0.01 * out[1, :500].abs().max()

    spoil_kernel(monkeypatch, "index_logits", nudge)
    [shape, *_] = list_shapes("small", ["index_logits"])
    rows = {row["kernel"]: row for row in bench_shape(shape, CPU, CpuClock(), rounds=2)}
    assert not rows["wrong"]["passed"]
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=0.5)
    assert rows["wrong"]["cold_us"] is None


def test_a_kernel_that_breaks_stops_no_other(monkeypatch):
    def fail(out):
        raise RuntimeError("no such\ninstruction")

    spoil_kernel(monkeypatch, "select_topk", fail)
    rows = {row["kernel"]: row for row in bench_shape(SHAPE, CPU, CpuClock(), rounds=2)}
    assert rows["wrong"]["note"] == "RuntimeError: no such instruction"
    assert rows["reference"]["cold_us"] > 0


def test_absent_kernels_and_peers_are_named_with_their_reasons():
    [row, *_] = bench_shape(SHAPE, CPU, CpuClock(), rounds=1)
    assert row["absent"]["vllm_persistent_topk"] == "runs on CUDA devices alone"


def test_shapes_already_stored_at_this_commit_are_not_measured_again(tmp_path):
    first = measure(tmp_path)
    file = tmp_path / ops.FILE_NAME
    assert [json.loads(line) for line in file.read_text().splitlines()] == first
    assert measure(tmp_path) == []
    assert {row["shape"] for row in measure(tmp_path, commit="def")} == {row["shape"] for row in first}


def test_an_interrupted_run_goes_on_with_the_next_shape(tmp_path):
    everything = {row["shape"] for row in measure()}
    done = {row["shape"] for row in measure(tmp_path, only="1 x")}
    with (tmp_path / ops.FILE_NAME).open("a") as lines:
        lines.write('{"op": "select_topk", "shape"')
    assert done
    assert {row["shape"] for row in measure(tmp_path)} == everything - done


def test_rows_of_an_unknown_commit_never_count_as_done(tmp_path):
    assert measure(tmp_path, commit="unknown")
    assert measure(tmp_path, commit="unknown")


def test_no_shape_is_started_when_the_time_is_up():
    assert measure(seconds=-1.0) == []


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"ops": ("softmax",)}, "softmax"),
        ({"grid": "huge"}, "huge"),
        ({"only": "3 x 3"}, "3 x 3"),
        ({"device": "tpu"}, "tpu"),
        ({"rounds": 0}, "rounds 0"),
    ],
)
def test_wrong_options_are_named(options, needle):
    with pytest.raises(InputError, match=needle):
        measure(**options)


def test_a_missing_peers_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        measure(peers_dir=tmp_path / "nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_error_says_what_to_run_instead():
    with pytest.raises(UnsupportedError, match="--device cpu"):
        bench_ops(OpsOptions())


def exact_and_other(logits):
    expected = logits.topk(4, dim=1).indices
    return expected, expected.clone()


def judge(logits, selected, expected):
    lens = torch.full((len(logits),), logits.shape[1], dtype=torch.int32)
    return peers.judge_selection(logits, lens, selected, expected)


def test_a_selection_is_compared_as_a_set():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected, other = exact_and_other(logits)
    verdict = judge(logits, other.flip(1).to(torch.int32), expected)
    assert verdict.passed
    assert verdict.note == ""


def test_a_selection_of_nearly_the_best_passes_with_a_note_and_a_worse_one_fails():
    logits = torch.arange(50.0).repeat(2, 1)
    logits[:, 45] = 45.99
    expected, other = exact_and_other(logits)
    other[1, other[1] == 46] = 45
    verdict = judge(logits, other, expected)
    assert verdict.passed
    assert verdict.note == "1 of 2 rows select another set"
    other[1, other[1] == 45] = 40
    assert not judge(logits, other, expected).passed


@pytest.mark.parametrize("wrong", [-1, 50, 49])
def test_a_selection_that_repeats_or_leaves_the_row_fails(wrong):
    logits = torch.arange(50.0).repeat(2, 1)
    expected, other = exact_and_other(logits)
    other[0, 3] = wrong
    assert not judge(logits, other, expected).passed
