"""How an op finds its kernel, on which devices, under which settings, and what a batch must look like."""

from __future__ import annotations

import importlib
import logging
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from nextn.batch import ForwardBatch, ForwardMode
from nextn.env import Environment, read_environment
from nextn.errors import ConfigError, InputError, UnsupportedError
from nextn.hardware import (
    Arch,
    DeviceInfo,
    describe_device,
    is_sm90_supported,
    is_sm100_supported,
    list_devices,
    parse_arch,
    pretend_device,
)
from nextn.ops import _kernel
from nextn.ops._kernel import OPS, Kernel, Launch, choose, discover, same_device

NO_SETTINGS = Environment(forced_kernels={}, disabled_kernels=frozenset())


@dataclass(frozen=True, kw_only=True)
class Sizes:
    arch: Arch
    width: int = 64


def make_kernel(name: str, rank: int, *, arches=frozenset(Arch), reason: str | None = None, form: str = "") -> Kernel:
    return Kernel(
        op="select_topk",
        name=name,
        arches=arches,
        rejects=lambda problem: reason,
        prepare=lambda problem: Launch(function=dict, arguments={}),
        rank=lambda problem: rank,
        form=(lambda problem: form) if form else None,
    )


REFERENCE = make_kernel("reference", 0)
FAST = make_kernel("fast", 20, form="wide")
HOPPER = make_kernel("hopper", 30, arches=frozenset({Arch.SM90}))
PICKY = make_kernel("picky", 40, reason="width 64 is not 128")


@pytest.fixture
def kernels(monkeypatch):
    """Replace the kernel files of every op by the given kernels."""

    def install(*found: Kernel) -> None:
        monkeypatch.setattr(_kernel, "discover", lambda op: found)

    return install


def test_the_highest_rank_that_takes_the_problem_wins_and_the_rest_is_explained(kernels):
    kernels(FAST, HOPPER, PICKY, REFERENCE)
    choice = choose("select_topk", Sizes(arch=Arch.SM100), environment=NO_SETTINGS)
    assert str(choice) == "fast (wide)"
    assert choice.others == ("reference",)
    assert choice.refusals == (("hopper", "written for sm90; not for sm100"), ("picky", "width 64 is not 128"))


def test_an_architecture_changes_the_choice(kernels):
    kernels(FAST, HOPPER, REFERENCE)
    assert choose("select_topk", Sizes(arch=Arch.SM90), environment=NO_SETTINGS).kernel is HOPPER


@pytest.mark.parametrize(
    ("arch", "words"), [(Arch.CPU, "this is a CPU, not a CUDA GPU"), (Arch.GFX942, "gfx942 is an AMD GPU")]
)
def test_a_wrong_platform_is_named(kernels, arch, words):
    kernels(HOPPER, REFERENCE)
    ((_, reason),) = choose("select_topk", Sizes(arch=arch), environment=NO_SETTINGS).refusals
    assert words in reason


def test_a_disabled_kernel_is_passed_over_with_the_variable_as_reason(kernels):
    kernels(FAST, REFERENCE)
    environment = Environment(forced_kernels={}, disabled_kernels=frozenset({"fast"}))
    choice = choose("select_topk", Sizes(arch=Arch.CPU), environment=environment)
    assert choice.kernel is REFERENCE
    assert choice.refusals == (("fast", "disabled by NEXTN_DISABLE_KERNELS"),)


def test_a_forced_kernel_runs_even_if_it_ranks_lower(kernels):
    kernels(FAST, REFERENCE)
    environment = Environment(forced_kernels={"select_topk": "reference"}, disabled_kernels=frozenset())
    assert choose("select_topk", Sizes(arch=Arch.CPU), environment=environment).kernel is REFERENCE


def test_a_forced_kernel_that_cannot_run_is_an_error_listing_every_refusal(kernels):
    kernels(PICKY, REFERENCE)
    environment = Environment(forced_kernels={"select_topk": "picky"}, disabled_kernels=frozenset())
    with pytest.raises(UnsupportedError, match=r"picky: width 64 is not 128; reference: NEXTN_KERNELS forces picky"):
        choose("select_topk", Sizes(arch=Arch.CPU), environment=environment)


