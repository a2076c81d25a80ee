"""Every NEXTN_* environment variable, read in one place.

Hides the process environment from the rest of the package; ``read_environment`` is called again by each owner that
needs it, so a test can change a variable without reloading modules.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nextn.errors import ConfigError

VARIABLES = {
    "NEXTN_KERNELS": "force kernels, as op=name pairs: index_logits=reference,sparse_mla=reference",
    "NEXTN_DISABLE_KERNELS": "never choose these kernels, by name: deep_gemm,triton_portable",
    "NEXTN_LOGITS_BUDGET_MB": "memory of one layer's index logits, 512 by default; more rows are scored in parts",
}
_LOGITS_BUDGET_MB = 512  # 128 verify rows over a context of 1M, or 800 over 160K, at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The package's settings that come from environment variables.

    Attributes:
        forced_kernels: op name to kernel name; that kernel or an error.
        disabled_kernels: kernel names that are passed over, with this as the reason.
        logits_budget_bytes: memory that one layer's index logits may take at a time.
    """

    forced_kernels: Mapping[str, str]
    disabled_kernels: frozenset[str]
    logits_budget_bytes: int = _LOGITS_BUDGET_MB * 2**20

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.forced_kernels.items())), self.disabled_kernels, self.logits_budget_bytes))


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """Read the NEXTN_* variables.

    Args:
        environ: the mapping to read; ``os.environ`` if None.

    Returns:
        The settings, with everything unset at its default.

    Raises:
        ConfigError: NEXTN_KERNELS holds an entry that is not ``op=name``, NEXTN_LOGITS_BUDGET_MB is no number of
            megabytes above 0, or an unknown NEXTN_* variable is set.

    Example:
        >>> read_environment({"NEXTN_KERNELS": "index_logits=reference"}).forced_kernels["index_logits"]
        'reference'
    """
    environ = os.environ if environ is None else environ
    unknown = sorted(name for name in environ if name.startswith("NEXTN_") and name not in VARIABLES)
    if unknown:
        raise ConfigError(
            f"unknown environment variables {unknown}; known ones are {sorted(VARIABLES)}: unset or rename them"
        )
    forced = {}
    for entry in _split(environ.get("NEXTN_KERNELS", "")):
        op, separator, name = entry.partition("=")
        if not (op and separator and name):
            raise ConfigError(f"NEXTN_KERNELS entry {entry!r} is not op=name; write for example index_logits=reference")
        forced[op] = name
    return Environment(
        forced_kernels=forced,
        disabled_kernels=frozenset(_split(environ.get("NEXTN_DISABLE_KERNELS", ""))),
        logits_budget_bytes=_read_budget(environ.get("NEXTN_LOGITS_BUDGET_MB", "")),
    )


def let_waiting_threads_sleep() -> None:
    """Have OpenMP threads sleep while they wait, unless OMP_WAIT_POLICY is set; must run before torch is imported.

    Spinning threads wait for each other through every small operation as soon as another process uses a core: on two
    cores, one of them busy, generation took 1.8 tokens/s spinning and 25 sleeping.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _read_budget(text: str) -> int:
    """Bytes of a number of megabytes, a fraction allowed."""
    try:
        budget = int(float(text or _LOGITS_BUDGET_MB) * 2**20)
    except (ValueError, OverflowError):
        budget = 0
    if budget <= 0:
        raise ConfigError(
            f"NEXTN_LOGITS_BUDGET_MB {text!r} is not a number of megabytes above 0; write for example 512"
        )
    return budget


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
