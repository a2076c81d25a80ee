"""Checks that need a GPU: ``python -m nextn.bench.gpu_check``, needing torch alone.

Hides how forwards are captured and compared. The scores run through the real DeepGEMM, eagerly and in a CUDA graph
replayed with other lengths, against the reference on the CPU; every reference runs on CUDA against itself on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nextn
from nextn import ops
from nextn.batch import ForwardBatch, ForwardMode
from nextn.bench.gpu_references import check_references
from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.env import Environment
from nextn.errors import NextnError
from nextn.hardware import DeviceInfo, describe_device, module_version
from nextn.ops._kernel import OPS
from nextn.plan import DSAMetadata, DSASpec, plan_forward
from nextn.testing.numerics import MAX_ERROR, QUANTISED_MAX_DIFF, compare_rows

REPEATS = 20
MAX_CONTEXT = 8250  # no multiple of a page, so that the last one is partly used
LENGTHS = (5000, 2049, 64, 7, 0, 8192, 2500, 129)  # 0: a padding request
CHANGED_LENGTHS = (300, 8192, 4097, 0, 2048, 7, 6, 65)
SPEC = DSASpec(
    num_heads=128,
    index_heads=64,
    softmax_scale=1.0,
    index_format=IndexCacheFormat(name="fp8"),
    latent_format=LatentCacheFormat(name="fp8"),
)
FORCED = Environment(forced_kernels={"index_logits": "deep_gemm"}, disabled_kernels=frozenset())


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreCase:
    """One batch of scores: rows of each request, and the form the kernel must run it in."""

    name: str
    row_counts: tuple[int, ...]
    form: str
    index_heads: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """What one check found.

    Attributes:
        op: the op checked.
        case: what it was checked on.
        form: how the kernel ran.
        passed: whether every claim held.
        diff: worst row's ``1 - 2 sum(xy) / sum(xx + yy)``, over all comparisons of the case.
        error: worst row's largest error, in units of its largest score.
        note: which claim failed, or what else was seen.
    """

    op: str
    case: str
    form: str
    passed: bool
    diff: float = 0.0
    error: float = 0.0
    note: str = ""


SCORE_CASES = (
    *(ScoreCase(name=f"next_n {n}", row_counts=(n,) * 8, form="native") for n in (1, 2, 4)),
    *(ScoreCase(name=f"next_n {n}", row_counts=(n,) * 8, form="flattened") for n in (3, 6)),
    ScoreCase(name="ragged", row_counts=(3, 0, 1, 6, 2, 1, 4, 5), form="flattened"),
    ScoreCase(name="next_n 4, 32 heads", row_counts=(4,) * 8, form="native", index_heads=32),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forward:
    """Inputs of a case on one device; ``context_lens`` may be overwritten between runs."""

    spec: DSASpec
    hardware: DeviceInfo
    environment: Environment | None
    batch: ForwardBatch
    q: torch.Tensor
    weights: torch.Tensor
    index_cache: torch.Tensor

    def run(self) -> tuple[DSAMetadata, torch.Tensor]:
        metadata = plan_forward(self.batch, self.spec, self.hardware, environment=self.environment)
        logits = ops.index_logits(
            self.q,
            self.weights,
            self.index_cache,
            self.batch.query_offsets,
            metadata.visible_lens,
            self.batch.page_table,
            max_context=self.batch.max_context,
            plan=metadata.index_logits,
        )
        return metadata, logits

    def on_cpu(self, context_lens: Sequence[int]) -> torch.Tensor:
        """The reference's masked scores for other lengths."""
        batch = dataclasses.replace(
            self.batch,
            query_offsets=self.batch.query_offsets.cpu(),
            context_lens=torch.tensor(context_lens, dtype=torch.int32),
            page_table=self.batch.page_table.cpu(),
        )
        moved = dataclasses.replace(
            self,
            hardware=describe_device("cpu"),
            environment=None,
            batch=batch,
            q=self.q.cpu(),
            weights=self.weights.cpu(),
            index_cache=self.index_cache.cpu(),
        )
        return _mask(*moved.run())


