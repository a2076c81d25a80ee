"""Two small Triton kernels around FlashMLA: slots outside the cache become -1, and lse gets this package's lower end.

Hides only launch sizes. Written as plain PyTorch each would be several launches, 2 us apiece beside a call of 23 us.
"""

# Triton's types describe device values.
# pyright: reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _bound_slots_kernel(slots_ptr, out_ptr, stride, topk, num_slots, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + row * stride + place, mask=place < topk, other=-1)
    tl.store(out_ptr + row * topk + place, tl.where((slots >= 0) & (slots < num_slots), slots, -1), mask=place < topk)


@triton.jit
def _lower_lse_kernel(lse_ptr, out_ptr, num_values, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lse = tl.load(lse_ptr + place, mask=place < num_values, other=0.0)
    tl.store(out_ptr + place, tl.where(lse == float("inf"), float("-inf"), lse), mask=place < num_values)


def bound_slots(slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """int32 ``[R, k]`` slots, -1 for those outside ``[0, num_slots)``, as a new contiguous tensor."""
    num_rows, topk = slots.shape
    out = torch.empty(num_rows, topk, dtype=torch.int32, device=slots.device)
    grid = (num_rows, triton.cdiv(topk, _BLOCK))
    _bound_slots_kernel[grid](slots, out, slots.stride(0), topk, num_slots, BLOCK=_BLOCK)
    return out


def lower_lse(lse: torch.Tensor, out: torch.Tensor) -> None:
    """Copy contiguous float32 ``lse`` to ``out`` of as many values, +inf as -inf."""
    _lower_lse_kernel[(triton.cdiv(lse.numel(), _BLOCK),)](lse, out, lse.numel(), BLOCK=_BLOCK)
