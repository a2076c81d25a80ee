"""Every Triton and Gluon kernel compiled for every GPU it names, on a machine that has none.

What runs on whose matrix units, and whether it fits, is read from the assembly.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nextn.errors import InputError
from nextn.hardware import Arch, has_module, pretend_device
from nextn.ops._kernel import OPS, Kernel, Launch, discover
from nextn.testing.compile_gate import TARGETS, compile_launch, is_interpreting

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        not has_module("triton") or is_interpreting(), reason="needs triton, and its interpreter turned off"
    ),
]

# Cases of each op that are compiled for every architecture, and those compiled for the first one only. The first case
# stands for an op that is not listed.
EVERYWHERE = {
    "index_logits": ("v32_next4",),
    "sparse_mla": ("tp8_next4",),
    "prepare_query": ("v32_verify",),
    "accept_drafts": ("v32_vocabulary",),
}
ONCE = {
    "index_logits": ("v32_decode", "v32_next8", "few_heads", "smallest_dim", "page_32", "bfloat16_out"),
    "select_topk": ("one_long_row",),  # one row, which Triton would specialise on
    "sparse_mla": ("tp8_decode", "v32_heads", "ragged_with_zeros", "bf16_cache"),
    "prepare_query": ("glm_verify", "unquantised", "dim_64"),
    "write_cache": ("bf16_latents", "fp32_caches", "all_spoilt"),  # the last has one page
    "accept_drafts": ("greedy_verify", "one_token_vocabulary"),
}
ONCE_ON = Arch.SM90
OPS_WITH_PRODUCTS = frozenset({"index_logits", "sparse_mla"})


def gate_parameters() -> Iterator[Any]:
    for op in OPS:
        kernels = [kernel for kernel in discover(op) if kernel.name.startswith(("triton", "gluon"))]
        if not kernels:
            continue
        cases = {case.name: case for case in importlib.import_module(f"nextn.ops.{op}.cases").CASES}
        everywhere = EVERYWHERE.get(op, (next(iter(cases)),))
        for kernel in kernels:
            for arch in (arch for arch in TARGETS if arch in kernel.arches):
                names = everywhere + (ONCE.get(op, ()) if arch is ONCE_ON else ())
                for name in names:
                    yield pytest.param(kernel, cases[name], arch, id=f"{op}-{kernel.name}-{name}-{arch}")


@pytest.mark.parametrize(("kernel", "case", "arch"), list(gate_parameters()))
def test_compiles_within_the_limits_of_its_gpu(kernel: Kernel, case: Any, arch: Arch):
    problem = case.problem(pretend_device(arch))
    reason = kernel.rejects(problem)
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")
    launch = prepare_on_meta(kernel, problem, case)
    binaries = [compile_launch(part, arch) for part in launch.arguments.get("launches", (launch,))]
    for binary in binaries:
        assert binary.shared_bytes <= TARGETS[arch].shared_bytes
        assert binary.registers <= (255 if arch.is_cuda else 512)
    if kernel.op in OPS_WITH_PRODUCTS:
        num_products = sum(binary.num_products for binary in binaries)
        assert num_products > 0, f"no {TARGETS[arch].product} in the assembly"
    for binary in binaries:
        assert not find_overwritten_loads(binary.assembly), "warp_specialize overwrites what a slower warp still reads"


def find_overwritten_loads(assembly: str) -> list[str]:
    """Loads of shared memory between the last barrier and the stores that hand a partition its arguments.

    Triton 3.6 puts the arguments of ``warp_specialize`` where it reduced before, and no barrier in between.
    """
    accesses = re.findall(r"(?:bar|barrier)\.sync\s+\d+|(?:ld|st)\.shared\S*.*global_smem", assembly)
    found, loads = [], []
    for access in accesses:
        if access.startswith("ld"):
            loads.append(access)
        elif access.startswith("st"):
            found += loads
        else:
            loads = []
    return found


def prepare_on_meta(kernel: Kernel, problem: Any, case: Any) -> Launch:
    """The launch of a case whose tensors hold nothing."""
    return kernel.prepare(problem, **ARGUMENTS[kernel.op](case))


def index_logits_arguments(case: Any) -> dict[str, torch.Tensor]:
    inputs = case.inputs("meta")
    out = torch.empty(*inputs.defined.shape, dtype=getattr(torch, case.out_dtype), device="meta")
    return {**inputs.arguments, "out": out}


def select_topk_arguments(case: Any) -> dict[str, Any]:
    inputs = case.inputs("meta")
    names = ("logits", "visible_lens", "query_offsets", "page_table")
    out = torch.empty(inputs.visible_lens.shape[0], case.topk, dtype=torch.int32, device="meta")
    return {**{name: getattr(inputs, name) for name in names}, "out": out}


def sparse_mla_arguments(case: Any) -> dict[str, Any]:
    inputs = case.inputs("meta")
    names = ("q", "kv_cache", "indices", "scale", "query_offsets")
    out = torch.empty(*inputs.q.shape[:2], 512, dtype=inputs.q.dtype, device="meta")
    lse = torch.empty(inputs.q.shape[:2], device="meta")
    return {**{name: getattr(inputs, name) for name in names}, "out": out, "lse": lse}


def prepare_query_arguments(case: Any) -> dict[str, Any]:
    inputs = case.inputs("meta")
    dtype = torch.float8_e4m3fn if case.quantise else torch.float32
    prepared = torch.empty(inputs["q"].shape, dtype=dtype, device="meta")
    return {**inputs, "out": (prepared, torch.empty(inputs["weights"].shape, device="meta"))}


def write_cache_arguments(case: Any) -> dict[str, Any]:
    return move_to_meta(case.inputs())


def accept_drafts_arguments(case: Any) -> dict[str, Any]:
    inputs = case.inputs()
    problem = case.problem(pretend_device(Arch.SM90))
    lens = torch.empty(problem.num_requests, dtype=torch.int32, device="meta")
    ids = torch.empty(problem.num_rows, dtype=torch.int64, device="meta")
    if inputs["sampling"] is not None:
        fields = {name: getattr(inputs["sampling"], name) for name in ("temperature", "top_k", "top_p", "seed")}
        inputs["sampling"] = dataclasses.replace(inputs["sampling"], **move_to_meta(fields))
    return {**move_to_meta(inputs), "out": (lens, ids)}


def move_to_meta(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


# What `prepare` takes of each op that has a Triton kernel, from a case.
ARGUMENTS = {
    "index_logits": index_logits_arguments,
    "select_topk": select_topk_arguments,
    "sparse_mla": sparse_mla_arguments,
    "prepare_query": prepare_query_arguments,
    "write_cache": write_cache_arguments,
    "accept_drafts": accept_drafts_arguments,
}


def test_a_plain_function_cannot_be_compiled():
    with pytest.raises(InputError, match="plain function"):
        compile_launch(Launch(function=len, arguments={}), Arch.SM90)


def test_the_cpu_is_no_target():
    with pytest.raises(InputError, match="cpu"):
        compile_launch(Launch(function=len, arguments={}, grid=(1,)), Arch.CPU)
