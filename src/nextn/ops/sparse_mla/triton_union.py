"""Sparse attention in Triton that gathers each latent once for all draft tokens of a request that selected it.

Contract and maths: ``reference.py``; device code: ``_triton_union.py`` lists the distinct slots, ``_triton_attend.py``
attends to them with a mask per token. Hides scratch memory and which rows share a list.

Floor: the distinct latent rows of each request once, 656 bytes each, and ``2 * 1088`` BF16 operations for each of them
and each (row, head) pair of its list, selected or not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._rows import Fills
from nextn.ops.sparse_mla._triton_launch import (
    GPU_ARCHES,
    MAX_SHARED_TOPK,
    MAX_SPLITS,
    PRODUCTS,
    AttendConfig,
    UnionWorkspace,
    allocate_union,
    chain,
    count_gathers,
    describe_launches,
    describe_union,
    share_lists,
)
from nextn.ops.sparse_mla.problem import SparseMlaProblem


def rejects(problem: SparseMlaProblem) -> str | None:
    """Why this kernel cannot take ``problem``, or gains nothing by it; None if it can."""
    if problem.cache != "fp8":
        return f"latent cache {problem.cache} is not fp8: a NaN would spoil rows that did not select it"
    if problem.dtype != "bfloat16":
        return f"queries are {problem.dtype}, not bfloat16"
    if problem.deterministic:
        return "a row's bits depend on what the rows beside it select"
    if problem.topk > MAX_SHARED_TOPK:
        return f"{problem.topk} slots per row exceed {MAX_SHARED_TOPK}"
    if problem.num_requests is None or problem.num_rows <= problem.num_requests:
        return "no request has several rows"
    config = choose_config(problem)
    if config.tokens == 1:
        return (
            f"programs of {config.least_pairs} (row, head) pairs hold {problem.heads} heads of one row, so sharing "
            "saves no gather"
        )
    return None


def choose_config(problem: SparseMlaProblem) -> AttendConfig:
    """As many rows to a list as make the fewest gathers; lists split until they fill the multiprocessors."""
    pairs, tile, num_warps = PRODUCTS[problem.arch]
    ways = [
        AttendConfig(
            tokens=t,
            depth=d,
            group=g,
            least_pairs=pairs,
            tile=tile,
            num_warps=num_warps,
        )
        for t, d, g in share_lists(problem, pairs)
    ]
    best = min(ways, key=lambda config: count_gathers(problem, config))
    programs = best.num_lists(problem.num_rows) * triton.cdiv(problem.heads, best.group)
    return replace(best, splits=max(1, min(problem.num_sms // max(programs, 1), MAX_SPLITS)))


def plan(
    problem: SparseMlaProblem,
    *,
    device: torch.device | str,
    config: AttendConfig | None = None,
    fills: Fills | None = None,
) -> UnionWorkspace:
    """Scratch memory of one forward."""
    return allocate_union(problem, choose_config(problem) if config is None else config, device, fills=fills)


def prepare(
    problem: SparseMlaProblem,
    *,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    query_offsets: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: OpPlan | None = None,
) -> Launch:
    """Describe the launches; tensors as in ``sparse_mla``, with ``lse`` float32 ``[R, Hq]``."""
    workspace = allocate_union(problem, choose_config(problem), q.device) if plan is None else plan.data
    lists, launches = describe_union(problem, workspace, indices, kv_cache)
    attend = describe_launches(
        problem,
        workspace.attend,
        lists,
        q=q,
        kv_cache=kv_cache,
        scale=scale,
        out=out,
        lse=lse,
    )
    return chain([*launches, *attend])


KERNEL = Kernel(
    op="sparse_mla",
    name="triton_union",
    arches=GPU_ARCHES,
    rejects=rejects,
    prepare=prepare,
    configure=choose_config,
    rank=lambda problem: 30,
    plan=plan,
    takes_fills=True,
)
