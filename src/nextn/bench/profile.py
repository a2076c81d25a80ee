"""``profile``: hardware counters of every launch at the shapes whose limits are explained, by Nsight Compute.

Hides how launches are told apart and which of the profiler's columns say what a kernel waits for. Times taken under a
profiler are of single runs with empty caches and are no benchmark.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextn.bench.peers import add_peers_folder, peer_candidates
from nextn.bench.rows import Row, collect_rows, describe_run, open_device
from nextn.bench.shapes import list_shapes
from nextn.bench.watched import last_line, run_watched
from nextn.bench.workloads import make_workload, our_candidates
from nextn.errors import InputError, UnsupportedError
from nextn.ops._kernel import OPS

FILE_NAME = "gpu_profile.jsonl"
GRID = "profile"
_TOOL = "ncu"
_MARK = "nextn-profile: "
_END = "spin_kernel"  # PyTorch's name for the kernel that ends what a mark begins
_SECTIONS = (
    "SpeedOfLight",
    "SchedulerStats",
    "WarpStateStats",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "LaunchStats",
)
_LEAST_SECONDS = 20.0  # a process that has less is not started
_NUM_STALLS = 4  # reasons kept, the most frequent ones

# Field: column. Percentages are of what the unit could do at most while the kernel ran.
_COUNTERS = {
    "time_us": "gpu__time_duration.sum",
    "cycles": "sm__cycles_active.avg",
    "dram_tb_per_s": "dram__bytes.sum.per_second",
    "dram_pct": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_pct": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "issue_pct": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "tensor_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "warps_per_scheduler": "smsp__warps_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
    "shared_kb": "launch__shared_mem_per_block",
    "programs": "launch__grid_size",
    "threads": "launch__block_size",
}
_SCALES = {"time_us": 1e-3, "dram_tb_per_s": 1e-12, "shared_kb": 1 / 1024}
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio$")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileOptions:
    """What to profile and where to keep the counters.

    Attributes:
        ops: ops to run; all that the grid has if empty.
        only: shapes whose name contains this.
        kernel: kernels whose name contains this.
        out: folder whose ``gpu_profile.jsonl`` is appended to, and what stands there of this commit not run again.
        peers_dir: folder with further peers, whose kernels are profiled too.
        commit: the commit these files are of, where git cannot say.
        seconds: of all processes together; those left over are not run.
    """

    ops: tuple[str, ...] = ()
    only: str = ""
    kernel: str = ""
    out: Path | None = None
    peers_dir: Path | None = None
    commit: str | None = None
    seconds: float = 500.0


def profile_ops(options: ProfileOptions, *, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Profile every kernel of every op, a process per op.

    Returns:
        One row per launch: op, shape, kernel, launch (the device function), passed, and the counters: time_us; cycles
        of a multiprocessor at work; dram_tb_per_s; dram_pct, l2_pct, l1_pct, tensor_pct and issue_pct of the units'
        peaks; warps_per_scheduler, registers, shared_kb, programs, threads; stalls, reason to warps that wait for it
        per issued instruction (a wait on an mbarrier counts as long_scoreboard). Instead of them one row, not passed,
        of an op whose process failed.

    Raises:
        InputError: an op without a shape to profile, or no such folder.
        UnsupportedError: there is no GPU or no ncu here.
    """
    listed = [op for op in OPS if any(options.only in shape.name for shape in list_shapes(GRID, [op]))]
    unlisted = sorted(set(options.ops) - set(listed))
    if unlisted or not listed:
        raise InputError(f"no shape of {unlisted or 'any op'} contains {options.only!r}; of {listed} some do")
    device = open_device("cuda", instead="read benchmarks/results/gpu_profile.jsonl")
    if shutil.which(_TOOL) is None:
        raise UnsupportedError(f"{_TOOL} is not on PATH; it comes with the CUDA toolkit as Nsight Compute")
    if options.peers_dir is not None:
        add_peers_folder(options.peers_dir)  # says now what the processes would say later
    deadline = time.monotonic() + options.seconds

    def measure(op: str) -> list[Row]:
        found = run_profiler(op, options.only, options.kernel, options.peers_dir, deadline - time.monotonic())
        return [{"op": op, "shapes": options.only, "kernels": options.kernel, **row} for row in found]

    return collect_rows(
        [((op, options.only, options.kernel, True), op) for op in options.ops or listed],
        measure,
        run={"stage": "profile", **describe_run(device, options.commit)},
        keys=("op", "shapes", "kernels", "passed"),
        file=options.out / FILE_NAME if options.out else None,
        seconds=options.seconds - _LEAST_SECONDS,
        on_row=on_row,
    )


