"""``check``: every kernel on a GPU against the reference on the CPU, over every named case.

Hides how a case becomes claims: right results, the same bits twenty times, nothing written around the outputs, and the
same bits from a captured graph whose inputs changed. Scores are also claimed to be the same bits at every depth.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nextn.bench import op_calls
from nextn.bench.op_calls import OpCall, Results, Verdict
from nextn.bench.rows import Row, collect_rows, describe_run, open_device
from nextn.bench.shapes import IndexLogitsShape
from nextn.bench.workloads import make_workload, offsets_of
from nextn.errors import InputError
from nextn.hardware import DeviceInfo, describe_device
from nextn.ops._kernel import OPS, Kernel, discover
from nextn.ops.index_logits.cases import IndexLogitsCase
from nextn.testing.poison import PoisonedOutput, poison_output

FILE_NAME = "gpu_check.jsonl"
REPEATS = 20
_ROW_PADDING = 4  # elements between two rows of an output, all to be left alone
_OPS_WITH_STRIDED_OUTPUTS = frozenset({"index_logits", "select_topk", "sparse_mla"})
_DEPTH_ROWS = ((64, 24), (64, 35), (32, 24), (8, 24))  # index heads and rows per request
_DEPTH_CONTEXT = 5000

_Check = tuple[tuple[str | bool, ...], Callable[[], Row]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckOptions:
    """What to check and where to keep it.

    Attributes:
        ops: ops to check; all if empty.
        device: ``cuda``, or ``cpu`` to try the check itself on the references.
        out: folder whose ``gpu_check.jsonl`` is appended to, and what passed there at this commit not checked again.
        commit: the commit these files are of, where git cannot say.
        seconds: start no case after this long.
    """

    ops: tuple[str, ...] = ()
    device: str = "cuda"
    out: Path | None = None
    commit: str | None = None
    seconds: float = 500.0


def check_ops(options: CheckOptions, *, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Check every kernel that takes a case, on all of them.

    Returns:
        One row per kernel and case: op, kernel, case, passed, diff, error, note.

    Raises:
        InputError: an unknown op or device.
        UnsupportedError: there is no GPU here.
    """
    unknown = sorted(set(options.ops) - set(OPS))
    if unknown:
        raise InputError(f"unknown ops {unknown}; use some of {list(OPS)}")
    device = open_device(options.device, instead="try it with --device cpu, on the references")
    run = {"stage": "check", **describe_run(device, options.commit)}
    return collect_rows(
        _list_checks(options.ops or OPS, device),
        lambda item: [item()],
        run=run,
        keys=("op", "kernel", "case", "passed"),
        file=options.out / FILE_NAME if options.out else None,
        seconds=options.seconds,
        on_row=on_row,
    )


def check_case(kernel: Kernel, case: Any, device: torch.device) -> Verdict:
    """Run one kernel on one case and test every claim."""
    guards: list[PoisonedOutput] = []
    call = _guarded_call(kernel.op, case, device, guards)
    launch = call.launcher(kernel)  # one plan for all repeats, as for the layers of a forward
    first = call.results_of(launch)
    verdict = call.compare(first, _expected(kernel.op, case.name))
    notes = [verdict.note] if verdict.note else []
    repeats = (_repeat(kernel, case, call, launch) for _ in range(REPEATS - 1))
    differing = sum(not _same_bits(repeat, first) for repeat in repeats)
    if differing:
        notes.append(f"{differing} of {REPEATS - 1} repeats differ in bits")
    notes += [note for guard in guards if (note := _damage(guard))]
    if device.type == "cuda":
        notes += _check_replay(kernel, case, device)
    return dataclasses.replace(verdict, passed=verdict.passed and not notes, note="; ".join(notes))


