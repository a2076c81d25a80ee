"""Index logits by DeepGEMM, the only file that imports it.

Hides which of DeepGEMM's two API generations is installed, what it takes on which GPU, and the flattening of the rest.
Contract and maths: ``reference.py``. DeepGEMM's own: ``csrc/apis/attention.hpp`` of deepseek-ai/DeepGEMM.

Generation A has ``fp8_paged_mqa_logits(..., clean_logits, indices)``; generation B has only
``fp8_fp4_paged_mqa_logits((q, None), ...)`` without ``clean_logits``. Versions say nothing, so signatures decide.
"""

from __future__ import annotations

import enum
import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nextn.hardware import Arch, import_library
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._pages import request_of_row
from nextn.ops.index_logits._schedule import PagedSchedule
from nextn.ops.index_logits.problem import IndexLogitsProblem

_MODULE = "deep_gemm"
_SM90_HEADER = Path("include/deep_gemm/impls/sm90_fp8_paged_mqa_logits.cuh")
# Builds that take four rows on SM90 split them over the two CTAs of a cluster; the shipped header shows it.
_SPLITS_ROWS_OVER_CLUSTER = re.compile(r"kNextN\s*/\s*kNumKVMulticast")
_HEAD_DIMS = (32, 64, 128)
_NATIVE_RANK = 30
_FLATTENED_RANK = 10  # below any kernel that reads a request's keys once for all of its rows


class _Generation(enum.Enum):
    A = "A"
    B = "B"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Build:
    """An installed DeepGEMM.

    Attributes:
        generation: which API it has.
        build_metadata: its ``get_paged_mqa_logits_metadata``.
        score: its paged logits function, called as generation A or B wants it.
        has_sm90_clusters: whether it takes next_n 4 and pages of 32 on SM90.
    """

    generation: _Generation
    build_metadata: Callable[..., torch.Tensor]
    score: Callable[..., torch.Tensor]
    has_sm90_clusters: bool


def find_build() -> _Build | str:
    """The installed DeepGEMM, or why there is none to use.

    The import is tried once; a module already in ``sys.modules`` is looked at anew whenever it is another one.
    """
    return _inspect_module(sys.modules.get(_MODULE))


def rejects(problem: IndexLogitsProblem) -> str | None:
    """Why DeepGEMM cannot take ``problem``; None if it can, natively or flattened."""
    reason = _reject_sizes(problem)
    if reason is not None:
        return reason
    build = find_build()
    return build if isinstance(build, str) else _reject_for_build(problem, build)


def build_schedule(
    problem: IndexLogitsProblem,
    *,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
) -> PagedSchedule:
    """Build the lengths and the schedule of one forward; device operations only, so a CUDA graph can capture it.

    Args:
        problem: sizes; must not be rejected.
        query_offsets: int32 ``[B + 1]``.
        visible_lens: int32 ``[R]``.
        page_table: int32 ``[B, P]``.

    DeepGEMM's scheduler reads out of bounds when every length is 0, and writes as many columns as a length says, so
    its own lengths, and only those, are held between 1 and ``max_context``. All rows of a request get the request's
    largest: DeepGEMM does not mask per row, and reads the last column only.
    """
    build = _require_build()
    lens = visible_lens.clamp(min=1, max=problem.max_context).contiguous()
    native_n = _native_rows(problem, build)
    if native_n is not None:
        largest = lens.view(problem.num_requests, native_n).amax(dim=1, keepdim=True)
        lens_2d = largest.expand(-1, native_n).contiguous()
    else:
        lens_2d = lens.view(-1, 1)
        page_table = page_table.index_select(0, request_of_row(query_offsets, problem.num_rows))
    slots = _num_slots(problem, native_n or 1)
    return PagedSchedule(
        context_lens=lens_2d,
        metadata=build.build_metadata(lens_2d, problem.page_size, slots),
        page_table=page_table,
        is_native=native_n is not None,
    )


def prepare(
    problem: IndexLogitsProblem,
    *,
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    query_offsets: torch.Tensor,
    visible_lens: torch.Tensor,
    page_table: torch.Tensor,
    out: torch.Tensor | None,
    plan: OpPlan | None = None,
) -> Launch:
    """Describe the call; tensors as in ``index_logits``.

    Without a plan one is built here, for this call alone. With ``out=None`` the launch returns DeepGEMM's own tensor,
    a view of rows ``align(max_context, 256)`` apart.
    """
    schedule: PagedSchedule | None = plan.data if plan is not None else None
    if schedule is None:
        schedule = build_schedule(
            problem, query_offsets=query_offsets, visible_lens=visible_lens, page_table=page_table
        )
    rows, next_n = schedule.context_lens.shape
    arguments = {
        "score": _require_build().score,
        "q": q.contiguous().view(rows, next_n, problem.heads, problem.dim),
        "cache": index_cache.view(index_cache.shape[0], problem.page_size, 1, problem.dim + 4),
        "weights": weights.contiguous(),
        "schedule": schedule,
        "max_context": problem.max_context,
        "out": out,
    }
    return Launch(function=_run, arguments=arguments)


def rank(problem: IndexLogitsProblem) -> int:
    """Native calls beat everything portable; flattened ones lose to any native kernel."""
    return _FLATTENED_RANK if _native_rows(problem, _require_build()) is None else _NATIVE_RANK


