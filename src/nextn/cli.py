"""The ``nextn`` command: generate, bench, explain and doctor.

Hides the terminal. Text a script would read goes to stdout, everything else to stderr; whatever the caller got wrong
ends in one line and exit code 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from nextn import __version__
from nextn.cli_bench import bench_app
from nextn.env import let_waiting_threads_sleep
from nextn.errors import NextnError, RequestError

app = cyclopts.App(
    name="nextn",
    help="DeepSeek Sparse Attention with native multi-token verification, and the speculative decoding around it.",
    version=__version__,
)
app.command(bench_app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 if it did what was asked, 2 if the input was wrong, 130 if interrupted."""
    let_waiting_threads_sleep()
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        _fail(" ".join(str(error).split()))
    except NextnError as error:
        _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


@app.command
def generate(
    prompt: str | None = None,
    *,
    prompt_file: Path | None = None,
    model: str | None = None,
    next_n: int = 4,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    ignore_eos: Annotated[bool, Parameter(negative=())] = False,
    cache_format: str = "fp8",
    device: str = "cpu",
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Continue a prompt with speculative decoding.

    Parameters
    ----------
    prompt
        The text to continue.
    prompt_file
        Read the prompt from this UTF-8 file instead.
    model
        A Hugging Face checkpoint folder; the small model that ships inside if not given.
    next_n
        Tokens verified per step, 1 to 8; 1 is plain decoding.
    max_new_tokens
        Stop after this many tokens.
    temperature
        0 is greedy: the same text at every next_n.
    top_k
        Sample among the k most likely tokens; 0 is all.
    top_p
        Sample among the most likely tokens that together reach this probability.
    seed
        Seed of the sampling.
    stop
        Stop before this text; may be given several times.
    ignore_eos
        Go on past the end-of-sequence token.
    cache_format
        fp8 or bf16.
    device
        cpu, or cuda.
    as_json
        Print one JSON object to stdout instead of streaming the text.
    """
    from nextn import LLM, SamplingParams

    text = _read_prompt(prompt, prompt_file)
    console = Console(stderr=True)
    with _ProgressLine(console) as progress:
        llm = LLM(model, next_n=next_n, cache_format=cache_format, device=device, progress=progress)
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop),
            ignore_eos=ignore_eos,
        )
        completion = None
        for event in llm.stream(text, params):
            progress.close()
            if not as_json:
                sys.stdout.write(event.text)
                sys.stdout.flush()
            completion = event.completion or completion
    assert completion is not None
    if as_json:
        print(json.dumps(_completion_report(completion, llm, next_n)))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    console.print(_completion_table(completion, llm, next_n))


@app.command
def explain(
    *,
    op: str = "index_logits",
    batch: int = 64,
    next_n: int = 4,
    context: int = 32768,
    heads: int | None = None,
    arch: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Which kernel runs an operation, and why each of the others does not; on any machine.

    Parameters
    ----------
    op
        index_logits, select_topk, sparse_mla, prepare_query, write_cache or accept_drafts.
    batch
        Requests.
    next_n
        Rows per request.
    context
        Tokens cached per request.
    heads
        Index heads (query heads for sparse_mla); DeepSeek-V3.2's if not given.
    arch
        sm80, sm89, sm90, sm100, sm103, sm120, gfx942, gfx950 or cpu; this machine's first device if not given.
    as_json
        Print one JSON object.
    """
    from nextn.diagnose import build_problem, explain_op
    from nextn.hardware import list_devices, parse_arch, pretend_device

    device = list_devices()[0] if arch is None else pretend_device(parse_arch(arch))
    report = explain_op(op, build_problem(op, device=device, batch=batch, next_n=next_n, context=context, heads=heads))
    print(json.dumps(report.to_dict()) if as_json else "\n".join(report.to_text()))


@app.command
def doctor(*, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """What is here: devices, versions, optional parts and how to get them, and the kernel each operation would use.

    Parameters
    ----------
    as_json
        Print one JSON object.
    """
    from nextn.diagnose import doctor_report

    report = doctor_report()
    print(json.dumps(report.to_dict()) if as_json else "\n".join(report.to_text()))


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise RequestError("give either a prompt or --prompt-file, and not both")
    if prompt_file is None:
        assert prompt is not None
        return prompt
    try:
        return prompt_file.read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"cannot read --prompt-file {prompt_file}: {error.strerror}; give a readable file") from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"--prompt-file {prompt_file} is not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from None


def _completion_report(completion: Any, llm: Any, next_n: int) -> dict[str, object]:
    stats = completion.stats
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "next_n": next_n,
        "verify_steps": stats.verify_steps,
        "acceptance_length": stats.acceptance_length,
        "accepted_per_position": list(stats.accepted_per_position),
        "tokens_per_second": stats.tokens_per_second,
        "first_token_seconds": stats.first_token_seconds,
        "prompt_tokens": completion.prompt_tokens,
        "finish_reason": completion.finish_reason,
        "device": llm.device_name,
        "kernels": llm.kernels,
    }


def _completion_table(completion: Any, llm: Any, next_n: int) -> Table:
    stats = completion.stats
    table = Table(show_header=False, title=f"next_n {next_n} on {llm.device_name}", title_justify="left")
    table.add_row("tokens", f"{len(completion.token_ids)} after a prompt of {completion.prompt_tokens}")
    table.add_row("finished by", completion.finish_reason)
    table.add_row("verify steps", str(stats.verify_steps))
    shares = [f"{count / max(stats.verify_steps, 1):.0%}" for count in stats.accepted_per_position]
    table.add_row("accepted by position", "  ".join(shares) or "no drafts at next_n 1")
    table.add_row("acceptance length", f"{stats.acceptance_length:.2f} tokens per step")
    table.add_row("first token", f"{stats.first_token_seconds:.2f} s")
    table.add_row("speed", f"{stats.tokens_per_second:.1f} tokens/s")
    for op, kernel in llm.kernels.items():
        table.add_row(op, kernel)
    return table


class _ProgressLine:
    """One line on the terminal that shows loading and prefill, and vanishes when the first token comes."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units of ``stage`` are finished."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def close(self) -> None:
        self._progress.stop()


def _fail(message: str) -> None:
    print(f"nextn: error: {message}", file=sys.stderr)
    sys.exit(2)
