"""One call of an op on given tensors, the same for every kernel that takes it.

Hides what each op's ``prepare`` is given, where its results lie, and how two kernels' results are compared.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nextn.cache_format import LATENT_DIM, index_cache_format, latent_cache_format
from nextn.hardware import describe_device
from nextn.ops._kernel import Choice, Kernel, OpPlan, discover
from nextn.ops._pages import gather_index_keys, gather_latent_rows
from nextn.testing.numerics import MAX_ERROR, QUANTISED_MAX_DIFF

Results = Mapping[str, torch.Tensor]
Limits = Mapping[str, tuple[float, float | None]]  # largest diff, and largest error or None for no limit
Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]

_POISON = -77  # of integers; floats are filled with NaN
_HALF_MAX_ERROR = 2.0**-7  # one step of bfloat16
_HALF_MAX_DIFF = 3e-5  # DeepGEMM's own limit for bfloat16 logits
_CODE_MAX_DIFF = 1e-4  # a value on the edge between two e4m3 codes may round either way
_LSE_MAX_ERROR = 1e-4
_ROWS_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What comparing a result with what was expected gave.

    Attributes:
        passed: whether it is within the op's limits.
        diff: worst row's ``1 - 2 sum(xy) / sum(xx + yy)``.
        error: worst row's largest error, in units of its largest value.
        note: what is wrong, or what else was seen; empty if nothing.
    """

    passed: bool
    diff: float = 0.0
    error: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class OpCall:
    """An op's tensors and how to judge what a kernel makes of them.

    Attributes:
        op: the op's name.
        problem: its sizes.
        arguments: what ``prepare`` takes but the outputs and the plan.
        outputs: the outputs by their names in ``prepare``: a tensor, or a tuple of tensors; empty if the arguments are
            changed in place.
        read: the results from what a launch wrote, elements that may hold anything set to 0.
        compare: judges results against expected ones.
    """

    op: str
    problem: Any
    arguments: dict[str, Any]
    outputs: dict[str, Any]
    read: Callable[[], Results]
    compare: Callable[[Results, Results], Verdict]

    def plan(self, kernel: Kernel, config: Any = None) -> OpPlan:
        """What ``kernel`` plans for this call, chosen or not, under its own configuration or another."""
        data = None
        if kernel.plan is not None:
            offered = {**self.arguments, "device": self.device, "config": config}
            data = kernel.plan(self.problem, **_taken_by(kernel.plan, offered))
        return OpPlan(choice=Choice(kernel=kernel, form="", refusals=(), others=()), problem=self.problem, data=data)

    def launcher(self, kernel: Kernel, config: Any = None) -> Callable[[], Any]:
        """Plan and prepare once; the result launches."""
        cut = _taken_by(kernel.prepare, {"config": config})
        return kernel.prepare(self.problem, **self.arguments, **self.outputs, plan=self.plan(kernel, config), **cut)

    def run(self, kernel: Kernel) -> Results:
        """Plan, prepare, and the results of one launch into poisoned outputs."""
        return self.results_of(self.launcher(kernel))

    def results_of(self, launch: Callable[[], Any]) -> Results:
        """The results of a prepared launch into poisoned outputs."""
        self.poison()
        launch()
        return {name: tensor.clone() for name, tensor in self.read().items()}

    def poison(self) -> None:
        """Fill the outputs with what no kernel writes."""
        for output in self.outputs.values():
            for tensor in output if isinstance(output, tuple) else (output,):
                poison(tensor)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))


