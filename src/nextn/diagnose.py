"""What ``nextn explain`` and ``nextn doctor`` report, as plain data.

Hides how a kernel choice, a device and an optional part are looked up; printing is the caller's.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import nextn
from nextn.batch import ForwardBatch, ForwardMode
from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.env import VARIABLES, read_environment
from nextn.errors import InputError, NextnError
from nextn.hardware import Arch, DeviceInfo, has_module, list_devices, module_version
from nextn.ops._kernel import OPS, choose
from nextn.ops.accept_drafts.problem import AcceptDraftsProblem
from nextn.plan import DSASpec, list_problems

_INDEX_HEADS, _QUERY_HEADS, _VOCAB = 64, 128, 129280  # DeepSeek-V3.2
_CACHE_FORMATS = ("fp8", "bf16", "fp32")
_OPTIONAL_PARTS = (
    # name, modules, distributions, what for, how to get it
    ("triton", ("triton",), ("triton", "pytorch-triton"), "GPU kernels", "pip install 'nextn[gpu]'"),
    (
        "deep_gemm",
        ("deep_gemm",),
        ("deep_gemm", "deep-gemm", "sgl-deep-gemm"),
        "DeepGEMM's index logits on SM90 and SM100",
        "build deepseek-ai/DeepGEMM, or pip install sgl-deep-gemm, for this torch and CUDA",
    ),
    (
        "flash_mla",
        ("flash_mla",),
        ("sgl-flash-mla", "flash-mla", "flash_mla"),
        "FlashMLA's sparse attention of 64 and 128 heads on SM90",
        "pip install sgl-flash-mla",
    ),
    ("server", ("fastapi", "uvicorn"), ("fastapi",), "nextn serve", "pip install 'nextn[serve]'"),
    ("plots", ("matplotlib",), ("matplotlib",), "plots of benchmarks", "pip install 'nextn[bench]'"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpReport:
    """Which kernel an op would use for one problem, and why no other.

    Attributes:
        op: the op's name.
        problem: the problem's sizes.
        kernel: the chosen kernel's name.
        form: how it would run the problem, or an empty string.
        refusals: kernel name to why it cannot take the problem.
        others: kernels that could, but rank lower.
    """

    op: str
    problem: Mapping[str, Any]
    kernel: str
    form: str
    refusals: Mapping[str, str]
    others: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as values ``json.dumps`` takes."""
        return dataclasses.asdict(self) | {"others": list(self.others)}

    def to_text(self) -> list[str]:
        """The report as lines."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.problem.items())
        lines = [f"{self.op}: {self.kernel}{f' ({self.form})' if self.form else ''}", f"  for {sizes}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refusals.items()]
        lines += [f"  not {name}: ranks lower" for name in self.others]
        return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionalPart:
    """A part that may be missing.

    Attributes:
        name: the part.
        version: its version, "found, version unknown" if it does not say, or None if it is not installed.
        purpose: what it is for.
        how: how to get it.
    """

    name: str
    version: str | None
    purpose: str
    how: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceReport:
    """A device and the kernel each op would use on it, for a verify step of DeepSeek-V3.2."""

    device: DeviceInfo
    kernels: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorReport:
    """What this machine and this installation are.

    Attributes:
        versions: nextn, python, torch and the CUDA or ROCm that torch was built for.
        devices: every device PyTorch can use, the CPU last.
        parts: optional parts, found or not.
        variables: every NEXTN_* variable: its value, or None where unset.
        problem: what is wrong with the settings, or None.
    """

    versions: Mapping[str, str]
    devices: tuple[DeviceReport, ...]
    parts: tuple[OptionalPart, ...]
    variables: Mapping[str, str | None]
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """The report as values ``json.dumps`` takes."""
        return {
            "versions": dict(self.versions),
            "devices": [
                {**_plain(dataclasses.asdict(entry.device)), "kernels": dict(entry.kernels)} for entry in self.devices
            ],
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "variables": dict(self.variables),
            "problem": self.problem,
        }

    def to_text(self) -> list[str]:
        """The report as lines."""
        lines = [f"{name} {version}" for name, version in self.versions.items()]
        for entry in self.devices:
            lines += ["", f"{entry.device.name} ({entry.device.arch}, {_count_units(entry.device)})"]
            lines += [f"  {op}: {kernel}" for op, kernel in entry.kernels.items()]
        lines.append("")
        for part in self.parts:
            state = f"not found, for {part.purpose}: {part.how}" if part.version is None else part.version
            lines.append(f"{part.name}: {state}")
        lines.append("")
        lines += [f"{name}: {'unset' if value is None else value}" for name, value in self.variables.items()]
        if self.problem is not None:
            lines.append(f"settings: {self.problem}")
        return lines


def build_problem(
    op: str,
    *,
    device: DeviceInfo | None = None,
    batch: int = 64,
    next_n: int = 4,
    context: int = 32768,
    heads: int | None = None,
    topk: int = 2048,
    page_size: int = 64,
    cache: str = "fp8",
) -> Any:
    """The problem of a uniform verify step, DeepSeek-V3.2's unless told otherwise.

    Args:
        op: the op's name.
        device: what to run on, real or pretended; this machine's first device if None.
        batch: requests.
        next_n: rows per request.
        context: tokens cached per request.
        heads: index heads (``index_logits``, ``prepare_query``) or query heads (``sparse_mla``); 64 or 128 if None.
        topk: tokens each row selects.
        page_size: tokens per page.
        cache: format of the latent cache: ``fp8``, ``bf16`` or ``fp32``; the index cache is fp8 unless this is fp32.

    Raises:
        InputError: there is no such op or format, or a size is below 1.
    """
    sizes = {"batch": batch, "next_n": next_n, "context": context, "topk": topk, "page_size": page_size}
    for name, value in (sizes if heads is None else sizes | {"heads": heads}).items():
        if value < 1:
            raise InputError(f"{name} {value} is below 1; pass at least 1")
    if op not in OPS:
        raise InputError(f"unknown op {op!r}; use one of {list(OPS)}")
    if cache not in _CACHE_FORMATS:
        raise InputError(f"unknown cache format {cache!r}; use one of {list(_CACHE_FORMATS)}")
    device = list_devices()[0] if device is None else device
    if op == "accept_drafts":
        return AcceptDraftsProblem(
            arch=device.arch,
            num_requests=batch,
            num_rows=batch * next_n,
            vocab=_VOCAB,
            is_greedy=True,
            has_draft_probs=False,
        )
    spec = DSASpec(
        num_heads=_QUERY_HEADS if heads is None else heads,
        index_heads=_INDEX_HEADS if heads is None else heads,
        index_topk=topk,
        softmax_scale=1.0,
        page_size=page_size,
        index_format=IndexCacheFormat(name="fp32" if cache == "fp32" else "fp8", page_size=page_size),
        latent_format=LatentCacheFormat(name=cache, page_size=page_size),
    )
    rows = ForwardBatch.build(
        ForwardMode.TARGET_VERIFY,
        row_counts=[next_n] * batch,
        context_lens=torch.empty(batch, dtype=torch.int32, device="meta"),
        page_table=torch.empty(batch, -(-context // page_size), dtype=torch.int32, device="meta"),
        max_context=context,
        page_size=page_size,
    )
    dtype = "float32" if device.arch is Arch.CPU else "bfloat16"
    return list_problems(rows, spec, device, dtype=dtype)[op]


def explain_op(op: str, problem: Any) -> OpReport:
    """The choice for ``problem`` and every refusal.

    Args:
        op: the op's name.
        problem: the op's problem, from :func:`build_problem` or the op itself.

    Raises:
        InputError: there is no such op.
        UnsupportedError: no kernel takes the problem.
    """
    choice = choose(op, problem)
    return OpReport(
        op=op,
        problem=_plain(dataclasses.asdict(problem)),
        kernel=choice.kernel.name,
        form=choice.form,
        refusals=dict(choice.refusals),
        others=choice.others,
    )


def doctor_report() -> DoctorReport:
    """Look at this machine and this installation; never raises for what it finds."""
    problem = None
    try:
        read_environment()
    except NextnError as error:
        problem = str(error)
    return DoctorReport(
        versions=_find_versions(),
        devices=tuple(
            DeviceReport(device=device, kernels={op: _choose_for(op, device) for op in OPS})
            for device in list_devices()
        ),
        parts=tuple(
            OptionalPart(name=name, version=_find_part(modules, distributions), purpose=purpose, how=how)
            for name, modules, distributions, purpose, how in _OPTIONAL_PARTS
        ),
        variables={name: os.environ.get(name) for name in VARIABLES},
        problem=problem,
    )


def _choose_for(op: str, device: DeviceInfo) -> str:
    try:
        return str(choose(op, build_problem(op, device=device)))
    except NextnError as error:
        return f"none: {error}"


def _find_versions() -> dict[str, str]:
    versions = {"nextn": nextn.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if torch.version.hip:
        versions["rocm"] = torch.version.hip
    return versions


def _find_part(modules: tuple[str, ...], distributions: tuple[str, ...]) -> str | None:
    if not all(has_module(module) for module in modules):
        return None
    versions = (module_version(distribution) for distribution in distributions)
    return next((version for version in versions if version is not None), "found, version unknown")


def _count_units(device: DeviceInfo) -> str:
    if device.arch is Arch.CPU:
        return f"{torch.get_num_threads()} threads"
    return f"{device.num_sms} compute units"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}
