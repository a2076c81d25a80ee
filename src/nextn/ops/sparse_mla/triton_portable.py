"""Sparse attention in portable Triton: a program takes heads of one row, or one part of its slots.

Contract and maths: ``reference.py``; device code: ``_triton_attend.py``. Hides how rows are cut on each architecture.

Floor, for R rows of H heads and k slots: ``656 * k * R`` bytes, less what rows of a request share and the L2 cache
serves, and ``2 * R * H * k * 1088`` BF16 operations.
"""

# Triton's types describe device values.
# pyright: reportArgumentType=false
from __future__ import annotations

from dataclasses import replace

import torch
import triton

from nextn.hardware import Arch
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops.sparse_mla._triton_launch import (
    GPU_ARCHES,
    MAX_SPLITS,
    PRODUCTS,
    AttendConfig,
    AttendWorkspace,
    SlotLists,
    allocate_workspace,
    chain,
    describe_launches,
)
from nextn.ops.sparse_mla.problem import SparseMlaProblem

_FEW_HEADS = 32  # as columns of the products: 374 us for 16 heads, 524 as rows padded to 64 (64 x 4 rows on an H100)
_FIXED_SPLIT_LEN = 512  # deterministic mode


def rejects(problem: SparseMlaProblem) -> str | None:
    """Why this kernel cannot take ``problem``; None if it can."""
    if problem.cache not in ("fp8", "bf16"):
        return f"latent cache {problem.cache} is neither fp8 nor bf16"
    if problem.dtype != "bfloat16":
        return f"queries are {problem.dtype}, not bfloat16"
    return None


def choose_config(problem: SparseMlaProblem) -> AttendConfig:
    """Products as large as the output's registers allow; rows split until they fill the multiprocessors."""
    pairs, tile, num_warps = PRODUCTS[problem.arch]
    group = min(pairs, triton.next_power_of_2(problem.heads))
    config = AttendConfig(group=group, least_pairs=pairs, tile=tile, num_warps=num_warps)
    if problem.arch is Arch.SM90 and group <= _FEW_HEADS:
        config = AttendConfig(group=group, transposed=True, tile=32, num_warps=4)
    elif problem.cache == "bf16" and tile == 64:
        config = replace(config, tile=32)  # rows of 1152 bytes, two tiles of them in shared memory
    if problem.deterministic:
        return replace(
            config,
            splits=triton.cdiv(problem.topk, _FIXED_SPLIT_LEN),
            split_len=_FIXED_SPLIT_LEN,
        )
    programs = problem.num_rows * triton.cdiv(problem.heads, group)
    most = min(MAX_SPLITS, triton.cdiv(problem.topk, 4 * config.tile))
    return replace(config, splits=max(1, min(problem.num_sms // max(programs, 1), most)))


def plan(
    problem: SparseMlaProblem,
    *,
    device: torch.device | str,
    config: AttendConfig | None = None,
) -> AttendWorkspace:
    """Scratch memory of one forward."""
    return allocate_workspace(problem, choose_config(problem) if config is None else config, device)


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
    workspace = allocate_workspace(problem, choose_config(problem), q.device) if plan is None else plan.data
    launches = describe_launches(
        problem,
        workspace,
        SlotLists(slots=indices),
        q=q,
        kv_cache=kv_cache,
        scale=scale,
        out=out,
        lse=lse,
    )
    return chain(launches)


KERNEL = Kernel(
    op="sparse_mla",
    name="triton_portable",
    arches=GPU_ARCHES,
    rejects=rejects,
    prepare=prepare,
    configure=choose_config,
    rank=lambda problem: 20,
    plan=plan,
)
