"""Kernel, Launch and choosing: how an op finds the file that runs it.

Hides which kernel files exist. An op's folder is scanned once for modules that export ``KERNEL``; delete a file and
the op still works, by the next best kernel, down to ``reference``, which takes every problem.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nextn.env import Environment, read_environment
from nextn.errors import ConfigError, InputError, UnsupportedError
from nextn.hardware import ALL_ARCHES, Arch, has_module

OPS = ("index_logits", "select_topk", "sparse_mla", "prepare_query", "write_cache", "accept_drafts")
_NOT_KERNELS = frozenset({"problem", "cases"})
_NO_GUARD = nullcontext()
_log = logging.getLogger("nextn.kernels")
_logged: set[tuple[str, str, tuple[str, ...], Arch]] = set()


class Problem(Protocol):
    """What choosing needs of an op's problem: sizes, and the architecture it is to run on."""

    @property
    def arch(self) -> Arch: ...


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One prepared call: everything but the act of launching.

    Attributes:
        function: a plain function, or a Triton kernel if ``grid`` is given.
        arguments: its keyword arguments.
        grid: launch grid, or None for a plain function.
        options: compile options of a Triton kernel (``num_warps``, ``num_stages``).
    """

    function: Any
    arguments: Mapping[str, Any]
    grid: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        """Launch; a plain function's return value is passed on, a Triton kernel has none.

        A Triton kernel is launched on the GPU its tensors lie on, whichever is current.
        """
        if self.grid is None:
            return self.function(**self.arguments)
        if 0 not in self.grid:
            with _on_device_of(self.arguments) if _has_several_gpus() else _NO_GUARD:
                self.function[self.grid](**self.arguments, **self.options)
        return None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to run an op.

    Attributes:
        op: the op's name.
        name: the kernel's name, unique within the op.
        arches: architectures it is written for.
        rejects: the only statement of its limits: why it cannot take a problem, as a sentence, or None if it can.
        prepare: shapes and tensors to a :class:`Launch` that fills the outputs it was given; works on meta tensors.
        rank: preference among the kernels that can take a problem; the highest wins, the reference is 0.
        plan: once-per-forward work (a schedule, a workspace) handed to every layer's ``prepare`` as ``plan``; None if
            the kernel needs none.
        configure: how it would cut a problem: a frozen dataclass, other values of which ``plan`` or ``prepare`` take as
            ``config``, for tuning. None if there is nothing to cut.
        form: how it would run a problem, for ``explain``: "native [64, 4]", "flattened, since ...".
        allocates_output: whether it can only write an output of its own. Then ``prepare`` also takes ``out=None``, and
            the launch returns that output; given an ``out`` it copies into it, and the launch returns ``out``.
        takes_fills: whether ``plan`` also takes ``fills``, which it asks for memory that must start with one value: the
            forward's plan then fills it in a launch it makes anyway. None if the call plans for itself alone.
    """

    op: str
    name: str
    arches: frozenset[Arch] = ALL_ARCHES
    rejects: Callable[[Any], str | None]
    prepare: Callable[..., Launch]
    rank: Callable[[Any], int]
    plan: Callable[..., Any] | None = None
    configure: Callable[[Any], Any] | None = None
    form: Callable[[Any], str] | None = None
    allocates_output: bool = False
    takes_fills: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for a problem, and why nothing better was.

    Attributes:
        kernel: the kernel to run.
        form: how it runs this problem, or an empty string.
        refusals: (kernel name, reason) of every kernel that was passed over because it cannot take the problem.
        others: names of the kernels that could take it but rank lower.
    """

    kernel: Kernel
    form: str
    refusals: tuple[tuple[str, str], ...]
    others: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kernel.name} ({self.form})" if self.form else self.kernel.name


@dataclass(frozen=True, kw_only=True)
class OpPlan:
    """An op's choice for one forward and what its kernel prepared; every layer's call reuses it.

    Attributes:
        choice: the kernel to run, and why.
        problem: the sizes it was chosen for.
        data: what the kernel's ``plan`` returned (a schedule, a workspace), or None if it plans nothing.
    """

    choice: Choice
    problem: Any
    data: Any = None


@functools.cache
def discover(op: str) -> tuple[Kernel, ...]:
    """Every kernel of ``op``, in order of name, the reference among them.

    Raises:
        InputError: there is no such op.
        ImportError: a kernel file exports no ``KERNEL``.
    """
    if op not in OPS:
        raise InputError(f"unknown op {op!r}; use one of {list(OPS)}")
    package = importlib.import_module(f"nextn.ops.{op}")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    modules = [
        importlib.import_module(f"{package.__name__}.{name}")
        for name in names
        if name not in _NOT_KERNELS and not name.startswith("_") and _is_importable(name)
    ]
    for module in modules:
        if not isinstance(getattr(module, "KERNEL", None), Kernel):
            raise ImportError(
                f"{module.__file__} exports no KERNEL; define one, or start the file's name with an underscore"
            )
    return tuple(module.KERNEL for module in modules)


def choose(op: str, problem: Problem, *, environment: Environment | None = None) -> Choice:
    """The best kernel for ``problem``, with every refusal.

    Args:
        op: the op's name.
        problem: the op's problem, sizes only.
        environment: settings; read from the process environment if None.

    Raises:
        ConfigError: NEXTN_KERNELS names an op that does not exist.
        UnsupportedError: no kernel takes the problem, or a forced kernel does not; the message lists every refusal.
    """
    environment = read_environment() if environment is None else environment
    unknown = sorted(set(environment.forced_kernels) - set(OPS))
    if unknown:
        raise ConfigError(f"NEXTN_KERNELS names unknown ops {unknown}; use some of {list(OPS)}")
    forced = environment.forced_kernels.get(op)
    accepted: list[Kernel] = []
    refusals: list[tuple[str, str]] = []
    for kernel in discover(op):
        reason = _refusal(kernel, problem, forced, environment)
        if reason is None:
            accepted.append(kernel)
        else:
            refusals.append((kernel.name, reason))
    if not accepted:
        listed = "; ".join(f"{name}: {reason}" for name, reason in refusals)
        raise UnsupportedError(f"no kernel of {op} takes {problem}: {listed}")
    accepted.sort(key=lambda kernel: kernel.rank(problem), reverse=True)
    best = accepted[0]
    choice = Choice(
        kernel=best,
        form=best.form(problem) if best.form else "",
        refusals=tuple(refusals),
        others=tuple(kernel.name for kernel in accepted[1:]),
    )
    _log_once(op, choice, problem.arch)
    return choice


def same_device(**tensors: torch.Tensor | None) -> torch.device:
    """The device all the given tensors share.

    Raises:
        InputError: they lie on more than one device.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise InputError(f"tensors lie on several devices: {listed}; move them to one")
    return next(iter(devices.values()))


