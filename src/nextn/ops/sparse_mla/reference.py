"""Attention over selected slots in plain PyTorch: the definition, and the path of machines without a better kernel.

Hides how rows are cut into blocks; no result depends on it.

Absorbed multi-head latent attention (DeepSeek-V2 report, section 2.1; DeepSeek-V3.2-Exp report, section 2.1), every
query head sharing the one latent row ``kv[slot]`` of 512 latents and 64 rope values. With ``S`` the slots of
``indices[r]`` that lie inside the cache::

    z[r, h, s] = scale * (q[r, h] . kv[s])                      over 576 values
    lse[r, h] = log sum_{s in S} exp(z[r, h, s])                natural logarithm
    out[r, h] = sum_{s in S} exp(z[r, h, s] - lse[r, h]) * kv[s, :512]

Defined cases. -1 may stand anywhere among the indices; any other slot outside the cache counts as -1 and is never read.
A slot named twice counts twice. A row with no slot gets 0 and an lse of minus infinity (FlashMLA says plus infinity).
NaN in rows that are not selected never matters; in a selected one it spoils the rows that select it alone. Sums are in
FP32 whatever the dtype of ``q``; FP8 latents times their power-of-two scales are exact.

Bits. Rows run in blocks of a fixed number, padded with empty rows, over the full width of ``indices`` rounded up to 16
slots, so every product has one shape and one alignment whatever the batch: a row's bits depend on nothing but its
query, its indices in their order, and the rows of the cache they name.
"""

from __future__ import annotations

import torch

from nextn.cache_format import LATENT_DIM, LATENT_ROW_DIM, latent_cache_format
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._pages import gather_latent_rows
from nextn.ops.sparse_mla.problem import SparseMlaProblem

_CPU_ROWS = 4  # the usual verify step; one row costs 0.7 ms instead of 0.4, at 8 heads and 256 slots on two cores
_CPU_BLOCKS_PER_GATHER = 16
_GPU_ROWS = 32
_SLOT_MULTIPLE = 16  # 64 bytes: rows of scores stay aligned, without which BLAS results vary with the address


def prepare(
    problem: SparseMlaProblem,
    *,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    query_offsets: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: OpPlan | None = None,
) -> Launch:
    """Describe the call; tensors as in ``sparse_mla``, with ``lse`` float32 ``[R, Hq]``."""
    arguments = {"q": q, "kv_cache": kv_cache, "indices": indices, "scale": scale, "out": out, "lse": lse}
    return Launch(function=_run, arguments=arguments)


def _run(
    *,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    is_on_cpu = q.device.type == "cpu"
    block, blocks_per_gather = (_CPU_ROWS, _CPU_BLOCKS_PER_GATHER) if is_on_cpu else (_GPU_ROWS, 1)
    num_slots = -(-indices.shape[1] // _SLOT_MULTIPLE) * _SLOT_MULTIPLE
    queries = torch.zeros(block, q.shape[1], LATENT_ROW_DIM, device=q.device)
    keys = torch.empty(block, num_slots, LATENT_ROW_DIM, device=q.device)
    for first in range(0, q.shape[0], block * blocks_per_gather):
        table, places = _gather(kv_cache, indices[first : first + block * blocks_per_gather], num_slots)
        for start in range(0, places.shape[0], block):
            block_places = places[start : start + block]
            count = block_places.shape[0]
            rows = slice(first + start, first + start + count)
            queries[:count] = q[rows]
            torch.index_select(table, 0, block_places.view(-1), out=keys[:count].view(-1, LATENT_ROW_DIM))
            keys[count:] = 0
            valid = torch.nn.functional.pad(block_places > 0, (0, 0, 0, block - count))
            block_out, block_lse = _attend(queries, keys, valid, scale)
            out[rows] = block_out[:count]
            lse[rows] = block_lse[:count]


def _gather(kv_cache: torch.Tensor, indices: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent rows that ``indices [M, k]`` name, and where each lies among them.

    Returns:
        table float32 ``[N, 576]``, row 0 zero, and places int64 ``[M, num_slots]`` in it: 0 where there is no slot. On
        a CPU a slot that several rows name is read and decoded once; on a GPU finding such slots would wait for it.
    """
    cache_format = latent_cache_format(kv_cache)
    slots = indices.to(torch.int64)
    inside = (slots >= 0) & (slots < kv_cache.shape[0] * cache_format.page_size)
    named = torch.nn.functional.pad(torch.where(inside, slots, -1).view(-1), (1, 0), value=-1)
    if named.device.type == "cpu":
        named, places = torch.unique(named, return_inverse=True)
    else:
        places = torch.arange(named.shape[0], device=named.device) * (named >= 0)
    table = gather_latent_rows(kv_cache, cache_format, named.clamp(min=0))
    table[0] = 0
    return table, torch.nn.functional.pad(places[1:].view(slots.shape), (0, num_slots - slots.shape[1]))


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 output ``[M, H, 512]`` and lse ``[M, H]`` of queries ``[M, H, 576]`` over keys ``[M, K, 576]``."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    scores.masked_fill_(~valid[:, None], float("-inf"))
    largest = scores.amax(dim=-1, keepdim=True)
    largest = torch.where(largest == float("-inf"), 0.0, largest)
    probabilities = scores.sub_(largest).exp_()
    total = probabilities.sum(dim=-1, keepdim=True)
    weighted = torch.bmm(probabilities, keys[..., :LATENT_DIM])
    out = weighted / torch.where(total == 0, 1.0, total)
    return out, (largest + total.log()).squeeze(-1)


KERNEL = Kernel(
    op="sparse_mla",
    name="reference",
    rejects=lambda problem: None,
    prepare=prepare,
    rank=lambda problem: 0,
)
