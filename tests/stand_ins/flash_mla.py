"""A pretended FlashMLA: the call of ``sgl-flash-mla`` on CPU tensors, strict about what the real one demands."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch

from nextn.ops.sparse_mla import reference


@dataclass
class Schedule:
    """What the first call fills, for one set of sizes."""

    sizes: tuple[int, ...] | None = None


class Library:
    """Records calls; its maths is the reference's, its odd ends are FlashMLA's."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_table: torch.Tensor | None,
        cache_seqlens: torch.Tensor | None,
        head_dim_v: int,
        tile_scheduler_metadata: Schedule,
        num_splits: None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        is_fp8_kvcache: bool | None = None,
        indices: torch.Tensor | None = None,
        use_legacy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert indices is not None
        rows, s_q, heads, dim = q.shape
        assert (s_q, dim, head_dim_v) == (1, 576, 512)
        assert heads in (64, 128)
        assert q.dtype == torch.bfloat16
        assert q.is_contiguous()
        assert k_cache.shape[1:] == (64, 1, 656)
        assert k_cache.dtype == torch.uint8
        assert indices.shape[:2] == (rows, 1)
        assert indices.shape[2] % 64 == 0
        assert indices.dtype == torch.int32
        assert indices.is_contiguous()
        assert use_legacy
        assert is_fp8_kvcache
        assert not causal
        assert (block_table, cache_seqlens, num_splits) == (None, None, None)
        assert ((indices >= -1) & (indices < k_cache.shape[0] * 64)).all(), "a slot out of bounds is read"
        schedule = tile_scheduler_metadata
        sizes = (rows, heads, indices.shape[2])
        assert schedule.sizes in (None, sizes), "a schedule of other sizes"
        schedule.sizes = sizes
        self.calls.append({"q": q, "indices": indices, "schedule": schedule})
        out = torch.empty(rows, heads, 512, dtype=q.dtype)
        lse = torch.empty(rows, heads)
        attend_plainly: Any = reference.KERNEL.prepare  # it reads its tensors alone, no problem
        attend_plainly(
            None,
            q=q[:, 0],
            kv_cache=k_cache[:, :, 0],
            indices=indices[:, 0],
            scale=softmax_scale,
            query_offsets=None,
            out=out,
            lse=lse,
        )()
        lse = torch.where(lse == float("-inf"), float("inf"), lse)
        return out.unsqueeze(1), lse.unsqueeze(2)


def make_module(library: Library, *, has_legacy: bool = True) -> types.ModuleType:
    """The module that ``import flash_mla`` would give."""
    module: Any = types.ModuleType("flash_mla")
    module.has_legacy = lambda: has_legacy
    module.get_mla_metadata = lambda: (Schedule(), None)
    module.flash_mla_with_kvcache = library.attend
    return module
