"""The NextN layer against a float64 layer written from the paper; transformers has no such layer."""

from __future__ import annotations

import pytest
import torch
from model_harness import Session, random_prompts, random_tensors, small_config, write_checkpoint
from plain_model import PlainLayer, rms

from nextn.errors import InputError
from nextn.model import load_model
from nextn.model.config import DEEPSEEK, GLM

NEXTN = 3  # the NextN layer's number in small_config
LENGTH = 70

# Float32 against float64 over one layer of 64 to 512 wide products: 2e-6 was measured; rows whose selection hangs on
# less than 1e-4 of the score are left out.
TOLERANCE = 3e-5
SAFE_MARGIN = 1e-4


class Drafting:
    """A prompt that has run through the target and the NextN layer, and the float64 layer beside it."""

    def __init__(self, folder, architecture: str, chunks: list[int], **changes) -> None:
        self.config = small_config(architecture, **changes)
        self.tensors = random_tensors(self.config, seed=3)
        self.model = load_model(write_checkpoint(folder, self.config, self.tensors))
        self.plain = PlainLayer(self.config, self.tensors, NEXTN)
        (self.tokens,) = random_prompts([LENGTH + 1], self.config["vocab_size"])
        self.session = Session(self.model, 1)
        start, hidden, outputs = 0, [], []
        for size in chunks:
            metadata = self.session.plan([size])
            ids = torch.tensor(self.tokens[start : start + size + 1])
            rows = self.model(ids[:-1], metadata, self.session.caches, self.session.backend)
            outputs.append(self.draft(ids[1:], rows, metadata))
            self.session.lengths[0] += size
            hidden.append(rows)
            start += size
        self.hidden = torch.cat(hidden)
        self.outputs = torch.cat([output.hidden for output in outputs])
        self.topk_slots = outputs[-1].topk_slots

    def draft(self, next_ids, hidden, metadata, shared_topk=None):
        assert self.model.mtp is not None
        return self.model.mtp(
            next_ids, hidden, metadata, self.session.draft_cache, self.session.backend, shared_topk=shared_topk
        )

    def pairs(self, next_ids: list[int], hidden: torch.Tensor) -> torch.Tensor:
        """What enters the float64 layer: embedding half first."""
        named = {name: tensor.double() for name, tensor in self.tensors.items()}
        prefix = f"model.layers.{NEXTN}."
        eps = self.config["rms_norm_eps"]
        embedded = rms(named["model.embed_tokens.weight"][next_ids], named[prefix + "enorm.weight"], eps)
        both = torch.cat((embedded, rms(hidden.double(), named[prefix + "hnorm.weight"], eps)), dim=1)
        return both @ named[prefix + "eh_proj.weight"].T

    def finish(self, stream: torch.Tensor) -> torch.Tensor:
        weight = self.tensors[f"model.layers.{NEXTN}.shared_head.norm.weight"].double()
        return rms(stream, weight, self.config["rms_norm_eps"])


