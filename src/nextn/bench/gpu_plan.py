"""Checks and times planning on a GPU: ``python -m nextn.bench.gpu_plan --stage check``, needing torch and triton alone.

Hides how plans are captured and compared. Rows and schedules must equal their definitions to the last integer, and a
captured forward, replayed with other lengths, depths and padding, must return the bits of an eager one.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

import torch

from nextn import ops
from nextn.backend import DSABackend, LayerCache
from nextn.batch import ForwardBatch, ForwardMode
from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.env import read_environment
from nextn.integrations import deep_gemm
from nextn.ops._rows import Fills, RowArrays, locate_rows_in_torch
from nextn.ops._triton_rows import locate_rows_in_triton
from nextn.ops.index_logits import _triton_schedule as schedules
from nextn.plan import DSAMetadata, DSASpec, plan_forward
from nextn.testing.numerics import MAX_ERROR, QUANTISED_MAX_DIFF, compare_rows
from nextn.testing.schedules import list_groups, share_out

DEVICE = torch.device("cuda")
MAX_CONTEXT = 4160
SPEC = DSASpec(
    num_heads=16,
    index_heads=64,
    index_topk=512,
    softmax_scale=0.13,
    index_format=IndexCacheFormat(name="fp8"),
    latent_format=LatentCacheFormat(name="fp8"),
)
# Rows of each request, and cached tokens. All have as many requests and rows, and no more rows of one than the first.
CAPTURED = ((4, 4, 4, 4, 4, 4, 8, 0), (4100, 64, 65, 4, 2049, 700, 9, 0))
REPLAYED = (
    ((4, 4, 4, 4, 4, 4, 8, 0), (5, 4160, 4, 2047, 4, 63, 3000, 0)),  # other lengths
    ((0, 8, 1, 7, 3, 5, 2, 6), (0, 900, 4096, 7, 2050, 5, 2, 640)),  # other depths
    ((8, 8, 8, 8, 0, 0, 0, 0), (4160, 4160, 4160, 4160, 0, 0, 0, 0)),
    ((4, 4, 4, 4, 4, 4, 4, 4), (4100, 0, 2, 0, 2049, 700, 0, 0)),  # padding requests
    ((3, 0, 1, 2, 4, 0, 1, 1), (70, 9, 4100, 2, 300, 12, 1, 0)),  # rows that no request owns
)


def check_rows(rounds: int = 60) -> str:
    """The rows launch against its definition, for random batches with hostile lengths and tables."""
    chooser = random.Random(0)
    for _ in range(rounds):
        inputs = _random_rows(chooser)
        fills = Fills(device=DEVICE)
        sizes = [chooser.choice((1, 1025, 3_000_000)) for _ in range(chooser.randrange(4))]
        pieces = [(fills.ask((size,), torch.int64, 2**62 + size).zero_(), 2**62 + size) for size in sizes]
        ours = locate_rows_in_triton(**{name: _to(value, DEVICE) for name, value in inputs.items()}, fills=fills)
        if not all(bool((memory == value).all()) for memory, value in pieces):
            return f"memory of {sizes} elements is not filled"
        theirs = locate_rows_in_torch(**inputs)
        for field in fields(RowArrays):
            if not torch.equal(getattr(ours, field.name).cpu(), getattr(theirs, field.name)):
                return f"{field.name} differs for offsets {inputs['query_offsets'].tolist()[:20]}"
    return ""


def check_schedules(rounds: int = 60) -> str:
    """The schedule launch against plain Python, for random batches by request, by row and by span of keys."""
    chooser = random.Random(1)
    for _ in range(rounds):
        per_group, num_programs = chooser.choice((1, 3, 4, 7, 8)), chooser.choice((1, 7, 396, 528))
        counts = [chooser.choice((0, 1, 2, 3, 4, 8, 9, 40)) for _ in range(chooser.choice((1, 5, 70, 1500)))]
        has_one_each = chooser.random() < 0.5
        counts = [min(count, per_group) for count in counts] if has_one_each else counts
        offsets = list(accumulate(counts, initial=0))
        lens = [chooser.choice((0, -1, 1, 63, 64, 65, 5000, 2**31 - 1, -(2**31))) for _ in range(offsets[-1])]
        starts = None
        if not has_one_each and chooser.random() < 0.5:
            starts = [chooser.choice((0, -5, 3)) + row // 11 * 70 for row in range(offsets[-1])]
        note = _compare_schedule(offsets, lens, starts, per_group, num_programs, has_one_each)
        if note:
            return note
    return ""


def check_selection_replays() -> str:
    """Plan and selection captured in a graph, replayed with other batches, against the eager run of each, in bits."""
    return _check_replays(attends=False)


def check_layer_replays() -> str:
    """The same with cache writes and attention."""
    return _check_replays(attends=True)


def _check_replays(*, attends: bool, layers: int = 2) -> str:
    backend, caches, inputs = make_forward(layers)
    batch = _make_batch(*CAPTURED)

    def run(batch: ForwardBatch) -> tuple[torch.Tensor, ...]:
        return _run_layers(backend, caches, inputs, backend.init_forward_metadata(batch), attends)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(batch)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(batch)
    for counts, lens in (CAPTURED, *REPLAYED, CAPTURED):
        other = _make_batch(counts, lens)
        eager = [part.clone() for part in run(other)]
        batch.context_lens.copy_(other.context_lens)
        batch.query_offsets.copy_(other.query_offsets)
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            for have, want in zip(captured, eager):
                name = "attended" if have.ndim == 3 else "slots"
                if not torch.equal(have[: len(want)], want):
                    return f"{name} of {counts}, {lens} differ from the eager run"
                if name == "slots" and not bool((have[len(want) :] == -1).all()):
                    return f"rows that no request owns select something in {counts}"
    return ""


def check_contiguous() -> str:
    """Contiguous keys against the reference on the CPU, and twenty repeats in bits."""
    generator = torch.Generator().manual_seed(2)
    for heads, num_keys, max_columns in ((64, 3000, None), (8, 2000, 600)):
        rows = 301
        starts = torch.arange(rows) // 90 * (num_keys // 4)
        ends = starts + torch.randint(-5, num_keys // 2, (rows,), generator=generator)
        given = {
            "q": torch.randn(rows, heads, 128, generator=generator).to(torch.float8_e4m3fn),
            "weights": torch.rand(rows, heads, generator=generator) * (heads * 128) ** -0.5,
            "keys": torch.randn(num_keys, 128, generator=generator).to(torch.float8_e4m3fn),
            "key_scales": torch.exp2(torch.randint(-6, 0, (num_keys,), generator=generator).float()),
            "row_starts": starts.to(torch.int32),
            "row_ends": ends.to(torch.int32),
        }
        moved = {name: tensor.to(DEVICE) for name, tensor in given.items()}
        shape = (rows, num_keys if max_columns is None else max_columns)
        wanted, have = torch.zeros(shape), torch.zeros(shape, device=DEVICE)
        ops.contiguous_index_logits(**given, out=wanted, max_columns=max_columns)
        ops.contiguous_index_logits(**moved, out=have, max_columns=max_columns)
        comparison = compare_rows(have.cpu(), wanted)
        if not (comparison.max_diff < QUANTISED_MAX_DIFF and comparison.max_error <= MAX_ERROR):
            return f"{heads} heads, {num_keys} keys: diff {comparison.max_diff:.1e}, error {comparison.max_error:.1e}"
        for _ in range(20):
            again = torch.zeros(shape, device=DEVICE)
            ops.contiguous_index_logits(**moved, out=again, max_columns=max_columns)
            if not torch.equal(again, have):
                return f"{heads} heads, {num_keys} keys: a repeat differs in bits"
    return ""


def check_drop_in() -> str:
    """The DeepGEMM module at several depths and with request ids, against index_logits, in bits."""
    generator = torch.Generator().manual_seed(4)
    _, (cache, *_), _ = make_forward(1)
    assert cache.index is not None
    paged, pages = cache.index.view(-1, 64, 1, 132), MAX_CONTEXT // 64
    for next_n, has_ids in ((1, False), (3, False), (6, False), (4, True)):
        rows, batch = 8 * next_n, _make_batch((next_n,) * 8, (4100, 64, 65, 10, 2049, 700, 9, 8))
        q = torch.randn(rows, 64, 128, generator=generator).to(torch.float8_e4m3fn).to(DEVICE)
        weights = (torch.randn(rows, 64, generator=generator) + 0.5).to(DEVICE)
        steps = torch.arange(next_n, dtype=torch.int32, device=DEVICE) + 1 - next_n
        lens = (batch.context_lens[:, None] + steps).clamp(min=0)
        ids = torch.arange(8, dtype=torch.int32, device=DEVICE).repeat_interleave(next_n) if has_ids else None
        shape = (rows, 1) if has_ids else (8, next_n)
        table = batch.page_table.repeat_interleave(next_n, 0) if has_ids else batch.page_table
        logits = deep_gemm.fp8_paged_mqa_logits(
            q.view(*shape, 64, 128), paged, weights, lens.view(shape), table, None, MAX_CONTEXT, indices=ids
        )
        visible = lens.view(-1)
        wanted = ops.index_logits(
            q.cpu(), weights.cpu(), cache.index.cpu(), batch.query_offsets.cpu(), visible.cpu(),
            batch.page_table.cpu(), max_context=pages * 64,
        )  # fmt: skip
        hidden = torch.arange(MAX_CONTEXT) >= visible.cpu()[:, None]
        comparison = compare_rows(logits.cpu().masked_fill(hidden, 0), wanted.masked_fill(hidden, 0))
        if not (comparison.max_diff < QUANTISED_MAX_DIFF and comparison.max_error <= MAX_ERROR):
            return f"next_n {next_n}, ids {has_ids}: diff {comparison.max_diff:.1e}, error {comparison.max_error:.1e}"
    return ""


def check_chunks() -> str:
    """A selection in many parts, under a small budget, against the whole, in bits."""
    backend, caches, inputs = make_forward(1)
    batch = _make_batch(*CAPTURED)
    (whole,) = _run_layers(backend, caches, inputs, backend.init_forward_metadata(batch), False)
    for rows in (1, 5, 8, 24):
        settings = replace(read_environment(), logits_budget_bytes=rows * 4 * 4352)
        metadata = plan_forward(batch, SPEC, backend.hardware, deterministic=True, environment=settings)
        if len(metadata.chunks) != -(-batch.num_rows // rows):
            return f"{len(metadata.chunks)} chunks under a budget of {rows} rows"
        if not torch.equal(_run_layers(backend, caches, inputs, metadata, False)[0], whole):
            return f"chunks of {rows} rows select otherwise"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage and print its lines; returns 1 if a check failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", choices=("check", "bench"), default="check")
    parser.add_argument("--only", default="", help="checks whose name holds this")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_plan: PyTorch finds no GPU here; run it on a machine with one", file=sys.stderr)
        return 2
    if arguments.stage == "bench":
        from nextn.bench.gpu_plan_times import time_contiguous, time_plans

        time_plans()
        time_contiguous()
        return 0
    failed = 0
    replays = (check_selection_replays, check_layer_replays)
    checks = (check_rows, check_schedules, *replays, check_chunks, check_drop_in, check_contiguous)
    for check in (check for check in checks if arguments.only in check.__name__):
        try:
            note = check()
        except Exception as error:  # whatever it is, the other checks still run
            note = f"{type(error).__name__}: {str(error)[-300:]}"
        failed += bool(note)
        print(f"{'FAIL' if note else 'ok  '} {check.__name__} {note}", flush=True)
    return 1 if failed else 0


def _random_rows(chooser: random.Random) -> dict:
    counts = [chooser.choice((0, 1, 2, 4, 8, 50)) for _ in range(chooser.choice((1, 2, 7, 64, 1000)))]
    offsets = list(accumulate(counts, initial=0))
    num_rows = max(offsets[-1] + chooser.choice((0, 0, 5, -3)), 0)
    pages = chooser.choice((1, 3, 40))
    lens = [chooser.choice((0, -1, 1, 64, 65, pages * 64, pages * 64 + 1, 2**31 - 1, -(2**31))) for _ in counts]
    table = [[chooser.choice((0, 1, 7, -1, 2**30, 2**25 - 1, 2**25)) for _ in range(pages)] for _ in counts]
    return {
        "query_offsets": torch.tensor(offsets, dtype=torch.int32),
        "context_lens": torch.tensor(lens, dtype=torch.int32),
        "page_table": torch.tensor(table, dtype=torch.int32),
        "num_rows": num_rows,
        "page_size": 64,
        "visible_lens": torch.arange(num_rows, dtype=torch.int32) if chooser.random() < 0.2 else None,
    }


def _compare_schedule(
    offsets: list[int],
    lens: list[int],
    starts: list[int] | None,
    per_group: int,
    num_programs: int,
    has_one_each: bool,
) -> str:
    def move(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    groups = list_groups(offsets, lens, rows_per_group=per_group, num_keys=4999, tile=64, starts=starts)
    shares = share_out(groups, num_programs=num_programs, tile_costs=schedules.TILE_COSTS)
    schedule = schedules.allocate_schedule(
        DEVICE, max_groups=len(lens), rows_per_group=per_group, num_programs=num_programs
    )
    for launch in schedules.describe_fill(
        schedule,
        query_offsets=move(offsets),
        visible_lens=move(lens),
        max_context=4999,
        tile=64,
        row_starts=None if starts is None else move(starts),
        has_one_group_each=has_one_each,
    ):
        launch()
    if [tuple(group) for group in schedule.groups[: len(groups)].tolist()] != groups:
        return f"groups differ for {len(offsets) - 1} requests, {len(lens)} rows, {per_group} per group"
    wanted = [(*share, *(groups[share[0]] if share[0] < len(groups) else (0,) * 4)) for share in shares]
    if [tuple(record) for record in schedule.programs[:, :6].tolist()] != wanted:
        return f"shares differ for {len(offsets) - 1} requests, {num_programs} programs"
    return ""


def compare_plan(metadata: DSAMetadata) -> str:
    """What of a plan's schedules differs from plain Python."""
    for chunk in metadata.chunks:
        data, problem = chunk.index_logits.data, chunk.index_logits.problem
        if not isinstance(data, schedules.WorkSchedule):
            return f"planned {chunk.index_logits.choice}, which has no such schedule"
        groups = list_groups(
            chunk.query_offsets.tolist(),
            chunk.visible_lens.tolist(),
            rows_per_group=data.rows_per_group,
            num_keys=problem.max_context,
            tile=64,
        )
        if [tuple(group) for group in data.groups[: len(groups)].tolist()] != groups:
            return "FAIL: groups differ"
        shares = share_out(groups, num_programs=data.num_programs, tile_costs=data.tile_costs)
        if [tuple(record) for record in data.programs[:, :2].tolist()] != shares:
            return "FAIL: shares differ"
    return ""


