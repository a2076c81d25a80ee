"""Sparse attention by FlashMLA's kernels for Hopper, the only file that imports it.

Hides how FlashMLA is found, that it checks no slot, and that it has no lower end: a row without a slot has lse +inf.
Contract and maths: ``reference.py``. FlashMLA's own: ``flash_mla_with_kvcache`` of the ``sgl-flash-mla`` package, which
keeps the kernels for SM90 that FlashMLA itself dropped (``use_legacy=True``).

Fewer heads than 64 it pads to 64, so those are left to the other kernels.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from nextn.cache_format import LATENT_DIM
from nextn.hardware import Arch, import_library
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops.sparse_mla.problem import SparseMlaProblem

_MODULE = "flash_mla"
_HEADS = (64, 128)
_INDEX_BLOCK = 64  # its tiles of slots
_FEW_ROWS = 16  # up to which the Gluon kernel starts faster; 4 and 64 were timed


def find_library() -> ModuleType | str:
    """The installed FlashMLA, or why there is none to use.

    The import is tried once; a module already in ``sys.modules`` is looked at anew whenever it is another one.
    """
    return _inspect_module(sys.modules.get(_MODULE))


def rejects(problem: SparseMlaProblem) -> str | None:
    """Why FlashMLA cannot take ``problem``; None if it can."""
    if problem.deterministic:
        return "deterministic mode needs splits of a fixed size, and FlashMLA's depend on the batch"
    if problem.cache != "fp8":
        return f"latent cache {problem.cache} is not fp8"
    if problem.dtype != "bfloat16":
        return f"queries are {problem.dtype}, not bfloat16"
    if problem.heads not in _HEADS:
        return f"{problem.heads} query heads are not 64 or 128; it would pad them"
    if problem.page_size != 64:
        return f"page_size {problem.page_size} is not 64"
    if problem.topk % _INDEX_BLOCK:
        return f"k {problem.topk} is no multiple of {_INDEX_BLOCK}"
    if problem.num_rows == 0:
        return "nothing to attend from: 0 rows"
    library = find_library()
    return library if isinstance(library, str) else None


def plan(problem: SparseMlaProblem, *, device: torch.device | str) -> Any:
    """FlashMLA's schedule, which its first call fills; it depends on sizes alone, so every layer may share it."""
    return _require_library().get_mla_metadata()[0]


def prepare(
    problem: SparseMlaProblem,
    *,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    query_offsets: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    plan: OpPlan | None = None,
) -> Launch:
    """Describe the call; tensors as in ``sparse_mla``. With ``out=None`` the launch returns FlashMLA's own tensor."""
    library = _require_library()
    arguments = {
        "attend": library.flash_mla_with_kvcache,
        "schedule": library.get_mla_metadata()[0] if plan is None or plan.data is None else plan.data,
        "q": q.contiguous().unsqueeze(1),
        "kv_cache": kv_cache.unsqueeze(2),
        "indices": indices,
        "scale": scale,
        "out": out,
        "lse": lse,
    }
    return Launch(function=_run, arguments=arguments)


def rank(problem: SparseMlaProblem) -> int:
    """Preference, by what was timed side by side on an H100 (benchmarks/results/ops.jsonl).

    At 128 heads and from 64 rows on it takes 97 to 361 us where the Gluon kernel takes 106 to 400; 4 rows take 27.2 and
    23.9; at 64 heads 228 and 244 against 206 and 228, its slots checked and its lse converted in all.
    """
    return 50 if problem.heads == 128 and problem.num_rows > _FEW_ROWS else 35


def _run(
    *,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    schedule: Any,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    out: torch.Tensor | None,
    lse: torch.Tensor,
) -> torch.Tensor:
    slots = _bound_slots(indices, kv_cache.shape[0] * kv_cache.shape[1])
    result, sums = attend(
        q,
        kv_cache,
        None,
        None,
        LATENT_DIM,
        schedule,
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=slots.unsqueeze(1),
        use_legacy=True,
    )
    _lower_lse(sums[:, :, 0], lse)
    result = result[:, 0]
    return result if out is None else out.copy_(result)


def _bound_slots(slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """FlashMLA takes -1 alone for no slot, and reads wherever any other number points."""
    if slots.device.type == "cuda":
        from nextn.ops.sparse_mla._triton_bounds import bound_slots

        return bound_slots(slots, num_slots)
    return torch.where((slots >= 0) & (slots < num_slots), slots, -1)


def _lower_lse(sums: torch.Tensor, lse: torch.Tensor) -> None:
    if sums.device.type == "cuda":
        from nextn.ops.sparse_mla._triton_bounds import lower_lse

        lower_lse(sums.contiguous(), lse)
    else:
        lse.copy_(sums.masked_fill(sums == float("inf"), float("-inf")))


def _require_library() -> ModuleType:
    library = find_library()
    assert not isinstance(library, str), f"planned without FlashMLA: {library}"
    return library


@functools.lru_cache(maxsize=8)
def _inspect_module(module: ModuleType | None) -> ModuleType | str:
    """Look at FlashMLA, importing it if ``module`` is None; cached per module, the failed import too."""
    if module is None:
        imported = import_library(_MODULE, missing="flash_mla is not installed (pip install sgl-flash-mla)")
        return imported if isinstance(imported, str) else _inspect_module(imported)
    attend = getattr(module, "flash_mla_with_kvcache", None)
    if attend is None or "use_legacy" not in inspect.signature(attend).parameters:
        return "the installed flash_mla has no use_legacy argument, and so no kernels for SM90; install sgl-flash-mla"
    has_legacy = getattr(module, "has_legacy", None)
    if has_legacy is None or not has_legacy():
        return "the installed flash_mla was built without its kernels for SM90; install sgl-flash-mla"
    return module


KERNEL = Kernel(
    op="sparse_mla",
    name="flash_mla",
    arches=frozenset({Arch.SM90}),
    rejects=rejects,
    prepare=prepare,
    rank=rank,
    plan=plan,
    allocates_output=True,
)