def require(condition: bool, message: str) -> None:
    """Raise InputError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def check_page_table(query_offsets: torch.Tensor, page_table: torch.Tensor) -> None:
    """Raise InputError unless the table is int32 ``[B, P]``, columns contiguous, and the offsets int32 ``[B + 1]``."""
    require(
        page_table.dtype == torch.int32 and page_table.ndim == 2,
        f"page_table is {page_table.dtype} {tuple(page_table.shape)}; pass int32 [requests, pages]",
    )
    require(
        page_table.shape[1] < 2 or page_table.stride(1) == 1,
        f"page_table has column stride {page_table.stride(1)}; its columns must be contiguous",
    )
    num_requests = page_table.shape[0]
    require(
        query_offsets.dtype == torch.int32 and tuple(query_offsets.shape) == (num_requests + 1,),
        f"query_offsets is {query_offsets.dtype} {tuple(query_offsets.shape)}; pass int32 [{num_requests + 1}], one "
        "more than page_table has rows",
    )


@functools.cache
def _has_several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _on_device_of(arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Makes the GPU of the first tensor current; changes nothing if that is no GPU."""
    device = next((value.device for value in arguments.values() if isinstance(value, torch.Tensor)), None)
    return _NO_GUARD if device is None or device.type != "cuda" else torch.cuda.device(device)


def _refusal(kernel: Kernel, problem: Problem, forced: str | None, environment: Environment) -> str | None:
    if forced is not None and kernel.name != forced:
        return f"NEXTN_KERNELS forces {forced}"
    if kernel.name in environment.disabled_kernels:
        return "disabled by NEXTN_DISABLE_KERNELS"
    if problem.arch not in kernel.arches:
        return f"written for {_list_arches(kernel.arches)}; {_describe_arch(problem.arch)}"
    return kernel.rejects(problem)


@functools.cache
def _list_arches(arches: frozenset[Arch]) -> str:
    return ", ".join(arch.value for arch in Arch if arch in arches)


def _describe_arch(arch: Arch) -> str:
    if arch is Arch.CPU:
        return "this is a CPU, not a CUDA GPU"
    return f"{arch} is an AMD GPU" if arch.is_rocm else f"not for {arch}"


def _is_importable(name: str) -> bool:
    """Triton files need triton, which a machine without a GPU may lack; every other file must import."""
    if name.split("_")[0] not in ("triton", "gluon"):
        return True
    return has_module("triton")


def _log_once(op: str, choice: Choice, arch: Arch) -> None:
    """Log a choice when its kernel or the kernels passed over change, not whenever a size does."""
    key = (op, choice.kernel.name, tuple(name for name, _ in choice.refusals), arch)
    if key in _logged:
        return
    _logged.add(key)
    passed_over = "; ".join(f"{name}: {reason}" for name, reason in choice.refusals) or "nothing"
    _log.info("%s on %s runs %s; passed over: %s", op, arch, choice, passed_over)
