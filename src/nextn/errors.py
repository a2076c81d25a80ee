"""Every exception the package raises on purpose, as one tree.

    NextnError
    ├── InputError (also ValueError)        an argument has the wrong shape, dtype, stride, device or value
    ├── UnsupportedError (also ValueError)  no kernel takes the problem; lists every refusal
    ├── ConfigError (also ValueError)       a model or engine configuration is unknown or inconsistent
    ├── CheckpointError (also ValueError)   a checkpoint folder is missing, truncated or does not match its config
    ├── RequestError (also ValueError)      one generation request cannot be served as asked
    └── CapacityError (also RuntimeError)   the page pool cannot hold what was asked of it

A message names the value, the limit and the fix. ``assert`` marks a mistake of ours, never of the caller's.
"""

from __future__ import annotations


class NextnError(Exception):
    """Anything the package raises on purpose."""


class InputError(NextnError, ValueError):
    """An argument has the wrong shape, dtype, stride, device or value."""


class UnsupportedError(NextnError, ValueError):
    """No kernel takes the problem; the message lists every refusal."""


class ConfigError(NextnError, ValueError):
    """A model or engine configuration is unknown or inconsistent."""


class CheckpointError(NextnError, ValueError):
    """A checkpoint folder is missing, truncated, or does not match its configuration."""


class RequestError(NextnError, ValueError):
    """One generation request cannot be served as asked."""


class CapacityError(NextnError, RuntimeError):
    """The page pool cannot hold what was asked of it."""