def run_profiler(op: str, only: str, kernel: str, peers_dir: Path | None, seconds: float) -> list[Row]:
    """Profile one op's shapes in one process; if it fails, a single row says how."""
    tool = [_TOOL, "--profile-from-start", "off", "--clock-control", "none", "--print-units", "base"]
    tool += ["--page", "raw", "--csv", *(word for section in _SECTIONS for word in ("--section", section))]
    arguments = ["run-shapes", "--op", op, "--only", only, "--kernel", kernel]
    arguments += [] if peers_dir is None else ["--peers-dir", str(peers_dir)]
    done, ran_out = run_watched(tool, arguments, seconds=seconds)
    rows = list(read_counters(done.stdout))
    if done.returncode == 0 and rows:
        return rows
    note = ran_out or f"exit code {done.returncode}: {last_line(done.stdout + done.stderr)}"
    return [{"shape": "", "kernel": "", "passed": False, "note": note}]


def run_shapes(op: str, only: str = "", kernel: str = "", peers_dir: Path | None = None) -> int:
    """Launch the kernels of an op at the shapes of the grid, each once unseen and once seen by a profiler."""
    device, launches = torch.device("cuda"), 0
    if peers_dir is not None:
        add_peers_folder(peers_dir)
    for shape in list_shapes(GRID, [op]):
        if only not in shape.name:
            continue
        workload = make_workload(shape, device)
        for candidate in (*our_candidates(workload)[0], *peer_candidates(workload)[0]):
            if candidate.kind == "reference" or kernel not in candidate.name:
                continue
            launch = candidate.build()
            launch()  # compiles
            torch.cuda.synchronize()
            print(_MARK + json.dumps({"shape": shape.name, "kernel": candidate.name}), flush=True)
            torch.cuda.profiler.start()
            launch()
            torch.cuda._sleep(1)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            launches += 1
    return launches


def read_counters(output: str) -> Iterator[Row]:
    """Rows from what a profiler and the process under it printed: a mark for each kernel, and a table of launches."""
    lines = output.splitlines()
    marks = (json.loads(line.removeprefix(_MARK)) for line in lines if line.startswith(_MARK))
    mark = next(marks, None)
    for values in csv.DictReader(line for line in lines if line.startswith('"')):
        if mark is None or not values["ID"]:  # a line of units has no number
            continue
        if _END in values["Kernel Name"]:
            mark = next(marks, None)
        else:
            yield {**mark, "launch": values["Kernel Name"], "passed": True, **_pick_counters(values)}


def _pick_counters(values: Mapping[str, str]) -> dict[str, Any]:
    counters: dict[str, Any] = {}
    for field, column in _COUNTERS.items():
        value = _number(values.get(column))
        counters[field] = None if value is None else round(value * _SCALES.get(field, 1), 3)
    stalls = {match[1]: value for name in values if (match := _STALL.match(name)) and (value := _number(values[name]))}
    most = sorted(stalls, key=lambda name: -stalls[name])[:_NUM_STALLS]
    counters["stalls"] = {name: round(stalls[name], 2) for name in most}
    return counters


def _number(text: str | None) -> float | None:
    """A value of the table; None for what the profiler could not read."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
