"""Top-k of every row in plain PyTorch: the definition, and the path of every machine without a better kernel.

Hides how floats are ordered as integers.

With ``len = min(max(visible_lens[r], 0), C)``, and at most ``P * page_size`` if a page table is given, row ``r`` gets
exactly ``min(k, len)`` distinct positions below ``len`` in ascending order, then -1. They are the first ``min(k, len)``
of the order: higher logit first; NaN below minus infinity; -0.0 equal to +0.0; among equals the lower position. A row
of at most k visible columns gets all of them, whatever they hold. Columns at or past ``len`` have no influence.

With a page table a position ``p`` of a row of request ``b`` becomes the slot
``page_table[b, p // page_size] * page_size + p % page_size``, in the same order. A negative page id, or one whose slot
exceeds 32 bits, gives -1; another id outside the cache gives a slot that ``sparse_mla`` takes as -1.

The order is that of one int64: the float's bits made monotone in the upper half, the inverted position in the lower, so
that no two columns compare equal and no sort has to be stable. Positions stay below 2^31, so the halves never overlap.
"""

from __future__ import annotations

import torch

from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._pages import INT32_MAX, request_of_row, translate_positions
from nextn.ops.select_topk.problem import SelectTopkProblem

_KEYS_AT_ONCE = 2**24  # int64 keys held at once: 128 MB
_INT32_MIN = -(2**31)
_INT64_MIN = -(2**63)


def prepare(
    problem: SelectTopkProblem,
    *,
    logits: torch.Tensor,
    visible_lens: torch.Tensor,
    query_offsets: torch.Tensor | None,
    page_table: torch.Tensor | None,
    out: torch.Tensor,
    plan: OpPlan | None = None,
) -> Launch:
    """Describe the call; tensors as in ``select_topk``."""
    arguments = {
        "logits": logits,
        "visible_lens": visible_lens,
        "query_offsets": query_offsets,
        "page_table": page_table,
        "page_size": problem.page_size,
        "out": out,
    }
    return Launch(function=_run, arguments=arguments)


def _run(
    *,
    logits: torch.Tensor,
    visible_lens: torch.Tensor,
    query_offsets: torch.Tensor | None,
    page_table: torch.Tensor | None,
    page_size: int,
    out: torch.Tensor,
) -> None:
    num_rows, width = logits.shape
    if page_table is not None:
        width = min(width, page_table.shape[1] * page_size)
    if logits.device.type == "cpu" and num_rows:
        width = min(width, max(int(visible_lens.max()), 0))  # a host read costs nothing there
    requests = None if query_offsets is None else request_of_row(query_offsets, num_rows)
    block = max(1, _KEYS_AT_ONCE // max(width, 1))
    for start in range(0, num_rows, block):
        rows = slice(start, start + block)
        lens = visible_lens[rows].to(torch.int64).clamp(max=width)
        positions = _select_positions(logits[rows, :width], lens, out.shape[1])
        if page_table is not None and requests is not None:
            positions = translate_positions(positions, requests[rows], page_table, page_size)
        out[rows] = positions


def _select_positions(logits: torch.Tensor, lens: torch.Tensor, k: int) -> torch.Tensor:
    """int64 ``[R, k]`` of logits ``[R, W]`` and lengths of at most W; a negative one counts as 0."""
    first = torch.arange(k, device=logits.device)
    everything = torch.where(first < lens[:, None], first, -1)
    if logits.shape[1] <= k:
        return everything
    keys = _order_keys(logits)
    columns = torch.arange(logits.shape[1], device=logits.device)
    keys.masked_fill_(columns >= lens[:, None], _INT64_MIN)
    best = torch.topk(keys, k, dim=1, sorted=False).indices.sort(dim=1).values
    return torch.where(lens[:, None] > k, best, everything)


def _order_keys(logits: torch.Tensor) -> torch.Tensor:
    """int64 keys, all different within a row, that ascend as the logits do and then as positions descend."""
    bits = (logits + 0.0).view(torch.int32)  # -0.0 + 0.0 is +0.0
    ordered = torch.where(bits < 0, bits ^ INT32_MAX, bits).masked_fill_(logits.isnan(), _INT32_MIN)
    inverted = torch.arange(INT32_MAX, INT32_MAX - logits.shape[1], -1, device=logits.device)
    return (ordered.to(torch.int64) << 32) + inverted


KERNEL = Kernel(
    op="select_topk",
    name="reference",
    rejects=lambda problem: None,
    prepare=prepare,
    rank=lambda problem: 0,
)
