"""Named shapes and hostile inputs of ``select_topk``, shared by tests, the compile gate and benchmarks.

Hides how a scenario becomes tensors; a case is sizes and the name of how its logits are distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nextn.hardware import DeviceInfo
from nextn.ops.select_topk.problem import SelectTopkProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectTopkInputs:
    """Tensors of one case on one device.

    Attributes:
        logits: float32 ``[R, C]``, rows further apart than long; past a row's length lie NaN and what would win.
        visible_lens: int32 ``[R]``.
        query_offsets: int32 ``[B + 1]``, or None for positions.
        page_table: int32 ``[B, P]``, or None.
    """

    logits: torch.Tensor
    visible_lens: torch.Tensor
    query_offsets: torch.Tensor | None
    page_table: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectTopkCase:
    """One scenario.

    Attributes:
        name: unique name.
        lens: visible length per row.
        num_columns: C.
        topk: k.
        values: how logits are distributed, a key of ``DISTRIBUTIONS``.
        rows_per_request: rows that share a request, to get slots; 0 for positions.
        page_size: tokens per page.
    """

    name: str
    lens: tuple[int, ...]
    num_columns: int
    topk: int
    values: str = "normal"
    rows_per_request: int = 0
    page_size: int = 64

    def __str__(self) -> str:
        return self.name

    @property
    def max_pages(self) -> int:
        """Columns of the page table; 0 for positions."""
        return -(-self.num_columns // self.page_size) if self.rows_per_request else 0

    def problem(self, device: DeviceInfo) -> SelectTopkProblem:
        """The problem of this case on ``device``."""
        return SelectTopkProblem(
            arch=device.arch,
            num_sms=device.num_sms,
            num_rows=len(self.lens),
            num_columns=self.num_columns,
            topk=self.topk,
            returns_slots=self.rows_per_request > 0,
            page_size=self.page_size,
            max_pages=self.max_pages,
        )

    def inputs(self, device: torch.device | str = "cpu", *, seed: int = 0) -> SelectTopkInputs:
        """Random tensors of this case."""
        generator = torch.Generator().manual_seed(seed)
        num_rows = len(self.lens)
        lens = torch.tensor(self.lens, dtype=torch.int32)
        stride = -(-self.num_columns // 4) * 4 + 8  # rows 16-byte aligned, as vector loads want them
        wide = torch.full((num_rows, stride), float("inf"))
        wide[:, 1::2] = float("nan")
        visible = torch.arange(self.num_columns) < lens[:, None]
        logits = wide[:, : self.num_columns]
        logits[visible] = DISTRIBUTIONS[self.values]((num_rows, self.num_columns), generator)[visible]
        offsets = table = None
        if self.rows_per_request:
            num_requests = -(-num_rows // self.rows_per_request)
            offsets = (torch.arange(num_requests + 1) * self.rows_per_request).clamp(max=num_rows).to(torch.int32)
            pages = torch.randperm(num_requests * self.max_pages, generator=generator)
            table = pages.view(num_requests, self.max_pages).to(torch.int32).to(device)
            offsets = offsets.to(device)
        return SelectTopkInputs(
            logits=wide.to(device)[:, : self.num_columns],
            visible_lens=lens.to(device),
            query_offsets=offsets,
            page_table=table,
        )


def _normal(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _equal(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.full(shape, -0.25)


def _plateau(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Half the columns exactly 0, as after a ReLU."""
    return torch.randn(shape, generator=generator).clamp_(min=0)


def _few_levels(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=generator).float()


def _close(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Neighbouring floats: only the last bits differ."""
    return (torch.randint(0, 64, shape, generator=generator, dtype=torch.int32) + 0x3F800000).view(torch.float32)


def _signed_zeros(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -0.0, 0.0)


def _special(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """NaN of both signs, both infinities, both zeros, subnormals and the largest floats, in plenty."""
    negative_nan = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32).item()
    choices = torch.tensor(
        [float("nan"), negative_nan, float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-40, 3.4e38, -3.4e38, 1.0]
    )
    return choices[torch.randint(0, len(choices), shape, generator=generator)]


def _all_nan(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.full(shape, float("nan"))


DISTRIBUTIONS: dict[str, Callable[[tuple[int, int], torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "equal": _equal,
    "plateau": _plateau,
    "few_levels": _few_levels,
    "close": _close,
    "signed_zeros": _signed_zeros,
    "special": _special,
    "all_nan": _all_nan,
}

_EDGES = (1, 2, 63, 64, 65, 255, 256, 257, 0, 300)

CASES = (
    SelectTopkCase(name="edge_lens", lens=_EDGES, num_columns=300, topk=64),
    SelectTopkCase(name="tiny", lens=(127, 128, 129, 4096), num_columns=4096, topk=128, rows_per_request=4),
    SelectTopkCase(name="v32", lens=(2047, 2048, 2049, 5000), num_columns=5000, topk=2048, rows_per_request=2),
    SelectTopkCase(name="long_rows", lens=(70_000, 9_001), num_columns=70_000, topk=2048),
    SelectTopkCase(name="one_long_row", lens=(40_000,), num_columns=40_000, topk=512),
    SelectTopkCase(name="k_above_columns", lens=(0, 5, 7), num_columns=7, topk=16),
    SelectTopkCase(name="k_1", lens=_EDGES, num_columns=300, topk=1),
    SelectTopkCase(name="odd_k", lens=_EDGES, num_columns=301, topk=37),
    SelectTopkCase(name="hostile_lens", lens=(-(2**31), -1, 2**31 - 1, 301), num_columns=300, topk=32),
    SelectTopkCase(name="no_rows", lens=(), num_columns=64, topk=8),
    SelectTopkCase(name="no_columns", lens=(0, 3), num_columns=0, topk=8),
    SelectTopkCase(name="page_32_slots", lens=_EDGES, num_columns=300, topk=64, rows_per_request=3, page_size=32),
    *(
        SelectTopkCase(name=name, lens=(*_EDGES, 1000), num_columns=1000, topk=64, values=name, rows_per_request=4)
        for name in DISTRIBUTIONS
        if name != "normal"
    ),
)
