"""The command line: what a script reads, and one line with exit code 2 for everything the caller got wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nextn import cli
from nextn.bench.generate import bench_generate
from nextn.engine.llm import SHIPPED_MODEL
from nextn.errors import NextnError


def run(capsys, *arguments):
    """Run the command in this process; returns (exit code, stdout, stderr)."""
    try:
        cli.main(list(arguments))
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_clear_line(code, out, err, *needles):
    assert code == 2
    assert out == ""
    assert err.startswith("nextn: error: ")
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    for needle in needles:
        assert needle in err


def test_json_is_one_object_with_the_documented_fields(capsys):
    code, out, err = run(capsys, "generate", "--prompt", "def add(a, b):\n", "--max-new-tokens", "9", "--json")
    assert code == 0, err
    report = json.loads(out)
    fields = {
        "text",
        "token_ids",
        "next_n",
        "verify_steps",
        "acceptance_length",
        "tokens_per_second",
        "device",
        "kernels",
    }
    assert fields <= set(report)
    assert len(report["token_ids"]) == 9
    assert report["next_n"] == 4
    assert report["kernels"]["index_logits"] == "reference"


def test_streamed_text_equals_the_json_text_and_the_table_goes_to_stderr(capsys):
    options = ["generate", "--prompt", "import os\n", "--max-new-tokens", "12", "--next-n", "3"]
    _, streamed, err = run(capsys, *options)
    _, out, _ = run(capsys, *options, "--json")
    assert streamed == json.loads(out)["text"] + "\n"
    for row in ("acceptance length", "verify steps", "accepted by position", "tokens/s", "index_logits"):
        assert row in err


def test_greedy_text_is_the_same_at_next_n_1_and_6(capsys):
    texts = set()
    for next_n in ("1", "6"):
        options = ("--prompt", "class A:\n", "--max-new-tokens", "16", "--next-n", next_n, "--json")
        _, out, _ = run(capsys, "generate", *options)
        texts.add(tuple(json.loads(out)["token_ids"]))
    assert len(texts) == 1


def test_a_prompt_file_is_the_same_as_a_prompt(capsys, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("x = 'é'\n", encoding="utf-8")
    _, from_file, _ = run(capsys, "generate", "--prompt-file", str(path), "--max-new-tokens", "4", "--json")
    _, from_text, _ = run(capsys, "generate", "x = 'é'\n", "--max-new-tokens", "4", "--json")
    assert json.loads(from_file)["token_ids"] == json.loads(from_text)["token_ids"]


@pytest.mark.parametrize("next_n", ["0", "9", "-1"])
def test_next_n_outside_1_to_8_is_refused(capsys, next_n):
    assert_one_clear_line(*run(capsys, "generate", "--prompt", "x", "--next-n", next_n), "next_n", next_n, "8")


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--prompt", ""], "empty"),
        ([], "prompt"),
        (["--prompt", "x", "--model", "/no/such/folder"], "/no/such/folder"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-p", "0"], "top_p"),
        (["--prompt", "x", "--cache-format", "int3"], "int3"),
        (["--prompt", "x", "--device", "tpu"], "tpu"),
        (["--prompt", "x", "--next-m", "2"], "--next-n"),
        (["--prompt", "x", "--next-n", "two"], "two"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
        (["--prompt", "x " * 9000], "context"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, arguments, needle):
    assert_one_clear_line(*run(capsys, "generate", *arguments), needle)


def test_a_prompt_file_that_is_not_utf8_is_refused(capsys, tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9\n")
    assert_one_clear_line(*run(capsys, "generate", "--prompt-file", str(path)), "UTF-8", "byte 3")


def copy_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED_MODEL, tmp_path / "model"))


def test_a_truncated_shard_is_named(capsys, tmp_path):
    model = copy_model(tmp_path)
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert_one_clear_line(*run(capsys, "generate", "--prompt", "x", "--model", str(model)), shard.name)


def test_a_folder_without_config_is_named(capsys, tmp_path):
    assert_one_clear_line(*run(capsys, "generate", "--prompt", "x", "--model", str(tmp_path)), "config.json")


def test_an_unsupported_weight_dtype_is_named(capsys, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    model = copy_model(tmp_path)
    shard = sorted(model.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("norm.weight") or name.endswith("weight"))
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int32)
    save_file(tensors, shard)
    assert_one_clear_line(*run(capsys, "generate", "--prompt", "x", "--model", str(model)), name, "I32")


def test_explain_names_the_choice_and_every_refusal(capsys):
    code, out, _ = run(capsys, "explain", "--op", "index_logits", "--next-n", "3", "--arch", "sm90", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["op"] == "index_logits"
    assert "not installed" in report["refusals"]["deep_gemm"]
    code, text, _ = run(capsys, "explain", "--op", "index_logits", "--next-n", "3", "--arch", "sm90")
    assert code == 0
    assert "deep_gemm" in text


@pytest.mark.parametrize(
    ("arguments", "needle"), [(["--arch", "sm42"], "sm42"), (["--op", "conv"], "conv"), (["--batch", "-1"], "-1")]
)
def test_explain_refuses_what_it_does_not_know(capsys, arguments, needle):
    assert_one_clear_line(*run(capsys, "explain", *arguments), needle)


def test_doctor_reports_this_machine(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert {"versions", "devices", "parts"} <= set(report)
    assert report["devices"][-1]["kernels"]["sparse_mla"] == "reference"
    code, text, _ = run(capsys, "doctor")
    assert code == 0
    assert "torch" in text


def test_bench_generate_measures_a_fresh_process():
    [row] = bench_generate("import sys\n", next_n=[2], max_new_tokens=4, runs=1)
    assert row.tokens == 4
    assert row.same_as_plain
    assert row.first_token_seconds > 0
    assert row.peak_memory_bytes > 50e6


def test_bench_generate_reports_a_failed_command():
    with pytest.raises(NextnError, match="exit code 2"):
        bench_generate("x", next_n=[2], max_new_tokens=4, runs=1, model="/no/such/folder")


def test_the_command_starts_with_threads_that_sleep_while_they_wait():
    # In a process of its own: the setting only counts if torch was not imported before it was made.
    script = (
        "import atexit, os, sys; from nextn import cli; assert 'torch' not in sys.modules; "
        "atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'])); cli.main(['--version'])"
    )
    environ = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    finished = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert finished.stdout.split()[-1] == "passive"
