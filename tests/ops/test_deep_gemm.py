"""The DeepGEMM kernel file: what it refuses and why, what it asks of the library, and whose bits it returns.

The inputs are exact: see tests/stand_ins/exact_inputs.py.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch

from nextn.env import Environment
from nextn.hardware import Arch
from nextn.ops._kernel import Choice, OpPlan, choose, discover
from nextn.ops.index_logits import reference
from nextn.ops.index_logits._schedule import PagedSchedule
from tests.stand_ins.exact_inputs import Inputs, make_inputs, make_problem
from tests.stand_ins.install import install_deep_gemm

deep_gemm = importlib.import_module("nextn.ops.index_logits.deep_gemm")
NO_SETTINGS = Environment(forced_kernels={}, disabled_kernels=frozenset())


def as_plan(inputs: Inputs, schedule: PagedSchedule) -> OpPlan:
    choice = Choice(kernel=deep_gemm.KERNEL, form="", refusals=(), others=())
    return OpPlan(choice=choice, problem=inputs.problem, data=schedule)


def run(kernel, inputs: Inputs) -> torch.Tensor:
    """The kernel's logits with 0 in every column that may hold anything."""
    problem = inputs.problem
    out = torch.full((problem.num_rows, problem.max_context), float("nan"))
    kernel.prepare(problem, **inputs.tensors, out=out)()
    is_visible = torch.arange(problem.max_context) < inputs.tensors["visible_lens"][:, None]
    return out.where(is_visible, torch.zeros(()))


UNIFORM = [636, 64, 65, 513, 9, 640]
RAGGED = ([3, 0, 1, 6, 2], [300, 12, 1, 640, 70])


@pytest.mark.parametrize("next_n", range(1, 9))
def test_every_depth_is_native_on_sm100(monkeypatch, tmp_path, next_n):
    library = install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    inputs = make_inputs(Arch.SM100, [next_n] * 6, UNIFORM)
    assert deep_gemm.rejects(inputs.problem) is None
    assert deep_gemm.form(inputs.problem) == f"native [6, {next_n}]"
    assert torch.equal(run(deep_gemm.KERNEL, inputs), run(reference.KERNEL, inputs))
    (call,) = library.calls
    assert call["q"].shape == (6, next_n, 32, 128)
    assert call["lens"].shape == (6, next_n)


@pytest.mark.parametrize("generation", ["A", "B"])
@pytest.mark.parametrize("next_n", [1, 2, 4])
def test_depths_1_2_and_4_are_native_on_a_hopper_build_with_clusters(monkeypatch, tmp_path, generation, next_n):
    library = install_deep_gemm(monkeypatch, tmp_path, generation=generation, arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, [next_n] * 6, UNIFORM, heads=64)
    assert deep_gemm.form(inputs.problem) == f"native [6, {next_n}]"
    assert torch.equal(run(deep_gemm.KERNEL, inputs), run(reference.KERNEL, inputs))
    ((_, schedule),) = library.schedules
    assert schedule.shape[0] - 1 == (66 if next_n == 4 else 132)


@pytest.mark.parametrize("generation", ["A", "B"])
@pytest.mark.parametrize(
    ("next_n", "has_clusters", "allowed"), [(3, True, "1, 2, 4"), (6, True, "1, 2, 4"), (4, False, "1, 2")]
)
def test_other_depths_are_flattened_on_hopper(monkeypatch, tmp_path, generation, next_n, has_clusters, allowed):
    library = install_deep_gemm(monkeypatch, tmp_path, generation=generation, arch=Arch.SM90, has_clusters=has_clusters)
    inputs = make_inputs(Arch.SM90, [next_n] * 6, UNIFORM)
    rows = 6 * next_n
    why = f"flattened to [{rows}, 1]: next_n {next_n} on sm90 is not among {allowed}"
    assert deep_gemm.form(inputs.problem) == why
    assert torch.equal(run(deep_gemm.KERNEL, inputs), run(reference.KERNEL, inputs))
    (call,) = library.calls
    assert call["lens"].shape == (rows, 1)
    assert torch.equal(call["table"], inputs.tensors["page_table"].repeat_interleave(next_n, dim=0))


