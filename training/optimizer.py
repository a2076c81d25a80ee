"""Muon for matrices and AdamW for the rest, behind one object with one learning-rate scale.

Hides the grouping of equal shapes that keeps the orthogonalisation to a few batched products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

MATCHED_RMS = 0.2  # Scales an orthogonal update to AdamW's usual RMS, so both share one learning rate.


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration (quintic, five steps) of ``matrices`` [N, rows, columns], in bfloat16 on a GPU."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum SGD whose update is orthogonalised per matrix (the last two dimensions), with decoupled decay."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                by_shape[tuple(parameter.shape[-2:])].append((parameter, update))
            for shape, entries in by_shape.items():
                self._apply(shape, entries, group)

    def _apply(self, shape: tuple[int, int], entries: list[tuple[nn.Parameter, Tensor]], group: dict) -> None:
        stacked = torch.cat([update.reshape(-1, *shape) for _, update in entries])
        updates = orthogonalise(stacked) * (MATCHED_RMS * max(shape) ** 0.5)
        offset = 0
        for parameter, _ in entries:
            count = parameter.numel() // (shape[0] * shape[1])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(updates[offset : offset + count].view_as(parameter), alpha=-group["lr"])
            offset += count


class Optimizers:
    """Both optimisers over ``named`` parameters; matrices of the transformer go to Muon."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], learning_rate: float, weight_decay: float) -> None:
        matrices, others = [], []
        for name, parameter in named:
            is_matrix = parameter.ndim >= 2 and not any(part in name for part in ("embed", "head", "indexer", "gate."))
            is_matrix = is_matrix and not name.endswith("mlp.gate")
            (matrices if is_matrix else others).append(parameter)
        self._peak = learning_rate
        self._parameters = matrices + others
        self._all: list[torch.optim.Optimizer] = []
        if matrices:
            self._all.append(Muon(matrices, learning_rate, weight_decay))
        decayed = [parameter for parameter in others if parameter.ndim >= 2]
        plain = [parameter for parameter in others if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._all.append(torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-10))

    def step(self, scale: float) -> None:
        """Clip, update with ``scale`` times the peak learning rate, and clear the gradients."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimiser in self._all:
            for group in optimiser.param_groups:
                group["lr"] = self._peak * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
