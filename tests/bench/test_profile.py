"""The profiler's table made into rows, as far as a machine without a GPU can tell."""

from __future__ import annotations

import pytest
import torch

from nextn.bench import profile
from nextn.bench.profile import ProfileOptions, profile_ops, read_counters, run_profiler
from nextn.errors import InputError, UnsupportedError

CPU = torch.device("cpu")
OUTPUT = """\
==PROF== Connected to process 470 (/usr/bin/python3.12)
nextn-profile: {"shape": "64 x 4", "kernel": "ours"}
nextn-profile: {"shape": "64 x 4", "kernel": "theirs"}
2 launches
==PROF== Disconnected from process 470
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum.per_second","launch__registers_per_thread",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"
"","","ns","byte/s","register/thread","","",""
"0","_list_kernel","1,500","2,000,000,000,000","64","4.321","1.0","0.5"
"1","_attend_kernel","84,608","n/a","168","0.5","0.75","0.5"
"2","at::spin_kernel(long)","1,000","0","16","0","0","0"
"3","flash","90,000","0","16","0","0","0"
"4","at::spin_kernel(long)","1,000","0","16","0","0","0"
"""


def test_launches_belong_to_the_kernel_whose_mark_they_follow():
    rows = list(read_counters(OUTPUT))
    assert [(row["kernel"], row["launch"]) for row in rows] == [
        ("ours", "_list_kernel"),
        ("ours", "_attend_kernel"),
        ("theirs", "flash"),
    ]
    assert all(row["shape"] == "64 x 4" and row["passed"] for row in rows)


def test_counters_have_the_units_their_names_say_and_none_where_unread():
    first, second, _ = read_counters(OUTPUT)
    assert (first["time_us"], first["dram_tb_per_s"], first["registers"]) == (1.5, 2.0, 64)
    assert second["time_us"] == pytest.approx(84.608)
    assert second["dram_tb_per_s"] is None
    assert second["tensor_pct"] is None


def test_stalls_are_the_reasons_per_issued_instruction_most_frequent_first():
    first, second, _ = read_counters(OUTPUT)
    assert list(first["stalls"].items())[:2] == [("barrier", 4.32), ("wait", 1.0)]
    assert next(iter(second["stalls"])) == "wait"


def test_a_process_that_fails_gives_one_row_that_says_how(monkeypatch, tmp_path):
    tool = tmp_path / "ncu"
    tool.write_text("#!/bin/sh\necho '==ERROR== no permission'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    [row] = run_profiler("select_topk", "", "", None, 20.0)
    assert not row["passed"]
    assert row["note"] == "exit code 9: ==ERROR== no permission"


@pytest.mark.parametrize(
    ("options", "needle"), [({"ops": ("softmax",)}, "softmax"), ({"only": "no such shape"}, "no such shape")]
)
def test_what_has_no_shape_to_profile_is_named(options, needle):
    with pytest.raises(InputError, match=needle):
        profile_ops(ProfileOptions(**options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_there_is_nothing_to_profile():
    with pytest.raises(UnsupportedError, match="finds no GPU"):
        profile_ops(ProfileOptions())


def test_a_profiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(profile, "open_device", lambda name, instead: CPU)
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match="ncu is not on PATH"):
        profile_ops(ProfileOptions())
