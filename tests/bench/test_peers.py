"""How peers are found and called, with stand-ins that take what the real ones take and nothing else."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from nextn.bench import peers
from nextn.bench.op_calls import find_kernel, sparse_mla_call
from nextn.bench.ops import check_candidate
from nextn.bench.peers import peer_candidates
from nextn.bench.shapes import IndexLogitsShape, SelectTopkShape, SparseMlaShape
from nextn.bench.workloads import make_workload, our_candidates
from nextn.hardware import Arch, pretend_device
from nextn.ops.sparse_mla.problem import problem_of
from nextn.testing.timing import CpuClock
from tests.stand_ins.install import install_deep_gemm

CPU = torch.device("cpu")
HOPPER = pretend_device(Arch.SM90)
ATTENTION = SparseMlaShape(requests=2, next_n=2, heads=16, context=256, topk=64)


def pretend_hopper(shape):
    """A workload on the CPU whose problem says it is for an H100."""
    workload = make_workload(shape, CPU)
    problem = dataclasses.replace(workload.call.problem, arch=HOPPER.arch, num_sms=HOPPER.num_sms)
    return dataclasses.replace(workload, call=dataclasses.replace(workload.call, problem=problem))


def verdicts(workload):
    """Peer to its verdict, of those that can run; and why the others cannot."""
    present, absent = peer_candidates(workload)
    return {one.name: check_candidate(one, CpuClock()).verdict for one in present}, absent


@pytest.fixture
def no_folders(monkeypatch):
    monkeypatch.setattr(peers, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize(("next_n", "native"), [(1, True), (2, True), (3, False), (4, True), (None, False)])
@pytest.mark.parametrize("generation", ["A", "B"])
def test_deep_gemm_runs_natively_where_it_can_and_flattened_everywhere(
    monkeypatch, tmp_path, generation, next_n, native
):
    library = install_deep_gemm(monkeypatch, tmp_path, generation=generation, arch=Arch.SM90)
    found, absent = verdicts(pretend_hopper(IndexLogitsShape(requests=8, context=130, next_n=next_n)))
    assert set(found) == ({"deep_gemm_native"} if native else set()) | {"deep_gemm_flattened"}
    assert all(verdict.passed for verdict in found.values()), found
    assert native or "flattened" in absent["deep_gemm_native"]
    flattened = library.calls[-1]
    assert flattened["lens"].shape[1] == 1


def test_a_deep_gemm_that_is_wrong_has_no_time(monkeypatch, tmp_path):
    library = install_deep_gemm(monkeypatch, tmp_path, generation="B", arch=Arch.SM90)
    real = library.score
    monkeypatch.setattr(library, "score", lambda *arguments: real(*arguments).mul_(1.1))
    found, _ = verdicts(pretend_hopper(IndexLogitsShape(requests=2, context=130, next_n=2)))
    assert [verdict.passed for verdict in found.values()] == [False, False]


def test_an_absent_deep_gemm_says_so(monkeypatch):
    monkeypatch.setattr(peers.deep_gemm, "find_build", lambda: "deep_gemm is not installed")
    found, absent = verdicts(pretend_hopper(IndexLogitsShape(requests=2, context=130, next_n=2)))
    assert found == {}
    assert set(absent.values()) == {"deep_gemm is not installed"}


def select_into(logits, lens, out, workspace, topk, longest):
    assert lens.dtype == torch.int32
    assert lens.shape == (logits.shape[0],)
    assert workspace.numel() == 2**20
    assert longest == logits.shape[1]
    out.copy_(logits.topk(topk, dim=1).indices.flip(1))


@pytest.fixture
def vllm_library(monkeypatch, tmp_path, no_folders):
    """vLLM's two functions as operators of PyTorch, in a folder that is searched."""
    file = tmp_path / "somewhere" / "_C_stable_libtorch.abi3.so"
    file.parent.mkdir()
    file.touch()
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    names = ("cooperative_topk", "persistent_topk")
    namespace = ModuleType("_C")
    namespace.__dict__.update(dict.fromkeys(names, select_into))
    monkeypatch.setattr(torch.ops, "_C", namespace, raising=False)
    peers.add_peers_folder(tmp_path)
    return loaded


