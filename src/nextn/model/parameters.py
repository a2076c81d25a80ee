"""TensorTarget: where one tensor of a checkpoint goes.

Hides that several checkpoint tensors share one fused parameter: a target is a view of the parameter's part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from nextn.model.rowwise import RowLinear


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorTarget:
    """One tensor a checkpoint must or may hold.

    Attributes:
        name: its name in the checkpoint.
        destination: the part of a parameter it fills; its shape is the shape the checkpoint must have.
        is_copy: whether it only repeats ``destination``, which another tensor fills; it may be absent.
    """

    name: str
    destination: torch.Tensor
    is_copy: bool = False


def stacked_targets(linear: RowLinear, *parts: tuple[str, int]) -> Iterator[TensorTarget]:
    """The checkpoint matrices stacked in one linear layer.

    Args:
        linear: the fused layer.
        parts: (name, rows) of each matrix in order of its rows in the layer.
    """
    assert linear.weight is not None
    views = linear.weight.data.split([rows for _, rows in parts])
    for (name, _), view in zip(parts, views):
        yield TensorTarget(name=f"{name}.weight", destination=view)


def linear_target(name: str, linear: RowLinear, *, is_copy: bool = False) -> TensorTarget:
    """The one checkpoint matrix of an unfused linear layer."""
    assert linear.weight is not None
    return TensorTarget(name=f"{name}.weight", destination=linear.weight.data, is_copy=is_copy)


def vector_target(name: str, vector: torch.Tensor) -> TensorTarget:
    """A norm's weight or bias, or a router's bias."""
    return TensorTarget(name=name, destination=vector.data)


def with_prefix(prefix: str, targets: Iterable[TensorTarget]) -> Iterator[TensorTarget]:
    """The same targets, their names behind ``prefix`` and a dot."""
    for target in targets:
        yield dataclasses.replace(target, name=f"{prefix}.{target.name}")
