"""Other people's kernels for the same work, measured beside ours and never depended on.

Hides where each is found, how it is called, and what it cannot take. A peer that is absent is a reason, not an error.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextn.bench.op_calls import OpCall, Results, Verdict, poison
from nextn.bench.workloads import Candidate, Workload
from nextn.errors import InputError
from nextn.hardware import Arch
from nextn.ops._pages import request_of_row
from nextn.ops.index_logits import deep_gemm
from nextn.ops.sparse_mla import flash_mla

_TOPK_LIBRARY = "_C_stable_libtorch.abi3.so"
_TOPK_WORKSPACE_BYTES = 2**20
_MOST_COOPERATIVE_ROWS = 64
_SELECTION_TOLERANCE = 1e-3  # of a row's largest logit, by which an approximate selection may fall short
_FOLDERS: list[Path] = []

Launcher = Callable[[], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Someone else's kernel.

    Attributes:
        name: how rows of results call it.
        op: the op of ours that does the same.
        find: None if it can be loaded here, else why not.
        rejects: why it cannot take a workload; None if it can.
        build: tensors to a launch, everything that is done once per forward done.
        read: our op's results from what a launch returned.
        judge: whether those are right; by our op's own limits if None.
        needs_gpu: whether it runs on CUDA devices alone.
    """

    name: str
    op: str
    find: Callable[[], str | None]
    rejects: Callable[[Workload], str | None]
    build: Callable[[Workload], Launcher]
    read: Callable[[Workload, Any], Results]
    judge: Callable[[Workload, Results], Verdict] | None = None
    needs_gpu: bool = True


def add_peers_folder(folder: Path) -> None:
    """Look for peers in a folder too: Python packages of their names, and vLLM's library anywhere below it.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"--peers-dir {folder} is not a folder; give one that holds deep_gemm, flash_mla or vllm_topk")
    sys.path.append(str(folder.resolve()))
    _FOLDERS.append(folder.resolve())


def peer_candidates(workload: Workload) -> tuple[list[Candidate], dict[str, str]]:
    """The peers that can do a workload here, and why each of the others is absent."""
    present, absent = [], {}
    for peer in PEERS:
        if peer.op != workload.call.op:
            continue
        is_on_cpu = workload.call.problem.arch is Arch.CPU
        reason = "runs on CUDA devices alone" if peer.needs_gpu and is_on_cpu else peer.find()
        reason = peer.rejects(workload) if reason is None else reason
        if reason is not None:
            absent[peer.name] = reason
        else:
            present.append(_candidate(peer, workload))
    return present, absent


def _candidate(peer: Peer, workload: Workload) -> Candidate:
    judge = Workload.judge if peer.judge is None else peer.judge
    return Candidate(
        name=peer.name,
        kind="peer",
        build=lambda: peer.build(workload),
        read=lambda result: peer.read(workload, result),
        poison=_poison_all,
        judge=lambda results: judge(workload, results),
    )


def _poison_all(result: Any) -> None:
    for tensor in result if isinstance(result, (tuple, list)) else (result,):
        poison(tensor)


# DeepGEMM


def find_deep_gemm() -> str | None:
    """Why DeepGEMM cannot be used here, or None."""
    build = deep_gemm.find_build()
    return build if isinstance(build, str) else None


def build_deep_gemm(call: OpCall, *, is_native: bool) -> Launcher:
    """DeepGEMM called as its own tests do: the schedule once, then one kernel per layer.

    Native is one row of the page table per request; flattened repeats it for every row, as SGLang does on Hopper.
    """
    problem, tensors = call.problem, call.arguments
    build = deep_gemm.find_build()
    assert not isinstance(build, str), build
    lens, table = tensors["visible_lens"], tensors["page_table"]
    next_n = problem.next_n if is_native else 1
    if is_native:
        lens_2d = lens.view(-1, next_n).amax(dim=1, keepdim=True).expand(-1, next_n).contiguous()
    else:
        lens_2d = lens.view(-1, 1)
        table = table.index_select(0, request_of_row(tensors["query_offsets"], problem.num_rows))
    slots = problem.num_sms // 2 if next_n == 4 and problem.arch is Arch.SM90 else problem.num_sms
    schedule = build.build_metadata(lens_2d, problem.page_size, slots)
    q = tensors["q"].view(-1, next_n, problem.heads, problem.dim)
    cache = tensors["index_cache"].view(-1, problem.page_size, 1, problem.dim + 4)
    arguments = (q, cache, tensors["weights"], lens_2d, table, schedule, problem.max_context)
    return functools.partial(build.score, *arguments)


def rejects_deep_gemm(call: OpCall, *, is_native: bool) -> str | None:
    """Why DeepGEMM cannot take a call natively or flattened."""
    problem = call.problem
    reason = deep_gemm.rejects(problem)
    if reason is None and is_native and not deep_gemm.form(problem).startswith("native"):
        return deep_gemm.form(problem)
    return reason


def _read_logits(workload: Workload, result: torch.Tensor) -> Results:
    workload.call.outputs["out"].copy_(result)
    return workload.call.read()


# Selection


def find_vllm_topk() -> str | None:
    """Load vLLM's kernels; why that failed, or None."""
    return _load_vllm_topk(tuple(_FOLDERS))


