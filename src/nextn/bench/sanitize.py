"""``sanitize``: every kernel over every case under compute-sanitizer, a process per op and tool.

Hides how tensors are kept apart, so that an access past one of them is seen, and how the tool's verdict is read.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nextn.bench import op_calls
from nextn.bench.rows import Row, collect_rows, describe_run, open_device
from nextn.bench.watched import last_line, run_watched
from nextn.errors import InputError, UnsupportedError
from nextn.hardware import describe_device
from nextn.ops._kernel import OPS, discover

FILE_NAME = "gpu_sanitize.jsonl"
TOOLS = ("memcheck", "racecheck", "synccheck")
_TOOL = "compute-sanitizer"
_FOUND_EXIT_CODE = 86
_LEAST_SECONDS = 10.0  # a process that has less is not started


@dataclass(frozen=True, kw_only=True, slots=True)
class SanitizeOptions:
    """What to run and where to keep the verdicts.

    Attributes:
        ops: ops to run; all if empty.
        tools: tools of compute-sanitizer, in order.
        only: run kernels whose name contains this.
        out: folder whose ``gpu_sanitize.jsonl`` is appended to, and what passed there at this commit not run again.
        commit: the commit these files are of, where git cannot say.
        seconds: of all processes together; those left over are not run.
    """

    ops: tuple[str, ...] = ()
    tools: tuple[str, ...] = ("memcheck",)
    only: str = ""
    out: Path | None = None
    commit: str | None = None
    seconds: float = 500.0


def sanitize_ops(options: SanitizeOptions, *, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Run every op under every tool.

    Returns:
        One row per op and tool: op, tool, passed, note (the tool's summary, or that time ran out).

    Raises:
        InputError: an unknown op or tool.
        UnsupportedError: there is no GPU or no compute-sanitizer here.
    """
    for name, known in (("ops", OPS), ("tools", TOOLS)):
        unknown = sorted(set(getattr(options, name)) - set(known))
        if unknown:
            raise InputError(f"unknown {name} {unknown}; use some of {list(known)}")
    device = open_device("cuda", instead="run the tests, which poison memory around every output")
    if shutil.which(_TOOL) is None:
        raise UnsupportedError(f"{_TOOL} is not on PATH; it comes with the CUDA toolkit")
    run = {"stage": "sanitize", **describe_run(device, options.commit)}
    deadline = time.monotonic() + options.seconds

    def measure(item: tuple[str, str]) -> list[Row]:
        op, tool = item
        found = run_tool(op, tool, options.only, deadline - time.monotonic())
        return [{"op": op, "tool": tool, "kernels": options.only, **found}]

    return collect_rows(
        [((op, tool, options.only, True), (op, tool)) for tool in options.tools for op in options.ops or OPS],
        measure,
        run=run,
        keys=("op", "tool", "kernels", "passed"),
        file=options.out / FILE_NAME if options.out else None,
        seconds=options.seconds - _LEAST_SECONDS,
        on_row=on_row,
    )


def run_tool(op: str, tool: str, only: str, seconds: float) -> Row:
    """Run one op's cases in a process under one tool; returns passed and note."""
    done, ran_out = run_watched(
        [_TOOL, "--tool", tool, "--error-exitcode", str(_FOUND_EXIT_CODE)],
        ["run-cases", "--op", op, "--only", only],
        seconds=seconds,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    if ran_out:
        return {"passed": False, "note": ran_out}
    return {"passed": done.returncode == 0, "note": read_summary(done.stdout + done.stderr, done.returncode)}


def read_summary(output: str, exit_code: int) -> str:
    """What the tool found, in a line: its first complaint, where that was, and its summary."""
    complaints = re.findall(
        r"^========= ((?:Invalid|Race|Barrier|Program hit|Error:|Warning:).*)\n=========\s+((?:at|and) .*)$",
        output,
        re.MULTILINE,
    )
    summary = [
        line for line in re.findall(r"^========= (\w+ SUMMARY:.*)$", output, re.MULTILINE) if "not printed" not in line
    ]
    ran = re.findall(r"^(\d+ launches.*)$", output, re.MULTILINE)
    failed = re.findall(r"^failed: (.*)$", output, re.MULTILINE)
    parts = [*(" ".join(complaint) for complaint in complaints[:1]), *failed[:1], *summary[:1], *ran[-1:]]
    return "; ".join(parts) or f"exit code {exit_code}: {last_line(output)}"


def run_cases(op: str, only: str = "", device_name: str = "cuda") -> tuple[int, list[str]]:
    """Launch every kernel of ours but the reference once on each case it takes.

    Other people's libraries are left out unless ``only`` is their kernel's name: what a tool finds in them is theirs.

    Returns:
        The number of launches, and what failed how; a case that fails keeps no other from being seen.
    """
    device = torch.device(device_name)
    hardware, launches, failures = describe_device(device), 0, []
    for kernel in discover(op):
        is_left_out = kernel.name == "reference" or (kernel.allocates_output and kernel.name != only)
        if is_left_out or only not in kernel.name or hardware.arch not in kernel.arches:
            continue
        for case in op_calls.list_cases(op):
            if kernel.rejects(case.problem(hardware)) is not None:
                continue
            try:
                op_calls.call_of_case(op, case, device).launcher(kernel)()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                launches += 1
            except Exception as error:  # a kernel may fail in any way
                failures.append(
                    " ".join(f"{kernel.name} on {case.name}: {type(error).__name__}: {error}".split())[:300]
                )
    return launches, failures
