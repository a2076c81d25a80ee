"""``nextn bench ops`` and ``verify-layer``, and the same without the command line's packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from nextn import cli
from nextn.bench import __main__ as bench_main
from nextn.bench import plots

OPS = ["ops", "--device", "cpu", "--op", "select_topk", "--rounds", "1", "--commit", "abc"]
LAYER = ["verify-layer", "--device", "cpu", "--batch", "1", "--context", "130", "--next-n", "2", "--topk", "64"]
LAYER += ["--rounds", "1", "--commit", "abc"]


def run(capsys, *arguments):
    """Run ``nextn bench`` in this process; returns (exit code, stdout, stderr)."""
    try:
        cli.main(["bench", *arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("arguments", [OPS, LAYER], ids=["ops", "verify-layer"])
def test_json_is_one_object_of_rows(capsys, arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert rows
    assert all(row["passed"] and row["cold_us"] > 0 and row["commit"] == "abc" for row in rows)


@pytest.mark.parametrize("arguments", [OPS, LAYER], ids=["ops", "verify-layer"])
def test_both_entries_print_the_same_table_but_for_times(capsys, arguments):
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert bench_main.main(arguments) == 0
    plain = capsys.readouterr().out
    assert out.splitlines()[0].split() == plain.splitlines()[0].split()
    assert [line.split()[:2] for line in out.splitlines()] == [line.split()[:2] for line in plain.splitlines()]


def test_a_plot_is_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run(capsys, *OPS, "--plot", str(tmp_path / "out.png"))
    assert code == 0, err
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["ops", "--op", "softmax", "--device", "cpu"], ["softmax"]),
        (["ops", "--grid", "huge", "--device", "cpu"], ["huge", "targets"]),
        (["ops", "--device", "tpu"], ["tpu"]),
        (["ops", "--device", "cpu", "--peers-dir", "/no/such/folder"], ["/no/such/folder"]),
        (["verify-layer", "--device", "cpu", "--context", "100"], ["context 100"]),
        (["verify-layer", "--contexts", "100"], ["--context"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, arguments, needles):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    for needle in needles:
        assert needle in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["ops", "verify-layer"])
def test_without_a_gpu_one_line_says_what_to_run_instead(capsys, command):
    code, out, err = run(capsys, command)
    assert (code, out) == (2, "")
    assert "finds no GPU" in err
    assert "--device cpu" in err
    assert bench_main.main([command]) == 2
    assert capsys.readouterr().err == err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(plots, "has_module", lambda name: False)
    code, _, err = run(capsys, *OPS, "--plot", "out.png")
    assert code == 2
    assert "nextn[bench]" in err


def test_a_failed_check_is_exit_code_1(capsys, monkeypatch):
    from nextn.bench import workloads
    from nextn.bench.op_calls import Verdict

    monkeypatch.setattr(workloads.Workload, "judge", lambda self, results: Verdict(passed=False, note="wrong"))
    code, out, _ = run(capsys, *OPS)
    assert code == 1
    assert "FAILED" in out


def test_the_module_runs_with_torch_and_the_standard_library_alone():
    script = (
        "import sys\n"
        "absent = ('cyclopts', 'rich', 'numpy', 'matplotlib', 'tokenizers', 'safetensors')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "from nextn.bench.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    environ = {**os.environ, "PYTHONWARNINGS": "ignore"}  # torch says that numpy is missing
    done = subprocess.run([sys.executable, "-c", script, *OPS], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert "torch_topk" in done.stdout
