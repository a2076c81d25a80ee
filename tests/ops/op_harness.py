"""Running every kernel of an op over every case: pairs for parametrising, and which pairs can run here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from nextn.hardware import Arch, DeviceInfo, describe_device, pretend_device
from nextn.ops._kernel import Choice, Kernel, OpPlan, discover

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def kernel_case_pairs(op: str, cases: Iterable[Any]) -> list[Any]:
    """One parameter set per kernel and case; a new kernel file is found by itself."""
    cases = tuple(cases)
    return [pytest.param(kernel, case, id=f"{kernel.name}-{case}") for kernel in discover(op) for case in cases]


def hardware_for(kernel: Kernel) -> DeviceInfo:
    """The machine, or a pretended H100 for a Triton kernel that runs in the interpreter."""
    if IS_INTERPRETING and kernel.name.startswith("triton"):
        return pretend_device(Arch.SM90)
    return describe_device(DEVICE)


def problem_or_skip(kernel: Kernel, case: Any) -> Any:
    """The case's problem for ``kernel``; skips with the kernel's own reason if it cannot take it."""
    problem = case.problem(hardware_for(kernel))
    if problem.arch not in kernel.arches:
        pytest.skip(f"{kernel.name} is not written for {problem.arch}")
    reason = kernel.rejects(problem)
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")
    return problem


def plan_for(kernel: Kernel, problem: Any, **tensors: Any) -> OpPlan:
    """An OpPlan for ``kernel`` alone, whatever would be chosen."""
    data = kernel.plan(problem, **tensors) if kernel.plan is not None else None
    choice = Choice(kernel=kernel, form="", refusals=(), others=())
    return OpPlan(choice=choice, problem=problem, data=data)
