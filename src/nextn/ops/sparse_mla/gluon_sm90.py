"""Sparse attention for Hopper in Gluon: latents are decoded while the tensor cores work, and gathered once per request.

Contract and maths: ``reference.py``; device code: ``_gluon_attend.py``, and ``_gluon_unite.py`` for the lists of what
the draft tokens of a request selected. Hides scratch memory and which rows share a list.

Floor, for B requests of n rows, H heads and k slots of 656 bytes: the distinct rows once, and BF16 operations
``2 * B * n * H * k * 1088``, in products of 64 (row, head) pairs. 64 x 4 x 16 with 2660 distinct slots a request is
112 MB, 37 us at 3.0 TB/s; 64 x 4 x 64 is 73 GFLOP, 97 us at 750 TFLOP/s. Of 96 us for the former, the lists take 7
and putting the splits together 2 to 3.
"""

# Triton's types describe device values.
# pyright: reportArgumentType=false, reportReturnType=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton

from nextn.cache_format import LATENT_DIM
from nextn.hardware import Arch
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops.sparse_mla._gluon_attend import _attend_sm90_kernel
from nextn.ops.sparse_mla._gluon_unite import _unite_kernel
from nextn.ops.sparse_mla._triton_launch import (
    AttendConfig,
    SlotLists,
    UnionWorkspace,
    allocate_union,
    chain,
    describe_launches,
    expect_len,
    share_lists,
)
from nextn.ops.sparse_mla.problem import SparseMlaProblem

_PAIRS = 64  # rows of a product
_TILE = 64
_MAX_SPLITS = 32
_MAX_TOKENS = 4  # whose slots are 8 to a thread; 16 do not fit its registers
_FIXED_SPLIT_LEN = 512  # deterministic mode
# Microseconds on an H100, for choosing how to cut. 16 x 4 x 16 took 61.1 with each row on its own in 2 splits, 67.3 in
# 4, and 48.5 with shared lists in 8; 64 x 2 x 16 took 107.0 and, shared in 2 splits, 89.6; 64 x 4 x 64 took 215.8.
_LAUNCH_TIME = 7.0
_PROGRAM_TIME = 4.5
_PAIR_TIME = 0.14
_TILE_TIME = 2.8
_COMBINE_TIME = 1.5
_UNION_TIME = 6.0
_BYTES_PER_TIME = 1e7  # written and read in the L2 cache


def rejects(problem: SparseMlaProblem) -> str | None:
    """Why this kernel cannot take ``problem``; None if it can."""
    if problem.cache != "fp8":
        return f"latent cache {problem.cache} is not fp8"
    if problem.dtype != "bfloat16":
        return f"queries are {problem.dtype}, not bfloat16"
    return None


def choose_config(problem: SparseMlaProblem) -> AttendConfig:
    """The fastest cut by arithmetic, or, in deterministic mode, one that depends on the heads and k alone."""
    if problem.deterministic:
        tokens, depth, group = next(share_lists(problem, _PAIRS, _MAX_TOKENS))
        splits = triton.cdiv(problem.topk, _FIXED_SPLIT_LEN)
        return _config(
            tokens=tokens,
            depth=depth,
            group=group,
            splits=splits,
            split_len=_FIXED_SPLIT_LEN,
        )
    return min(_candidates(problem), key=lambda config: _estimate(problem, config))


def plan(
    problem: SparseMlaProblem,
    *,
    device: torch.device | str,
    config: AttendConfig | None = None,
) -> UnionWorkspace:
    """Scratch memory of one forward."""
    config = choose_config(problem) if config is None else config
    # Half the bytes of float32 parts, for a rounding that stays within the op's limits.
    return allocate_union(problem, config, device, has_tables=False, part_dtype=torch.bfloat16)


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
    workspace = _plan_here(problem, q.device) if plan is None else plan.data
    lists, launches = _describe_union(problem, workspace, indices, kv_cache)
    attend, *combine = describe_launches(
        problem,
        workspace.attend,
        lists,
        q=q,
        kv_cache=kv_cache,
        scale=scale,
        out=out,
        lse=lse,
    )
    attend = _for_hopper(problem, attend, workspace.attend.config)
    if launches:
        attend = _as_dependent(attend)
    return chain([*launches, attend, *(_as_dependent(launch, IS_DEPENDENT=True) for launch in combine)])


def _plan_here(problem: SparseMlaProblem, device: torch.device) -> UnionWorkspace:
    return plan(problem, device=device)


def form(problem: SparseMlaProblem) -> str:
    """How ``problem`` would run, for ``explain``."""
    config = choose_config(problem)
    shared = "each row on its own" if config.tokens == 1 else f"slots of {config.tokens} rows gathered once"
    return f"{shared}, {config.group} heads a program, lists in {config.splits}"


