"""nextn.integrations.deep_gemm: DeepGEMM's signatures and contracts, against sums written out here.

Queries and keys are small integers and scales powers of two, so that every order of summation gives the same bits.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch

from nextn.errors import InputError, NextnError, UnsupportedError
from nextn.integrations import deep_gemm

PAGE = 64


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)


def make_weights(rows: int, heads: int) -> torch.Tensor:
    return torch.randint(-15, 16, (rows, heads), generator=torch.Generator().manual_seed(rows)) / 16


class PagedKeys:
    """Keys of some requests, plainly, and the same in pages of a cache; unused bytes are NaN and unused pages wild."""

    def __init__(self, lens: list[int], *, dim: int = 128, page: int = PAGE, columns: int | None = None) -> None:
        generator = torch.Generator().manual_seed(sum(lens))
        pages_each = [-(-length // page) for length in lens]
        num_pages = sum(pages_each) + 3
        order = torch.randperm(num_pages, generator=generator).tolist()
        bytes_of = torch.full((num_pages, page * (dim + 4)), 0xFF, dtype=torch.uint8)
        table = torch.full((len(lens), columns or max(pages_each)), 2**30, dtype=torch.int32)
        self.keys, self.scales = [], []
        for request, length in enumerate(lens):
            keys = integers(length, dim, seed=request)
            scales = torch.exp2(torch.randint(-3, 3, (length,), generator=generator).float())
            for column in range(pages_each[request]):
                table[request, column] = mine = order.pop()
                part = slice(column * page, min((column + 1) * page, length))
                rows = part.stop - part.start
                bytes_of[mine, : rows * dim] = keys[part].view(torch.uint8).reshape(-1)
                bytes_of[mine, page * dim : page * dim + rows * 4] = scales[part].view(torch.uint8)
            self.keys.append(keys)
            self.scales.append(scales)
        self.cache = bytes_of.view(num_pages, page, 1, dim + 4)
        self.table = table


def score(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 ``[S]`` of one row: q ``[H, D]``, weights ``[H]``, keys ``[S, D]``, scales ``[S]``."""
    products = (q.double() @ keys.double().T).clamp(min=0)
    return ((products * weights.double()[:, None]).sum(0) * scales.double()).float()


def call(paged: PagedKeys, q, weights, lens, max_context_len, **options) -> torch.Tensor:
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, PAGE, deep_gemm.get_num_sms())
    return deep_gemm.fp8_paged_mqa_logits(
        q, paged.cache, weights, lens, paged.table, schedule, max_context_len, **options
    )