@pytest.mark.parametrize("arch", [Arch.SM90, Arch.SM100])
def test_a_ragged_batch_is_flattened(monkeypatch, tmp_path, arch):
    library = install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=arch)
    inputs = make_inputs(arch, *RAGGED)
    assert deep_gemm.form(inputs.problem) == "flattened to [12, 1]: the requests have different numbers of rows"
    assert torch.equal(run(deep_gemm.KERNEL, inputs), run(reference.KERNEL, inputs))
    request_of_row = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3, 3, 3, 4, 4])
    assert torch.equal(library.calls[0]["table"], inputs.tensors["page_table"][request_of_row])


def test_native_and_flattened_agree_to_the_last_bit(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, [4] * 6, UNIFORM)
    as_ragged = replace(inputs, problem=replace(inputs.problem, next_n=None))
    assert torch.equal(run(deep_gemm.KERNEL, inputs), run(deep_gemm.KERNEL, as_ragged))


@pytest.mark.parametrize(("heads", "dim", "page_size"), [(8, 64, 64), (16, 32, 32), (64, 128, 32)])
def test_other_sizes_sm100_takes(monkeypatch, tmp_path, heads, dim, page_size):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    inputs = make_inputs(Arch.SM100, [3, 3], [70, 511], heads=heads, dim=dim, page_size=page_size)
    assert deep_gemm.rejects(inputs.problem) is None
    assert torch.equal(run(deep_gemm.KERNEL, inputs), run(reference.KERNEL, inputs))


def test_pages_of_32_run_on_a_hopper_build_that_takes_them(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="B", arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, [2, 2], [70, 511], page_size=32)
    assert torch.equal(run(deep_gemm.KERNEL, inputs), run(reference.KERNEL, inputs))


def test_native_rows_are_given_the_batchs_own_page_table(monkeypatch, tmp_path):
    library = install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    inputs = make_inputs(Arch.SM100, [2] * 6, UNIFORM)
    wide = torch.full((6, 40), 2**30, dtype=torch.int32)
    wide[:, :10] = inputs.tensors["page_table"]
    view = wide[:, :10]
    inputs = replace(inputs, tensors=inputs.tensors | {"page_table": view})
    assert torch.equal(run(deep_gemm.KERNEL, inputs), run(reference.KERNEL, inputs))
    assert library.calls[0]["table"].data_ptr() == wide.data_ptr()
    assert library.calls[0]["table"].stride() == (40, 1)


def test_one_schedule_serves_every_layer(monkeypatch, tmp_path):
    library = install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, [4] * 6, UNIFORM)
    schedule = deep_gemm.KERNEL.plan(inputs.problem, **inputs.batch_tensors)
    out = torch.empty(24, inputs.problem.max_context)
    for _ in range(5):
        deep_gemm.prepare(inputs.problem, **inputs.tensors, out=out, plan=as_plan(inputs, schedule))()
    assert len(library.schedules) == 1
    assert all(call["lens"] is schedule.context_lens for call in library.calls)
    assert all(call["schedule"] is schedule.metadata for call in library.calls)
    assert len(library.calls) == 5


@pytest.mark.parametrize("row_counts", [[2, 2, 2], [2, 0, 1]])
def test_lengths_stay_within_what_deep_gemm_survives(monkeypatch, tmp_path, row_counts):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, row_counts, [0, 0, 100])
    visible = torch.tensor([-3, 0, 0, 5000, 7, 7][: sum(row_counts)], dtype=torch.int32)
    tensors = inputs.batch_tensors | {"visible_lens": visible}
    schedule = deep_gemm.build_schedule(inputs.problem, **tensors)
    assert schedule.context_lens.min() == 1
    assert schedule.context_lens.max() <= 100
    assert visible.min() == -3, "the batch's own lengths must stay as they are"


