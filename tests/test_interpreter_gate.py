"""The op tests of every Triton kernel, run by Triton's interpreter.

``TRITON_INTERPRET`` must be set before a kernel file is imported and turns the compiler off, hence a second process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nextn.hardware import has_module
from nextn.ops._kernel import OPS, discover

ROOT = Path(__file__).parent.parent
TIME_LIMIT = 580  # seconds; the interpreter runs kernels a program at a time

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(
    not has_module("triton") or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, outside its interpreter",
)


@pytest.mark.slow
@pytest.mark.timeout(TIME_LIMIT + 20)
@pytest.mark.parametrize("op", OPS)
def test_portable_kernels_pass_the_op_tests_in_the_interpreter(op):
    kernels = [kernel.name for kernel in discover(op) if kernel.name.startswith("triton")]
    if not kernels:
        pytest.skip(f"{op} has no Triton kernel")
    files = sorted(str(path) for path in (ROOT / "tests" / "ops").glob(f"test_{op}*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout[-2000:]
    assert int(passed.group(1)) >= len(kernels), result.stdout[-2000:]