@pytest.mark.parametrize("next_n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("has_own_lens", [True, False], ids=["L+1..L+n", "all L+n"])
def test_every_row_is_scored_up_to_its_own_length_at_any_depth(next_n, has_own_lens):
    longest = [130, next_n, 64]
    paged = PagedKeys(longest)
    own = torch.tensor([[length - next_n + 1 + j for j in range(next_n)] for length in longest], dtype=torch.int32)
    lens = own if has_own_lens else own[:, -1:].expand(-1, next_n).contiguous()
    q, weights = integers(3, next_n, 32, 128), make_weights(3 * next_n, 32)
    logits = call(paged, q, weights, lens, 150)
    assert logits.shape == (3 * next_n, 150)
    assert logits.stride() == (256, 1)
    for b in range(3):
        for j in range(next_n):
            row, length = b * next_n + j, int(own[b, j])
            wanted = score(q[b, j], weights[row], paged.keys[b], paged.scales[b])
            assert torch.equal(logits[row, :length], wanted[:length])


@pytest.mark.parametrize(("heads", "dim", "page"), [(8, 128, 64), (16, 64, 32), (64, 32, 64)])
def test_other_heads_dims_and_pages_are_taken(heads, dim, page):
    paged = PagedKeys([100, 37], dim=dim, page=page)
    lens = torch.tensor([[99, 100], [36, 37]], dtype=torch.int32)
    q, weights = integers(2, 2, heads, dim), make_weights(4, heads)
    logits = deep_gemm.fp8_paged_mqa_logits(q, paged.cache, weights, lens, paged.table, None, 100)
    wanted = score(q[1, 0], weights[2], paged.keys[1], paged.scales[1])
    assert torch.equal(logits[2, :36], wanted[:36])


def test_a_repeated_table_may_be_passed_strided():
    paged = PagedKeys([70, 130])
    lens, q, weights = torch.full((2, 3), 64, dtype=torch.int32), integers(2, 3, 32, 128), make_weights(6, 32)
    plain = call(paged, q, weights, lens, 130)
    paged.table = paged.table.repeat_interleave(3, 0)[::3]
    assert torch.equal(call(paged, q, weights, lens, 130)[:, :64], plain[:, :64])


def test_rows_with_equal_neighbouring_indices_are_one_request():
    paged = PagedKeys([100, 64, 5])
    owners = [0, 0, 0, 1, 2, 2]
    visible = [98, 99, 100, 64, 4, 5]
    ids = torch.tensor([7, 7, 7, 2, 7, 7], dtype=torch.int32)  # an id may come back; only neighbours are compared
    q, weights = integers(6, 1, 32, 128), make_weights(6, 32)
    lens = torch.tensor(visible, dtype=torch.int32)[:, None]
    paged.table = paged.table[owners]
    logits = call(paged, q, weights, lens, 100, indices=ids)
    for row, (owner, length) in enumerate(zip(owners, visible)):
        wanted = score(q[row, 0], weights[row], paged.keys[owner], paged.scales[owner])
        assert torch.equal(logits[row, :length], wanted[:length])


def test_each_run_of_equal_indices_owns_its_rows():
    offsets = deep_gemm._find_offsets(torch.tensor([5, 5, 5, 1, 5], dtype=torch.int32))
    assert offsets.tolist() == [0, 3, 3, 3, 4, 5]
    assert deep_gemm._find_offsets(torch.empty(0, dtype=torch.int32)).tolist() == [0]


def test_padding_hostile_lengths_and_wild_pages_are_survived():
    paged = PagedKeys([100, 3, 10])
    lens = torch.tensor([[99, 100], [0, -5], [2**31 - 1, 10]], dtype=torch.int32)
    paged.table[2] = -1
    q, weights = integers(3, 2, 32, 128), make_weights(6, 32)
    logits = call(paged, q, weights, lens, 100)
    assert torch.equal(logits[1], score(q[0, 1], weights[1], paged.keys[0], paged.scales[0]))


@pytest.mark.parametrize(("requests", "max_context_len"), [(0, 100), (2, 0)])
def test_nothing_to_score_gives_an_empty_result(requests, max_context_len):
    paged = PagedKeys([5] * requests, columns=1) if requests else PagedKeys([5])
    lens, q = torch.full((requests, 2), 4, dtype=torch.int32), integers(requests, 2, 32, 128)
    table = paged.table[:requests]
    logits = deep_gemm.fp8_paged_mqa_logits(
        q, paged.cache, make_weights(requests * 2, 32), lens, table, None, max_context_len
    )
    assert logits.shape == (requests * 2, max_context_len)


def test_more_columns_than_the_table_holds_are_given():
    paged = PagedKeys([60])
    q, weights, lens = integers(1, 1, 32, 128), make_weights(1, 32), torch.tensor([[60]], dtype=torch.int32)
    logits = call(paged, q, weights, lens, 1000)
    assert logits.shape == (1, 1000)
    assert logits.stride(0) == 1024
    assert torch.equal(logits[0, :60], score(q[0, 0], weights[0], paged.keys[0], paged.scales[0]))


def test_the_function_of_both_formats_takes_fp8_queries_and_either_dtype():
    paged = PagedKeys([100])
    q, weights, lens = integers(1, 2, 32, 128), make_weights(2, 32), torch.tensor([[99, 100]], dtype=torch.int32)
    plain = call(paged, q, weights, lens, 100)
    call_both = deep_gemm.fp8_fp4_paged_mqa_logits
    assert torch.equal(call_both((q, None), paged.cache, weights, lens, paged.table, None, 100)[1], plain[1])
    halved = call_both(q, paged.cache, weights, lens, paged.table, None, 100, logits_dtype=torch.bfloat16)
    assert torch.equal(halved[1], plain[1].bfloat16())


SPANS = [(0, 10), (0, 11), (11, 150), (150, 150), (120, 90), (11, 151)]


def make_contiguous():
    keys, scales = integers(160, 128, seed=5), torch.exp2(torch.randint(-3, 3, (160,)).float())
    starts, ends = (torch.tensor(bounds, dtype=torch.int32) for bounds in zip(*SPANS))
    return integers(6, 32, 128, seed=9), (keys, scales), make_weights(6, 32), starts, ends


@pytest.mark.parametrize("clean", [True, False])
def test_contiguous_keys_are_scored_within_each_rows_span(clean):
    q, kv, weights, starts, ends = make_contiguous()
    logits = deep_gemm.fp8_mqa_logits(q, kv, weights, starts, ends, clean_logits=clean)
    assert logits.shape == (6, 160)
    assert logits.stride(0) == 512  # align(160 + 256, 256)
    for row, (start, end) in enumerate(SPANS):
        wanted = score(q[row], weights[row], *kv)
        assert torch.equal(logits[row, start:end], wanted[start:end])
        if clean:
            assert (logits[row, : min(start, end)] == float("-inf")).all()
            assert (logits[row, max(start, end) :] == float("-inf")).all()


def test_logits_are_cleaned_unless_told_otherwise():
    q, kv, weights, starts, ends = make_contiguous()
    assert torch.isneginf(deep_gemm.fp8_mqa_logits(q, kv, weights, starts, ends)).sum() == 6 * 160 - 10 - 11 - 139 - 140


def test_compressed_logits_begin_with_each_rows_first_key():
    q, kv, weights, starts, ends = make_contiguous()
    logits = deep_gemm.fp8_fp4_mqa_logits((q, None), kv, weights, starts, ends, False, 139, torch.float32)
    assert logits.shape == (6, 139)
    for row, (start, end) in enumerate(SPANS):
        count = min(max(end - start, 0), 139)
        assert torch.equal(logits[row, :count], score(q[row], weights[row], *kv)[start : start + count])


def test_the_schedule_has_deep_gemms_shape_and_any_schedule_will_do():
    lens = torch.tensor([[4, 5]], dtype=torch.int32)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, 64, 132)
    assert schedule.shape == (133, 2)
    assert schedule.dtype == torch.int32
    paged, q, weights = PagedKeys([5]), integers(1, 2, 32, 128), make_weights(2, 32)
    args = (q, paged.cache, weights, lens, paged.table)
    wild = torch.full((5, 2), 2**30, dtype=torch.int32)
    logits = deep_gemm.fp8_paged_mqa_logits(*args, wild, 5)
    assert torch.equal(logits[1], deep_gemm.fp8_paged_mqa_logits(*args, schedule, 5)[1])


