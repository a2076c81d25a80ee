"""Tokenizer: text to ids and back, without losing a byte.

Hides the byte-level alphabet in which tokenizer.json spells its tokens. Ids are decoded to bytes and bytes to text, so
that a character may be split over tokens.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _FastTokenizer

from nextn.errors import CheckpointError


class Tokenizer:
    """A byte-level BPE tokenizer with its special tokens.

    Args:
        tokenizer: the parsed tokenizer.json.
        bos_id: id put before every text, or None.
        eos_ids: ids that end a text.

    Raises:
        CheckpointError: the tokenizer is not byte-level, or a special id is not in its vocabulary.

    Attributes:
        bos_id: id put before every text, or None.
        eos_ids: ids that end a text.
        vocab_size: ids the tokenizer knows; a model's may be larger.
    """

    def __init__(self, tokenizer: _FastTokenizer, *, bos_id: int | None, eos_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, token in added.items() if token.special)
        self._bytes_of = _spell_out(tokenizer, {number: token.content for number, token in added.items()})
        strangers = {token for token in (bos_id, *self.eos_ids) if token is not None and token not in self._bytes_of}
        if strangers:
            raise CheckpointError(f"special ids {sorted(strangers)} are not in tokenizer.json's vocabulary")

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """The ids of ``text``; special tokens written out in it become their ids.

        Args:
            text: what to encode.
            add_bos: put ``bos_id`` first, if there is one and the text does not start with it.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The bytes that ``ids`` stand for; ids beyond the vocabulary stand for none."""
        hidden = self._special_ids if skip_special else frozenset()
        return b"".join(self._bytes_of.get(number, b"") for number in ids if number not in hidden)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def token_id(self, text: str) -> int | None:
        """The id of the one token spelled ``text``, special tokens included, or None."""
        return self._tokenizer.token_to_id(text)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read ``tokenizer.json`` of a Hugging Face folder, and which of its tokens begin and end a text.

    Those are named by ``generation_config.json`` and ``config.json`` (ids), and ``tokenizer_config.json`` (spellings).

    Raises:
        CheckpointError: there is no tokenizer.json, it cannot be read, or it is not byte-level.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"there is no {path}; a checkpoint needs one for text")
    try:
        tokenizer = _FastTokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read: {error}; fetch it again") from None
    settings = [_read_json(folder / name) for name in ("generation_config.json", "config.json")]
    spelled = _read_json(folder / "tokenizer_config.json")
    bos_ids = [token for values in settings for token in _as_list(values.get("bos_token_id"))]
    eos_ids = {token for values in settings for token in _as_list(values.get("eos_token_id"))}
    spelled_bos = _find_token(tokenizer, spelled.get("bos_token"))
    spelled_eos = _find_token(tokenizer, spelled.get("eos_token"))
    return Tokenizer(
        tokenizer,
        bos_id=next((token for token in [spelled_bos, *bos_ids] if token is not None), None),
        eos_ids=eos_ids | ({spelled_eos} if spelled_eos is not None else set()),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; fetch it again") from None
    return values if isinstance(values, dict) else {}


def _as_list(found: Any) -> list[int]:
    if found is None:
        return []
    return list(found) if isinstance(found, list) else [found]


def _find_token(tokenizer: _FastTokenizer, token: Any) -> int | None:
    """The id of a token given as its spelling, or as an object that holds it under ``content``."""
    spelling = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(spelling) if isinstance(spelling, str) else None


def _spell_out(tokenizer: _FastTokenizer, added: dict[int, str]) -> dict[int, bytes]:
    """Id to bytes. Added tokens are spelled as they are, all others in the byte-level alphabet."""
    if "ByteLevel" not in json.dumps(json.loads(tokenizer.to_str()).get("decoder")):
        raise CheckpointError("tokenizer.json has no ByteLevel decoder; only byte-level tokenizers are supported")
    alphabet = _byte_alphabet()
    spelled = {}
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number in added:
            spelled[number] = added[number].encode("utf-8")
        elif set(token) <= alphabet.keys():
            spelled[number] = bytes(alphabet[character] for character in token)
        else:
            raise CheckpointError(
                f"token {number} of tokenizer.json, {token!r}, is not spelled in byte-level characters"
            )
    return spelled


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte, its own where it is printable in Latin-1."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}