def test_settings_come_from_the_process_environment_unless_given(kernels, monkeypatch):
    kernels(FAST, REFERENCE)
    monkeypatch.setenv("NEXTN_DISABLE_KERNELS", "fast")
    assert choose("select_topk", Sizes(arch=Arch.CPU)).kernel is REFERENCE


def test_a_choice_is_logged_once_and_again_when_another_kernel_is_taken(kernels, caplog, monkeypatch):
    monkeypatch.setattr(_kernel, "_logged", set())
    kernels(PICKY, FAST, REFERENCE)
    with caplog.at_level(logging.INFO, logger="nextn.kernels"):
        for width in (64, 65, 66):
            choose("select_topk", Sizes(arch=Arch.CPU, width=width), environment=NO_SETTINGS)
        kernels(REFERENCE)
        choose("select_topk", Sizes(arch=Arch.CPU), environment=NO_SETTINGS)
    assert [record.getMessage() for record in caplog.records] == [
        "select_topk on cpu runs fast (wide); passed over: picky: width 64 is not 128",
        "select_topk on cpu runs reference; passed over: nothing",
    ]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_that_ranks_lowest_and_unique_names(op):
    found = discover(op)
    names = [kernel.name for kernel in found]
    assert "reference" in names
    assert len(set(names)) == len(names)
    assert all(kernel.op == op for kernel in found)


def test_an_unknown_op_is_named():
    with pytest.raises(InputError, match="unknown op 'flash'"):
        discover("flash")


def test_a_kernel_file_without_a_kernel_is_named(monkeypatch, tmp_path):
    (tmp_path / "half_written.py").write_text("RANK = 20\n")
    monkeypatch.setattr(importlib.import_module("nextn.ops.select_topk"), "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"half_written\.py exports no KERNEL"):
        discover.__wrapped__("select_topk")


@pytest.mark.parametrize(("num_gpus", "place", "entered"), [(1, "cuda:1", []), (2, "cuda:1", [1]), (2, "cpu", [])])
def test_a_launch_makes_the_gpu_of_its_tensors_current_where_there_are_several(monkeypatch, num_gpus, place, entered):
    current, launched_on = [], []
    monkeypatch.setattr(_kernel, "_has_several_gpus", lambda: num_gpus > 1)

    @contextmanager
    def guard(device):
        current.append(device.index)
        yield
        current.pop()

    class OnDevice(torch.Tensor):
        device = torch.device(place)

    class Compiled:
        def __getitem__(self, grid):
            return lambda **arguments: launched_on.extend(current)

    monkeypatch.setattr(torch.cuda, "device", guard)
    Launch(function=Compiled(), arguments={"size": 3, "x": torch.ones(1).as_subclass(OnDevice)}, grid=(1,))()
    assert launched_on == entered
    assert not current


def test_a_launch_passes_on_what_its_function_returns_and_skips_an_empty_grid():
    assert Launch(function=dict, arguments={"a": 1})() == {"a": 1}
    launched: list[tuple[int, ...]] = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append(grid)

    Launch(function=Compiled(), arguments={}, grid=(2, 3))()
    Launch(function=Compiled(), arguments={}, grid=(0, 3))()
    assert launched == [(2, 3)]


def test_tensors_on_two_devices_are_named():
    assert same_device(a=torch.ones(1), b=None) == torch.device("cpu")
    with pytest.raises(InputError, match="a on cpu, b on meta"):
        same_device(a=torch.ones(1), b=torch.ones(1, device="meta"))


def test_environment_is_parsed():
    environment = read_environment(
        {
            "NEXTN_KERNELS": " index_logits=reference , sparse_mla=fast",
            "NEXTN_DISABLE_KERNELS": "deep_gemm",
            "HOME": "/",
        }
    )
    assert environment.forced_kernels == {"index_logits": "reference", "sparse_mla": "fast"}
    assert environment.disabled_kernels == {"deep_gemm"}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"NEXTN_KERNEL": "x"}, "unknown environment variables \\['NEXTN_KERNEL'\\]"),
        ({"NEXTN_KERNELS": "index_logits"}, "is not op=name"),
    ],
)
def test_a_wrong_variable_is_an_error(environ, words):
    with pytest.raises(ConfigError, match=words):
        read_environment(environ)