def make_forward(layers: int) -> tuple[DSABackend, tuple[LayerCache, ...], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    angles = torch.arange(131072)[:, None] * torch.logspace(0, -4, 32)
    backend = DSABackend(
        SPEC, torch.cat([angles.cos(), angles.sin()], dim=1).float(), device=DEVICE, deterministic=True
    )
    num_pages, rows = 8 * (MAX_CONTEXT // 64) + 1, sum(CAPTURED[0])
    caches = backend.allocate_caches(num_pages, [True] * max(layers, 1))
    inputs = []
    for cache in caches[:layers]:
        _fill(cache, generator)
        sizes = {"kv": (rows, 576), "index_k": (rows, 128), "q": (rows, 64, 128), "queries": (rows, 16, 576)}
        made = {name: torch.randn(size, generator=generator).bfloat16().to(DEVICE) for name, size in sizes.items()}
        inputs.append({**made, "weights": torch.randn(rows, 64, generator=generator).to(DEVICE)})
    return backend, caches, inputs


def _fill(cache: LayerCache, generator: torch.Generator) -> None:
    """Random e4m3 values, scales a power of two, rope values of a size with them."""
    assert cache.index is not None
    num_pages = cache.kv.shape[0]
    keys = torch.randn(num_pages, 8192, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.exp2(torch.randint(-6, 0, (num_pages, 64), generator=generator).float()).view(torch.uint8)
    cache.index.copy_(torch.cat([keys, scales], dim=1))
    latents = torch.randn(num_pages, 64, 512, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.full((num_pages, 64, 4), 0.125).view(torch.uint8)
    rope = torch.randn(num_pages, 64, 64, generator=generator).bfloat16().view(torch.uint8)
    cache.kv.copy_(torch.cat([latents, scales, rope], dim=2).view(cache.kv.shape))


def _make_batch(counts: Sequence[int], lens: Sequence[int]) -> ForwardBatch:
    pages = MAX_CONTEXT // 64
    table = torch.randperm(len(counts) * pages, generator=torch.Generator().manual_seed(5)).add(1)
    return ForwardBatch.build(
        ForwardMode.TARGET_VERIFY,
        row_counts=counts,
        context_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        page_table=table.view(len(counts), pages).to(torch.int32).to(DEVICE),
        max_context=MAX_CONTEXT,
    )


def _run_layers(
    backend: DSABackend,
    caches: Sequence[LayerCache],
    inputs: Sequence[dict[str, torch.Tensor]],
    metadata: DSAMetadata,
    attends: bool,
) -> tuple[torch.Tensor, ...]:
    rows = metadata.batch.num_rows
    results: list[torch.Tensor] = []
    for cache, given in zip(caches, inputs):
        part = {name: tensor[:rows] for name, tensor in given.items()}
        if attends:
            backend.write_cache(cache, metadata, kv=part["kv"], kv_norm_weight=None, index_k=part["index_k"])
        results.append(backend.get_topk_paged(cache, metadata, q=part["q"], weights=part["weights"]))
        if attends:
            results.append(backend.attend(cache, metadata, q=part["queries"], topk_slots=results[-1]))
    return tuple(results)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


if __name__ == "__main__":
    sys.exit(main())
