"""Compiling prepared Triton and Gluon launches for GPUs that are not there.

Hides Triton's drivers: a stand-in names the target, so a launch on meta tensors is specialised as a real one would be
and goes through the whole compiler, assembler included.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nextn.errors import InputError
from nextn.hardware import Arch

if TYPE_CHECKING:
    from nextn.ops._kernel import Launch

_KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A GPU as the compiler sees it.

    Attributes:
        backend: ``cuda`` or ``hip``.
        name: Triton's name of the architecture.
        warp_size: threads of a warp.
        shared_bytes: most shared memory of one program.
        product: what every matrix instruction of its assembly begins with.
    """

    backend: str
    name: int | str
    warp_size: int
    shared_bytes: int
    product: str


TARGETS = {
    Arch.SM80: Target(backend="cuda", name=80, warp_size=32, shared_bytes=163 * _KIB, product="mma.sync"),
    Arch.SM89: Target(backend="cuda", name=89, warp_size=32, shared_bytes=99 * _KIB, product="mma.sync"),
    Arch.SM90: Target(backend="cuda", name=90, warp_size=32, shared_bytes=227 * _KIB, product="wgmma.mma_async"),
    Arch.SM100: Target(backend="cuda", name=100, warp_size=32, shared_bytes=227 * _KIB, product="tcgen05.mma"),
    Arch.SM103: Target(backend="cuda", name=103, warp_size=32, shared_bytes=227 * _KIB, product="tcgen05.mma"),
    Arch.SM120: Target(backend="cuda", name=120, warp_size=32, shared_bytes=99 * _KIB, product="mma.sync"),
    Arch.GFX942: Target(backend="hip", name="gfx942", warp_size=64, shared_bytes=64 * _KIB, product="v_mfma"),
    Arch.GFX950: Target(backend="hip", name="gfx950", warp_size=64, shared_bytes=160 * _KIB, product="v_mfma"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Binary:
    """What compiling one launch gave.

    Attributes:
        arch: what it was compiled for.
        assembly: PTX, or AMD's assembly.
        intermediate: Triton's GPU dialect, where loops, stages and layouts can be read.
        shared_bytes: shared memory of one program.
        registers: vector registers of one thread.
        stack_bytes: local memory of one thread; more than 0 where registers were spilled.
        num_products: matrix instructions in the assembly.
    """

    arch: Arch
    assembly: str
    intermediate: str
    shared_bytes: int
    registers: int
    stack_bytes: int
    num_products: int


def is_interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter; it then compiles nothing."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def compile_launch(launch: Launch, arch: Arch) -> Binary:
    """Compile a launch for ``arch`` without a GPU.

    Args:
        launch: of a Triton or Gluon kernel; its tensors may be meta tensors, and are never read.
        arch: one of ``TARGETS``.

    Raises:
        InputError: ``arch`` is no target, the launch is a plain function, or the interpreter is on.

    Example:
        >>> compile_launch(Launch(function=len, arguments={}), Arch.SM90)
        Traceback (most recent call last):
        nextn.errors.InputError: the launch is a plain function; pass that of a Triton or Gluon kernel
    """
    if launch.grid is None:
        raise InputError("the launch is a plain function; pass that of a Triton or Gluon kernel")
    if arch not in TARGETS:
        raise InputError(f"nothing compiles for {arch}; use one of {[str(target) for target in TARGETS]}")
    if is_interpreting():
        raise InputError("TRITON_INTERPRET is set, which turns the compiler off; unset it")
    target = TARGETS[arch]
    with _pretend_driver(target):
        compiled = launch.function.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    registers, stack_bytes = _read_usage(compiled.asm, assembly)
    return Binary(
        arch=arch,
        assembly=assembly,
        intermediate=compiled.asm["ttgir"],
        shared_bytes=compiled.metadata.shared,
        registers=registers,
        stack_bytes=stack_bytes,
        num_products=len(re.findall(rf"^\s*(?:@\S+\s+)?{re.escape(target.product)}", assembly, re.MULTILINE)),
    )


class _PretendDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_device(self) -> str:
        """A key of the compiler's in-memory cache, so that targets do not share entries."""
        return f"pretended {self._target.name}"

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self._target.backend, self._target.name, self._target.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _pretend_driver(target: Target) -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_PretendDriver(target))  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        driver._active = before


def _read_usage(asm: dict[str, Any], assembly: str) -> tuple[int, int]:
    """Registers and stack bytes of one thread."""
    if "cubin" in asm:
        usage = _dump_usage(asm["cubin"])
        return int(_find(r"REG:(\d+)", usage)), int(_find(r"STACK:(\d+)", usage))
    return int(_find(r"\.vgpr_count:\s+(\d+)", assembly)), int(
        _find(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    )


def _dump_usage(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in the compiler's output"
    return match.group(1)
