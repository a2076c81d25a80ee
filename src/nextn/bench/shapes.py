"""The shapes that are timed, and the least time an H100 could take for each.

Hides the arithmetic of bytes and products. A shape is sizes alone: two rows of results with one name ran the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nextn.cache_format import LATENT_DIM, LATENT_ROW_DIM
from nextn.errors import InputError

# An H100's measured ceilings: linear reads, FP8 products, and BF16 products as the best attention kernels reach them.
BYTES_PER_SECOND = 3.0e12
FP8_FLOPS_PER_SECOND = 1.5e15
BF16_FLOPS_PER_SECOND = 0.8e15
RAGGED_DEPTHS = (0, 8, 4, 3, 5, 2, 6, 4)  # rows of eight requests in turn, 0 to 8, mean 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The least a shape needs: each input byte read once, each output byte written once, each product done once.

    Attributes:
        num_bytes: bytes to and from device memory.
        num_flops: floating-point operations of the matrix products, two per multiply-add.
        flops_per_second: of the units that do them.
    """

    num_bytes: int
    num_flops: int
    flops_per_second: float

    @property
    def floor_us(self) -> float:
        """The larger of the two times, in microseconds."""
        return max(self.num_bytes / BYTES_PER_SECOND, self.num_flops / self.flops_per_second) * 1e6