def _describe_union(
    problem: SparseMlaProblem, workspace: UnionWorkspace, indices: torch.Tensor, kv_cache: torch.Tensor
) -> tuple[SlotLists, tuple[Launch, ...]]:
    """The lists to attend to, and the launch that makes them if rows share them."""
    if workspace.slots is None or workspace.masks is None or workspace.counts is None:
        return SlotLists(slots=indices), ()
    config = workspace.attend.config
    topk_block = max(triton.next_power_of_2(problem.topk), 32)
    num_entries = topk_block * triton.next_power_of_2(config.tokens)
    num_warps = max(1, min(32, num_entries // 128))
    arguments = {
        "indices_ptr": indices,
        "slots_ptr": workspace.slots,
        "masks_ptr": workspace.masks,
        "counts_ptr": workspace.counts,
        "indices_stride": indices.stride(0),
        "num_rows": problem.num_rows,
        "topk": problem.topk,
        "num_slots": kv_cache.shape[0] * problem.page_size,
        "TOKENS": config.tokens,
        "DEPTH": config.depth,
        "TOPK_BLOCK": topk_block,
        "ENTRIES": num_entries,
        "NUM_WARPS": num_warps,
    }
    unite = Launch(
        function=_unite_kernel,
        arguments=arguments,
        grid=(workspace.counts.shape[0],),
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )
    lists = SlotLists(slots=workspace.slots, masks=workspace.masks, counts=workspace.counts)
    return lists, (unite,)


def _for_hopper(problem: SparseMlaProblem, attend: Launch, config: AttendConfig) -> Launch:
    """The portable launch's arguments handed to the Hopper kernel."""
    unknown = ("PAIRS", "TILE", "IS_FP8", "TRANSPOSED", "BY_PTX", "DOT_DTYPE", "LIST_BLOCK", "NUM_STAGES", "age_ptr")
    arguments = {name: value for name, value in attend.arguments.items() if name not in unknown}
    arguments["codes_ptr"] = arguments["codes_ptr"].view(torch.int32)
    arguments["IS_DENSE"] = arguments["page_stride"] == problem.page_size * 656
    return Launch(
        function=_attend_sm90_kernel,
        arguments=arguments,
        grid=attend.grid,
        options={"num_warps": config.num_warps, "enable_fp_fusion": True},
    )


def _as_dependent(launch: Launch, **arguments: bool) -> Launch:
    """Set up while the launch before it, one of our own, still runs; the kernel itself waits for that one's end.

    Measured at 64 x 4 x 16 (90 % overlap): 105.4 us without, 100.7 with; then 97.4, and 96.4 once the attention let
    its dependent start early too.
    """
    return replace(launch, arguments={**launch.arguments, **arguments}, options={**launch.options, "launch_pdl": True})


def _candidates(problem: SparseMlaProblem) -> Iterator[AttendConfig]:
    """Every number of rows that may share a list, and every number of splits."""
    for tokens, depth, group in share_lists(problem, _PAIRS, _MAX_TOKENS):
        most = triton.cdiv(round(expect_len(problem, tokens)), 2 * _TILE)
        for splits in range(1, min(most, _MAX_SPLITS) + 1):
            yield _config(tokens=tokens, depth=depth, group=group, splits=splits)


def _config(**cut: int | None) -> AttendConfig:
    return AttendConfig(tile=_TILE, num_warps=4, **cut)


def _estimate(problem: SparseMlaProblem, config: AttendConfig) -> float:
    """Microseconds on an H100."""
    programs = config.num_lists(problem.num_rows) * triton.cdiv(problem.heads, config.group) * config.splits
    tiles = triton.cdiv(triton.cdiv(round(expect_len(problem, config.tokens)), _TILE), config.splits)
    program_time = _PROGRAM_TIME + config.tokens * config.group * _PAIR_TIME + tiles * _TILE_TIME
    time = _LAUNCH_TIME + triton.cdiv(programs, problem.num_sms) * program_time
    if config.splits > 1:
        part_bytes = problem.num_rows * problem.heads * config.splits * LATENT_DIM * 2
        time += _COMBINE_TIME + 2 * part_bytes / _BYTES_PER_TIME
    return time + (_UNION_TIME if config.tokens > 1 else 0.0)


KERNEL = Kernel(
    op="sparse_mla",
    name="gluon_sm90",
    arches=frozenset({Arch.SM90}),
    rejects=rejects,
    prepare=prepare,
    configure=choose_config,
    rank=lambda problem: 40,
    plan=plan,
    form=form,
)