def check_scores(case: ScoreCase, device: torch.device) -> CheckResult:
    """Run one case through DeepGEMM and compare it with the reference.

    Claims: the form is the expected one; eager scores and those of a captured graph replayed with changed lengths are
    within the bounds of the reference; repeats and the replayed graph return the eager bits.
    """
    result = CheckResult(op="index_logits", case=case.name, form="", passed=False)
    forward = _make_forward(case, device)
    try:
        metadata, logits = forward.run()
    except NextnError as error:
        return dataclasses.replace(result, note=str(error))
    form = metadata.index_logits.choice.form
    eager = _mask(metadata, logits)
    failures = [] if form.startswith(case.form) else [f"ran {form}, not {case.form}"]
    repeated = sum(torch.equal(_mask(*forward.run()), eager) for _ in range(REPEATS))
    if repeated < REPEATS:
        failures.append(f"{REPEATS - repeated} of {REPEATS} repeats differ in bits")
    replay = _capture(forward)
    changed = replay(CHANGED_LENGTHS)
    if not torch.equal(replay(LENGTHS), eager):
        failures.append("the replayed graph differs in bits from the eager run")
    wanted = torch.cat([forward.on_cpu(LENGTHS), forward.on_cpu(CHANGED_LENGTHS)])
    comparison = compare_rows(torch.cat([eager, changed]), wanted)
    diff, error = comparison.max_diff, comparison.max_error
    if not (diff < QUANTISED_MAX_DIFF and error <= MAX_ERROR):
        failures.append(f"a row is above {QUANTISED_MAX_DIFF} or {MAX_ERROR}")
    return dataclasses.replace(result, form=form, passed=not failures, diff=diff, error=error, note="; ".join(failures))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, print a table, append JSON lines; returns 1 if a check failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", choices=("index_logits", "references", "all"), default="all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON lines")
    parser.add_argument("--commit", help="the commit these files are of, where git cannot say")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check: PyTorch finds no GPU here; run it on a machine with one", file=sys.stderr)
        return 2
    os.environ["NEXTN_KERNELS"] = ",".join(f"{op}=reference" for op in OPS)  # the scores name their kernel themselves
    device = torch.device("cuda")
    results: list[CheckResult] = []
    if arguments.op in ("index_logits", "all"):
        results += [_report(check_scores(case, device)) for case in SCORE_CASES]
    if arguments.op in ("references", "all"):
        results += [
            _report(CheckResult(op=op, case=case, form="reference", passed=not note, note=note))
            for op, case, note in check_references(device)
        ]
    _append(arguments.out, results, _describe_run(device, arguments.commit))
    failed = sum(not result.passed for result in results)
    print(f"{len(results)} checks, {failed} failed")
    return 1 if failed or not results else 0


def _make_forward(case: ScoreCase, device: torch.device) -> _Forward:
    """Random quantised inputs; page 0, which no request owns, holds NaN, and unused table entries are wild."""
    generator = torch.Generator().manual_seed(len(case.form) + sum(case.row_counts))
    spec = dataclasses.replace(SPEC, index_heads=case.index_heads)
    requests, rows = len(case.row_counts), sum(case.row_counts)
    pages_each = -(-MAX_CONTEXT // spec.page_size)
    num_pages = requests * pages_each + 1
    table = torch.randperm(num_pages - 1, generator=generator).add(1).to(torch.int32).view(requests, pages_each)
    keys = torch.randn(num_pages, spec.page_size * spec.index_dim, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.exp2(torch.randint(-6, 0, (num_pages, spec.page_size), generator=generator).float())
    cache = torch.cat([keys.view(torch.uint8), scales.view(torch.uint8)], dim=1)
    cache[0] = 0x7F  # NaN; DeepGEMM reads page 0 for the columns past a request's end
    longest = torch.tensor([LENGTHS, CHANGED_LENGTHS]).amax(dim=0)
    is_used = torch.arange(pages_each) < -(-longest // spec.page_size)[:, None]  # a padding request keeps entry 0
    table = torch.where(is_used, table, 2**30).to(torch.int32)
    queries = torch.randn(rows, spec.index_heads, spec.index_dim, generator=generator).to(torch.float8_e4m3fn)
    batch = ForwardBatch.build(
        ForwardMode.TARGET_VERIFY,
        row_counts=case.row_counts,
        context_lens=torch.tensor(LENGTHS, dtype=torch.int32, device=device),
        page_table=table.to(device),
        max_context=MAX_CONTEXT,
    )
    return _Forward(
        spec=spec,
        hardware=describe_device(device),
        environment=FORCED,
        batch=batch,
        q=queries.to(device),
        weights=torch.randn(rows, spec.index_heads, generator=generator).to(device),
        index_cache=cache.to(device),
    )


def _mask(metadata: DSAMetadata, logits: torch.Tensor) -> torch.Tensor:
    """The scores with 0 wherever a row may hold anything."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(columns < metadata.visible_lens[:, None], logits, 0.0)


def _capture(forward: _Forward) -> Callable[[Sequence[int]], torch.Tensor]:
    """Capture plan and scores together; the result replays them for given lengths, in the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward.run()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward.run()

    def replay(context_lens: Sequence[int]) -> torch.Tensor:
        forward.batch.context_lens.copy_(torch.tensor(context_lens, dtype=torch.int32))
        graph.replay()
        return _mask(*captured)

    return replay


def _report(result: CheckResult) -> CheckResult:
    figures = f"diff {result.diff:.1e} error {result.error:.1e}" if result.op == "index_logits" else ""
    verdict = "ok  " if result.passed else "FAIL"
    print(f"{verdict} {result.op:13} {result.case:24} {result.form:64} {figures} {result.note}".rstrip(), flush=True)
    return result


def _describe_run(device: torch.device, commit: str | None) -> dict[str, Any]:
    return {
        "stage": "check",
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "deep_gemm": _deep_gemm_version(),
        "nextn": nextn.__version__,
        "commit": commit or _find_commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _deep_gemm_version() -> str | None:
    module = sys.modules.get("deep_gemm")
    return getattr(module, "__version__", None) or module_version("deep_gemm")


def _find_commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _append(folder: Path, results: Sequence[CheckResult], run: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpu_check.jsonl").open("a", encoding="utf-8") as lines:
        for result in results:
            lines.write(json.dumps({**run, **dataclasses.asdict(result)}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
