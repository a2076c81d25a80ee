"""The GPU check itself, on a CPU: its inputs, its comparison and its verdicts, with a stand-in for DeepGEMM."""

from __future__ import annotations

import json

import pytest
import torch

from nextn.bench import gpu_check
from nextn.bench.gpu_check import ScoreCase, check_scores
from nextn.hardware import Arch, pretend_device
from tests.stand_ins.install import install_deep_gemm

CPU = torch.device("cpu")


def run_again(forward):
    """What a captured graph does, without one."""

    def replay(context_lens):
        forward.batch.context_lens.copy_(torch.tensor(context_lens, dtype=torch.int32))
        return gpu_check._mask(*forward.run())

    return replay


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A pretended Hopper GPU with DeepGEMM, contexts cut to what a CPU does in a moment."""
    found = install_deep_gemm(monkeypatch, tmp_path, generation="B", arch=Arch.SM90)
    real = gpu_check.describe_device
    hopper = pretend_device(Arch.SM90)
    monkeypatch.setattr(gpu_check, "describe_device", lambda device: hopper if device is CPU else real(device))
    monkeypatch.setattr(gpu_check, "_capture", run_again)
    monkeypatch.setattr(gpu_check, "REPEATS", 2)
    monkeypatch.setattr(gpu_check, "MAX_CONTEXT", 330)
    monkeypatch.setattr(gpu_check, "LENGTHS", (300, 65, 0))
    monkeypatch.setattr(gpu_check, "CHANGED_LENGTHS", (7, 0, 200))
    return found


@pytest.mark.parametrize(
    "case",
    [
        ScoreCase(name="next_n 4", row_counts=(4, 4, 4), form="native"),
        ScoreCase(name="next_n 3", row_counts=(3, 3, 3), form="flattened"),
        ScoreCase(name="ragged", row_counts=(2, 0, 5), form="flattened", index_heads=32),
    ],
    ids=str,
)
@pytest.mark.usefixtures("library")
def test_a_right_kernel_passes(case):
    result = check_scores(case, CPU)
    assert result.passed, result.note
    assert result.diff < 1e-12


@pytest.mark.usefixtures("library")
def test_an_unexpected_form_fails():
    result = check_scores(ScoreCase(name="next_n 3", row_counts=(3, 3, 3), form="native"), CPU)
    assert not result.passed
    assert "ran flattened to [9, 1]" in result.note


def test_a_slightly_wrong_row_fails(library, monkeypatch):
    real = library.score

    def score(*arguments):
        logits = real(*arguments)
        logits[1, 40] += 0.01 * logits[1, :60].abs().max()
        return logits

    monkeypatch.setattr(library, "score", score)
    result = check_scores(ScoreCase(name="next_n 2", row_counts=(2, 2, 2), form="native"), CPU)
    assert not result.passed
    assert result.error == pytest.approx(0.01, rel=0.5)


def test_bits_that_change_between_repeats_fail(library, monkeypatch):
    real = library.score
    runs: list[int] = []

    def score(*arguments):
        runs.append(1)
        return real(*arguments) * (1 + 1e-7 * len(runs))

    monkeypatch.setattr(library, "score", score)
    result = check_scores(ScoreCase(name="next_n 2", row_counts=(2, 2, 2), form="native"), CPU)
    assert "2 of 2 repeats differ in bits" in result.note


@pytest.mark.usefixtures("library")
def test_a_kernel_that_does_not_take_the_case_fails_with_its_reason():
    result = check_scores(ScoreCase(name="16 heads", row_counts=(2, 2, 2), form="native", index_heads=16), CPU)
    assert "16 index heads on sm90 are not one of 32, 64" in result.note


def test_a_nan_in_either_run_fails(library, monkeypatch):
    real = library.score
    runs: list[int] = []

    def score(*arguments):
        runs.append(1)
        logits = real(*arguments)
        if len(runs) == 4:  # after the first run and two repeats: the replay with changed lengths
            logits[0, 0] = torch.nan
        return logits

    monkeypatch.setattr(library, "score", score)
    result = check_scores(ScoreCase(name="next_n 2", row_counts=(2, 2, 2), form="native"), CPU)
    assert not result.passed
    assert result.diff != result.diff


def test_results_are_appended_as_json_lines(tmp_path):
    result = gpu_check.CheckResult(op="index_logits", case="next_n 1", form="native [8, 1]", passed=True, diff=1e-9)
    for _ in range(2):
        gpu_check._append(tmp_path / "results", [result], {"gpu": "H100", "commit": "abc"})
    lines = (tmp_path / "results" / "gpu_check.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["case"] == "next_n 1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err
