"""The checks of kernels on a device, tried on a CPU: right kernels pass, and each kind of wrong one is caught."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from pathlib import Path

import pytest
import torch

from nextn.bench import check, sanitize
from nextn.bench.check import CheckOptions, check_case, check_depths, check_ops
from nextn.bench.op_calls import find_kernel, list_cases
from nextn.bench.sanitize import SanitizeOptions, read_summary, sanitize_ops
from nextn.errors import InputError, UnsupportedError
from nextn.ops._kernel import OPS, Launch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(check, "REPEATS", 3)


def spoilt_kernel(op, spoil):
    """The reference, and then ``spoil`` on the number of the launch and the arguments of ``prepare``."""
    reference = find_kernel(op, "reference")
    count = itertools.count()

    def prepare(problem, **arguments):
        right = reference.prepare(problem, **arguments)

        def launch():
            right()
            spoil(next(count), arguments)

        return Launch(function=launch, arguments={})

    return dataclasses.replace(reference, name="spoilt", prepare=prepare)


def case_of(op, name):
    return next(case for case in list_cases(op) if case.name == name)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_passes_every_case(op):
    rows = check_ops(CheckOptions(ops=(op,), device="cpu", commit="abc"))
    assert [row["case"] for row in rows] == [case.name for case in list_cases(op)]
    assert [row["note"] for row in rows if not row["passed"]] == []


WRONG = {
    ("index_logits", "v32_next2"): lambda _, given: given["out"][1, :10].mul_(1.1),
    ("select_topk", "tiny"): lambda _, given: given["out"][0, :1].add_(1),
    ("sparse_mla", "tp8_next4"): lambda _, given: given["out"][2, 3].mul_(1.05),
    ("prepare_query", "v32_verify"): lambda _, given: given["out"][1][0].mul_(1.1),
    ("write_cache", "verify"): lambda _, given: given["kv_cache"][:, :, 512:516].fill_(0),
    ("accept_drafts", "greedy_ragged"): lambda _, given: given["out"][0][:1].add_(1),
}


@pytest.mark.parametrize(("op", "name"), WRONG)
def test_a_wrong_result_is_caught(op, name):
    kernel = spoilt_kernel(op, WRONG[op, name])
    verdict = check_case(kernel, case_of(op, name), CPU)
    assert not verdict.passed
    assert verdict.note


def test_a_write_past_a_row_is_caught():
    def spoil(_, given):
        out = given["out"]
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.shape[1]).fill_(1.0)

    verdict = check_case(spoilt_kernel("index_logits", spoil), case_of("index_logits", "v32_next2"), CPU)
    assert "outside the output" in verdict.note


def test_bits_that_change_between_repeats_are_caught():
    def spoil(number, given):
        given["out"][0, :5].mul_(1 + 1e-6 * number)

    verdict = check_case(spoilt_kernel("index_logits", spoil), case_of("index_logits", "v32_next2"), CPU)
    assert verdict.note == "2 of 2 repeats differ in bits"


def test_an_unwritten_element_is_caught():
    def spoil(_, given):
        given["out"][0, 0] = float("nan")

    assert not check_case(spoilt_kernel("index_logits", spoil), case_of("index_logits", "v32_next2"), CPU).passed


def test_a_row_that_depends_on_its_depth_is_caught(monkeypatch):
    monkeypatch.setattr(check, "_DEPTH_CONTEXT", 200)

    def prepare(problem, **arguments):
        right = find_kernel("index_logits", "reference").prepare(problem, **arguments)

        def launch():
            right()
            if problem.next_n == 4:
                arguments["out"][5, :10].mul_(1 + 1e-6)

        return Launch(function=launch, arguments={})

    reference = find_kernel("index_logits", "reference")
    assert check_depths(reference, 8, 24, CPU).passed
    verdict = check_depths(dataclasses.replace(reference, prepare=prepare), 8, 24, CPU)
    assert verdict.note == "other bits at depths [4, 4, 4, 4, 4, 4]"


def test_what_passed_at_this_commit_is_not_checked_again(tmp_path):
    options = CheckOptions(ops=("accept_drafts",), device="cpu", commit="abc", out=tmp_path)
    assert check_ops(options)
    assert check_ops(options) == []


def test_what_failed_is_checked_again(tmp_path, monkeypatch):
    kernel = spoilt_kernel("prepare_query", WRONG["prepare_query", "v32_verify"])
    monkeypatch.setattr(check, "discover", lambda op: (kernel,))
    options = CheckOptions(ops=("prepare_query",), device="cpu", commit="abc", out=tmp_path)
    failed = {row["case"] for row in check_ops(options) if not row["passed"]}
    assert failed
    assert {row["case"] for row in check_ops(options)} == failed


def test_an_unknown_op_is_named():
    with pytest.raises(InputError, match="softmax"):
        check_ops(CheckOptions(ops=("softmax",), device="cpu"))


@pytest.mark.parametrize(
    ("options", "needle"), [({"ops": ("softmax",)}, "softmax"), ({"tools": ("valgrind",)}, "valgrind")]
)
def test_unknown_ops_and_tools_of_the_sanitizer_are_named(options, needle):
    with pytest.raises(InputError, match=needle):
        sanitize_ops(SanitizeOptions(**options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_there_is_nothing_to_sanitize():
    with pytest.raises(UnsupportedError, match="finds no GPU"):
        sanitize_ops(SanitizeOptions())


def test_a_sanitizer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(sanitize, "open_device", lambda name, instead: CPU)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match="compute-sanitizer is not on PATH"):
        sanitize_ops(SanitizeOptions())


def test_the_sanitizer_s_first_complaint_and_summary_are_kept():
    output = (
        "========= COMPUTE-SANITIZER\n"
        "========= Invalid __global__ read of size 4 bytes\n"
        "=========     at kernel+0x10\n"
        "24 launches\n"
        "========= ERROR SUMMARY: 1 errors were not printed. Use --print-limit option\n"
        "========= ERROR SUMMARY: 3 errors\n"
    )
    summary = "Invalid __global__ read of size 4 bytes at kernel+0x10; ERROR SUMMARY: 3 errors; 24 launches"
    assert read_summary(output, 86) == summary


def test_the_summary_of_a_race_check_is_kept():
    output = "24 launches\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert read_summary(output, 0) == "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings); 24 launches"


def test_a_case_that_fails_under_the_sanitizer_is_named_and_keeps_no_other_from_being_seen(monkeypatch):
    def prepare(problem, **arguments):
        if problem.topk == 1:
            raise RuntimeError("invalid argument")
        return lambda: seen.append(problem.topk)

    seen: list[int] = []
    broken = dataclasses.replace(spoilt_kernel("select_topk", lambda call: None), prepare=prepare, plan=None)
    monkeypatch.setattr(sanitize, "discover", lambda op: (broken,))
    launches, [failure] = sanitize.run_cases("select_topk", device_name="cpu")
    assert failure.endswith("on k_1: RuntimeError: invalid argument")
    assert launches == len(seen) > 10
    output = f"failed: {failure}\n{launches} launches, 1 failed\n========= ERROR SUMMARY: 0 errors\n"
    assert read_summary(output, 1) == f"{failure}; ERROR SUMMARY: 0 errors; {launches} launches, 1 failed"


def test_where_a_race_was_found_is_kept():
    output = (
        "========= Error: Race reported between Write access at kernel+0xf0 in kernel.py:17\n"
        "=========     and Read access at kernel+0x100 in kernel.py:20 [124 hazards]\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )
    summary = read_summary(output, 86)
    assert "between Write access at kernel+0xf0 in kernel.py:17 and Read access at kernel+0x100" in summary
    assert summary.endswith("RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)")


def is_running(process: int) -> bool:
    """Whether a process exists and has not ended; who started it may not have asked for its exit code yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here")
def test_a_tool_that_takes_too_long_is_ended_with_what_it_started(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n(sleep 60 & echo $! > {tmp_path}/pid; wait)\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begin = time.monotonic()
    row = sanitize.run_tool("select_topk", "memcheck", "", 1.0)
    assert time.monotonic() - begin < 30
    assert row == {"passed": False, "note": "not finished after 1 s"}
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_sanitizer_that_says_nothing_is_reported_with_its_last_line():
    assert read_summary("Device not supported\n", 1) == "exit code 1: Device not supported"