def _taken_by(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    taken = inspect.signature(function).parameters
    return {name: offered[name] for name in taken if name in offered}


def poison(tensor: torch.Tensor) -> None:
    """Fill with NaN, or a number that no index is."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(0x7F)
    else:
        tensor.fill_(float("nan") if tensor.is_floating_point() else _POISON)


def list_cases(op: str) -> tuple[Any, ...]:
    """The named cases of an op."""
    return importlib.import_module(f"nextn.ops.{op}.cases").CASES


def find_kernel(op: str, name: str) -> Kernel:
    """The kernel of that name."""
    return next(kernel for kernel in discover(op) if kernel.name == name)


def allocate_plainly(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An output like any other."""
    return torch.empty(shape, dtype=dtype, device=device)


def call_of_case(
    op: str, case: Any, device: torch.device | str, *, seed: int = 0, allocate: Allocate = allocate_plainly
) -> OpCall:
    """A case's tensors on a device as a call; ``allocate`` makes its outputs."""
    device = torch.device(device)
    inputs, problem = case.inputs(device, seed=seed), case.problem(describe_device(device))
    if op == "index_logits":
        return index_logits_call(problem, inputs.arguments, inputs.defined, allocate)
    return _BUILDERS[op](problem, _arguments_of(inputs), allocate)


def index_logits_call(
    problem: Any, arguments: dict[str, Any], defined: torch.Tensor, allocate: Allocate = allocate_plainly
) -> OpCall:
    """A call of ``index_logits``; bool ``[R, C]`` ``defined`` says which logits count, if their rows still see them."""
    dtype = getattr(torch, problem.out_dtype)
    out = allocate(tuple(defined.shape), dtype, defined.device)
    columns = torch.arange(defined.shape[1], device=defined.device)
    limits = (QUANTISED_MAX_DIFF, MAX_ERROR) if dtype == torch.float32 else (_HALF_MAX_DIFF, _HALF_MAX_ERROR)
    return OpCall(
        op="index_logits",
        problem=problem,
        arguments=arguments,
        outputs={"out": out},
        read=lambda: {"logits": out.masked_fill(~(defined & (columns < arguments["visible_lens"][:, None])), 0)},
        compare=lambda actual, expected: judge_close(actual, expected, {"logits": limits}),
    )


def select_topk_call(problem: Any, arguments: dict[str, Any], allocate: Allocate = allocate_plainly) -> OpCall:
    """A call of ``select_topk``: exact."""
    device = arguments["logits"].device
    out = allocate((problem.num_rows, problem.topk), torch.int32, device)
    return OpCall(
        op="select_topk",
        problem=problem,
        arguments=arguments,
        outputs={"out": out},
        read=lambda: {"selected": out},
        compare=_judge_equal,
    )


def sparse_mla_call(problem: Any, arguments: dict[str, Any], allocate: Allocate = allocate_plainly) -> OpCall:
    """A call of ``sparse_mla``: rows within the limits, empty rows where they should be."""
    q = arguments["q"]
    out = allocate((*q.shape[:2], LATENT_DIM), q.dtype, q.device)
    lse = torch.empty(q.shape[:2], device=q.device)
    error = MAX_ERROR if q.dtype == torch.float32 else _HALF_MAX_ERROR
    limits = {"out": (QUANTISED_MAX_DIFF, error), "lse": (QUANTISED_MAX_DIFF, _LSE_MAX_ERROR)}
    return OpCall(
        op="sparse_mla",
        problem=problem,
        arguments=arguments,
        outputs={"out": out, "lse": lse},
        read=lambda: {"out": out, "lse": lse},
        compare=lambda actual, expected: _judge_attention(actual, expected, limits),
    )


def prepare_query_call(problem: Any, arguments: dict[str, Any], allocate: Allocate = allocate_plainly) -> OpCall:
    """A call of ``prepare_query``: what queries and weights stand for together."""
    q = arguments["q"]
    dtype = torch.float8_e4m3fn if problem.quantise else torch.float32
    prepared = allocate(tuple(q.shape), dtype, q.device)
    folded = allocate(tuple(q.shape[:2]), torch.float32, q.device)
    return OpCall(
        op="prepare_query",
        problem=problem,
        arguments=arguments,
        outputs={"out": (prepared, folded)},
        read=lambda: {"query": prepared.float() * folded[..., None]},
        compare=lambda actual, expected: judge_close(actual, expected, {"query": (_CODE_MAX_DIFF, None)}),
    )


def write_cache_call(problem: Any, arguments: dict[str, Any], allocate: Allocate = allocate_plainly) -> OpCall:
    """A call of ``write_cache``: what both caches then stand for, unwritten bytes included; nothing is allocated."""
    del allocate
    caches = {name: arguments[name] for name in ("kv_cache", "index_cache") if arguments[name] is not None}
    limits: Limits = {"latents": (_CODE_MAX_DIFF, None), "keys": (_CODE_MAX_DIFF, None)}

    def read() -> Results:
        found = {"latents": _read_latents(caches["kv_cache"])} if "kv_cache" in caches else {}
        if "index_cache" in caches:
            found["keys"] = _read_keys(caches["index_cache"], problem.index_dim)
        return found

    return OpCall(
        op="write_cache",
        problem=problem,
        arguments=arguments,
        outputs={},
        read=read,
        compare=lambda actual, expected: _judge_caches(actual, expected, limits),
    )


def accept_drafts_call(problem: Any, arguments: dict[str, Any], allocate: Allocate = allocate_plainly) -> OpCall:
    """A call of ``accept_drafts``: exact."""
    device = arguments["logits"].device
    lens = allocate((problem.num_requests,), torch.int32, device)
    ids = allocate((problem.num_rows,), torch.int64, device)
    return OpCall(
        op="accept_drafts",
        problem=problem,
        arguments=arguments,
        outputs={"out": (lens, ids)},
        read=lambda: {"lens": lens, "ids": ids},
        compare=_judge_equal,
    )


def judge_close(actual: Results, expected: Results, limits: Limits) -> Verdict:
    """Compare tensors row by row; a limit is the largest ``diff`` and the largest error, or None for no limit."""
    worst_diff = worst_error = 0.0
    failures = []
    for name, wanted in expected.items():
        max_diff, max_error = limits[name]
        diff, error = _measure_rows(actual[name], wanted)
        if not (diff <= max_diff and (max_error is None or error <= max_error)):
            failures.append(f"{name}: diff {diff:.2g} above {max_diff:g}, or error {error:.2g} above {max_error}")
        worst_diff, worst_error = max(worst_diff, diff), max(worst_error, error)
    return Verdict(passed=not failures, diff=worst_diff, error=worst_error, note="; ".join(failures))


def _measure_rows(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Worst row's diff and error, as ``compare_rows`` has them, but on the device: logits are hundreds of megabytes."""
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ"
    if expected.numel() == 0:
        return 0.0, 0.0
    diffs, errors = [], []
    for x, y in zip(actual.flatten(1).split(_ROWS_AT_ONCE), expected.to(actual.device).flatten(1).split(_ROWS_AT_ONCE)):
        x, y = x.double(), y.double()
        energy, squares = (x * x + y * y).sum(dim=1), (x - y).square().sum(dim=1)
        largest, error = y.abs().amax(dim=1), (x - y).abs().amax(dim=1)
        diffs.append(torch.where(energy == 0, 0.0, squares / energy))
        errors.append(torch.where(error == 0, 0.0, error / largest))
    return float(torch.cat(diffs).max()), float(torch.cat(errors).max())


def _judge_equal(actual: Results, expected: Results) -> Verdict:
    wrong = [
        f"{int((actual[name] != wanted.to(actual[name].device)).sum())} of {wanted.numel()} {name} differ"
        for name, wanted in expected.items()
        if not torch.equal(actual[name], wanted.to(actual[name].device))
    ]
    return Verdict(passed=not wrong, note="; ".join(wrong))


def _judge_attention(actual: Results, expected: Results, limits: Limits) -> Verdict:
    wanted_lse, lse = expected["lse"].cpu(), actual["lse"].cpu()
    empty = wanted_lse == float("-inf")
    if not torch.equal(lse == float("-inf"), empty):
        return Verdict(passed=False, note="lse is -inf for the wrong rows")
    return judge_close(
        {"out": actual["out"], "lse": lse.masked_fill(empty, 0)},
        {"out": expected["out"], "lse": wanted_lse.masked_fill(empty, 0)},
        limits,
    )


def _judge_caches(actual: Results, expected: Results, limits: Limits) -> Verdict:
    """Unwritten slots hold the NaN they were filled with, in both."""
    ours, wanted = ({name: tensor.cpu() for name, tensor in results.items()} for results in (actual, expected))
    for name, tensor in wanted.items():
        if not torch.equal(ours[name].isnan(), tensor.isnan()):
            return Verdict(passed=False, note=f"{name}: other slots were written")
    return judge_close(
        {name: tensor.nan_to_num() for name, tensor in ours.items()},
        {name: tensor.nan_to_num() for name, tensor in wanted.items()},
        limits,
    )


def _read_latents(cache: torch.Tensor) -> torch.Tensor:
    cache = cache.squeeze(2) if cache.ndim == 4 else cache
    cache_format = latent_cache_format(cache)
    return gather_latent_rows(
        cache, cache_format, torch.arange(cache.shape[0] * cache_format.page_size, device=cache.device)
    )


def _read_keys(cache: torch.Tensor, dim: int) -> torch.Tensor:
    cache_format = index_cache_format(cache, dim)
    if cache.ndim == 4:
        cache = cache.flatten(1)
    values, scales = gather_index_keys(cache, cache_format, torch.arange(cache.shape[0], device=cache.device))
    values = values.reshape(-1, dim)
    return values if scales is None else values * scales.reshape(-1, 1)


def _arguments_of(inputs: Any) -> dict[str, Any]:
    """A case's inputs as keyword arguments of ``prepare``; the ops differ in what a case calls inputs."""
    if isinstance(inputs, dict):
        return inputs
    names = [field.name for field in dataclasses.fields(inputs)]
    return {name: getattr(inputs, name) for name in names if not name.startswith("exact_")}


_BUILDERS: dict[str, Callable[..., OpCall]] = {
    "select_topk": select_topk_call,
    "sparse_mla": sparse_mla_call,
    "prepare_query": prepare_query_call,
    "write_cache": write_cache_call,
    "accept_drafts": accept_drafts_call,
}
