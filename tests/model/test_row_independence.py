"""A row's bits depend on its request's tokens only: not on the batch, the rows beside it, chunks or context width."""

from __future__ import annotations

import pytest
import torch
from model_harness import Session, random_prompts, random_tensors, small_config, write_checkpoint

from nextn.model import load_model
from nextn.model.config import DEEPSEEK, GLM
from nextn.model.rowwise import ROW_BLOCK, RowLinear, map_rows

LENGTH = 75

# Widths like those of the shipped checkpoint, where vectorised kernels, their remainders and threads all take part.
WIDE = {
    "hidden_size": 384,
    "q_lora_rank": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "index_n_heads": 32,
    "moe_intermediate_size": 200,
    "intermediate_size": 520,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "num_hidden_layers": 2,
}
CONFIGS = {
    "deepseek": small_config(DEEPSEEK),
    "glm": small_config(GLM, indexer_types=["full", "shared", "full"]),
    "wide": small_config(DEEPSEEK, **WIDE),
}


def load_random(name: str, tmp_path_factory):
    config = CONFIGS[name]
    return load_model(write_checkpoint(tmp_path_factory.mktemp(name), config, random_tensors(config)))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    return load_random(request.param, tmp_path_factory)


@pytest.fixture
def wide_model(tmp_path_factory):
    return load_random("wide", tmp_path_factory)


def run(model, prompts, sizes, cache_format="fp8", **options):
    """Target hidden states, logits, and NextN hidden states of the first request."""
    session = Session(model, len(prompts), cache_format=cache_format, **options)
    target, draft = [], []
    start = 0
    for step in range(LENGTH):
        size = sizes[min(step, len(sizes) - 1)]
        rows = [ids[start : start + size] for ids in prompts]
        if not rows[0]:
            break
        metadata = session.plan([len(ids) for ids in rows])
        flat = torch.tensor([token for ids in rows for token in ids])
        hidden = model(flat, metadata, session.caches, session.backend)
        drafted = model.mtp(flat, hidden, metadata, session.draft_cache, session.backend)
        target.append(hidden[: len(rows[0])])
        draft.append(drafted.hidden[: len(rows[0])])
        session.lengths = [length + len(ids) for length, ids in zip(session.lengths, rows)]
        start += size
    hidden = torch.cat(target)
    return hidden, model.compute_logits(hidden), torch.cat(draft)


def assert_same_bits(actual, expected):
    for name, left, right in zip(("hidden", "logits", "draft"), actual, expected):
        rows = (left != right).any(dim=1).nonzero().flatten().tolist()
        assert not rows, f"{name} differs in rows {rows[:5]} of {left.shape[0]}"


def test_chunks_rows_and_neighbours_leave_every_bit(model):
    vocab_size = model.config.vocab_size
    (prompt,) = random_prompts([LENGTH], vocab_size)
    expected = run(model, [prompt], [LENGTH])
    for sizes in ([64, 1], [40, 9, 3, 7, 2, 8, 5]):
        assert_same_bits(run(model, [prompt], sizes), expected)
    neighbours = random_prompts([30, LENGTH, 0, 57, 5], vocab_size, seed=2)
    for sizes in ([LENGTH], [60, 4]):
        assert_same_bits(run(model, [prompt, *neighbours], sizes), expected)


def test_two_threads_leave_every_bit_too(wide_model):
    """Among themselves: one thread and two may differ, as one machine and another may."""
    torch.set_num_threads(2)
    try:
        prompts = random_prompts([LENGTH, 20, 0, 9], wide_model.config.vocab_size)
        expected = run(wide_model, prompts[:1], [LENGTH])
        assert_same_bits(run(wide_model, prompts, [66, 4, 1]), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cache_format", ["bf16", "fp32"])
def test_every_cache_format_leaves_every_bit(model, cache_format):
    prompts = random_prompts([LENGTH, 40], model.config.vocab_size)
    expected = run(model, prompts[:1], [LENGTH], cache_format)
    assert_same_bits(run(model, prompts, [62, 4], cache_format), expected)


def test_verify_rows_equal_rows_decoded_alone(model):
    """For every depth from 8 to 1, each attempt written over the one before, as rejected drafts are."""
    prompts = random_prompts([LENGTH, 50, 33], model.config.vocab_size, seed=5)
    depth = 8
    alone = Session(model, 1, cache_format="fp8")
    alone.extend([prompts[0][:-depth]])
    expected = torch.cat([alone.extend([[token]])[0] for token in prompts[0][-depth:]])
    together = Session(model, 3, cache_format="fp8")
    together.extend([ids[:-depth] for ids in prompts])
    committed = list(together.lengths)
    for next_n in range(depth, 0, -1):
        rows = [ids[len(ids) - depth :][:next_n] for ids in prompts]
        actual = together.extend(rows)[0]
        assert torch.equal(actual, expected[:next_n]), next_n
        together.lengths = list(committed)


def test_the_width_of_the_context_leaves_every_bit(model):
    (prompt,) = random_prompts([LENGTH], model.config.vocab_size)
    narrow, wide = Session(model, 1), Session(model, 1, capacity=448)
    (expected,) = narrow.extend([prompt])
    (actual,) = wide.extend([prompt], max_context=448)
    assert torch.equal(actual, expected)


def test_no_rows_give_no_rows(model):
    session = Session(model, 2)
    metadata = session.plan([0, 0])
    nothing = torch.empty(0, dtype=torch.int64)
    hidden = model(nothing, metadata, session.caches, session.backend)
    assert hidden.shape == (0, model.config.hidden_size)
    assert model.compute_logits(hidden).shape == (0, model.config.vocab_size)
    assert model.mtp(nothing, hidden, metadata, session.draft_cache, session.backend).hidden.shape == hidden.shape


@pytest.mark.parametrize("num_rows", [0, 1, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 3 * ROW_BLOCK])
def test_blocks_have_one_size_and_rows_come_back_in_order(num_rows):
    seen = []

    def record(block, other):
        seen.append((tuple(block.shape), block.is_contiguous(), tuple(other.shape)))
        return block * 2, other.sum(dim=1)

    rows, others = torch.randn(num_rows, 5), torch.randn(num_rows, 3, 2)
    doubled, summed = map_rows(record, rows, others)
    assert set(seen) == {((ROW_BLOCK, 5), True, (ROW_BLOCK, 3, 2))}
    assert torch.equal(doubled, rows * 2)
    torch.testing.assert_close(summed, others.sum(dim=1))


def test_a_packed_product_is_the_product():
    linear = RowLinear(48, 33, device="cpu", dtype=torch.float32)
    assert linear.weight is not None
    torch.nn.init.normal_(linear.weight)
    weight, rows = linear.weight.data.clone(), torch.randn(ROW_BLOCK, 48)
    linear.pack()
    torch.testing.assert_close(linear(rows).double(), rows.double() @ weight.double().T, atol=1e-5, rtol=1e-5)
