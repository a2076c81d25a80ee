"""Checks and times ``select_topk``'s Triton kernel on a GPU: ``python -m nextn.bench.gpu_select_topk --stage check``.

Hides which shapes and configurations are tried. A time is printed only for a configuration whose result, on the very
inputs that are timed, equals the reference's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextn.bench.rows import print_rows
from nextn.hardware import describe_device
from nextn.ops._kernel import Choice, Kernel, Launch, OpPlan, discover
from nextn.ops.select_topk.cases import CASES, DISTRIBUTIONS, SelectTopkCase, SelectTopkInputs
from nextn.ops.select_topk.problem import SelectTopkProblem

REPEATS = 20
TOPK = 2048
POISON = -77
READ_BANDWIDTH = 3.0e12  # bytes per second, measured on an H100 80GB HBM3

# rows, length, configurations: fields of SelectTopkConfig that are tried side by side.
SHAPES: tuple[tuple[int, int, tuple[Mapping[str, Any], ...]], ...] = (
    (1, 8192, ({"bins": 2048}, {"bins": 4096})),
    (256, 8192, ({"bins": 2048, "max_registers": 64}, {"bins": 4096, "max_registers": 64})),
    (512, 16384, ({"tiles": 8}, {"num_warps": 32}, {"max_registers": 64})),
    (64, 32768, ({"parts": 2, "prefetches": True}, {"parts": 4, "max_registers": 64})),
    (256, 32768, ({"parts": 2, "max_registers": 64}, {"parts": 4, "max_registers": 64}, {"max_registers": 64})),
    (16, 65536, ({"parts": 8, "prefetches": True}, {"parts": 4, "prefetches": True})),
    (4, 131072, ({"parts": 32, "prefetches": True}, {"parts": 16}, {"parts": 16, "samples": 2048})),
    (1, 1048576, ({"parts": 32, "samples": 4096, "prefetches": True}, {"parts": 16, "samples": 4096})),
    (64, 131072, ({"parts": 2, "prefetches": True}, {"parts": 4, "prefetches": True})),
)

# Rows as long as the kernel's paths differ: registers, blocks, split, many blocks, more rows than programs.
CHECKED = (
    SelectTopkCase(name="registers", lens=(8192, 5000, 2049, 0), num_columns=8192, topk=TOPK, rows_per_request=2),
    SelectTopkCase(name="32k", lens=(32768, 32767, 4097, 2048), num_columns=32768, topk=TOPK, rows_per_request=4),
    SelectTopkCase(name="split", lens=(131072, 70001, 33000, 32768, 10), num_columns=131072, topk=TOPK),
    SelectTopkCase(name="1m", lens=(1048576, 999999), num_columns=1048576, topk=TOPK, rows_per_request=1),
    SelectTopkCase(name="blocks", lens=tuple(range(30000, 50000, 100)), num_columns=50000, topk=TOPK),
    SelectTopkCase(name="unaligned", lens=(40001, 40000, 33001), num_columns=40001, topk=1999),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Runner:
    """One configuration on one set of inputs."""

    launch: Launch
    out: torch.Tensor

    def run(self) -> torch.Tensor:
        self.out.fill_(POISON)
        self.launch()
        return self.out


def check(device: torch.device | str = "cuda") -> Iterator[dict[str, Any]]:
    """Compare every case and distribution with the reference on the CPU, with ``REPEATS`` repeats and in a CUDA graph.

    Yields:
        One row per case: ``op, case, config, passed, note``.
    """
    hostile = [
        dataclasses.replace(case, name=f"{case.name} {values}", values=values)
        for case, values in itertools.product(CHECKED[:3], DISTRIBUTIONS)
        if values != "normal"
    ]
    for case in (*CASES, *CHECKED, *hostile):
        yield {"op": "select_topk", "stage": "check", "case": case.name, **_attempt(_check_case, case, device)}
    for rows, length, configs in SHAPES:
        for config in configs:
            row = _attempt(_check_shape, rows, length, config, device)
            yield {"op": "select_topk", "stage": "check", "case": f"{rows} x {length}", "config": dict(config), **row}


def bench(device: torch.device | str = "cuda") -> Iterator[dict[str, Any]]:
    """Median times of every shape and configuration, with the L2 cache flushed and warm.

    Yields:
        One row per shape and configuration: ``rows, length, config, cold_us, warm_us, floor_us``, or a ``note``.
    """
    for rows, length, configs in SHAPES:
        logits, lens = _random_rows(rows, length, device)
        floor = rows * (length + TOPK) * 4 / READ_BANDWIDTH * 1e6
        torch_us = _attempt(lambda logits=logits: {"torch_us": _time_cold(lambda: torch.topk(logits, TOPK, dim=1))})
        for config in configs:
            row = _attempt(_bench_config, config, logits, lens)
            shape = {"rows": rows, "length": length, "config": dict(config), "floor_us": round(floor, 2)}
            yield {"op": "select_topk", "stage": "bench", **shape, **torch_us, **row}


def _attempt(function: Any, *arguments: Any) -> dict[str, Any]:
    """The row a check returns, or what stopped it: one broken variant must not hide the others."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"passed": False, "note": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _kernel(name: str) -> Kernel:
    return next(kernel for kernel in discover("select_topk") if kernel.name == name)