@pytest.mark.parametrize(("rows", "names"), [(64, {"cooperative", "persistent"}), (65, {"persistent"})])
def test_vllm_s_selections_run_as_vllm_chooses_them(vllm_library, rows, names):
    found, absent = verdicts(pretend_hopper(SelectTopkShape(rows=rows, length=600, topk=512)))
    assert set(found) == {f"vllm_{name}_topk" for name in names} | {"torch_topk"}
    assert all(verdict.passed for verdict in found.values()), found
    assert rows == 64 or absent["vllm_cooperative_topk"] == "65 rows are above 64"
    assert len(vllm_library) == 1


@pytest.mark.usefixtures("vllm_library")
def test_vllm_takes_three_values_of_k():
    _, absent = verdicts(pretend_hopper(SelectTopkShape(rows=2, length=600, topk=500)))
    assert absent["vllm_persistent_topk"] == "k 500 is not 512, 1024 or 2048"


@pytest.mark.usefixtures("no_folders")
def test_without_its_library_vllm_is_absent():
    _, absent = verdicts(pretend_hopper(SelectTopkShape(rows=2, length=600, topk=512)))
    assert "is in no --peers-dir" in absent["vllm_persistent_topk"]


def attend(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    *,
    softmax_scale,
    is_fp8_kvcache,
    indices,
    use_legacy,
):
    """FlashMLA's contract on the reference: 64 or 128 heads, plus infinity for a row without a slot."""
    assert block_table is cache_seqlens is None
    assert (head_dim_v, is_fp8_kvcache, use_legacy) == (512, True, True)
    assert tile_scheduler_metadata == "schedule"
    assert q.shape[1] == indices.shape[1] == 1
    assert q.shape[2] in (64, 128)
    assert k_cache.shape[2:] == (1, 656)
    tensors = {"q": q[:, 0], "kv_cache": k_cache.squeeze(2), "indices": indices[:, 0]}
    call = sparse_mla_call(problem_of(HOPPER, **tensors), {**tensors, "scale": softmax_scale, "query_offsets": None})
    results = call.run(find_kernel("sparse_mla", "reference"))
    lse = torch.where(results["lse"] == float("-inf"), float("inf"), results["lse"])
    return results["out"][:, None], lse[:, :, None]


@pytest.fixture
def flash_mla(monkeypatch):
    module = ModuleType("flash_mla")
    module.__dict__.update(
        has_legacy=lambda: True, get_mla_metadata=lambda: ("schedule", None), flash_mla_with_kvcache=attend
    )
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    return module


@pytest.mark.usefixtures("flash_mla")
def test_flash_mla_runs_padded_and_its_real_heads_are_compared():
    workload = pretend_hopper(ATTENTION)
    workload.call.arguments["indices"][1] = -1
    workload = dataclasses.replace(workload, expected=workload.call.run(find_kernel("sparse_mla", "reference")))
    found, _ = verdicts(workload)
    assert found["flash_mla_direct"].passed, found


@pytest.mark.usefixtures("flash_mla")
@pytest.mark.parametrize(
    ("changes", "needle"),
    [({"heads": 129}, "129 heads"), ({"topk": 63}, "k 63"), ({"arch": Arch.SM100}, "sm100")],
)
def test_flash_mla_says_what_it_cannot_take(changes, needle):
    workload = pretend_hopper(ATTENTION)
    problem = dataclasses.replace(workload.call.problem, **changes)
    workload = dataclasses.replace(workload, call=dataclasses.replace(workload.call, problem=problem))
    assert needle in peer_candidates(workload)[1]["flash_mla_direct"]


def test_a_flash_mla_without_kernels_for_hopper_is_absent(flash_mla):
    flash_mla.has_legacy = lambda: False
    assert "kernels for SM90" in peer_candidates(pretend_hopper(ATTENTION))[1]["flash_mla_direct"]


def test_an_absent_flash_mla_says_so(monkeypatch):
    monkeypatch.setattr(peers.flash_mla, "find_library", lambda: "flash_mla is not installed")
    assert peer_candidates(pretend_hopper(ATTENTION))[1]["flash_mla_direct"] == "flash_mla is not installed"


@pytest.mark.usefixtures("flash_mla")
def test_a_library_wrapped_as_one_of_our_kernels_is_judged_too():
    workload = pretend_hopper(dataclasses.replace(ATTENTION, heads=64))
    wrapped = {one.name: one for one in our_candidates(workload)[0]}["flash_mla"]
    assert wrapped.kind == "wrapped"
    verdict = check_candidate(wrapped, CpuClock()).verdict
    assert verdict.passed, verdict.note