class Shape(Protocol):
    """What is common to the shapes of all ops."""

    @property
    def op(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def cost(self) -> Cost: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexLogitsShape:
    """Requests of one length, FP8 keys of 128 values, float32 logits.

    Attributes:
        requests: B.
        context: cached tokens of each.
        next_n: rows per request; None is ragged, 0 to 8 with a mean of 4.
        heads: index heads.
    """

    requests: int
    context: int
    next_n: int | None
    heads: int = 64
    op: str = "index_logits"

    @property
    def name(self) -> str:
        depth = "ragged" if self.next_n is None else f"n {self.next_n}"
        return f"{self.requests} x {self.context} {depth}" + ("" if self.heads == 64 else f" heads {self.heads}")

    @property
    def row_counts(self) -> tuple[int, ...]:
        if self.next_n is not None:
            return (self.next_n,) * self.requests
        return tuple(RAGGED_DEPTHS[request % len(RAGGED_DEPTHS)] for request in range(self.requests))

    @property
    def cost(self) -> Cost:
        rows = sum(self.row_counts)
        num_keys = self.context * sum(count > 0 for count in self.row_counts)
        return Cost(
            num_bytes=num_keys * (128 + 4) + rows * self.context * 4,
            num_flops=2 * rows * self.context * self.heads * 128,
            flops_per_second=FP8_FLOPS_PER_SECOND,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectTopkShape:
    """Full rows of random float32 logits, positions out.

    Attributes:
        rows: R.
        length: logits of each.
        topk: k.
    """

    rows: int
    length: int
    topk: int = 2048
    op: str = "select_topk"

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.length}" + ("" if self.topk == 2048 else f" k {self.topk}")

    @property
    def cost(self) -> Cost:
        return Cost(
            num_bytes=self.rows * (self.length + self.topk) * 4,
            num_flops=0,
            flops_per_second=FP8_FLOPS_PER_SECOND,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseMlaShape:
    """Rows that share part of their slots, FP8 latents, bfloat16 queries.

    Attributes:
        requests: B.
        next_n: rows per request.
        heads: query heads.
        overlap: share of a row's slots that all rows of its request name.
        context: cached tokens of each request.
        topk: slots per row.
    """

    requests: int
    next_n: int
    heads: int
    overlap: float = 0.9
    context: int = 32768
    topk: int = 2048
    op: str = "sparse_mla"

    @property
    def name(self) -> str:
        return f"{self.requests} x {self.next_n} x {self.heads} overlap {self.overlap:g}"

    @property
    def cost(self) -> Cost:
        rows = self.requests * self.next_n
        num_shared = round(self.topk * self.overlap)
        union = self.requests * (num_shared + self.next_n * (self.topk - num_shared))
        row_values = self.heads * (LATENT_ROW_DIM + LATENT_DIM)
        return Cost(
            num_bytes=union * 656 + rows * (row_values * 2 + self.heads * 4 + self.topk * 4),
            num_flops=2 * rows * self.topk * row_values,
            flops_per_second=BF16_FLOPS_PER_SECOND,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallOpShape:
    """An op whose work follows from its rows alone, in DeepSeek-V3.2's sizes.

    Attributes:
        op: ``prepare_query``, ``write_cache`` or ``accept_drafts``.
        rows: R, four to a request.
        is_sampled: whether drafts are judged by rejection sampling, at temperature 0.8 and top-p 0.95.
    """

    op: str
    rows: int
    is_sampled: bool = False

    @property
    def name(self) -> str:
        return f"{self.rows} rows" + (" sampled" if self.is_sampled else "")

    @property
    def cost(self) -> Cost:
        return Cost(num_bytes=self.rows * _SMALL_OP_BYTES[self.op], num_flops=0, flops_per_second=FP8_FLOPS_PER_SECOND)


# Bytes per row, in and out: 64 bfloat16 heads to e4m3 with float32 weights; 576 and 128 bfloat16 values to a row of
# each cache; 129280 float32 logits. Positions and a row of the rope table come with the first two.
_SMALL_OP_BYTES = {
    "prepare_query": 64 * 128 * (2 + 1) + 64 * (4 + 4) + 8 + 256,
    "write_cache": (576 + 128) * 2 + 656 + 132 + 8 + 256,
    "accept_drafts": 129280 * 4 + 8 + 8,
}

_TARGET_LOGITS = (
    *((1, 8192, n) for n in (1, 4, 8)),
    *((1, 131072, n) for n in (1, 2, 4, 8)),
    *((4, 65536, n) for n in (1, 3, 4, 8)),
    *((16, 32768, n) for n in (1, 3, 4, 6, 8)),
    *((64, 8192, n) for n in (1, 2, 4, 8)),
    *((64, 32768, n) for n in (1, 2, 3, 4, 5, 6, 7, 8, None)),
    *((128, 16384, n) for n in (1, 2, 4, 8)),
)
_TARGET_ROWS = ((1, 8192), (4, 131072), (16, 65536), (64, 32768), (256, 8192), (256, 32768), (512, 16384))
_TARGET_ATTENTION = (
    *((64, 4, 16, overlap) for overlap in (0.9, 0.7)),
    *((1, 4, 128, 0.9), (16, 4, 128, 0.9), (64, 1, 128, 0.9), (64, 4, 128, 0.9), (64, 4, 64, 0.9), (256, 1, 64, 0.9)),
)
_SMALL_OPS = ("prepare_query", "write_cache", "accept_drafts")
_MOST_TOKENS = 2**22  # of a full grid's index caches: 550 MB


def _logits(sizes: Sequence[tuple[int, int, int | None]], heads: int = 64) -> list[Shape]:
    return [IndexLogitsShape(requests=b, context=context, next_n=n, heads=heads) for b, context, n in sizes]


def _rows(sizes: Sequence[tuple[int, int]]) -> list[Shape]:
    return [SelectTopkShape(rows=rows, length=length) for rows, length in sizes]


def _attention(sizes: Sequence[tuple[int, int, int, float]], context: int = 32768) -> list[Shape]:
    return [
        SparseMlaShape(requests=b, next_n=n, heads=heads, overlap=overlap, context=min(context, 2**21 // b // 64 * 64))
        for b, n, heads, overlap in sizes
    ]


def _small_ops(rows: Sequence[int]) -> list[Shape]:
    return [SmallOpShape(op=op, rows=count) for op in _SMALL_OPS for count in rows]


def _full_logits() -> list[Shape]:
    sizes = [
        (requests, context, n)
        for requests in (1, 4, 16, 64, 128, 256)
        for context in (2048, 8192, 32768, 131072)
        for n in (1, 2, 3, 4, 5, 6, 7, 8, None)
        if requests * context <= _MOST_TOKENS and not (n is None and requests < len(RAGGED_DEPTHS))
    ]
    return _logits(sizes) + _logits([size for size in sizes if size[1] == 32768], heads=32)


def list_shapes(grid: str, ops: Sequence[str]) -> list[Any]:
    """The shapes of a grid, of the ops named.

    The grids are ``targets``, ``small`` (a few seconds, on a CPU too), ``full``, and ``profile``, whose limits counters
    explain.

    Example:
        >>> [shape.name for shape in list_shapes("small", ["select_topk"])]
        ['1 x 4096', '8 x 4096']
    """
    shapes = {
        "targets": lambda: [
            *_logits(_TARGET_LOGITS),
            *_rows(_TARGET_ROWS),
            *_attention(_TARGET_ATTENTION),
            *_small_ops((256,)),
            *_small_ops((4096,))[:2],
            SmallOpShape(op="accept_drafts", rows=256, is_sampled=True),
        ],
        "small": lambda: [
            *_logits(((2, 1024, 1), (2, 1024, 4), (8, 256, None))),
            *_rows(((1, 4096), (8, 4096))),
            *_attention(((2, 4, 16, 0.9),), context=4096),
            *_small_ops((8,)),
            SmallOpShape(op="accept_drafts", rows=8, is_sampled=True),
        ],
        "full": lambda: [
            *_full_logits(),
            *_rows([(r, c) for r in (1, 4, 16, 64, 256, 512) for c in (2048, 8192, 32768, 131072) if r * c <= 2**26]),
            *_attention([(b, n, h, o) for b in (1, 16, 64) for n in range(1, 9) for h in (16, 64) for o in (0.9, 0.7)]),
            *_small_ops((4, 64, 256, 1024)),
        ],
        "profile": lambda: [
            *_logits(((64, 32768, 1), (64, 32768, 4), (64, 32768, 5), (64, 32768, 8), (1, 8192, 4))),
            *_rows(((64, 32768), (256, 32768))),
            *_attention(((64, 4, 16, 0.9), (64, 4, 64, 0.9), (64, 4, 128, 0.9))),
            *_small_ops((256,)),
            *_small_ops((4096,))[:2],
        ],
    }[grid]()
    return [shape for shape in shapes if shape.op in ops]


GRIDS = ("targets", "small", "full", "profile")


def choose_shapes(grid: str, ops: Sequence[str], only: str = "") -> list[Any]:
    """The shapes of a grid, of the ops named, whose name contains ``only``.

    Raises:
        InputError: there is no such grid, or no such shape in it.
    """
    if grid not in GRIDS:
        raise InputError(f"unknown grid {grid!r}; use one of {list(GRIDS)}")
    shapes = list_shapes(grid, ops)
    chosen = [shape for shape in shapes if only in shape.name]
    if not chosen:
        raise InputError(f"no shape of grid {grid} contains {only!r}; one is called {shapes[0].name!r}")
    return chosen
