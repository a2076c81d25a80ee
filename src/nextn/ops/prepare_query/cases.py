"""Named shapes and hostile inputs of ``prepare_query``, shared by tests, the compile gate and benchmarks.

Hides how a scenario becomes tensors; a case is sizes and the name of how its queries are distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nextn.cache_format import ROPE_DIM
from nextn.hardware import DeviceInfo
from nextn.ops.prepare_query.problem import PrepareQueryProblem

MAX_POSITIONS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareQueryCase:
    """One scenario.

    Attributes:
        name: unique name.
        num_rows: R.
        heads: H.
        dim: D.
        dtype: dtype of queries.
        interleaved: as in ``prepare_query``.
        hadamard: likewise.
        quantise: likewise.
        values: how queries are distributed, a key of ``DISTRIBUTIONS``.
    """

    name: str
    num_rows: int
    heads: int = 32
    dim: int = 128
    dtype: torch.dtype = torch.float32
    interleaved: bool = False
    hadamard: bool = True
    quantise: bool = True
    values: str = "normal"

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, bool]:
        """The keyword options of ``prepare_query``."""
        return {"interleaved": self.interleaved, "hadamard": self.hadamard, "quantise": self.quantise}

    def problem(self, device: DeviceInfo) -> PrepareQueryProblem:
        """The problem of this case on ``device``."""
        return PrepareQueryProblem(
            arch=device.arch,
            num_rows=self.num_rows,
            heads=self.heads,
            dim=self.dim,
            dtype=str(self.dtype).removeprefix("torch."),
            **self.options,
        )

    def inputs(self, device: torch.device | str = "cpu", *, seed: int = 0) -> dict[str, Any]:
        """Random tensors of this case: q (heads further apart than long), weights, positions and rope_table."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.full((self.num_rows, self.heads, self.dim + 8), float("nan"))
        shape = (self.num_rows, self.heads, self.dim)
        wide[..., : self.dim] = DISTRIBUTIONS[self.values](shape, generator)
        angles = torch.rand(MAX_POSITIONS, ROPE_DIM // 2, generator=generator) * 6.3
        return {
            "q": wide.to(device, self.dtype)[..., : self.dim],
            "weights": torch.randn(self.num_rows, self.heads, generator=generator).to(device),
            "positions": torch.randint(0, MAX_POSITIONS, (self.num_rows,), generator=generator).to(device),
            "rope_table": torch.cat([angles.cos(), angles.sin()], dim=1).to(device),
        }


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _outliers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One value a thousand times the rest, what the Hadamard transform is for."""
    values = torch.randn(shape, generator=generator)
    values[..., 3] *= 1000.0
    return values


def _tiny(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Below the smallest amax that a scale is made from, some of them zero."""
    values = torch.randn(shape, generator=generator) * 1e-6
    values[::2] = 0.0
    return values


def _powers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Magnitudes around 448 times a power of two, where the scale changes."""
    exponents = torch.randint(-3, 4, shape[:-1], generator=generator)[..., None]
    nudges = torch.randint(-1, 2, shape, generator=generator) * 2.0**-23
    return torch.ldexp(448.0 * (1.0 + nudges), exponents)


def _mixed_magnitudes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    exponents = torch.randint(-30, 30, shape, generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), exponents)


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "outliers": _outliers,
    "tiny": _tiny,
    "powers": _powers,
    "mixed_magnitudes": _mixed_magnitudes,
}

CASES = (
    PrepareQueryCase(name="tiny_verify", num_rows=4),
    PrepareQueryCase(name="v32_verify", num_rows=8, heads=64, dtype=torch.bfloat16),
    PrepareQueryCase(name="glm_verify", num_rows=6, dtype=torch.bfloat16, interleaved=True, hadamard=False),
    PrepareQueryCase(name="interleaved_hadamard", num_rows=3, interleaved=True),
    PrepareQueryCase(name="plain", num_rows=3, hadamard=False),
    PrepareQueryCase(name="unquantised", num_rows=5, quantise=False),
    PrepareQueryCase(name="unquantised_plain", num_rows=5, quantise=False, hadamard=False, interleaved=True),
    PrepareQueryCase(name="half", num_rows=2, dtype=torch.float16),
    PrepareQueryCase(name="dim_64", num_rows=3, dim=64),
    PrepareQueryCase(name="one_head", num_rows=7, heads=1),
    PrepareQueryCase(name="odd_heads", num_rows=3, heads=13),
    PrepareQueryCase(name="one_row", num_rows=1),
    PrepareQueryCase(name="no_rows", num_rows=0),
    PrepareQueryCase(name="chunk", num_rows=130, heads=16),
    *(PrepareQueryCase(name=name, num_rows=5, heads=8, values=name) for name in DISTRIBUTIONS if name != "normal"),
    PrepareQueryCase(name="powers_plain", num_rows=5, heads=8, values="powers", hadamard=False),
)
