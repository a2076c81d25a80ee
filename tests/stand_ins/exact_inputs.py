"""Inputs of ``index_logits`` whose every score is exact in FP64 in any order of summation.

Queries and keys are integers of at most 15 (exact in e4m3), weights multiples of 1/16 below 1, key scales powers of
two. A product over 128 dimensions is an integer below 2**15, its weighted sum over 64 heads a multiple of 1/16 below
2**21: 25 bits. Kernels that sum in FP64 therefore round the same number once, and must return the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nextn.hardware import Arch, pretend_device
from nextn.ops.index_logits.problem import IndexLogitsProblem


@dataclass(frozen=True, kw_only=True)
class Inputs:
    problem: IndexLogitsProblem
    tensors: dict[str, torch.Tensor]

    @property
    def batch_tensors(self) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in ("query_offsets", "visible_lens", "page_table")}


def make_problem(**changes) -> IndexLogitsProblem:
    sizes = {
        "arch": Arch.SM90, "num_sms": 132, "num_requests": 64, "num_rows": 192, "next_n": 3, "max_rows": 3,
        "heads": 64, "dim": 128, "page_size": 64, "max_pages": 512, "max_context": 32768, "cache": "fp8",
        "out_dtype": "float32", "deterministic": False,
    }  # fmt: skip
    return IndexLogitsProblem(**(sizes | changes))


def make_inputs(
    arch: Arch, row_counts: list[int], lens: list[int], *, heads: int = 32, dim: int = 128, page_size: int = 64
) -> Inputs:
    """A batch of exact inputs; ``lens`` includes each request's rows, 0 for a padding request."""
    generator = torch.Generator().manual_seed(len(row_counts) * 1000 + sum(lens))
    rows, pages_per_request = sum(row_counts), 10 * 64 // page_size
    num_pages = len(lens) * pages_per_request
    table = torch.randperm(num_pages, generator=generator).to(torch.int32).reshape(len(lens), pages_per_request)
    values = torch.randint(-15, 16, (num_pages, page_size * dim), generator=generator).to(torch.float8_e4m3fn)
    exponents = torch.randint(-8, 0, (num_pages, page_size), generator=generator)
    cache = torch.cat([values.view(torch.uint8), torch.exp2(exponents.float()).view(torch.uint8)], dim=1)
    offsets = torch.tensor([0, *torch.tensor(row_counts).cumsum(0).tolist()], dtype=torch.int32)
    visible = [max(0, length - count + 1 + j) for length, count in zip(lens, row_counts) for j in range(count)]
    counts = set(row_counts)
    problem = make_problem(
        arch=arch, num_sms=pretend_device(arch).num_sms, num_requests=len(lens), num_rows=rows,
        next_n=counts.pop() if len(counts) == 1 and 0 not in counts else None, max_rows=max(row_counts),
        heads=heads, dim=dim, page_size=page_size, max_pages=pages_per_request, max_context=max(lens),
    )  # fmt: skip
    tensors = {
        "q": torch.randint(-15, 16, (rows, heads, dim), generator=generator).to(torch.float8_e4m3fn),
        "weights": torch.randint(-15, 16, (rows, heads), generator=generator) / 16,
        "index_cache": cache,
        "query_offsets": offsets,
        "visible_lens": torch.tensor(visible, dtype=torch.int32),
        "page_table": table,
    }
    return Inputs(problem=problem, tensors=tensors)