def test_an_all_padding_batch_does_not_reach_the_schedulers_zero_length_bug(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    inputs = make_inputs(Arch.SM100, [2, 2], [0, 0])
    inputs = replace(inputs, problem=replace(inputs.problem, max_context=128))
    assert torch.equal(run(deep_gemm.KERNEL, inputs), torch.zeros(4, 128))


def test_native_lengths_hold_each_requests_largest_even_if_the_host_orders_rows_otherwise(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM100)
    inputs = make_inputs(Arch.SM100, [2, 2], [300, 400])
    visible = torch.tensor([300, 20, 7, 400], dtype=torch.int32)
    inputs = replace(inputs, tensors=inputs.tensors | {"visible_lens": visible})
    schedule = deep_gemm.build_schedule(inputs.problem, **inputs.batch_tensors)
    assert schedule.context_lens.tolist() == [[300, 300], [400, 400]]
    assert torch.equal(run(deep_gemm.KERNEL, inputs), run(reference.KERNEL, inputs))


def test_a_strided_output_is_filled_and_nothing_beside_it(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, [2, 2], [70, 200])
    storage = torch.full((4, 300), -7.0)
    out = storage[:, 50:250]
    launch = deep_gemm.prepare(inputs.problem, **inputs.tensors, out=out)
    assert launch() is out
    assert torch.equal(out[3], run(reference.KERNEL, inputs)[3])
    assert (storage[:, :50] == -7).all()
    assert (storage[:, 250:] == -7).all()


def test_without_an_output_deep_gemms_own_tensor_is_returned(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, [2, 2], [70, 300])
    logits = deep_gemm.prepare(inputs.problem, **inputs.tensors, out=None)()
    assert logits.shape == (4, 300)
    assert logits.stride() == (512, 1)
    assert torch.equal(logits[3], run(reference.KERNEL, inputs)[3])


def test_queries_and_weights_of_any_stride_are_taken(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, [2, 2], [70, 300])
    wide = torch.cat([inputs.tensors["weights"], torch.ones(4, 5)], dim=1)[:, :32]
    q = inputs.tensors["q"].view(torch.uint8).transpose(0, 1).contiguous().transpose(0, 1).view(torch.float8_e4m3fn)
    strided = replace(inputs, tensors=inputs.tensors | {"weights": wide, "q": q})
    assert not q.is_contiguous()
    assert torch.equal(run(deep_gemm.KERNEL, strided), run(reference.KERNEL, inputs))


def test_preparing_a_planned_call_touches_no_data(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, [2, 2], [70, 300])
    tensors = {name: tensor.to("meta") for name, tensor in inputs.tensors.items()}
    schedule = PagedSchedule(
        context_lens=torch.empty(2, 2, dtype=torch.int32, device="meta"),
        metadata=torch.empty(133, 2, dtype=torch.int32, device="meta"),
        page_table=tensors["page_table"],
        is_native=True,
    )
    launch = deep_gemm.prepare(inputs.problem, **tensors, out=None, plan=as_plan(inputs, schedule))
    assert launch.arguments["q"].shape == (2, 2, 32, 128)
    assert launch.arguments["cache"].shape == (20, 64, 1, 132)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"deterministic": True}, "deterministic mode runs one kernel at every depth"),
        ({"cache": "fp32"}, "index cache fp32 is not fp8"),
        ({"out_dtype": "bfloat16"}, "logits of bfloat16 are not float32"),
        ({"dim": 96}, "head_dim 96 is not one of 32, 64, 128"),
        ({"heads": 16}, "16 index heads on sm90 are not one of 32, 64"),
        ({"heads": 24, "arch": Arch.SM100}, "24 index heads on sm100 are not one of 8, 16, 32, 64"),
        ({"page_size": 16}, "page_size 16 on sm90 is not one of 32, 64"),
        ({"page_size": 128, "arch": Arch.SM103}, "page_size 128 on sm103 is not one of 32, 64"),
        ({"num_rows": 0, "next_n": None}, "nothing to score: 0 rows"),
        ({"max_context": 0}, "over a context of 0"),
    ],
)
def test_a_size_it_cannot_take_is_refused_with_the_limit(monkeypatch, tmp_path, changes, reason):
    problem = make_problem(**changes)
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=problem.arch)
    assert reason in deep_gemm.rejects(problem)


def test_pages_of_32_are_refused_on_a_hopper_build_without_clusters(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90, has_clusters=False)
    assert deep_gemm.rejects(make_problem(page_size=32)) == "page_size 32 on sm90 is not one of 64"


@pytest.mark.parametrize("next_n", [1, 2])
def test_generation_b_is_refused_on_sm100_with_its_reason(monkeypatch, tmp_path, next_n):
    install_deep_gemm(monkeypatch, tmp_path, generation="B", arch=Arch.SM100)
    reason = deep_gemm.rejects(make_problem(arch=Arch.SM100, next_n=next_n, num_rows=64 * next_n))
    assert "MX-scaled queries with bfloat16 weights" in reason


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        (Arch.CPU, "this is a CPU, not a CUDA GPU"),
        (Arch.GFX950, "gfx950 is an AMD GPU"),
        (Arch.SM120, "not for sm120"),
        (Arch.SM80, "not for sm80"),
    ],
)
def test_another_platform_is_refused_without_importing_deep_gemm(monkeypatch, arch, words):
    monkeypatch.setattr(deep_gemm, "import_library", lambda *_, **__: pytest.fail("imported"))
    choice = choose("index_logits", make_problem(arch=arch), environment=NO_SETTINGS)
    assert words in dict(choice.refusals)["deep_gemm"]


