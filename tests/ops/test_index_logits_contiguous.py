"""Index logits over contiguous keys: every kernel that takes them against sums written out here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from op_harness import DEVICE, IS_INTERPRETING, problem_or_skip

from nextn import ops
from nextn.errors import InputError
from nextn.hardware import Arch, DeviceInfo, has_module, pretend_device
from nextn.ops._kernel import Kernel, discover
from nextn.ops.index_logits._contiguous import ContiguousKeys
from nextn.ops.index_logits.problem import CONTIGUOUS, IndexLogitsProblem
from nextn.testing.compile_gate import TARGETS, compile_launch
from nextn.testing.numerics import assert_same_bits
from nextn.testing.poison import poison_output

INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)
NAMES = ("gluon_sm90", "reference", "triton_portable")
KERNELS = [kernel for kernel in discover("index_logits") if kernel.name in NAMES]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


@dataclass(frozen=True, kw_only=True)
class SpanCase:
    name: str
    num_keys: int
    spans: tuple[tuple[int, int], ...]
    heads: int = 16
    dim: int = 128
    max_columns: int | None = None
    out_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    def problem(self, hardware: DeviceInfo) -> IndexLogitsProblem:
        return IndexLogitsProblem(
            arch=hardware.arch, num_sms=hardware.num_sms, num_requests=1, num_rows=len(self.spans), next_n=None,
            max_rows=len(self.spans), heads=self.heads, dim=self.dim, page_size=0, max_pages=0,
            max_context=self.num_keys, cache=CONTIGUOUS, out_dtype=str(self.out_dtype).removeprefix("torch."),
        )  # fmt: skip


CASES = (
    SpanCase(name="one_prompt", num_keys=140, spans=tuple((0, 121 + row) for row in range(20))),
    SpanCase(name="three_prompts", num_keys=900, spans=((0, 1), (0, 2), (2, 700), (2, 701), (2, 702), (702, 900))),
    SpanCase(name="windows", num_keys=400, spans=tuple((row * 7, row * 7 + 100) for row in range(11)), heads=8),
    SpanCase(name="all_heads", num_keys=100, spans=((3, 90),) * 3, heads=64),
    SpanCase(name="small_dim", num_keys=70, spans=((1, 66), (0, 70)), heads=32, dim=32),
    SpanCase(
        name="many_rows", num_keys=500, spans=tuple((row // 9 * 100, 101 + 13 * row) for row in range(30)), heads=64
    ),
    SpanCase(name="compressed", num_keys=900, spans=((0, 70), (70, 170), (800, 900), (895, 900)), max_columns=100),
    SpanCase(name="cut_columns", num_keys=300, spans=((0, 300), (130, 131), (130, 299)), max_columns=65),
    SpanCase(name="compressed_32", num_keys=900, spans=((0, 70), (70, 170), (800, 900)), heads=32, max_columns=90),
    SpanCase(name="bfloat16", num_keys=130, spans=((0, 130), (64, 128)), out_dtype=torch.bfloat16),
    SpanCase(name="bfloat16_64", num_keys=130, spans=((0, 130), (64, 128)), heads=64, out_dtype=torch.bfloat16),
    SpanCase(
        name="hostile",
        num_keys=200,
        spans=(
            (INT32_MIN, 5),
            (150, INT32_MAX),
            (9, 9),
            (INT32_MAX, INT32_MIN),
            (100, 50),
            (-1, 0),
            (0, 0),
            (199, 200),
        ),
    ),
    SpanCase(
        name="hostile_compressed", num_keys=200, spans=((INT32_MIN, 5), (150, INT32_MAX), (70, 60)), max_columns=90
    ),
    SpanCase(name="no_keys", num_keys=0, spans=((0, 0), (0, 9))),
    SpanCase(name="no_rows", num_keys=50, spans=()),
    SpanCase(name="no_columns", num_keys=50, spans=((0, 50),), max_columns=0),
)


def make_inputs(case: SpanCase) -> dict[str, Any]:
    """Products of small integers, exact in float32 in any order."""
    generator = torch.Generator().manual_seed(len(case.spans) * 1000 + case.num_keys)
    rows = len(case.spans)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(torch.float8_e4m3fn)

    bounds = torch.tensor(case.spans, dtype=torch.int64).reshape(-1, 2).to(torch.int32)
    return {
        "q": integers(rows, case.heads, case.dim),
        "weights": torch.randint(-15, 16, (rows, case.heads), generator=generator) / 16,
        "keys": integers(case.num_keys, case.dim),
        "key_scales": torch.exp2(torch.randint(-3, 3, (case.num_keys,), generator=generator).float()),
        "row_starts": bounds[:, 0].contiguous(),
        "row_ends": bounds[:, 1].contiguous(),
    }


def score(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """float64 ``[R, N]``, every key for every row."""
    products = torch.einsum("rhd,sd->rhs", inputs["q"].double(), inputs["keys"].double()).clamp(min=0)
    return (products * inputs["weights"].double()[:, :, None]).sum(1) * inputs["key_scales"].double()


def run(kernel: Kernel, case: SpanCase, inputs: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    moved = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    keys = ContiguousKeys(
        values=moved["keys"],
        scales=moved["key_scales"],
        row_starts=moved["row_starts"],
        is_compressed=case.max_columns is not None,
    )
    unused = torch.empty(1, 1, dtype=torch.int32, device=DEVICE)
    kernel.prepare(
        problem_or_skip(kernel, case),
        q=moved["q"],
        weights=moved["weights"],
        index_cache=keys,
        query_offsets=unused[0],
        visible_lens=moved["row_ends"],
        page_table=unused,
        out=out,
    )()


@every_kernel
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_key_of_a_rows_span_is_scored_and_no_other_column_is_written(kernel, case):
    problem_or_skip(kernel, case)
    inputs = make_inputs(case)
    rows, columns = len(case.spans), case.num_keys if case.max_columns is None else case.max_columns
    output = poison_output((rows, columns), case.out_dtype, DEVICE, row_padding=8)
    untouched = output.view.clone()
    run(kernel, case, inputs, output.view)
    output.assert_untouched_around()
    wanted, all_scores = untouched.cpu(), score(inputs)
    for row, (start, end) in enumerate(case.spans):
        start, end = max(start, 0), min(end, case.num_keys)
        first = start if case.max_columns is not None else 0
        end = min(end, first + columns)
        if start < end:
            wanted[row, start - first : end - first] = all_scores[row, start:end].to(torch.float32).to(case.out_dtype)
    if case.out_dtype == torch.float32:
        assert_same_bits(output.view.cpu(), wanted)
    else:  # the interpreter rounds to bfloat16 in its own way
        torch.testing.assert_close(output.view.cpu(), wanted, rtol=2**-7, atol=0, equal_nan=True)


@every_kernel
def test_a_row_has_the_same_bits_alone_and_among_others(kernel):
    spans = tuple((start, end) for start in (0, 3, 500) for end in (511, 520, 640))
    case = SpanCase(name="together", num_keys=640, spans=spans, heads=32)
    problem_or_skip(kernel, case)
    inputs = make_inputs(case)
    together = torch.zeros(len(spans), 640, device=DEVICE)
    run(kernel, case, inputs, together)
    for row in (0, 4, 8):
        only = {name: tensor if name.startswith("key") else tensor[row : row + 1] for name, tensor in inputs.items()}
        alone = torch.zeros(1, 640, device=DEVICE)
        run(kernel, SpanCase(name="alone", num_keys=640, spans=spans[row : row + 1], heads=32), only, alone)
        assert_same_bits(alone, together[row : row + 1])


@every_kernel
def test_a_nan_key_spoils_its_own_column_alone(kernel):
    case = SpanCase(name="nan", num_keys=100, spans=((0, 100), (10, 60)))
    problem_or_skip(kernel, case)
    inputs = make_inputs(case)
    clean, spoilt = torch.zeros(2, 100, device=DEVICE), torch.zeros(2, 100, device=DEVICE)
    run(kernel, case, inputs, clean)
    inputs["keys"].view(torch.uint8)[[7, 50]] = 0x7F
    run(kernel, case, inputs, spoilt)
    others = torch.ones(100, dtype=torch.bool, device=DEVICE)
    others[[7, 50]] = False
    assert_same_bits(spoilt[:, others], clean[:, others])


@pytest.mark.compile
@pytest.mark.skipif(IS_INTERPRETING or not has_module("triton"), reason="needs Triton's compiler")
@pytest.mark.parametrize(
    ("case", "arch"), [(CASES[0], Arch.SM80), (CASES[0], Arch.SM90), (CASES[5], Arch.SM90)], ids=str
)
def test_contiguous_keys_are_multiplied_on_matrix_units(arch, case):
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == "triton_portable")
    moved = {name: tensor.to("meta") for name, tensor in make_inputs(case).items()}
    keys = ContiguousKeys(
        values=moved["keys"], scales=moved["key_scales"], row_starts=moved["row_starts"],
        is_compressed=case.max_columns is not None,
    )  # fmt: skip
    unused = torch.empty(1, 1, dtype=torch.int32, device="meta")
    device = pretend_device(arch)
    problem = IndexLogitsProblem(
        arch=arch, num_sms=device.num_sms, num_requests=1, num_rows=len(case.spans), next_n=None,
        max_rows=len(case.spans), heads=case.heads, dim=case.dim, page_size=0, max_pages=0, max_context=case.num_keys,
        cache=CONTIGUOUS,
    )  # fmt: skip
    launch = kernel.prepare(
        problem, q=moved["q"], weights=moved["weights"], index_cache=keys, query_offsets=unused[0],
        visible_lens=moved["row_ends"], page_table=unused,
        out=torch.empty(len(case.spans), case.max_columns or case.num_keys, device="meta"),
    )  # fmt: skip
    binary = compile_launch(launch, arch)
    assert binary.num_products > 0
    assert binary.shared_bytes <= TARGETS[arch].shared_bytes


@pytest.mark.skipif(IS_INTERPRETING, reason="one process is enough for the public function")
def test_the_function_makes_its_output_and_chooses_its_kernel():
    inputs = make_inputs(CASES[1])
    logits = ops.contiguous_index_logits(**inputs)
    assert logits.shape == (6, 900)
    assert torch.equal(logits[3, 2:701], score(inputs)[3, 2:701].float())
    compressed = ops.contiguous_index_logits(**inputs, max_columns=699)
    assert compressed.shape == (6, 699)
    assert torch.equal(compressed[3], score(inputs)[3, 2:701].float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: {"q": given["q"].float()}, "q is torch.float32"),
        (
            lambda given: {"weights": given["weights"][:2]},
            r"weights is torch.float32 \(2, 16\); pass float32 \[6, 16\]",
        ),
        (lambda given: {"keys": given["keys"][:, :64]}, r"keys is torch.float8_e4m3fn \(900, 64\)"),
        (lambda given: {"keys": given["keys"].view(torch.uint8)}, "keys is torch.uint8"),
        (lambda given: {"keys": given["keys"].mT.contiguous().mT}, r"with strides \(1, 900\)"),
        (
            lambda given: {"key_scales": given["key_scales"][:9]},
            r"key_scales is torch.float32 \(9,\); pass float32 \[900",
        ),
        (lambda given: {"row_ends": given["row_ends"].long()}, r"row_ends is torch.int64 \(6,\); pass int32 \[6\]"),
        (lambda given: {"row_starts": given["row_starts"].to("meta")}, "tensors lie on several devices"),
        (lambda given: {"max_columns": -1}, "max_columns is -1"),
        (lambda given: {"out": torch.empty(6, 899)}, r"out is torch.float32 \(6, 899\)"),
    ],
)
def test_a_wrong_tensor_is_named_with_what_to_pass(change, words):
    given = make_inputs(CASES[1])
    with pytest.raises(InputError, match=words):
        ops.contiguous_index_logits(**{**given, **change(given)})


@pytest.mark.parametrize("kernel", discover("index_logits"), ids=lambda kernel: kernel.name)
def test_a_kernel_without_contiguous_keys_refuses_them(kernel):
    problem = IndexLogitsProblem(
        arch=Arch.SM90, num_sms=132, num_requests=1, num_rows=8, next_n=None, max_rows=8, heads=64, dim=128,
        page_size=0, max_pages=0, max_context=640, cache=CONTIGUOUS,
    )  # fmt: skip
    takes_them = kernel.rejects(problem) is None
    assert takes_them == (kernel.name in NAMES)
