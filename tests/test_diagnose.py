"""explain and doctor: the choice, every refusal, and what this machine has, as plain data."""

from __future__ import annotations

import json
import sys

import pytest

from nextn.diagnose import build_problem, doctor_report, explain_op
from nextn.errors import InputError
from nextn.hardware import Arch, pretend_device
from nextn.ops._kernel import OPS
from tests.stand_ins.install import install_deep_gemm


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", [Arch.CPU, Arch.SM90, Arch.SM100, Arch.GFX942])
def test_every_op_is_explained_on_every_machine(op, arch):
    report = explain_op(op, build_problem(op, device=pretend_device(arch)))
    assert report.kernel
    assert report.problem["arch"] == arch.value
    assert json.loads(json.dumps(report.to_dict()))["op"] == op
    assert report.to_text()[0].startswith(f"{op}: {report.kernel}")


def test_the_sizes_asked_about_reach_the_problem(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="B", arch=Arch.SM90)
    device = pretend_device(Arch.SM90)
    problem = build_problem("index_logits", device=device, batch=64, next_n=2, context=32768, heads=64)
    report = explain_op("index_logits", problem)
    assert (report.kernel, report.form) == ("deep_gemm", "native [64, 2]")
    assert "reference" in report.others
    problem = build_problem("index_logits", device=device, batch=64, next_n=3, context=32768, heads=16)
    assert explain_op("index_logits", problem).refusals["deep_gemm"] == "16 index heads on sm90 are not one of 32, 64"


def test_a_missing_deep_gemm_is_named_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    report = explain_op("index_logits", build_problem("index_logits", device=pretend_device(Arch.CPU)))
    assert "not deep_gemm: written for sm90, sm100, sm103; this is a CPU" in "\n".join(report.to_text())


@pytest.mark.parametrize(
    ("op", "sizes", "words"),
    [
        ("flash", {}, "unknown op 'flash'"),
        ("index_logits", {"next_n": 0}, "next_n 0 is below 1"),
        ("sparse_mla", {"heads": -1}, "heads -1 is below 1"),
    ],
)
def test_a_wrong_question_is_refused(op, sizes, words):
    with pytest.raises(InputError, match=words):
        build_problem(op, **sizes)


def test_the_doctor_names_devices_kernels_parts_and_settings(monkeypatch):
    monkeypatch.setenv("NEXTN_DISABLE_KERNELS", "fast")
    report = doctor_report()
    assert report.devices[-1].device.arch is Arch.CPU
    assert set(report.devices[-1].kernels) == set(OPS)
    assert report.devices[-1].kernels["index_logits"].startswith("reference")
    unset = dict.fromkeys(("NEXTN_KERNELS", "NEXTN_LOGITS_BUDGET_MB"))
    assert report.variables == {**unset, "NEXTN_DISABLE_KERNELS": "fast"}
    assert report.problem is None
    assert set(report.versions) >= {"nextn", "python", "torch"}
    assert json.loads(json.dumps(report.to_dict()))["devices"][-1]["arch"] == "cpu"


def test_the_doctor_says_how_to_get_what_is_missing(monkeypatch):
    monkeypatch.setattr("nextn.diagnose.has_module", lambda name: name != "deep_gemm")
    report = doctor_report()
    parts = {part.name: part for part in report.parts}
    assert parts["deep_gemm"].version is None
    assert parts["triton"].version is not None
    text = "\n".join(report.to_text())
    assert "deep_gemm: not found, for DeepGEMM's index logits on SM90 and SM100: build deepseek-ai/DeepGEMM" in text
    assert "pip install 'nextn[gpu]'" not in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("NEXTN_KERNELS", "index_logits=flash", "none: no kernel of index_logits takes"),
        ("NEXTN_KERNEL", "x", "unknown environment variables"),
    ],
)
def test_the_doctor_survives_wrong_settings_and_reports_them(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    assert words in "\n".join(doctor_report().to_text())