@pytest.fixture
def no_deep_gemm(monkeypatch):
    """Forget any DeepGEMM and what was found out about it."""
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    deep_gemm._inspect_module.cache_clear()
    yield
    deep_gemm._inspect_module.cache_clear()


@pytest.mark.usefixtures("no_deep_gemm")
def test_an_absent_deep_gemm_is_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    assert deep_gemm.rejects(make_problem()) == "deep_gemm is not installed"
    choice = choose("index_logits", make_problem(), environment=NO_SETTINGS)
    assert ("deep_gemm", "deep_gemm is not installed") in choice.refusals


@pytest.mark.usefixtures("no_deep_gemm")
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
        ("raise OSError('cannot load') from OSError('no libcudart')", "OSError: cannot load (no libcudart)"),
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("assert False, 'Expected one .so file, found 0'", "AssertionError: Expected one .so file"),
    ],
)
def test_a_broken_deep_gemm_is_refused_with_the_imports_own_words_and_tried_once(monkeypatch, tmp_path, source, words):
    attempts = tmp_path / "attempts"
    (tmp_path / "deep_gemm.py").write_text(f"with open({str(attempts)!r}, 'a') as log:\n    log.write('x')\n{source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(3):
        reason = deep_gemm.rejects(make_problem())
        assert reason.startswith("deep_gemm cannot be imported: ")
        assert words in reason
    assert attempts.read_text() == "x"


def test_an_api_from_before_two_dimensional_lengths_is_refused(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)

    def fp8_paged_mqa_logits(
        q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, clean_logits=True
    ):
        raise AssertionError

    module = sys.modules["deep_gemm"]
    monkeypatch.setattr(module, "fp8_paged_mqa_logits", fp8_paged_mqa_logits)
    assert "unknown signature" in deep_gemm.rejects(make_problem())


def test_a_deep_gemm_without_paged_logits_is_refused(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="B", arch=Arch.SM90)
    monkeypatch.delattr(sys.modules["deep_gemm"], "get_paged_mqa_logits_metadata")
    assert "has no get_paged_mqa_logits_metadata" in deep_gemm.rejects(make_problem())


@pytest.mark.parametrize(
    ("parameters", "is_known"), [("clean_logits: bool = False, indices: Tensor", True), ("", False)]
)
def test_a_compiled_function_is_told_by_its_docstring(monkeypatch, tmp_path, parameters, is_known):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    module = sys.modules["deep_gemm"]

    class Compiled:
        __doc__ = f"fp8_paged_mqa_logits(q: Tensor, kv_cache: Tensor, {parameters}) -> Tensor"
        __signature__ = "none, as pybind11's"

        def __init__(self, function):
            self._function = function

        def __call__(self, *positional, **named):
            return self._function(*positional, **named)

    monkeypatch.setattr(module, "fp8_paged_mqa_logits", Compiled(module.fp8_paged_mqa_logits))
    assert (deep_gemm.rejects(make_problem()) is None) is is_known


def test_native_outranks_and_flattened_yields_to_a_portable_kernel(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="B", arch=Arch.SM90)
    native, flattened = make_problem(next_n=4, num_rows=256), make_problem()
    portable = 20
    assert deep_gemm.rank(native) > portable > deep_gemm.rank(flattened) > reference.KERNEL.rank(flattened)


def test_the_stand_in_notices_a_schedule_of_other_lengths(monkeypatch, tmp_path):
    install_deep_gemm(monkeypatch, tmp_path, generation="A", arch=Arch.SM90)
    inputs = make_inputs(Arch.SM90, [2, 2], [70, 300])
    schedule = deep_gemm.build_schedule(inputs.problem, **inputs.batch_tensors)
    copied = replace(schedule, context_lens=schedule.context_lens.clone())
    with pytest.raises(AssertionError, match="another lengths tensor"):
        deep_gemm.prepare(inputs.problem, **inputs.tensors, out=None, plan=as_plan(inputs, copied))()
    schedule.context_lens.fill_(300)
    with pytest.raises(AssertionError, match="lengths changed after the schedule"):
        deep_gemm.prepare(inputs.problem, **inputs.tensors, out=None, plan=as_plan(inputs, schedule))()


def test_the_kernel_file_is_discovered():
    assert deep_gemm.KERNEL in discover("index_logits")