def check_depths(kernel: Kernel, heads: int, num_rows: int, device: torch.device) -> Verdict:
    """Row-for-row the same bits at every depth that divides a request's rows, flattened, and ragged.

    The rows of two requests are cut into shorter requests over the same pages.
    """
    shape = IndexLogitsShape(requests=2, context=_DEPTH_CONTEXT, next_n=num_rows, heads=heads)
    workload = make_workload(shape, device)
    call = workload.call
    whole = call.run(kernel)
    verdict = workload.judge(whole)
    differing = []
    ragged = [8, 3, 0, 5, 1, 7, num_rows - 24]
    for counts in (*([n] * (num_rows // n) for n in range(1, 9) if num_rows % n == 0), ragged):
        part = _cut(call, tuple(counts * 2), num_rows)
        if not _same_bits(part.run(kernel), whole):
            differing.append(str(counts))
    note = f"other bits at depths {', '.join(differing)}" if differing else ""
    return dataclasses.replace(verdict, passed=verdict.passed and not differing, note=verdict.note or note)


def _list_checks(ops: Sequence[str], device: torch.device) -> Iterator[_Check]:
    """Per kernel and case that it takes: op, kernel, case and True, as a passed row has them, and what checks it."""
    hardware = describe_device(device)
    for op in ops:
        for kernel, case in itertools.product(discover(op), op_calls.list_cases(op)):
            if hardware.arch in kernel.arches and kernel.rejects(case.problem(hardware)) is None:
                yield _named(kernel, case.name, functools.partial(check_case, kernel, case, device))
        if op == "index_logits" and device.type != "cpu":
            yield from _list_depth_checks(device)


def _list_depth_checks(device: torch.device) -> Iterator[_Check]:
    hardware = describe_device(device)
    for kernel, (heads, rows) in itertools.product(discover("index_logits"), _DEPTH_ROWS):
        is_ours = not kernel.allocates_output and kernel.name != "reference" and hardware.arch in kernel.arches
        if is_ours and kernel.rejects(_depth_problem(heads, rows, hardware)) is None:
            check = functools.partial(check_depths, kernel, heads, rows, device)
            yield _named(kernel, f"depths of {rows} rows, {heads} heads", check)


def _named(kernel: Kernel, case: str, check: Callable[[], Verdict]) -> _Check:
    names = {"op": kernel.op, "kernel": kernel.name, "case": case}
    return (*names.values(), True), lambda: {**names, **dataclasses.asdict(_attempt(check))}


def _depth_problem(heads: int, rows: int, hardware: DeviceInfo) -> Any:
    case = IndexLogitsCase(name="depths", row_counts=(rows,) * 2, context_lens=(_DEPTH_CONTEXT,) * 2, heads=heads)
    return case.problem(hardware)


def _attempt(check: Callable[[], Verdict]) -> Verdict:
    try:
        return check()
    except Exception as error:  # one broken kernel must not hide what the others do
        return Verdict(passed=False, note=" ".join(f"{type(error).__name__}: {error}".split())[:300])


def _guarded_call(op: str, case: Any, device: torch.device, guards: list[PoisonedOutput]) -> OpCall:
    """The case's call, its outputs inside memory that ``guards`` watch."""

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if len(shape) < 2:
            return op_calls.allocate_plainly(shape, dtype, device)
        padding = _ROW_PADDING if op in _OPS_WITH_STRIDED_OUTPUTS else 0
        guards.append(poison_output(shape, dtype, device, row_padding=padding))
        return guards[-1].view

    return op_calls.call_of_case(op, case, device, allocate=allocate)


@functools.lru_cache(maxsize=128)
def _expected(op: str, name: str) -> Results:
    """The reference's results on the CPU for the case of that name."""
    case = next(case for case in op_calls.list_cases(op) if case.name == name)
    return op_calls.call_of_case(op, case, "cpu").run(op_calls.find_kernel(op, "reference"))


def _repeat(kernel: Kernel, case: Any, call: OpCall, launch: Callable[[], Any]) -> Results:
    """One more launch; where inputs are changed in place, a new one on inputs as they were."""
    if call.outputs:
        return call.results_of(launch)
    return op_calls.call_of_case(kernel.op, case, call.device).run(kernel)


def _check_replay(kernel: Kernel, case: Any, device: torch.device) -> list[str]:
    """Capture plan and launch, overwrite every input, replay, and compare with an eager run on those inputs."""
    call, other = op_calls.call_of_case(kernel.op, case, device), _other_inputs(kernel.op, case, device)
    if not call.problem.num_rows:
        return []
    call.launcher(kernel)()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.launcher(kernel)()
    _overwrite(call.arguments, other.arguments)
    call.poison()
    graph.replay()
    torch.cuda.synchronize()
    replayed = {name: tensor.clone() for name, tensor in call.read().items()}
    return [] if _same_bits(replayed, other.run(kernel)) else ["a replayed graph differs in bits from an eager run"]


def _other_inputs(op: str, case: Any, device: torch.device) -> OpCall:
    """The case drawn anew, its rows seeing half as much."""
    call = op_calls.call_of_case(op, case, device, seed=1)
    if "visible_lens" in call.arguments:
        call.arguments["visible_lens"].div_(2, rounding_mode="floor")
    return call


def _overwrite(arguments: dict[str, Any], others: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value.copy_(others[name])
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [field.name for field in dataclasses.fields(value)]
            _overwrite(
                {field: getattr(value, field) for field in fields},
                {field: getattr(others[name], field) for field in fields},
            )


def _cut(call: OpCall, counts: tuple[int, ...], num_rows: int) -> OpCall:
    """The same rows as shorter requests, each over the pages of the request it was cut from."""
    device = call.arguments["q"].device
    starts = [0, *itertools.accumulate(counts)][:-1]
    owners = [min(start // num_rows, 1) for start in starts]
    uniform = set(counts)
    problem = dataclasses.replace(
        call.problem,
        num_requests=len(counts),
        next_n=counts[0] if len(uniform) == 1 else None,
        max_rows=max(counts),
    )
    arguments = {
        **call.arguments,
        "query_offsets": offsets_of(counts, device),
        "page_table": call.arguments["page_table"][owners],
    }
    return dataclasses.replace(call, problem=problem, arguments=arguments)


def _damage(guard: PoisonedOutput) -> str:
    try:
        guard.assert_untouched_around()
    except AssertionError as error:
        return str(error)
    return ""


def _same_bits(actual: Results, expected: Results) -> bool:
    return all(torch.equal(_bits(actual[name]), _bits(wanted)) for name, wanted in expected.items())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Integers that are equal where the bits are, and for any two NaN."""
    if not tensor.is_floating_point():
        return tensor
    return torch.nan_to_num(tensor.float(), nan=0.125, posinf=3e38, neginf=-3e38).view(torch.int32)
