"""The main job measured: time to the first token, tokens per second and peak memory of ``nextn generate``.

Hides how a command is timed: every figure is of a fresh process, started the way a user starts it, so imports and
loading count. Nothing here is a test; a row says what one machine did.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from nextn.errors import NextnError


@dataclass(frozen=True, kw_only=True)
class GenerateRow:
    """One depth measured.

    Attributes:
        next_n: tokens verified per step.
        tokens: tokens generated.
        verify_steps: target forwards after the prompt.
        acceptance_length: tokens committed per verify step.
        first_token_seconds: wall time of a whole command that generates one token: start, load, prefill, exit.
        tokens_per_second: generated tokens over the time from the first to the last, median of the runs.
        peak_memory_bytes: largest resident set of the process.
        same_as_plain: whether the token ids equal those of the first row.
    """

    next_n: int
    tokens: int
    verify_steps: int
    acceptance_length: float
    first_token_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    same_as_plain: bool

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def bench_generate(
    prompt: str,
    *,
    next_n: Sequence[int] = (1, 2, 4, 8),
    max_new_tokens: int = 128,
    runs: int = 3,
    model: str | None = None,
    on_row: Callable[[GenerateRow], None] | None = None,
) -> list[GenerateRow]:
    """Measure ``nextn generate`` at several depths, batch 1, greedy.

    Args:
        prompt: the text to continue.
        next_n: depths to measure, in order; the first is what the others' text is compared with.
        max_new_tokens: tokens generated per run; generation does not stop at an end-of-sequence token.
        runs: processes per depth; the median speed is reported.
        model: a checkpoint folder; the shipped one if None.
        on_row: called with each row as it is ready.

    Returns:
        One row per depth.

    Raises:
        NextnError: a command failed; the message is its last line of stderr.
    """
    rows: list[GenerateRow] = []
    plain_ids: list[int] | None = None
    for depth in next_n:
        options = ["--prompt", prompt, "--next-n", str(depth), "--ignore-eos"]
        options += ["--model", model] if model else []
        first = _run([*options, "--max-new-tokens", "1"])
        results = [_run([*options, "--max-new-tokens", str(max_new_tokens)]) for _ in range(runs)]
        report = results[0].report
        plain_ids = report["token_ids"] if plain_ids is None else plain_ids
        speeds = sorted(result.report["tokens_per_second"] for result in results)
        row = GenerateRow(
            next_n=depth,
            tokens=len(report["token_ids"]),
            verify_steps=report["verify_steps"],
            acceptance_length=report["acceptance_length"],
            first_token_seconds=first.wall_seconds,
            tokens_per_second=speeds[len(speeds) // 2],
            peak_memory_bytes=max(result.peak_memory_bytes for result in results),
            same_as_plain=all(result.report["token_ids"] == plain_ids for result in results),
        )
        rows.append(row)
        if on_row:
            on_row(row)
    return rows


@dataclass(frozen=True, kw_only=True)
class _Run:
    report: dict
    wall_seconds: float
    peak_memory_bytes: int


def _run(options: Sequence[str]) -> _Run:
    """Run one ``nextn generate --json`` in a process of its own and read its report and resource use."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "nextn", "generate", *options, "--json"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        with process.stdout:
            output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # not communicate(): it would reap the process and its usage
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        lines = errors.read().strip().splitlines() or ["no message"]
    if process.returncode:
        raise NextnError(f"nextn generate failed with exit code {process.returncode}: {lines[-1]}")
    scale = 1 if sys.platform == "darwin" else 1024
    return _Run(report=json.loads(output), wall_seconds=seconds, peak_memory_bytes=usage.ru_maxrss * scale)