def test_num_sms_can_be_set_and_reset():
    available = deep_gemm.get_num_sms()
    deep_gemm.set_num_sms(3)
    try:
        assert deep_gemm.get_num_sms() == 3
    finally:
        deep_gemm.set_num_sms(0)
    assert deep_gemm.get_num_sms() == available >= 1
    with pytest.raises(InputError, match="num_sms is -1"):
        deep_gemm.set_num_sms(-1)


def test_it_can_stand_in_for_deep_gemm_itself(monkeypatch):
    """With this module in DeepGEMM's place, DeepGEMM's adapter must not be chosen here: it would call itself."""
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm)
    deep_gemm._choose.cache_clear()
    paged, q, weights = PagedKeys([9]), integers(1, 1, 32, 128), make_weights(1, 32)
    lens = torch.tensor([[9]], dtype=torch.int32)
    logits = call(paged, q, weights, lens, 9)
    assert torch.equal(logits[0], score(q[0, 0], weights[0], paged.keys[0], paged.scales[0]))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        (
            "fp8_paged_mqa_logits",
            "q kv_cache weights context_lens block_table schedule_meta max_context_len clean_logits=False indices=None",
        ),
        (
            "fp8_fp4_paged_mqa_logits",
            "q kv_cache weights context_lens block_table schedule_meta max_context_len clean_logits=False "
            "logits_dtype=torch.float32 indices=None",
        ),
        ("get_paged_mqa_logits_metadata", "context_lens block_kv num_sms indices=None"),
        (
            "fp8_mqa_logits",
            "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits=True max_seqlen_k=0",
        ),
        (
            "fp8_fp4_mqa_logits",
            "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits=True max_seqlen_k=0 "
            "logits_dtype=torch.float32",
        ),
        ("get_num_sms", ""),
        ("set_num_sms", "num_sms"),
    ],
)
def test_signatures_are_deep_gemms(name, parameters):
    signature = inspect.signature(getattr(deep_gemm, name))
    shown = [
        key if value.default is value.empty else f"{key}={value.default}" for key, value in signature.parameters.items()
    ]
    assert " ".join(shown) == parameters


