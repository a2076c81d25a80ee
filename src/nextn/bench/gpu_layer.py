"""Checks one layer's whole attention on a device: in deterministic mode a token's bits depend on nothing around it.

Hides how the same tokens are arranged into forwards: at once, one by one, alone, at mixed depths, in chunks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextn.backend import DSABackend, LayerCache
from nextn.batch import ForwardBatch, ForwardMode
from nextn.bench.rows import describe_run, print_rows
from nextn.cache_format import LATENT_DIM, ROPE_DIM, IndexCacheFormat, LatentCacheFormat
from nextn.plan import DSASpec

PAGE = 64


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Requests whose last tokens are verified.

    Attributes:
        prefix_lens: tokens of each request that are cached before the verified ones.
        depth: verified tokens per request.
        spec: sizes of the attention.
    """

    prefix_lens: tuple[int, ...]
    depth: int
    spec: DSASpec

    @property
    def max_context(self) -> int:
        return max(self.prefix_lens) + self.depth


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a model would compute for every token of every request, ``[B, L, ...]``, on the device."""

    kv: torch.Tensor
    index_k: torch.Tensor
    index_q: torch.Tensor
    weights: torch.Tensor
    q: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Result:
    """Selected slots and attention of each verified token, ``[B, depth, ...]``."""

    slots: torch.Tensor
    attended: torch.Tensor


def make_scenario(
    prefix_lens: Sequence[int], depth: int, *, heads: int, index_heads: int = 64, topk: int = 2048, cache: str = "fp8"
) -> Scenario:
    """A scenario over FP8 index keys.

    Args:
        prefix_lens: tokens of each request cached before the verified ones.
        depth: verified tokens per request.
        heads: query heads.
        index_heads: heads of the indexer.
        topk: tokens each row selects.
        cache: format of the latents, fp8 or bf16.
    """
    spec = DSASpec(
        num_heads=heads,
        index_heads=index_heads,
        index_topk=topk,
        softmax_scale=0.1,
        index_format=IndexCacheFormat(name="fp8"),
        latent_format=LatentCacheFormat(name="fp8" if cache == "fp8" else "bf16"),
    )
    return Scenario(prefix_lens=tuple(prefix_lens), depth=depth, spec=spec)


def check(scenario: Scenario, device: torch.device | str) -> Iterator[dict[str, Any]]:
    """Compare every arrangement of the verified tokens with verifying all at once, bit for bit.

    Yields:
        One row per arrangement: ``op, case, passed, note``.
    """
    layer = _Layer(scenario, torch.device(device))
    depth, num_requests = scenario.depth, len(scenario.prefix_lens)
    expected, cache = layer.run([[depth] * num_requests])
    mixed = [(request * 3) % (depth + 1) for request in range(num_requests)]
    arrangements = {
        "again": [[depth] * num_requests],
        "one token at a time": [[1] * num_requests] * depth,
        "mixed depths": [mixed, [depth - first for first in mixed]],
        "two halves": [[depth // 2] * num_requests, [depth - depth // 2] * num_requests],
    }
    for request in range(num_requests):
        alone = [depth if other == request else 0 for other in range(num_requests)]
        arrangements[f"request {request} first"] = [alone, [depth - count for count in alone]]
    for name, steps in arrangements.items():
        result, written = layer.run(steps)
        notes = [
            *_differing("slots", result.slots, expected.slots),
            *_differing("attention", result.attended, expected.attended),
            *_differing("latent cache", written.kv, cache.kv),
            *_differing("index cache", _require(written.index), _require(cache.index)),
        ]
        yield {"op": "layer", "case": name, "passed": not notes, "note": "; ".join(notes), "kernels": layer.kernels}


class _Layer:
    """One layer whose verified tokens can be run in any steps, from the same prefix."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        self.scenario = scenario
        self.kernels: dict[str, str] = {}
        num_requests, context = len(scenario.prefix_lens), scenario.max_context
        positions = torch.arange(context + PAGE)[:, None] * torch.logspace(0, -4, ROPE_DIM // 2)
        rope_table = torch.cat([positions.cos(), positions.sin()], dim=1).float()
        self._backend = DSABackend(scenario.spec, rope_table, device=device, deterministic=True)
        generator = torch.Generator().manual_seed(1)
        num_pages = -(-context // PAGE)
        order = torch.randperm(num_requests * num_pages, generator=generator)
        self._table = order.to(torch.int32).reshape(num_requests, num_pages).to(device)
        self._tokens = _make_tokens(scenario, device)
        (self._prefix,) = self._backend.allocate_caches(num_requests * num_pages, [True])
        self._write_prefix()

    def run(self, steps: Sequence[Sequence[int]]) -> tuple[Result, LayerCache]:
        """Verify the tokens in ``steps``, each the tokens that every request advances by."""
        spec, num_requests = self.scenario.spec, len(self.scenario.prefix_lens)
        assert self._prefix.index is not None
        cache = LayerCache(kv=self._prefix.kv.clone(), index=self._prefix.index.clone())
        shape = (num_requests, self.scenario.depth)
        slots = torch.full((*shape, spec.index_topk), -7, dtype=torch.int32, device=cache.kv.device)
        attended = torch.full((*shape, spec.num_heads, LATENT_DIM), float("nan"), device=cache.kv.device)
        done = [0] * num_requests
        for counts in steps:
            rows = [(b, done[b] + j) for b, count in enumerate(counts) for j in range(count)]
            requests, offsets = (torch.tensor(column) for column in zip(*rows))
            result = self._forward(cache, counts, done, rows)
            slots[requests, offsets], attended[requests, offsets] = result.slots, result.attended.float()
            done = [before + count for before, count in zip(done, counts)]
        return Result(slots=slots, attended=attended), cache

    def _forward(
        self, cache: LayerCache, counts: Sequence[int], done: Sequence[int], rows: Sequence[tuple[int, int]]
    ) -> Result:
        prefix = self.scenario.prefix_lens
        metadata = self._backend.init_forward_metadata(
            ForwardBatch.build(
                ForwardMode.TARGET_VERIFY,
                row_counts=counts,
                context_lens=[prefix[b] + done[b] + count for b, count in enumerate(counts)],
                page_table=self._table,
                max_context=self.scenario.max_context,
            )
        )
        self.kernels = self._backend.kernels(metadata)
        requests = torch.tensor([b for b, _ in rows])
        positions = torch.tensor([prefix[b] + j for b, j in rows])
        tokens = self._tokens
        self._write(cache, metadata, tokens.kv[requests, positions], tokens.index_k[requests, positions])
        slots = self._backend.get_topk_paged(
            cache, metadata, q=tokens.index_q[requests, positions], weights=tokens.weights[requests, positions]
        )
        attended = self._backend.attend(cache, metadata, q=tokens.q[requests, positions], topk_slots=slots)
        return Result(slots=slots, attended=attended)

    def _write_prefix(self) -> None:
        for b, length in enumerate(self.scenario.prefix_lens):
            if length:
                batch = ForwardBatch.build(
                    ForwardMode.EXTEND,
                    row_counts=[length],
                    context_lens=[length],
                    page_table=self._table[b : b + 1],
                )
                metadata = self._backend.init_forward_metadata(batch)
                self._write(self._prefix, metadata, self._tokens.kv[b, :length], self._tokens.index_k[b, :length])

    def _write(self, cache: LayerCache, metadata: Any, kv: torch.Tensor, index_k: torch.Tensor) -> None:
        device = kv.device
        self._backend.write_cache(
            cache,
            metadata,
            kv=kv,
            kv_norm_weight=torch.ones(LATENT_DIM, device=device),
            index_k=index_k,
            index_norm_weight=torch.ones(index_k.shape[1], device=device),
            index_norm_bias=torch.zeros(index_k.shape[1], device=device),
        )


def _make_tokens(scenario: Scenario, device: torch.device) -> Tokens:
    spec, shape = scenario.spec, (len(scenario.prefix_lens), scenario.max_context)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(2)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*shape, *size, generator=generator, device=device)

    return Tokens(
        kv=draw(LATENT_DIM + ROPE_DIM).to(dtype),
        index_k=draw(spec.index_dim).to(dtype),
        index_q=draw(spec.index_heads, spec.index_dim).to(dtype),
        weights=draw(spec.index_heads),
        q=draw(spec.num_heads, LATENT_DIM + ROPE_DIM).to(dtype) * 0.2,
    )


def _differing(what: str, result: torch.Tensor, expected: torch.Tensor) -> list[str]:
    # Bits, so that NaN equals NaN and -0.0 differs from +0.0.
    if result.dtype.is_floating_point:
        result, expected = result.view(torch.int32), expected.view(torch.int32)
    wrong = int((result != expected).sum())
    return [f"{wrong} of {result.numel()} values of the {what} differ"] if wrong else []


def _require(index: torch.Tensor | None) -> torch.Tensor:
    assert index is not None
    return index


def list_scenarios() -> tuple[Scenario, ...]:
    """Contexts below and above top-k, batches beyond one request, every depth that matters."""
    return (
        make_scenario((2000, 2045, 4096, 9001, 130, 0), 4, heads=16),
        make_scenario((5000, 63, 3000), 8, heads=128),
        make_scenario((5000, 63, 3000), 3, heads=64, index_heads=32, cache="bf16"),
        make_scenario((70, 200, 129), 5, heads=8, index_heads=32, topk=64),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON line per arrangement of every scenario; 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="file the rows are appended to as well")
    parser.add_argument("--commit", help="the commit these files are of, where git cannot say")
    arguments = parser.parse_args(argv)
    run = describe_run(torch.device(arguments.device), arguments.commit)
    return print_rows(
        (
            {**run, "scenario": number, **row}
            for number, scenario in enumerate(list_scenarios())
            for row in check(scenario, arguments.device)
        ),
        arguments.out,
    )


if __name__ == "__main__":
    sys.exit(main())
