"""What the machine is: architectures, devices and optional modules.

Hides every capability check of the package. Nothing here initialises CUDA at import, and a described device is plain
data, so another machine can be pretended by building one.
"""

from __future__ import annotations

import enum
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

import torch

from nextn.errors import InputError


class Arch(enum.Enum):
    """A GPU architecture the kernels know, or the CPU."""

    CPU = "cpu"
    SM80 = "sm80"
    SM89 = "sm89"
    SM90 = "sm90"
    SM100 = "sm100"
    SM103 = "sm103"
    SM120 = "sm120"
    GFX942 = "gfx942"
    GFX950 = "gfx950"
    OTHER = "other"

    @property
    def is_cuda(self) -> bool:
        """Whether this is an NVIDIA GPU the package knows."""
        return self.value.startswith("sm")

    @property
    def is_rocm(self) -> bool:
        """Whether this is an AMD GPU the package knows."""
        return self.value.startswith("gfx")

    @property
    def is_sm100_family(self) -> bool:
        """Whether this is a B200, GB200 or B300."""
        return self in (Arch.SM100, Arch.SM103)

    def __str__(self) -> str:
        return self.value


ALL_ARCHES = frozenset(Arch)
CUDA_ARCHES = frozenset(arch for arch in Arch if arch.is_cuda)

_CUDA_CAPABILITIES = {
    (8, 0): Arch.SM80,
    (8, 6): Arch.SM80,
    (8, 7): Arch.SM80,
    (8, 9): Arch.SM89,
    (9, 0): Arch.SM90,
    (10, 0): Arch.SM100,
    (10, 3): Arch.SM103,
    (12, 0): Arch.SM120,
    (12, 1): Arch.SM120,
}

# Streaming multiprocessors of a common part of each architecture, for planning on a machine that has none.
_TYPICAL_NUM_SMS = {
    Arch.CPU: 1,
    Arch.SM80: 108,
    Arch.SM89: 142,
    Arch.SM90: 132,
    Arch.SM100: 148,
    Arch.SM103: 148,
    Arch.SM120: 188,
    Arch.GFX942: 304,
    Arch.GFX950: 256,
    Arch.OTHER: 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceInfo:
    """A device as plain data.

    Attributes:
        arch: its architecture.
        name: the vendor's name for it, or a name for the pretended part.
        num_sms: streaming multiprocessors (compute units on AMD, 1 on a CPU).
    """

    arch: Arch
    name: str
    num_sms: int


def parse_arch(text: str) -> Arch:
    """The architecture called ``text``: sm90, sm_90a, SM90, gfx942, cpu.

    Raises:
        InputError: no such architecture; the message lists those that exist.
    """
    folded = text.lower().replace("_", "").rstrip("af") if text.lower().startswith("sm") else text.lower()
    for arch in Arch:
        if arch.value == folded:
            return arch
    raise InputError(f"unknown architecture {text!r}; use one of {[arch.value for arch in Arch]}")


def pretend_device(arch: Arch) -> DeviceInfo:
    """A typical device of ``arch``, for planning and explaining on a machine that has none."""
    return DeviceInfo(arch=arch, name=f"a typical {arch} device", num_sms=_TYPICAL_NUM_SMS[arch])


def describe_device(device: torch.device | str) -> DeviceInfo:
    """What ``device`` is.

    Raises:
        InputError: the device type is neither cpu nor cuda (ROCm devices are ``cuda`` in PyTorch).
    """
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return DeviceInfo(arch=Arch.CPU, name="CPU", num_sms=1)
    if device.type != "cuda":
        raise InputError(f"device type {device.type!r} is not supported; use cpu or cuda")
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo(arch=_arch_of(properties), name=properties.name, num_sms=properties.multi_processor_count)


def list_devices() -> list[DeviceInfo]:
    """Every device PyTorch can use here, the CPU last."""
    gpus = [describe_device(f"cuda:{i}") for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*gpus, describe_device("cpu")]


def is_sm100_supported(device: DeviceInfo) -> bool:
    """Whether ``device`` is of the SM100 family (B200, GB200, B300)."""
    return device.arch.is_sm100_family


def is_sm90_supported(device: DeviceInfo) -> bool:
    """Whether ``device`` is a Hopper GPU (H100, H200, H20, GH200)."""
    return device.arch is Arch.SM90


def import_library(name: str, *, missing: str) -> ModuleType | str:
    """An optional library, or why it cannot be used, in one line.

    Args:
        name: the module's name.
        missing: what to say if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return missing if error.name == name else f"{name} cannot be imported: {error}"
    except Exception as error:  # a broken build raises anything: OSError, AssertionError, RuntimeError
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        return f"{name} cannot be imported: {type(error).__name__}: {error}{cause}"


def has_module(name: str) -> bool:
    """Whether a module called ``name`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def module_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _arch_of(properties: object) -> Arch:
    gcn = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    if gcn:
        return next((arch for arch in Arch if arch.is_rocm and gcn.startswith(arch.value)), Arch.OTHER)
    capability = (getattr(properties, "major"), getattr(properties, "minor"))  # noqa: B009
    return _CUDA_CAPABILITIES.get(capability, Arch.OTHER)
