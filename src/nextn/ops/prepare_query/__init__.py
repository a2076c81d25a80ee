"""Index queries made ready for scoring: rotated, Hadamard-transformed, quantised, their scale folded into the weights.

Hides which kernel prepares them. The maths and every defined odd case stand in ``reference.py``.
"""

from __future__ import annotations

import torch

from nextn.cache_format import ROPE_DIM
from nextn.hardware import describe_device
from nextn.ops._kernel import OpPlan, choose, require, same_device
from nextn.ops.prepare_query.problem import PrepareQueryProblem, problem_of

__all__ = ["PrepareQueryProblem", "prepare_query", "problem_of"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int32, torch.int64)
_DIMS = (64, 128)


def prepare_query(
    q: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    rope_table: torch.Tensor,
    *,
    interleaved: bool,
    hadamard: bool = True,
    quantise: bool = True,
    plan: OpPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate, transform and quantise index queries, and fold every scale into their head weights.

    The first 64 dims are rotated (DeepSeek-V3.2-Exp inference code; half-split there, interleaved in GLM-5), then the
    whole head is multiplied by the orthonormal Hadamard matrix and given one power-of-two scale.

    Args:
        q: float32, bfloat16 or float16 ``[R, H, D]``, D 64 or 128, as the projection gives it.
        weights: floating ``[R, H]`` head weights as the projection gives them.
        positions: int32 or int64 ``[R]``.
        rope_table: float32 ``[max_positions, 64]``, 32 cosines and then 32 sines.
        interleaved: whether pairs ``(2i, 2i + 1)`` are rotated rather than ``(i, i + 32)``.
        hadamard: whether to transform; must be what the cached keys were written with.
        quantise: False leaves the query in float32, for a float32 index cache.
        plan: the choice of this forward, for these sizes and options; chosen here if None.

    Returns:
        The query, e4m3fn (or float32) ``[R, H, D]``, and float32 ``[R, H]`` weights that hold ``H^-0.5 D^-0.5`` and the
        query's own scale: what ``index_logits`` takes.

    Raises:
        InputError: a tensor has the wrong dtype, shape or device.

    Example:
        >>> table = torch.cat([torch.ones(8, 32), torch.zeros(8, 32)], dim=1)
        >>> q8, folded = prepare_query(torch.ones(2, 4, 128), torch.ones(2, 4), torch.tensor([0, 1]), table,
        ...                            interleaved=False)
        >>> q8.dtype, folded.shape
        (torch.float8_e4m3fn, torch.Size([2, 4]))
    """
    _check(q, weights, positions, rope_table)
    if plan is None:
        options = {"interleaved": interleaved, "hadamard": hadamard, "quantise": quantise}
        problem = problem_of(describe_device(q.device), q=q, **options)
        plan = OpPlan(choice=choose("prepare_query", problem), problem=problem)
    prepared = torch.empty(q.shape, dtype=torch.float8_e4m3fn if quantise else torch.float32, device=q.device)
    folded = torch.empty(weights.shape, device=q.device)
    prepare = plan.choice.kernel.prepare
    prepare(plan.problem, q=q, weights=weights, positions=positions, rope_table=rope_table, out=(prepared, folded))()
    return prepared, folded


def _check(q: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor, rope_table: torch.Tensor) -> None:
    require(
        q.ndim == 3 and q.shape[1] > 0 and q.shape[2] in _DIMS and q.dtype in _FLOATS,
        f"q is {q.dtype} {tuple(q.shape)}; pass float32, bfloat16 or float16 [rows, heads, {_DIMS[0]} or {_DIMS[1]}]",
    )
    num_rows, heads, _ = q.shape
    require(
        tuple(weights.shape) == (num_rows, heads) and weights.dtype in _FLOATS,
        f"weights is {weights.dtype} {tuple(weights.shape)}; pass float32 [{num_rows}, {heads}]",
    )
    require(
        tuple(positions.shape) == (num_rows,) and positions.dtype in _INTEGERS,
        f"positions is {positions.dtype} {tuple(positions.shape)}; pass int64 [{num_rows}]",
    )
    require(
        rope_table.ndim == 2
        and rope_table.shape[0] > 0
        and rope_table.shape[1] == ROPE_DIM
        and rope_table.dtype == torch.float32,
        f"rope_table is {rope_table.dtype} {tuple(rope_table.shape)}; pass float32 [max_positions, {ROPE_DIM}]",
    )
    same_device(q=q, weights=weights, positions=positions, rope_table=rope_table)
