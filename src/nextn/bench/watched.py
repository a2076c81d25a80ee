"""A process of this package under a tool that watches it: compute-sanitizer, or Nsight Compute.

Hides how such a process is ended in time: ``timeout`` ends the tool together with the process that the tool starts,
which holds the pipes and the GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

_TIMED_OUT_EXIT_CODES = (124, 137)


def run_watched(
    tool: Sequence[str], arguments: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run ``python -m nextn.bench`` with arguments under a tool.

    Args:
        tool: its command and options.
        arguments: of ``python -m nextn.bench``.
        seconds: after which both are ended.
        environment: variables to set beside those there are.

    Returns:
        What became of it, its output as text; and that time ran out, in words, or an empty string.
    """
    command = ["timeout", "--kill-after=5", f"{seconds:.0f}", *tool, sys.executable, "-m", "nextn.bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    return done, f"not finished after {seconds:.0f} s" if done.returncode in _TIMED_OUT_EXIT_CODES else ""


def last_line(output: str) -> str:
    """The last line of an output, cut; ``no output`` if there is none."""
    return (output.strip().splitlines() or ["no output"])[-1][:200]