def assert_close_where_safe(drafting: Drafting, actual: torch.Tensor, expected: torch.Tensor, rows: range) -> None:
    safe = [row for row in rows if drafting.plain.margins[row] > SAFE_MARGIN]
    assert len(safe) > 0.9 * len(rows)
    torch.testing.assert_close(
        actual[[row - rows.start for row in safe]].double(), expected[safe], atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("architecture", [DEEPSEEK, GLM])
@pytest.mark.parametrize("chunks", [[LENGTH], [40, 23, 7]], ids=["one chunk", "three chunks"])
def test_prefill_predicts_what_the_float64_layer_does(tmp_path, architecture, chunks):
    drafting = Drafting(tmp_path, architecture, chunks)
    expected = drafting.finish(drafting.plain.run(drafting.pairs(drafting.tokens[1:], drafting.hidden)))
    assert_close_where_safe(drafting, drafting.outputs, expected, range(LENGTH))
    assert drafting.model.mtp is not None
    logits = drafting.model.mtp.compute_logits(drafting.outputs)
    head = drafting.tensors["lm_head.weight"].double()
    torch.testing.assert_close(logits.double(), drafting.outputs.double() @ head.T, atol=1e-4, rtol=1e-4)


def test_every_norm_but_the_index_keys_has_the_configured_epsilon(tmp_path):
    drafting = Drafting(tmp_path, GLM, [LENGTH], rms_norm_eps=0.02)
    expected = drafting.finish(drafting.plain.run(drafting.pairs(drafting.tokens[1:], drafting.hidden)))
    assert_close_where_safe(drafting, drafting.outputs, expected, range(LENGTH))


def test_draft_steps_feed_on_their_own_hidden_states(tmp_path):
    drafting = Drafting(tmp_path, DEEPSEEK, [LENGTH])
    ids, hidden = list(drafting.tokens[1:]), drafting.hidden
    step_hidden = drafting.outputs[-1:]
    for token in (5, 17, 60):
        output = drafting.draft(torch.tensor([token]), step_hidden, drafting.session.plan([1]))
        drafting.session.lengths[0] += 1
        ids, hidden = [*ids, token], torch.cat((hidden, step_hidden))
        expected = drafting.finish(drafting.plain.run(drafting.pairs(ids, hidden)))
        torch.testing.assert_close(output.hidden[0].double(), expected[-1], atol=TOLERANCE, rtol=TOLERANCE)
        step_hidden = output.hidden


def test_a_shared_selection_is_attended_to_and_writes_no_index_key(tmp_path):
    drafting = Drafting(tmp_path, GLM, [LENGTH])
    drafting.plain.run(drafting.pairs(drafting.tokens[1:], drafting.hidden))
    selected = drafting.plain.selected[-1]
    index = drafting.session.draft_cache.index
    assert index is not None
    index_before = index.clone()
    step_hidden = drafting.outputs[-1:]
    output = drafting.draft(
        torch.tensor([5]), step_hidden, drafting.session.plan([1]), shared_topk=drafting.topk_slots[-1:]
    )
    assert torch.equal(index, index_before)
    assert torch.equal(output.topk_slots, drafting.topk_slots[-1:])
    pairs = drafting.pairs([*drafting.tokens[1:], 5], torch.cat((drafting.hidden, step_hidden)))
    expected = drafting.finish(drafting.plain.run(pairs, reuse={LENGTH: selected}))
    torch.testing.assert_close(output.hidden[0].double(), expected[-1], atol=TOLERANCE, rtol=TOLERANCE)
    own = drafting.finish(drafting.plain.run(pairs))
    assert (own[-1] - expected[-1]).abs().max() > 100 * TOLERANCE


def test_the_draft_layer_leaves_the_targets_caches_alone(tmp_path):
    drafting = Drafting(tmp_path, DEEPSEEK, [LENGTH])
    before = [cache.kv.clone() for cache in drafting.session.caches[:-1]]
    drafting.draft(torch.tensor([5]), drafting.outputs[-1:], drafting.session.plan([1]))
    assert all(torch.equal(cache.kv, kept) for cache, kept in zip(drafting.session.caches, before))


def test_rows_that_do_not_fit_the_batch_are_refused(tmp_path):
    drafting = Drafting(tmp_path, DEEPSEEK, [LENGTH])
    metadata = drafting.session.plan([2])
    with pytest.raises(InputError, match=r"next_ids is torch.int64 \(1,\); pass int64 \[2\]"):
        drafting.draft(torch.tensor([5]), drafting.outputs[-1:], metadata)
    with pytest.raises(InputError, match=r"hidden is \(1, 64\); pass \[2, 64\]"):
        drafting.draft(torch.tensor([5, 6]), drafting.outputs[-1:], metadata)
    with pytest.raises(InputError, match=r"input_ids is torch\.int32"):
        drafting.model(torch.tensor([5, 6], dtype=torch.int32), metadata, drafting.session.caches, None)
    with pytest.raises(InputError, match="2 caches for 3 layers"):
        drafting.model(torch.tensor([5, 6]), metadata, drafting.session.caches[:2], drafting.session.backend)
