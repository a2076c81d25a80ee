"""Index queries rotated, Hadamard-transformed and quantised in portable Triton: one launch, a block of heads at a time.

Contract and maths: ``reference.py``. Hides how a head's 64 or 128 values lie in registers (``_triton_numerics.py``).

Without the Hadamard transform every byte is the reference's. With it, sums are float32 butterflies where the reference
adds exactly: values differ by some 2^-23 of the head's largest, so about one code in 100,000 is rounded to the other
neighbour; a head whose sums leave float32's range (values beyond 2^121) becomes NaN. Folded weights are the
reference's bits wherever the scale is.

Floor: every query read and written once, ``R H D (itemsize + 1)`` bytes (4096 rows of 64 heads of 128 bfloat16: 101 MB,
34 us at 3.0 TB/s); 7 additions a value (0.2 GFLOP, nothing).
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nextn.hardware import Arch
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._triton_numerics import (
    e4m3_bytes,
    has_native_e4m3,
    load_parts,
    rotate_parts,
    scale_parts,
)
from nextn.ops.prepare_query.problem import PrepareQueryProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareQueryConfig:
    """How one launch is cut.

    Attributes:
        heads: heads of a program; a power of two.
        width: values of a part of a head, 16 or 32. With parts of 16 a warp of 32 heads moves nothing between threads,
            but reads few neighbouring bytes at a time: 60 us where parts of 32 and 16 heads take 53 (4096 rows of 64).
        num_warps: warps of a program.
        max_registers: registers a thread may use, so that more programs fit a multiprocessor; None leaves it to the
            compiler. NVIDIA only.
    """

    heads: int = 16
    width: int = 32
    num_warps: int = 1
    max_registers: int | None = None


@triton.jit(do_not_specialize=["max_positions"])
def _prepare_query_kernel(
    q_ptr, weights_ptr, positions_ptr, table_ptr, out_ptr, folded_ptr, heads, max_positions,
    q_row_stride, q_head_stride, q_stride, weights_row_stride, weights_stride, positions_stride, table_row_stride,
    table_stride, out_row_stride, out_head_stride, out_stride, folded_row_stride, folded_stride,
    weight_factor, hadamard_factor,
    HEADS: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr, HADAMARD: tl.constexpr, QUANTISE: tl.constexpr,
    NATIVE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    NUM_PARTS: tl.constexpr = DIM // WIDTH
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = head < heads
    head = head.to(tl.int64)
    position = tl.load(positions_ptr + row * positions_stride).to(tl.int64)
    weight = tl.load(weights_ptr + row * weights_row_stride + head * weights_stride, mask=live, other=0.0)
    q = q_ptr + row * q_row_stride + head[:, None] * q_head_stride
    parts = load_parts(q, q_stride, live[:, None], DIM, WIDTH)
    position = tl.minimum(tl.maximum(position, 0), max_positions - 1)
    # One pointer per head, though all are the same: wide loads, where a single one would be read a value at a time.
    angles = table_ptr + position * table_row_stride + tl.zeros([HEADS, 1], tl.int64)
    parts = rotate_parts(parts, angles, table_stride, INTERLEAVED, NUM_PARTS)
    parts, scale = scale_parts(parts, hadamard_factor, HADAMARD, QUANTISE, NUM_PARTS)
    folded = weight.to(tl.float32) * weight_factor
    if QUANTISE:
        folded *= scale
    out = out_ptr + row * out_row_stride + head[:, None] * out_head_stride
    for part in tl.static_range(NUM_PARTS):
        places = out + (tl.arange(0, WIDTH) + part * WIDTH)[None, :] * out_stride
        if QUANTISE:
            tl.store(places, e4m3_bytes(parts[part], NATIVE), mask=live[:, None])
        else:
            tl.store(places, parts[part], mask=live[:, None])
    tl.store(folded_ptr + row * folded_row_stride + head * folded_stride, folded, mask=live)


def configure(problem: PrepareQueryProblem) -> PrepareQueryConfig:
    """The configuration for a problem: the best of those timed in benchmarks/results/small_ops_h100.jsonl.

    Without the transform rotated neighbours stay in a thread with parts of 16, which takes less than half the
    instructions of parts of 32.
    """
    return PrepareQueryConfig(width=32 if problem.hadamard else 16)


def prepare(
    problem: PrepareQueryProblem,
    *,
    q: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    rope_table: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
    plan: OpPlan | None = None,
    config: PrepareQueryConfig | None = None,
) -> Launch:
    """Describe the call; ``out`` is the prepared query and the folded weights, both written.

    Args:
        config: how to cut the launch, for tuning; chosen by ``configure`` if None.
    """
    del plan
    config = configure(problem) if config is None else config
    prepared, folded = out
    if problem.quantise:
        prepared = prepared.view(torch.uint8)
    arguments = {
        "q_ptr": q,
        "weights_ptr": weights,
        "positions_ptr": positions,
        "table_ptr": rope_table,
        "out_ptr": prepared,
        "folded_ptr": folded,
        "heads": problem.heads,
        "max_positions": rope_table.shape[0],
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "q_stride": q.stride(2),
        "weights_row_stride": weights.stride(0),
        "weights_stride": weights.stride(1),
        "positions_stride": positions.stride(0),
        "table_row_stride": rope_table.stride(0),
        "table_stride": rope_table.stride(1),
        "out_row_stride": prepared.stride(0),
        "out_head_stride": prepared.stride(1),
        "out_stride": prepared.stride(2),
        "folded_row_stride": folded.stride(0),
        "folded_stride": folded.stride(1),
        "weight_factor": problem.heads**-0.5 * problem.dim**-0.5,
        "hadamard_factor": problem.dim**-0.5,
        "HEADS": config.heads,
        "DIM": problem.dim,
        "INTERLEAVED": problem.interleaved,
        "HADAMARD": problem.hadamard,
        "QUANTISE": problem.quantise,
        "NATIVE": has_native_e4m3(problem.arch),
        "WIDTH": config.width,
    }
    options: dict[str, Any] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    if config.max_registers is not None and problem.arch.is_cuda:
        options["maxnreg"] = config.max_registers
    return Launch(
        function=_prepare_query_kernel,
        arguments=arguments,
        grid=(problem.num_rows, triton.cdiv(problem.heads, config.heads)),
        options=options,
    )


KERNEL = Kernel(
    op="prepare_query",
    name="triton_portable",
    arches=frozenset(arch for arch in Arch if arch.is_cuda or arch.is_rocm),
    rejects=lambda problem: None,
    prepare=prepare,
    configure=configure,
    rank=lambda problem: 20,
)