def test_forcing_a_kernel_of_an_unknown_op_is_an_error_not_a_wish(kernels):
    kernels(REFERENCE)
    environment = read_environment({"NEXTN_KERNELS": "topk=reference"})
    with pytest.raises(ConfigError, match=r"unknown ops \['topk'\]; use some of \['index_logits'"):
        choose("select_topk", Sizes(arch=Arch.CPU), environment=environment)


@pytest.mark.parametrize(
    ("text", "arch"),
    [("sm90", Arch.SM90), ("SM_90a", Arch.SM90), ("sm100f", Arch.SM100), ("gfx942", Arch.GFX942), ("cpu", Arch.CPU)],
)
def test_architectures_are_parsed(text, arch):
    assert parse_arch(text) is arch


def test_an_unknown_architecture_lists_those_that_exist():
    with pytest.raises(InputError, match=r"unknown architecture 'sm70'; use one of \['cpu', 'sm80'"):
        parse_arch("sm70")


@pytest.mark.parametrize("arch", [Arch.SM100, Arch.SM103])
def test_the_sm100_family(arch):
    assert is_sm100_supported(pretend_device(arch))
    assert not is_sm90_supported(pretend_device(arch))


def test_hopper_is_not_of_the_sm100_family():
    assert is_sm90_supported(pretend_device(Arch.SM90))
    assert not is_sm100_supported(pretend_device(Arch.SM90))


def test_the_cpu_is_always_a_device_and_the_last():
    assert list_devices()[-1] == DeviceInfo(arch=Arch.CPU, name="CPU", num_sms=1)
    assert describe_device("meta").arch is Arch.CPU
    with pytest.raises(InputError, match="'xpu' is not supported"):
        describe_device(torch.device("xpu"))


def make_table(requests: int, pages: int = 4) -> torch.Tensor:
    return torch.arange(requests * pages, dtype=torch.int32).reshape(requests, pages)


@pytest.mark.parametrize(
    ("row_counts", "next_n", "max_rows"),
    [([4, 4], 4, 4), ([1, 1, 1], 1, 1), ([2, 3], None, 3), ([2, 0], None, 2), ([0, 0], None, 0), ([], None, 0)],
)
def test_next_n_is_defined_only_where_every_request_has_as_many_rows(row_counts, next_n, max_rows):
    batch = ForwardBatch.build(
        ForwardMode.DRAFT_EXTEND,
        row_counts=row_counts,
        context_lens=[100] * len(row_counts),
        page_table=make_table(len(row_counts)),
    )
    assert (batch.next_n, batch.max_rows, batch.num_rows) == (next_n, max_rows, sum(row_counts))
    assert batch.query_offsets.tolist() == [sum(row_counts[:i]) for i in range(len(row_counts) + 1)]


def test_lengths_on_the_device_are_used_as_they_are():
    lens = torch.tensor([0, 300], dtype=torch.int32)
    batch = ForwardBatch.build(ForwardMode.DECODE, row_counts=[1, 1], context_lens=lens, page_table=make_table(2))
    assert batch.context_lens is lens
    assert batch.max_context == 256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row_counts": [1, -1]}, "negative"),
        ({"context_lens": [9]}, "1 context_lens for 2 requests"),
        ({"context_lens": [9, 0]}, "request 1 has 1 rows but only 0 cached tokens"),
        ({"context_lens": [9, 257]}, "request 1 has 257 tokens, above the 256"),
        ({"context_lens": [9, 200], "max_context": 199}, "has 200 above max_context 199"),
        ({"max_context": 257}, "max_context 257 does not fit"),
        ({"context_lens": torch.tensor([9, 9])}, "pass int32"),
        ({"page_table": make_table(2).long()}, "page_table is torch.int64"),
        ({"page_table": make_table(3)}, "pass int32 \\[2, pages\\]"),
        ({"page_table": make_table(4, 2).T}, "column stride 2"),
        ({"visible_lens": torch.tensor([1], dtype=torch.int32)}, "visible_lens is torch.int32 \\(1,\\)"),
    ],
)
def test_a_wrong_batch_is_refused_with_value_and_limit(changes, words):
    arguments = {"row_counts": [1, 1], "context_lens": [9, 9], "page_table": make_table(2)}
    with pytest.raises(InputError, match=words):
        ForwardBatch.build(ForwardMode.DECODE, **(arguments | changes))
