"""scripts/gpu, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu"


def run(*arguments):
    environ = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environ)


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        ([], "unknown stage ''"),
        (["--stage", "tune"], "unknown stage 'tune'"),
        (["--stage", "check", "--ops", "x"], "unknown option '--ops'"),
        (["--stage"], "--stage needs a name"),
    ],
)
def test_wrong_arguments_are_named(arguments, needle):
    done = run(*arguments)
    assert done.returncode != 0
    assert needle in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_once(tmp_path):
    done = run("--stage", "sanitize", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("finds no GPU") == 1


def test_a_stage_stores_rows_of_the_commit_given(tmp_path):
    arguments = ["--stage", "check", "--op", "accept_drafts", "--out", str(tmp_path), "--commit", "abc"]
    done = run(*arguments, "--", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert {(row["op"], row["commit"], row["passed"]) for row in rows} == {("accept_drafts", "abc", True)}
