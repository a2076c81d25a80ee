"""DeepSeek Sparse Attention with native multi-token verification, and the speculative decoding around it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextn.engine.config import EngineConfig
    from nextn.engine.llm import LLM
    from nextn.engine.request import Completion, SpeculationStats, StreamEvent
    from nextn.engine.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "EngineConfig", "SamplingParams", "SpeculationStats", "StreamEvent", "__version__"]

_HOMES = {
    "Completion": "nextn.engine.request",
    "EngineConfig": "nextn.engine.config",
    "LLM": "nextn.engine.llm",
    "SamplingParams": "nextn.engine.sampling",
    "SpeculationStats": "nextn.engine.request",
    "StreamEvent": "nextn.engine.request",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that ``import nextn`` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nextn' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
