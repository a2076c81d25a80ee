"""Times of planning and of scores over contiguous keys: ``python -m nextn.bench.gpu_plan --stage bench``.

Hides which batches and configurations are tried. Every time is printed after its result was checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nextn import ops
from nextn.backend import DSABackend
from nextn.batch import ForwardBatch, ForwardMode
from nextn.bench.gpu_plan import DEVICE, SPEC, compare_plan, make_forward
from nextn.ops import _triton_rows
from nextn.ops.index_logits import _triton_schedule
from nextn.plan import DSAMetadata
from nextn.testing.numerics import MAX_ERROR, compare_rows

PLANS = (("64 x 32K, n=4", 64, 4, 32768), ("1 x 32K, n=4", 1, 4, 32768), ("1024 x 8K, n=4", 1024, 4, 8192),
         ("1024 x 8K, n=1", 1024, 1, 8192), ("4 x 128K, 1024 rows each", 4, 1024, 131072))  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Variant:
    """How the two launches are cut; ``blocks`` and ``warps`` are of the schedule."""

    blocks: int
    warps: int
    programs: int
    rows: int = 128

    def apply(self) -> None:
        cut = (self.blocks, self.programs, self.warps)
        _triton_schedule._BLOCKS = {True: cut, False: cut}
        _triton_rows._BLOCK = self.rows


VARIANTS = (
    _Variant(blocks=256, programs=256, warps=8),
    _Variant(blocks=1024, programs=512, warps=16),
)


def time_plans() -> None:
    """One line per batch and variant: a plan in a captured graph, alone with a cold L2 and ten in a row."""
    backend, _, _ = make_forward(0)
    other = DSABackend(SPEC, backend.rope_table, device=DEVICE)
    for name, requests, rows, context in PLANS:
        table = torch.zeros(requests, context // 64, dtype=torch.int32, device=DEVICE)
        batch = ForwardBatch.build(
            ForwardMode.TARGET_VERIFY,
            row_counts=[rows] * requests,
            context_lens=torch.full((requests,), context, dtype=torch.int32, device=DEVICE),
            page_table=table,
            max_context=context,
        )

        def run(batch: ForwardBatch = batch) -> DSAMetadata:
            return backend.init_forward_metadata(batch)

        for mode, planner in (("deterministic", backend), ("default", other)):
            launches = _count_kernels(lambda planner=planner, batch=batch: planner.init_forward_metadata(batch))
            print(f"{name}, {mode}: {len(launches)} launches: {', '.join(launches)[:300]}", flush=True)
        for variant in VARIANTS:
            variant.apply()
            note = compare_plan(run())
            cold, row = (0.0, 0.0) if note else _time_graph(run)
            print(f"{name:26} {note or f'cold {cold:5.1f} us  in a row {row:5.1f} us'}  {variant}", flush=True)


def time_contiguous() -> None:
    """Scores of a prompt's last chunk over contiguous keys, one line per size."""
    for rows, num_keys, heads in ((4096, 8192, 64), (1024, 131072, 64)):
        values = torch.randn(num_keys, 128, device=DEVICE).to(torch.float8_e4m3fn)
        q = torch.randn(rows, heads, 128, device=DEVICE).to(torch.float8_e4m3fn)
        ends = torch.arange(num_keys - rows + 1, num_keys + 1, dtype=torch.int32, device=DEVICE)
        weights, scales = torch.rand(rows, heads, device=DEVICE), torch.rand(num_keys, device=DEVICE)
        out = torch.zeros(rows, num_keys, device=DEVICE)
        given = (q, weights, values, scales, torch.zeros_like(ends), ends)
        row = rows // 2
        products = torch.einsum("hd,sd->hs", q[row].float(), values.float()).clamp(min=0)
        wanted = (products * weights[row, :, None]).sum(0) * scales
        wanted[int(ends[row]) :] = 0
        floor = 2 * int(ends.sum()) * heads * 128 / 1500e12 * 1e6

        def run(given: tuple[torch.Tensor, ...] = given, out: torch.Tensor = out) -> None:
            ops.contiguous_index_logits(*given, out=out)

        out.zero_()
        run()
        error = compare_rows(out[row : row + 1], wanted[None]).max_error
        cold, _ = (0.0, 0.0) if error > MAX_ERROR else _time_graph(run, repeats=10)
        time = f"FAIL: error {error:.1e}" if error > MAX_ERROR else f"{cold:.0f} us, floor {floor:.0f}"
        print(f"contiguous {rows} rows x {num_keys} keys x {heads} heads: {time}", flush=True)


def _count_kernels(run: Callable[[], object]) -> list[str]:
    """Names of the kernels, copies and fills that one eager call launches."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        torch.cuda.synchronize()
    return [event.name[:40] for event in profiler.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]


def _time_graph(run: Callable[[], object], repeats: int = 30) -> tuple[float, float]:
    """Microseconds of one captured call: median with the L2 overwritten before each, and mean of ten in one graph."""
    run()
    torch.cuda.synchronize()
    one, ten = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(one):
        run()
    with torch.cuda.graph(ten):
        for _ in range(10):
            run()
    flush = torch.empty(2**27, dtype=torch.uint8, device=DEVICE)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        one.replay()
        end.record()
    torch.cuda.synchronize()
    cold = sorted(start.elapsed_time(end) for start, end in pairs)[repeats // 2] * 1e3
    start, end = pairs[0]
    start.record()
    for _ in range(repeats):
        ten.replay()
    end.record()
    torch.cuda.synchronize()
    return cold, start.elapsed_time(end) * 1e3 / (10 * repeats)
