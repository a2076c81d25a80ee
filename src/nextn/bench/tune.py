"""``tune``: one kernel under other configurations than it would choose, each checked and then timed in turns.

Hides how configurations are written: fields and values as in ``stages=4|8 turns=2``, every combination of which is
tried in place of what the kernel would choose.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nextn.bench.ops import check_rounds, describe_shape, open_clock, time_candidates
from nextn.bench.rows import Row, collect_rows, open_device
from nextn.bench.shapes import choose_shapes
from nextn.bench.workloads import Candidate, Workload, candidate_of, make_workload
from nextn.errors import InputError
from nextn.ops._kernel import OPS, Kernel, discover
from nextn.testing.timing import Clock

FILE_NAME = "tuning.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions:
    """What to try and where to keep it.

    Attributes:
        op: the op.
        kernel: one of its kernels that has configurations.
        configs: what differs from the kernel's own choice, each as ``field=value|value field=value``; Python literals.
        grid: as in ``bench ops``.
        only: shapes whose name contains this.
        out: folder whose ``tuning.jsonl`` is appended to; nothing is stored if None.
        commit: the commit these files are of, where git cannot say.
        rounds: turns per configuration.
        seconds: start no shape after this long.
    """

    op: str
    kernel: str
    configs: tuple[str, ...] = ()
    grid: str = "targets"
    only: str = ""
    out: Path | None = None
    commit: str | None = None
    rounds: int = 15
    seconds: float = 500.0


def tune_kernel(options: TuneOptions, *, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Time a kernel's own choice and every configuration asked for, side by side on every shape.

    Returns:
        Rows as of ``bench ops``, with ``config``: what differs from the choice, nothing for the choice itself.

    Raises:
        InputError: an unknown op, kernel or grid, or a configuration that cannot be read.
        UnsupportedError: there is no GPU here.
    """
    check_rounds(options.rounds)
    kernel = _find_tunable(options.op, options.kernel)
    changes = [{}, *itertools.chain.from_iterable(map(parse_config, options.configs))]
    shapes = choose_shapes(options.grid, [options.op], options.only)
    device = open_device("cuda", instead="read benchmarks/results")
    run, clock = open_clock(device, options.commit)
    return collect_rows(
        [((shape.name,), shape) for shape in shapes],
        lambda shape: tune_shape(kernel, shape, changes, device, clock, rounds=options.rounds),
        run={**run, "tuned": " ; ".join(options.configs)},
        keys=("shape", "tuned"),
        file=options.out / FILE_NAME if options.out else None,
        seconds=options.seconds,
        on_row=on_row,
    )


def tune_shape(
    kernel: Kernel, shape: Any, changes: Sequence[Mapping[str, Any]], device: torch.device, clock: Clock, *, rounds: int
) -> Iterator[Row]:
    """Rows of one shape, a configuration each; one that cannot be built or is wrong says why and has no time."""
    workload = make_workload(shape, device)
    candidates = [_candidate(kernel, workload, change) for change in changes]
    timed = time_candidates(candidates, clock, rounds=rounds, floor_us=shape.cost.floor_us)
    for change, (_, row) in zip(changes, timed):
        config = {name: list(value) if isinstance(value, tuple) else value for name, value in change.items()}
        described = {"stage": "tune", "kernel": kernel.name, "kind": "ours", "chosen": not change, "config": config}
        yield {**describe_shape(shape), **described, **row}


def parse_config(text: str) -> list[dict[str, Any]]:
    """Every combination of the values that a text gives each field.

    Raises:
        InputError: a part is not ``field=value``, or a value is no Python literal.

    Example:
        >>> parse_config("stages=4|8 rows=(2,2)")
        [{'stages': 4, 'rows': (2, 2)}, {'stages': 8, 'rows': (2, 2)}]
    """
    fields = {}
    for part in text.split():
        name, equals, values = part.partition("=")
        if not name or not equals:
            raise InputError(f"{part!r} in config {text!r} is not field=value")
        try:
            fields[name] = [ast.literal_eval(value) for value in values.split("|")]
        except (SyntaxError, ValueError):
            raise InputError(f"{values!r} in config {text!r} holds no Python literal, such as 4 or (2,2)") from None
    return [dict(zip(fields, combination)) for combination in itertools.product(*fields.values())]


def _find_tunable(op: str, name: str) -> Kernel:
    if op not in OPS:
        raise InputError(f"unknown op {op!r}; use one of {list(OPS)}")
    tunable = {kernel.name: kernel for kernel in discover(op) if kernel.configure is not None}
    if name not in tunable:
        raise InputError(f"no kernel {name!r} of {op} has configurations to try; use one of {sorted(tunable)}")
    return tunable[name]


def _candidate(kernel: Kernel, workload: Workload, change: Mapping[str, Any]) -> Candidate:
    call = workload.call

    def build() -> Callable[[], Any]:
        assert kernel.configure is not None
        config = kernel.configure(call.problem)
        unknown = sorted(set(change) - {field.name for field in dataclasses.fields(config)})
        if unknown:
            names = [field.name for field in dataclasses.fields(config)]
            raise InputError(f"{type(config).__name__} has no fields {unknown}; it has {names}")
        return call.launcher(kernel, dataclasses.replace(config, **change))

    return dataclasses.replace(candidate_of(kernel, workload), build=build)