def form(problem: IndexLogitsProblem) -> str:
    """How ``problem`` would run: ``native [64, 4]``, or flattened and why."""
    build = _require_build()
    native_n = _native_rows(problem, build)
    if native_n is not None:
        return f"native [{problem.num_requests}, {native_n}]"
    flattened = f"flattened to [{problem.num_rows}, 1]"
    if problem.next_n is None:
        return f"{flattened}: the requests have different numbers of rows"
    allowed = ", ".join(str(n) for n in _sm90_next_ns(build))
    return f"{flattened}: next_n {problem.next_n} on {problem.arch} is not among {allowed}"


def _run(
    *,
    score: Callable[..., torch.Tensor],
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    schedule: PagedSchedule,
    max_context: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    logits = score(q, cache, weights, schedule.context_lens, schedule.page_table, schedule.metadata, max_context)
    return logits if out is None else out.copy_(logits)


def _reject_sizes(problem: IndexLogitsProblem) -> str | None:
    if problem.deterministic:
        return "deterministic mode runs one kernel at every depth, and DeepGEMM's differ between depths"
    if problem.cache != "fp8":
        return f"index cache {problem.cache} is not fp8"
    if problem.out_dtype != "float32":
        return f"logits of {problem.out_dtype} are not float32"
    if problem.dim not in _HEAD_DIMS:
        return f"head_dim {problem.dim} is not one of {_listed(_HEAD_DIMS)}"
    if problem.num_rows == 0 or problem.max_context == 0:
        return f"nothing to score: {problem.num_rows} rows over a context of {problem.max_context}"
    return None


def _reject_for_build(problem: IndexLogitsProblem, build: _Build) -> str | None:
    is_sm100 = problem.arch.is_sm100_family
    if is_sm100 and build.generation is _Generation.B:
        return (
            "this build (no clean_logits argument) takes on SM100 only MX-scaled queries with bfloat16 weights and "
            "per-row indices, not FP32 scales folded into FP32 weights"
        )
    heads = (8, 16, 32, 64) if is_sm100 else (32, 64)
    if problem.heads not in heads:
        return f"{problem.heads} index heads on {problem.arch} are not one of {_listed(heads)}"
    page_sizes = (32, 64) if is_sm100 or build.has_sm90_clusters else (64,)
    if problem.page_size not in page_sizes:
        return f"page_size {problem.page_size} on {problem.arch} is not one of {_listed(page_sizes)}"
    return None


def _native_rows(problem: IndexLogitsProblem, build: _Build) -> int | None:
    """next_n if all of a request's rows can be scored in one go, else None."""
    if problem.next_n is None:
        return None
    if problem.arch.is_sm100_family or problem.next_n in _sm90_next_ns(build):
        return problem.next_n
    return None


def _sm90_next_ns(build: _Build) -> tuple[int, ...]:
    return (1, 2, 4) if build.has_sm90_clusters else (1, 2)


def _num_slots(problem: IndexLogitsProblem, next_n: int) -> int:
    """Schedule slots: one per SM, or one per cluster of two where four rows share a cluster."""
    return problem.num_sms // 2 if problem.arch is Arch.SM90 and next_n == 4 else problem.num_sms


def _require_build() -> _Build:
    build = find_build()
    assert not isinstance(build, str), f"planned without DeepGEMM: {build}"
    return build


@functools.lru_cache(maxsize=8)
def _inspect_module(module: ModuleType | None) -> _Build | str:
    """Look at DeepGEMM, importing it if ``module`` is None; cached per module, the failed import too."""
    if module is None:
        imported = import_library(_MODULE, missing="deep_gemm is not installed")
        return imported if isinstance(imported, str) else _inspect_module(imported)
    build_metadata = getattr(module, "get_paged_mqa_logits_metadata", None)
    if build_metadata is None:
        return "the installed deep_gemm has no get_paged_mqa_logits_metadata; it has no paged logits"
    legacy = getattr(module, "fp8_paged_mqa_logits", None)
    current = getattr(module, "fp8_fp4_paged_mqa_logits", None)
    if legacy is not None and {"clean_logits", "indices"} <= _parameters(legacy):
        generation, score = _Generation.A, functools.partial(_score_a, legacy)
    elif legacy is None and current is not None and _is_generation_b(_parameters(current)):
        generation, score = _Generation.B, functools.partial(_score_b, current)
    else:
        return "the installed deep_gemm has a paged logits function of an unknown signature; install a newer one"
    return _Build(
        generation=generation,
        build_metadata=build_metadata,
        score=score,
        has_sm90_clusters=_has_sm90_clusters(module),
    )


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Names of a function's parameters, from its signature, or from the docstring that pybind11 writes."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set(re.findall(r"(\w+)\s*:", function.__doc__ or ""))


def _is_generation_b(parameters: set[str]) -> bool:
    return {"schedule_meta", "max_context_len"} <= parameters and not {"clean_logits", "logits_dtype"} & parameters


def _has_sm90_clusters(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if file is None:
        return False
    header = Path(file).parent / _SM90_HEADER
    return header.is_file() and _SPLITS_ROWS_OVER_CLUSTER.search(header.read_text()) is not None


def _score_a(function: Callable[..., torch.Tensor], q: torch.Tensor, *others: Any) -> torch.Tensor:
    return function(q, *others, clean_logits=False)


def _score_b(function: Callable[..., torch.Tensor], q: torch.Tensor, *others: Any) -> torch.Tensor:
    return function((q, None), *others)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)


KERNEL = Kernel(
    op="index_logits",
    name="deep_gemm",
    arches=frozenset({Arch.SM90, Arch.SM100, Arch.SM103}),
    rejects=rejects,
    prepare=prepare,
    rank=rank,
    plan=build_schedule,
    form=form,
    allocates_output=True,
)
