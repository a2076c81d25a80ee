"""A strict stand-in for DeepGEMM's paged index logits, shared by both API generations.

It asserts what DeepGEMM's host code asserts (csrc/apis/attention.hpp) and what its kernels silently need: a schedule
built by this library from the very lengths passed, lengths that fit the output, pages that exist. It computes with a
plain FP64 loop of its own and leaves NaN wherever the real kernel writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

SPLIT_KV = 256


@dataclass(kw_only=True)
class PagedMQA:
    """One pretended library on one pretended GPU.

    ``schedules`` and ``calls`` record every schedule built and every score call, in order.
    """

    arch_major: int
    num_sms: int
    sm90_next_ns: tuple[int, ...]
    sm90_page_sizes: tuple[int, ...] = (64,)
    schedules: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    calls: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def build_schedule(
        self, context_lens: torch.Tensor, block_kv: int, num_sms: int, indices: torch.Tensor | None
    ) -> torch.Tensor:
        assert context_lens.dim() == 2
        assert context_lens.dtype == torch.int32
        assert context_lens.is_contiguous()
        assert indices is None, "varlen is not what these tests are about"
        assert block_kv in self._page_sizes()
        # The real scheduler's search runs off its prefix sums when every length is 0.
        assert int(context_lens.max()) > 0
        schedule = _split_work(context_lens, num_sms)
        self.schedules.append((context_lens, schedule))
        return schedule

    def score(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        weights: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
        schedule_meta: torch.Tensor,
        max_context_len: int,
    ) -> torch.Tensor:
        self._check_query(q, weights)
        self._check_cache(q, kv_cache)
        self._check_lens(q, context_lens, block_table, max_context_len)
        self._check_schedule(q, context_lens, schedule_meta)
        self.calls.append({"q": q, "lens": context_lens, "table": block_table, "schedule": schedule_meta})
        return _compute(q, kv_cache, weights, context_lens, block_table, max_context_len)

    def _page_sizes(self) -> tuple[int, ...]:
        return (32, 64) if self.arch_major == 10 else self.sm90_page_sizes

    def _check_query(self, q: torch.Tensor, weights: torch.Tensor) -> None:
        batch, next_n, heads, dim = q.shape
        assert q.dtype == torch.float8_e4m3fn
        assert q.is_contiguous()
        assert batch >= 1
        assert next_n >= 1
        assert dim in (32, 64, 128)
        assert heads in ((8, 16, 32, 64) if self.arch_major == 10 else (32, 64))
        assert self.arch_major == 10 or next_n in self.sm90_next_ns
        assert weights.shape == (batch * next_n, heads)
        assert weights.dtype == torch.float32
        assert weights.is_contiguous()

    def _check_cache(self, q: torch.Tensor, kv_cache: torch.Tensor) -> None:
        assert kv_cache.dtype == torch.uint8
        _, block_kv, heads_kv, width = kv_cache.shape
        assert block_kv in self._page_sizes()
        assert heads_kv == 1
        assert width == q.shape[3] + 4
        assert kv_cache.stride(1) == width
        assert kv_cache.stride(3) == 1
        assert kv_cache.stride(0) % 4 == 0

    def _check_lens(
        self, q: torch.Tensor, context_lens: torch.Tensor, block_table: torch.Tensor, max_context_len: int
    ) -> None:
        assert context_lens.shape == q.shape[:2]
        assert context_lens.dtype == torch.int32
        assert context_lens.is_contiguous()
        assert block_table.dim() == 2
        assert block_table.shape[0] == q.shape[0]
        assert block_table.dtype == torch.int32
        assert block_table.stride(1) == 1
        # The kernel writes as far as the lengths say, and reads the lengths as unsigned.
        assert int(context_lens.min()) >= 0
        assert int(context_lens.max()) <= max_context_len

    def _check_schedule(self, q: torch.Tensor, context_lens: torch.Tensor, schedule: torch.Tensor) -> None:
        slots = self.num_sms // 2 if self.arch_major == 9 and q.shape[1] == 4 else self.num_sms
        assert schedule.shape == (slots + 1, 2)
        assert schedule.dtype == torch.int32
        assert schedule.is_contiguous()
        built_from = [lens for lens, built in self.schedules if built is schedule]
        assert built_from, "the schedule was not built by this library"
        assert built_from[0] is context_lens, "the schedule was built from another lengths tensor"
        assert torch.equal(_split_work(context_lens, slots), schedule), "the lengths changed after the schedule"


def _split_work(context_lens: torch.Tensor, slots: int) -> torch.Tensor:
    """Start of every slot as (request, split): segments of 256 columns, in order, evenly over the slots."""
    segments = [
        (request, split)
        for request, length in enumerate(context_lens[:, -1].tolist())
        for split in range(-(-length // SPLIT_KV))
    ]
    per_slot, extra = divmod(len(segments), slots)
    starts = [slot * per_slot + max(0, slot - (slots - extra)) for slot in range(slots)]
    sentinel = (context_lens.shape[0], 0)
    rows = [segments[start] if start < len(segments) else sentinel for start in starts]
    return torch.tensor([*rows, sentinel], dtype=torch.int32)


def _compute(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
) -> torch.Tensor:
    batch, next_n, _, dim = q.shape
    num_pages, block_kv = kv_cache.shape[:2]
    width = -(-max_context_len // SPLIT_KV) * SPLIT_KV
    logits = torch.full((batch * next_n, width), float("nan"))
    pages = kv_cache.as_strided((num_pages, block_kv * (dim + 4)), (kv_cache.stride(0), 1))
    for request in range(batch):
        length = int(context_lens[request, -1])
        used = -(-length // block_kv)
        table = block_table[request, :used].tolist()
        assert all(0 <= page < num_pages for page in table), f"request {request} reads pages {table}"
        columns = -(-length // SPLIT_KV) * SPLIT_KV
        table += [0] * (columns // block_kv - used)
        keys, scales = _gather(pages[table], block_kv, dim)
        for row in range(next_n):
            products = q[request, row].to(torch.float64) @ keys.T
            scores = (products.clamp(min=0) * weights[request * next_n + row].to(torch.float64)[:, None]).sum(dim=0)
            logits[request * next_n + row, :columns] = (scores * scales).to(torch.float32)
    return logits[:, :max_context_len]


def _gather(pages: torch.Tensor, block_kv: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = pages[:, : block_kv * dim].contiguous().view(torch.float8_e4m3fn).to(torch.float64).reshape(-1, dim)
    scales = pages[:, block_kv * dim :].contiguous().view(torch.float32).to(torch.float64).reshape(-1)
    return values, scales
