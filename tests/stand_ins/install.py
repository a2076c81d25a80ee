"""Puts a pretended DeepGEMM where the kernel file looks for the real one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nextn.hardware import Arch, pretend_device
from nextn.ops._kernel import OPS, discover
from tests.stand_ins import deep_gemm_a, deep_gemm_b
from tests.stand_ins.paged_mqa import PagedMQA

_MAKERS = {"A": deep_gemm_a.make_module, "B": deep_gemm_b.make_module}
_HEADER = "include/deep_gemm/impls/sm90_fp8_paged_mqa_logits.cuh"
_PLAIN = "template <uint32_t kNextN, uint32_t kNumHeads> void sm90_fp8_paged_mqa_logits();"
_CLUSTERS = "constexpr uint32_t kNextNPerCTA = kNextN / kNumKVMulticast;"


def other_kernels() -> frozenset[str]:
    """Names of all kernels but the references and DeepGEMM, for tests that pretend a GPU on CPU tensors."""
    names = {kernel.name for op in OPS for kernel in discover(op)}
    return frozenset(names - {"reference", "deep_gemm"})


def install_deep_gemm(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, generation: str, arch: Arch, has_clusters: bool = True
) -> PagedMQA:
    """Install a stand-in for ``arch``; ``has_clusters``: whether this build takes four rows on SM90.

    Returns:
        The library behind it, which records what is asked of it.
    """
    header = folder / _HEADER
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(_CLUSTERS if has_clusters else _PLAIN)
    library = PagedMQA(
        arch_major=9 if arch is Arch.SM90 else 10,
        num_sms=pretend_device(arch).num_sms,
        sm90_next_ns=(1, 2, 4) if has_clusters else (1, 2),
        sm90_page_sizes=(32, 64) if has_clusters else (64,),
    )
    monkeypatch.setitem(sys.modules, "deep_gemm", _MAKERS[generation](library, str(folder / "__init__.py")))
    return library
