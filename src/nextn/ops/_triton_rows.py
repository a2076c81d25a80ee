"""Where each row of a batch stands, in one Triton launch that a CUDA graph can capture.

Contract: ``_rows.locate_rows_in_torch``, equal in every bit for ascending offsets. Floor: 28 bytes written per row, so
it takes as long as its longest chain of loads: a binary search of the offsets, then lengths, then the page table.
"""

# Triton's types describe host values; device code is checked by the compile gate.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nextn.ops._kernel import Launch
from nextn.ops._rows import Fills, RowArrays

_BLOCK = 128
_FILL_BLOCK = 1024  # elements that a program writes at a time
_MAX_FILL_PROGRAMS = 1024
_MAX_FILLS = 3


@triton.jit
def find_request(offsets_ptr, row, num_requests, search_steps):
    """Requests that end at or before each row: the row's request, or ``num_requests`` if no request owns it."""
    low = tl.zeros_like(row)
    high = tl.zeros_like(row) + num_requests
    for _ in range(search_steps):
        middle = (low + high) // 2
        ends_before = tl.load(offsets_ptr + middle + 1, mask=low < high, other=0) <= row
        low, high = tl.where((low < high) & ends_before, middle + 1, low), tl.where(ends_before, high, middle)
    return low


@triton.jit(do_not_specialize=["num_rows", "num_requests", "num_columns", "search_steps", "num_fill_programs"])
def _locate_rows_kernel(
    offsets_ptr,
    context_lens_ptr,
    table_ptr,
    positions_ptr,
    lens_ptr,
    requests_ptr,
    slots_ptr,
    fills,
    table_row_stride,
    num_rows,
    num_requests,
    num_columns,
    search_steps,
    num_fill_programs,
    PAGE: tl.constexpr,
    WRITES_LENS: tl.constexpr,
    BLOCK: tl.constexpr,
    FILL_BLOCK: tl.constexpr,
):
    """The first programs fill memory, each its share of every piece; the others locate the rows."""
    program = tl.program_id(0)
    for i in tl.static_range(len(fills)):
        memory_ptr, size, value = fills[i]
        first = tl.where(program < num_fill_programs, program.to(tl.int64) * FILL_BLOCK, size)
        for start in range(first, size, num_fill_programs * FILL_BLOCK):
            offs = start + tl.arange(0, FILL_BLOCK)
            filling = tl.full((FILL_BLOCK,), value, memory_ptr.dtype.element_ty)
            tl.store(memory_ptr + offs, filling, mask=offs < size)
    row = (program - num_fill_programs) * BLOCK + tl.arange(0, BLOCK)
    mask_row = (row >= 0) & (row < num_rows)
    request = find_request(offsets_ptr, row, num_requests, search_steps)
    is_owned = request < num_requests
    request = tl.minimum(request, num_requests - 1).to(tl.int64)
    stop = tl.load(offsets_ptr + request + 1, mask=mask_row, other=0).to(tl.int64)
    context_len = tl.load(context_lens_ptr + request, mask=mask_row, other=0).to(tl.int64)
    position = tl.where(is_owned, tl.maximum(context_len - stop + row, -1), -1)
    is_inside = mask_row & (position >= 0) & (position < tl.cast(num_columns, tl.int64) * PAGE)
    page_ptr = table_ptr + request * table_row_stride + position // PAGE
    page = tl.load(page_ptr, mask=is_inside, other=-1).to(tl.int64)
    slot = page * PAGE + position % PAGE
    slot = tl.where((page >= 0) & (slot <= 2147483647), slot, -1)
    tl.store(positions_ptr + row, tl.maximum(position, 0), mask=mask_row)
    tl.store(requests_ptr + row, request, mask=mask_row)
    tl.store(slots_ptr + row, slot, mask=mask_row)
    if WRITES_LENS:
        tl.store(lens_ptr + row, (position + 1).to(tl.int32), mask=mask_row)


def describe_rows(
    *,
    query_offsets: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    num_rows: int,
    page_size: int,
    visible_lens: torch.Tensor | None = None,
    fills: Fills | None = None,
) -> tuple[Launch, RowArrays]:
    """The launch that fills the arrays, and the arrays; arguments as in ``_rows.locate_rows``, at most three fills."""
    requests = fills.requests if fills else []
    assert len(requests) <= _MAX_FILLS, f"{len(requests)} pieces of memory to fill in one launch"
    pieces = tuple((memory, memory.numel(), value) for memory, value in requests)
    largest = max((size for _, size, _ in pieces), default=0)
    num_fill_programs = min(-(-largest // _FILL_BLOCK), _MAX_FILL_PROGRAMS)
    num_requests = context_lens.shape[0]
    int64 = {"dtype": torch.int64, "device": query_offsets.device}
    writes_lens = visible_lens is None
    if visible_lens is None:
        visible_lens = torch.empty(num_rows, dtype=torch.int32, device=query_offsets.device)
    arrays = RowArrays(
        positions=torch.empty(num_rows, **int64),
        visible_lens=visible_lens,
        request_of_row=torch.empty(num_rows, **int64),
        slots=torch.empty(num_rows, **int64),
    )
    arguments = {
        "offsets_ptr": query_offsets.contiguous(),
        "context_lens_ptr": context_lens.contiguous(),
        "table_ptr": page_table,
        "positions_ptr": arrays.positions,
        "lens_ptr": arrays.visible_lens,
        "requests_ptr": arrays.request_of_row,
        "slots_ptr": arrays.slots,
        "fills": pieces,
        "table_row_stride": page_table.stride(0),
        "num_rows": num_rows,
        "num_requests": num_requests,
        "num_columns": page_table.shape[1],
        "search_steps": num_requests.bit_length(),
        "num_fill_programs": num_fill_programs,
        "PAGE": page_size,
        "WRITES_LENS": writes_lens,
        "BLOCK": _BLOCK,
        "FILL_BLOCK": _FILL_BLOCK,
    }
    options = {"num_warps": 4, "enable_fp_fusion": True}
    grid = (num_fill_programs + -(-num_rows // _BLOCK),)
    return Launch(function=_locate_rows_kernel, arguments=arguments, grid=grid, options=options), arrays


def locate_rows_in_triton(
    *,
    query_offsets: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    num_rows: int,
    page_size: int,
    visible_lens: torch.Tensor | None = None,
    fills: Fills | None = None,
) -> RowArrays:
    """:func:`nextn.ops._rows.locate_rows` in one launch, and one for each fill past the third."""
    if fills:
        for memory, value in fills.requests[_MAX_FILLS:]:
            memory.fill_(value)
        fills = Fills(device=fills.device, requests=fills.requests[:_MAX_FILLS])
    launch, arrays = describe_rows(
        query_offsets=query_offsets,
        context_lens=context_lens,
        page_table=page_table,
        num_rows=num_rows,
        page_size=page_size,
        visible_lens=visible_lens,
        fills=fills,
    )
    launch()
    return arrays