def paged_arguments() -> dict[str, Any]:
    paged = PagedKeys([5])
    return {
        "q": integers(1, 2, 32, 128), "kv_cache": paged.cache, "weights": make_weights(2, 32),
        "context_lens": torch.tensor([[4, 5]], dtype=torch.int32), "block_table": paged.table, "schedule_meta": None,
        "max_context_len": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(1, 2, 32, 128)}, r"q is torch.float32 \(1, 2, 32, 128\); pass float8_e4m3fn"),
        ({"q": integers(2, 32, 128)}, r"q is torch.float8_e4m3fn \(2, 32, 128\)"),
        ({"kv_cache": torch.zeros(3, 8448, dtype=torch.uint8)}, r"kv_cache is torch.uint8 \(3, 8448\)"),
        ({"kv_cache": torch.zeros(3, 64, 1, 100, dtype=torch.uint8)}, r"pass uint8 \[pages, page_size, 1, 132\]"),
        (
            {"context_lens": torch.tensor([5], dtype=torch.int32)},
            r"context_lens is torch.int32 \(1,\); pass .*\[1, 2\]",
        ),
        ({"context_lens": torch.tensor([[4, 5]])}, "context_lens is torch.int64"),
        ({"context_lens": torch.ones(1, 3, dtype=torch.int32)}, r"context_lens is torch.int32 \(1, 3\)"),
        ({"weights": make_weights(2, 32).bfloat16()}, r"weights is torch.bfloat16 .*; pass float32 \[2, 32\]"),
        ({"weights": make_weights(1, 32)}, r"pass float32 \[2, 32\]"),
        ({"block_table": torch.zeros(1, 1)}, "page_table is torch.float32"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, r"block_table has shape \(2, 1\); pass \[1, pages\]"),
        ({"block_table": torch.zeros(1, 1, dtype=torch.int32, device="meta")}, "several devices"),
        ({"max_context_len": -1}, "max_context_len is -1"),
        ({"clean_logits": True}, "clean_logits is set"),
        ({"indices": torch.zeros(1, dtype=torch.int32)}, r"indices is torch.int32 \(1,\) with next_n 2"),
    ],
)
def test_wrong_paged_input_is_named_with_what_to_pass(change, words):
    with pytest.raises(InputError, match=words):
        deep_gemm.fp8_paged_mqa_logits(**{**paged_arguments(), **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv": integers(4, 128)}, "kv is a Tensor; pass the pair"),
        ({"max_seqlen_k": 5}, "clean_logits is set with max_seqlen_k 5"),
        ({"max_seqlen_k": -5, "clean_logits": False}, "max_seqlen_k is -5"),
        ({"weights": make_weights(6, 31)}, r"weights is torch.float32 \(6, 31\)"),
        ({"cu_seq_len_k_end": torch.zeros(5, dtype=torch.int32)}, r"row_ends is torch.int32 \(5,\); pass int32 \[6\]"),
    ],
)
def test_wrong_contiguous_input_is_named_with_what_to_pass(change, words):
    names = ("q", "kv", "weights", "cu_seq_len_k_start", "cu_seq_len_k_end")
    with pytest.raises(InputError, match=words):
        deep_gemm.fp8_mqa_logits(**{**dict(zip(names, make_contiguous())), **change})


def test_fp4_queries_and_odd_logit_dtypes_are_refused():
    given = paged_arguments()
    values, others = given.pop("q"), list(given.values())
    with pytest.raises(UnsupportedError, match="queries with scales are FP4"):
        deep_gemm.fp8_fp4_paged_mqa_logits((values, torch.ones(1, 2, 32)), *others)
    with pytest.raises(UnsupportedError, match=r"queries in torch.int8 are FP4"):
        deep_gemm.fp8_fp4_mqa_logits(values[0].view(torch.int8), *make_contiguous()[1:])
    with pytest.raises(InputError, match=r"logits_dtype is torch.float16"):
        deep_gemm.fp8_fp4_paged_mqa_logits((values, None), *others, logits_dtype=torch.float16)


def test_wrong_schedule_arguments_are_refused():
    lens = torch.ones(2, 2, dtype=torch.int32)
    cases: tuple[Any, ...] = ((lens[0], 64, 132), (lens, 0, 132), (lens, 64, 0), (lens, 64, 132, lens[0]))
    for arguments in cases:
        with pytest.raises(NextnError):
            deep_gemm.get_paged_mqa_logits_metadata(*arguments)
