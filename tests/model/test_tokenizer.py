"""The tokenizer loses nothing: not a byte of the text, and not half a character that two tokens share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from nextn.errors import CheckpointError
from nextn.model import Tokenizer, load_tokenizer

BOS, EOS, THINK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<think>"
TEXTS = ["def main():\n    return 'naïve café 🤖'\n", "日本語のテキスト", "\x00\x7f\u2028 tabs\tand  spaces "]


def train(*, byte_level: bool = True) -> FastTokenizer:
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if byte_level:
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken(THINK, special=False)])
    return tokenizer


FAST = train()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FAST.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    return tmp_path


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@given(text=st.text())
def test_any_text_survives(text):
    tokenizer = Tokenizer(FAST, bos_id=0, eos_ids=[1])
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(ids, skip_special=False) == text


def test_characters_split_over_tokens_are_put_together_and_broken_ones_replaced(tokenizer):
    ids = [tokenizer.token_id(spelling) for spelling in ["Ã", "©", "ð", "Ł", "¦", "Ģ"]]
    assert tokenizer.decode(ids) == "é🦀"
    assert tokenizer.decode(ids[:1]) == "�"


def test_bos_is_put_first_once(tokenizer):
    assert tokenizer.encode("x")[0] == 0
    assert tokenizer.encode(BOS + "x") == tokenizer.encode("x")
    assert tokenizer.encode("x", add_bos=False)[0] != 0


def test_special_tokens_are_hidden_and_shown(tokenizer):
    ids = [0, *tokenizer.encode("hi", add_bos=False), tokenizer.token_id(THINK), 1]
    assert tokenizer.decode(ids) == "hi" + THINK
    assert tokenizer.decode(ids, skip_special=False) == BOS + "hi" + THINK + EOS


def test_ids_the_tokenizer_does_not_know_stand_for_nothing(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size + 7]) == ""


def test_specials_are_resolved_from_every_file(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 300]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": BOS}, "eos_token": THINK}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id == 0
    assert tokenizer.eos_ids == {1, 300, tokenizer.token_id(THINK)}


def test_a_special_id_outside_the_vocabulary_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 5000}))
    with pytest.raises(CheckpointError, match="5000"):
        load_tokenizer(folder)


def test_a_tokenizer_that_is_not_byte_level_is_refused(folder):
    train(byte_level=False).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="ByteLevel"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", [None, '{"version": '], ids=["absent", "cut"])
def test_an_unreadable_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(folder)