@functools.cache
def _load_vllm_topk(folders: tuple[Path, ...]) -> str | None:
    files = [file for folder in folders for file in sorted(folder.rglob(_TOPK_LIBRARY))]
    if not files:
        return f"{_TOPK_LIBRARY} of vLLM 0.33 is in no --peers-dir"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"{files[0]} cannot be loaded: {error}".splitlines()[0]
    return None


def build_vllm_topk(name: str, lens: torch.Tensor, topk: int, longest: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """vLLM's ``cooperative_topk`` or ``persistent_topk``: logits to int32 ``[R, topk]`` positions in no order."""
    out = torch.empty(lens.shape[0], topk, dtype=torch.int32, device=lens.device)
    workspace = torch.zeros(_TOPK_WORKSPACE_BYTES, dtype=torch.uint8, device=lens.device)
    kernel = getattr(torch.ops._C, name)

    def launch(logits: torch.Tensor) -> torch.Tensor:
        kernel(logits, lens, out, workspace, topk, longest)
        return out

    return launch


def _build_vllm(workload: Workload, *, name: str) -> Launcher:
    tensors, problem = workload.call.arguments, workload.call.problem
    select = build_vllm_topk(name, tensors["visible_lens"], problem.topk, problem.num_columns)
    return functools.partial(select, tensors["logits"])


def rejects_vllm_topk(num_rows: int, topk: int, name: str) -> str | None:
    """Why ``name`` cannot select; as vLLM chooses between the two."""
    if topk not in (512, 1024, 2048):
        return f"k {topk} is not 512, 1024 or 2048"
    if name == "cooperative_topk" and num_rows > _MOST_COOPERATIVE_ROWS:
        return f"{num_rows} rows are above {_MOST_COOPERATIVE_ROWS}"
    return None


def _rejects_vllm(workload: Workload, *, name: str) -> str | None:
    problem = workload.call.problem
    return rejects_vllm_topk(problem.num_rows, problem.topk, name)


def _build_torch_topk(workload: Workload) -> Launcher:
    logits, topk = workload.call.arguments["logits"], workload.call.problem.topk
    values = torch.empty(logits.shape[0], topk, device=logits.device)
    places = torch.empty(values.shape, dtype=torch.int64, device=logits.device)
    return lambda: torch.topk(logits, topk, dim=1, out=(values, places)).indices


def _judge_as_sets(workload: Workload, results: Results) -> Verdict:
    """Right if every row's set is the reference's, or differs by logits within the tolerance of the last selected."""
    tensors = workload.call.arguments
    return judge_selection(
        tensors["logits"], tensors["visible_lens"], results["selected"], workload.expected["selected"]
    )


def judge_selection(
    logits: torch.Tensor, visible_lens: torch.Tensor, selected: torch.Tensor, expected: torch.Tensor
) -> Verdict:
    """Compare two selections as sets, of rows that see at least as many logits as are selected.

    Args:
        logits: float32 ``[R, C]``.
        visible_lens: int32 ``[R]``.
        selected: ``[R, k]`` positions in any order.
        expected: ``[R, k]`` positions, the exact selection.
    """
    ours, wanted = selected.long().sort(dim=1).values, expected.long().sort(dim=1).values
    is_inside = (ours >= 0) & (ours < visible_lens[:, None])
    if not (is_inside.all() and (ours[:, 1:] != ours[:, :-1]).all()):
        return Verdict(passed=False, note="positions repeat or lie outside their rows")
    differing = int((ours != wanted).any(dim=1).sum())
    last, largest = (logits.gather(1, wanted).aminmax(dim=1)[part] for part in (0, 1))
    scale = torch.maximum(last.abs(), largest.abs())
    error = float(((last - logits.gather(1, ours).amin(dim=1)) / scale).clamp(min=0).max())
    note = f"{differing} of {len(ours)} rows select another set" if differing else ""
    return Verdict(passed=error <= _SELECTION_TOLERANCE, error=error, note=note)


# FlashMLA


def find_flash_mla() -> str | None:
    """Why FlashMLA for SM90 (``sgl-flash-mla``) cannot be used here, or None."""
    library = flash_mla.find_library()
    return library if isinstance(library, str) else None


def padded_heads(heads: int) -> int | None:
    """Heads that FlashMLA runs ``heads`` as: 64 or 128; None if there are more."""
    return next((padded for padded in (64, 128) if heads <= padded), None)


def build_flash_mla(q: torch.Tensor, kv_cache: torch.Tensor, indices: torch.Tensor, scale: float) -> Launcher:
    """FlashMLA's sparse FP8 decode, every row a batch entry as SGLang and vLLM call it.

    Heads are padded with zeros here, once: the servers pay for that in every layer, the number of this launch does not
    hold it. A launch returns ``[R, 1, padded, 512]`` and lse ``[R, padded, 1]``.
    """
    library = flash_mla.find_library()
    padded = padded_heads(q.shape[1])
    assert padded is not None
    assert not isinstance(library, str), library
    queries = torch.zeros(q.shape[0], 1, padded, q.shape[2], dtype=q.dtype, device=q.device)
    queries[:, 0, : q.shape[1]] = q
    schedule, _ = library.get_mla_metadata()  # filled by the first call, which is not timed
    return functools.partial(
        library.flash_mla_with_kvcache,
        queries,
        kv_cache.unsqueeze(2),
        None,
        None,
        512,
        schedule,
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=indices.unsqueeze(1),
        use_legacy=True,
    )


def _build_flash_mla(workload: Workload) -> Launcher:
    tensors = workload.call.arguments
    return build_flash_mla(tensors["q"], tensors["kv_cache"], tensors["indices"], tensors["scale"])


def _rejects_flash_mla(workload: Workload) -> str | None:
    problem = workload.call.problem
    if problem.arch is not Arch.SM90:
        return f"its SM90 kernels do not run on {problem.arch}"
    if padded_heads(problem.heads) is None:
        return f"{problem.heads} heads are above 128"
    return None if problem.topk % 64 == 0 else f"k {problem.topk} is no multiple of 64"


def read_flash_mla(result: tuple[torch.Tensor, torch.Tensor], heads: int) -> Results:
    """Its output and lse as ours are: real heads alone, and minus infinity for a row without a slot."""
    out, lse = result
    lse = lse[:, :heads, 0]
    return {"out": out[:, 0, :heads], "lse": torch.where(lse == float("inf"), float("-inf"), lse)}


def _deep_gemm_peer(form: str) -> Peer:
    is_native = form == "native"
    return Peer(
        name=f"deep_gemm_{form}",
        op="index_logits",
        find=find_deep_gemm,
        rejects=lambda workload: rejects_deep_gemm(workload.call, is_native=is_native),
        build=lambda workload: build_deep_gemm(workload.call, is_native=is_native),
        read=_read_logits,
    )


def _vllm_peer(name: str) -> Peer:
    return Peer(
        name=f"vllm_{name}",
        op="select_topk",
        find=find_vllm_topk,
        rejects=functools.partial(_rejects_vllm, name=name),
        build=functools.partial(_build_vllm, name=name),
        read=lambda _, result: {"selected": result},
        judge=_judge_as_sets,
    )


PEERS = (
    _deep_gemm_peer("native"),
    _deep_gemm_peer("flattened"),
    _vllm_peer("cooperative_topk"),
    _vllm_peer("persistent_topk"),
    Peer(
        name="torch_topk",
        op="select_topk",
        find=lambda: None,
        rejects=lambda workload: None,
        build=_build_torch_topk,
        read=lambda _, result: {"selected": result},
        judge=_judge_as_sets,
        needs_gpu=False,
    ),
    Peer(
        name="flash_mla_direct",
        op="sparse_mla",
        find=find_flash_mla,
        rejects=_rejects_flash_mla,
        build=_build_flash_mla,
        read=lambda workload, result: read_flash_mla(result, workload.call.problem.heads),
    ),
)


def peer_reasons() -> Mapping[str, str | None]:
    """Per peer, why it cannot be used here, or None."""
    return {peer.name: peer.find() for peer in PEERS}