def _make_runner(
    problem: SelectTopkProblem, inputs: SelectTopkInputs, config: Mapping[str, Any] | None = None
) -> _Runner:
    from nextn.ops.select_topk.triton_portable import SelectTopkConfig

    kernel = _kernel("triton_portable")
    assert kernel.plan is not None
    chosen = None if config is None else SelectTopkConfig(**config)
    data = kernel.plan(problem, device=inputs.logits.device, config=chosen)
    choice = Choice(kernel=kernel, form="", refusals=(), others=())
    out = torch.empty(problem.num_rows, problem.topk, dtype=torch.int32, device=inputs.logits.device)
    launch = kernel.prepare(
        problem, **_tensors(inputs), out=out, plan=OpPlan(choice=choice, problem=problem, data=data)
    )
    return _Runner(launch=launch, out=out)


def _tensors(inputs: SelectTopkInputs) -> dict[str, Any]:
    return {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}


def _expected(problem: SelectTopkProblem, inputs: SelectTopkInputs) -> torch.Tensor:
    """The reference's result for the same tensors moved to the CPU."""
    moved = {name: None if tensor is None else tensor.cpu() for name, tensor in _tensors(inputs).items()}
    out = torch.empty(problem.num_rows, problem.topk, dtype=torch.int32)
    _kernel("reference").prepare(problem, **moved, out=out)()
    return out


def _check_case(case: SelectTopkCase, device: torch.device | str) -> dict[str, Any]:
    problem = case.problem(describe_device(device))
    inputs = case.inputs(device)
    runner = _make_runner(problem, inputs)
    expected = _expected(problem, inputs).to(device)
    note = _compare_repeats(runner, expected) or _compare_replay(problem, inputs, runner)
    return {"passed": not note, "note": note}


def _check_shape(rows: int, length: int, config: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    logits, lens = _random_rows(rows, length, device)
    inputs = SelectTopkInputs(logits=logits, visible_lens=lens, query_offsets=None, page_table=None)
    problem = _problem(logits)
    note = _compare_repeats(_make_runner(problem, inputs, config), _expected(problem, inputs).to(device))
    return {"passed": not note, "note": note}


def _compare_repeats(runner: _Runner, expected: torch.Tensor) -> str:
    """What differs from ``expected`` in any of the repeats, in words; empty if nothing."""
    for repeat in range(REPEATS):
        wrong = (runner.run() != expected).any(dim=1).nonzero().flatten().tolist() if expected.numel() else []
        if wrong:
            return f"repeat {repeat}: {len(wrong)} of {len(expected)} rows differ, the first is row {wrong[0]}"
    return ""


def _compare_replay(problem: SelectTopkProblem, inputs: SelectTopkInputs, runner: _Runner) -> str:
    """Whether a captured graph replayed with other lengths still selects what the reference does."""
    if not problem.num_rows:
        return ""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runner.launch()
    inputs.visible_lens.copy_(inputs.visible_lens.flip(0) // 2)
    inputs.logits.nan_to_num_(nan=0.5)  # what was past the old lengths becomes ordinary
    expected = _expected(problem, inputs).to(inputs.logits.device)
    runner.out.fill_(POISON)
    graph.replay()
    return "" if torch.equal(runner.out, expected) else "a replay with changed lengths differs"


def _random_rows(rows: int, length: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(rows + length)
    logits = torch.randn(rows, length, generator=generator, device=device)
    return logits, torch.full((rows,), length, dtype=torch.int32, device=device)


def _problem(logits: torch.Tensor) -> SelectTopkProblem:
    device = describe_device(logits.device)
    return SelectTopkProblem(
        arch=device.arch,
        num_sms=device.num_sms,
        num_rows=logits.shape[0],
        num_columns=logits.shape[1],
        topk=TOPK,
    )


def _bench_config(config: Mapping[str, Any], logits: torch.Tensor, lens: torch.Tensor) -> dict[str, Any]:
    inputs = SelectTopkInputs(logits=logits, visible_lens=lens, query_offsets=None, page_table=None)
    runner = _make_runner(_problem(logits), inputs, config)
    expected = torch.topk(logits, TOPK, dim=1).indices.sort(dim=1).values.to(torch.int32)
    differing = (runner.run() != expected).any(dim=1).sum().item()
    # torch.topk breaks ties as it likes: compare what was selected where it chose otherwise.
    if differing and not torch.equal(_sorted_values(logits, runner.out), _sorted_values(logits, expected)):
        return {"passed": False, "note": f"{differing} rows differ from torch.topk"}
    return {"passed": True, "cold_us": _time_cold(runner.launch), "warm_us": _time_warm(runner.launch)}


def _sorted_values(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, indices.long().clamp(min=0)).sort(dim=1).values


def _time_cold(function: Any) -> float:
    """Median microseconds with the L2 cache flushed before every run."""
    from triton.testing import do_bench

    milliseconds: Any = do_bench(function, warmup=10, rep=40, return_mode="median")
    return round(milliseconds * 1e3, 2)


def _time_warm(function: Any) -> float:
    """Median microseconds back to back in a CUDA graph, the logits in the L2 cache where they fit."""
    from triton.testing import do_bench_cudagraph

    milliseconds: Any = do_bench_cudagraph(function, rep=10, return_mode="median")
    return round(milliseconds * 1e3, 2)


def main() -> int:
    """Run a stage and print its rows as JSON lines; 1 if any check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("check", "bench"), default="check")
    parser.add_argument("--out", type=Path, help="file the rows are appended to as well")
    arguments = parser.parse_args()
    return print_rows((check if arguments.stage == "check" else bench)("cuda"), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
