"""``nextn bench``: generate, ops and verify-layer.

Hides how options reach the benchmarks and how their rows reach the terminal; what is measured stands in ``bench``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

bench_app = cyclopts.App(name="bench", help="Measure: every row is checked before its time is printed.")

_DEMO_PROMPT = 'class Stack:\n    """A last-in, first-out collection."""'

Sizes = Annotated[tuple[int, ...], Parameter(negative=())]
AsJson = Annotated[bool, Parameter(name="--json", negative=())]


@bench_app.command(name="generate")
def bench_generate_command(
    prompt: str = _DEMO_PROMPT,
    *,
    next_n: tuple[int, ...] = (1, 2, 4, 8),
    max_new_tokens: int = 128,
    runs: int = 3,
    model: str | None = None,
    as_json: AsJson = False,
) -> None:
    """Time to the first token, tokens per second and peak memory of ``nextn generate``, in fresh processes.

    Parameters
    ----------
    prompt
        The text to continue.
    next_n
        A depth to measure; may be given several times.
    max_new_tokens
        Tokens generated per run.
    runs
        Runs per depth; the median is reported.
    model
        A checkpoint folder; the one that ships inside if not given.
    as_json
        Print one JSON object to stdout.
    """
    from nextn.bench.generate import bench_generate

    console = Console(stderr=True)
    with console.status("measuring ..."):
        rows = bench_generate(prompt, next_n=next_n, max_new_tokens=max_new_tokens, runs=runs, model=model)
    if as_json:
        print(json.dumps({"rows": [row.as_dict() for row in rows]}))
        return
    table = Table("next_n", "tokens", "steps", "tokens/step", "first token s", "tokens/s", "peak MB", "text")
    for row in rows:
        table.add_row(
            str(row.next_n),
            str(row.tokens),
            str(row.verify_steps),
            f"{row.acceptance_length:.2f}",
            f"{row.first_token_seconds:.1f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.peak_memory_bytes / 1e6:.0f}",
            "same" if row.same_as_plain else "DIFFERS",
        )
    Console().print(table)


@bench_app.command(name="ops")
def bench_ops_command(
    *,
    op: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    grid: str | None = None,
    only: str = "",
    device: str = "cuda",
    out: Path | None = None,
    peers_dir: Path | None = None,
    commit: str | None = None,
    rounds: int = 30,
    seconds: float = 500.0,
    plot: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Every kernel of an operation, ours and others', checked and then timed side by side, L2 flushed and warm.

    Parameters
    ----------
    op
        index_logits, select_topk, sparse_mla, prepare_query, write_cache or accept_drafts; may be given several times;
        all if not given.
    grid
        targets (the published shapes), small or full; small on a CPU, else targets, if not given.
    only
        Only shapes whose name contains this.
    device
        cuda, or cpu to try it on the references.
    out
        Folder whose ops.jsonl is appended to; shapes already there at this commit are not measured again.
    peers_dir
        Folder with deep_gemm, flash_mla or vLLM's library.
    commit
        The commit of these files, where git cannot say.
    rounds
        Turns per kernel.
    seconds
        Start no shape after this long.
    plot
        Draw time against next_n into this PNG.
    as_json
        Print one JSON object to stdout.
    """
    from nextn.bench.ops import FILE_NAME, OpsOptions, bench_ops

    options = OpsOptions(
        ops=op,
        grid=grid,
        only=only,
        device=device,
        out=out,
        peers_dir=peers_dir,
        commit=commit,
        rounds=rounds,
        seconds=seconds,
    )
    _run_bench(bench_ops, options, plot=plot, file=out and out / FILE_NAME, as_json=as_json)


@bench_app.command(name="verify-layer")
def bench_verify_layer_command(
    *,
    batch: Sizes = (64,),
    context: Sizes = (32768,),
    next_n: Sizes = (4,),
    heads: Sizes = (16,),
    topk: int = 2048,
    drift: float | None = None,
    device: str = "cuda",
    out: Path | None = None,
    peers_dir: Path | None = None,
    commit: str | None = None,
    rounds: int = 30,
    seconds: float = 500.0,
    plot: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Scores, selection and attention of one layer's verify step as one captured graph, ours and the peers' together.

    Parameters
    ----------
    batch
        Requests; may be given several times, as may the next three.
    context
        Cached tokens of each request.
    next_n
        Rows per request.
    heads
        Query heads of the attention.
    topk
        Tokens each row selects.
    drift
        Weight of a draft's own noise in its index query, 0 to 1; by default about 90 % of neighbouring drafts'
        selections are in common.
    device
        cuda, or cpu to try it on the references.
    out
        Folder whose verify_layer.jsonl is appended to; shapes already there at this commit are not measured again.
    peers_dir
        Folder with deep_gemm, flash_mla or vLLM's library.
    commit
        The commit of these files, where git cannot say.
    rounds
        Turns per composition.
    seconds
        Start no shape after this long.
    plot
        Draw time against next_n into this PNG.
    as_json
        Print one JSON object to stdout.
    """
    from nextn.bench.verify_layer import DRIFT, FILE_NAME, VerifyLayerOptions, bench_verify_layer

    options = VerifyLayerOptions(
        batch=batch,
        context=context,
        next_n=next_n,
        heads=heads,
        topk=topk,
        drift=DRIFT if drift is None else drift,
        device=device,
        out=out,
        peers_dir=peers_dir,
        commit=commit,
        rounds=rounds,
        seconds=seconds,
    )
    _run_bench(bench_verify_layer, options, plot=plot, file=out and out / FILE_NAME, as_json=as_json)


def _run_bench(measure: Any, options: Any, *, plot: Path | None, file: Path | None, as_json: bool) -> None:
    """Measure, showing the shape at hand, and print rows; exit code 1 if a check failed."""
    from nextn.bench.plots import plot_rows, require_matplotlib
    from nextn.bench.tables import print_comparison

    if plot is not None:
        require_matplotlib()
    with Console(stderr=True).status("measuring ...") as status:
        rows = measure(options, on_row=lambda row: status.update(f"measured {row['shape']}: {row['kernel']}"))
    if plot is not None:
        plot_rows(rows, plot, stored=file)
    if as_json:
        print(json.dumps({"rows": rows}))
    else:
        print_comparison(rows)
    if not all(row["passed"] for row in rows):
        sys.exit(1)
