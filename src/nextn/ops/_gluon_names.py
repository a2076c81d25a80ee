"""Names of Gluon's that Triton changed between 3.6 and 3.9, for device code that runs on either.

Hides which version is installed. All are for Hopper.
"""

# Triton's types describe one version.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

barrier = getattr(gl, "thread_barrier", None) or gl.barrier
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
