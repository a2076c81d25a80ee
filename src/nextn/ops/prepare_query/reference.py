"""Preparing index queries in plain PyTorch: the definition, and the path of every machine without a better kernel.

Hides nothing but the order of the steps. For row r and head h (DeepSeek-V3.2-Exp technical report, section 2.1, and the
inference code released with it)::

    v = [rotate(q[r, h, :64], table[positions[r]]) | q[r, h, 64:]]
    v = v @ Hadamard * D**-0.5                                          (unless hadamard is False)
    s = 2^ceil(log2(max(amax(|v|), 1e-4) / 448)),  q8 = e4m3(v / s)     (s = 1, q8 = v unless quantise)
    folded[r, h] = weights[r, h] * H**-0.5 * D**-0.5 * s

Defined cases. A position outside the table is taken as the nearest inside it. A NaN or an infinity spoils its own row
and head alone: all of that q8 and that folded weight are NaN when both the Hadamard transform and the quantiser run.
"""

from __future__ import annotations

import torch

from nextn.cache_format import ROPE_DIM
from nextn.hardware import ALL_ARCHES
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._numerics import hadamard, quantise_ue8m0, rotate
from nextn.ops.prepare_query.problem import PrepareQueryProblem


def prepare(
    problem: PrepareQueryProblem,
    *,
    q: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    rope_table: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
    plan: OpPlan | None = None,
) -> Launch:
    """Describe the call; ``out`` is the prepared query and the folded weights, both written."""
    del plan
    arguments = {"problem": problem, "q": q, "weights": weights, "positions": positions, "rope_table": rope_table}
    return Launch(function=_run, arguments={**arguments, "out": out})


def _run(
    problem: PrepareQueryProblem,
    q: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    rope_table: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    prepared, folded = out
    inside = positions.to(torch.int64).clamp(0, rope_table.shape[0] - 1)
    table_rows = rope_table.index_select(0, inside).unsqueeze(1)
    values = q.to(torch.float32)
    values = torch.cat(
        [rotate(values[..., :ROPE_DIM], table_rows, problem.interleaved), values[..., ROPE_DIM:]], dim=-1
    )
    if problem.hadamard:
        values = hadamard(values)
    torch.mul(weights.to(torch.float32), problem.heads**-0.5 * problem.dim**-0.5, out=folded)
    if not problem.quantise:
        prepared.copy_(values)
        return
    codes, scale = quantise_ue8m0(values, problem.dim)
    prepared.copy_(codes)
    folded.mul_(scale.squeeze(-1))


KERNEL = Kernel(
    op="prepare_query",
    name="reference",
    arches=ALL_ARCHES,
    rejects=lambda problem: None,
    prepare=prepare,
    rank=lambda problem: 0,
)
