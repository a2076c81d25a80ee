"""Text for training: the Python standard library's own source, split by file, tokenised and cut in windows.

Hides where the files come from (a directory or a tar archive), the byte-level BPE and the order of the windows.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL_TOKENS = (BOS, EOS, "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
BOS_ID, EOS_ID = 0, 1
HELD_OUT_PERCENT = 4
MAX_FILE_BYTES = 320_000
# Tables of data in Python syntax: they teach digits, not code.
SKIPPED = (
    "site-packages/",
    "__pycache__/",
    "encodings/",
    "pydoc_data/",
    "lib2to3/tests/data/",
    "test/encoded_modules/",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Source files by relative path, already divided; both lists are in a fixed pseudo-random order."""

    train: list[tuple[str, str]]
    held_out: list[tuple[str, str]]
    sha256: str

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all files."""
        return sum(len(text.encode()) for _, text in self.train + self.held_out)


def _read_files(source: Path) -> dict[str, bytes]:
    if source.is_dir():
        paths = sorted(source.rglob("*.py"))
        return {path.relative_to(source).as_posix(): path.read_bytes() for path in paths if path.is_file()}
    files: dict[str, bytes] = {}
    with tarfile.open(source) as archive:
        for member in archive:
            handle = archive.extractfile(member) if member.isfile() and member.name.endswith(".py") else None
            if handle is not None:
                files[member.name.removeprefix("./")] = handle.read()
    return files


def _path_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def collect(source: Path) -> Corpus:
    """Read ``source`` (a standard library directory or a tar of one) and split it by the hash of each path."""
    kept: list[tuple[str, str]] = []
    seen: set[bytes] = set()
    for name, data in sorted(_read_files(source).items()):
        digest = hashlib.sha256(data).digest()
        if any(part in name for part in SKIPPED) or not 64 <= len(data) <= MAX_FILE_BYTES or digest in seen:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        kept.append((name, text.replace("\r\n", "\n")))
    checksum = hashlib.sha256()
    for name, text in kept:
        checksum.update(name.encode() + b"\0" + text.encode() + b"\0")
    kept.sort(key=lambda item: _path_hash(item[0]))
    held_out = [item for item in kept if _path_hash(item[0]) % 100 < HELD_OUT_PERCENT]
    held_out.sort(key=lambda item: _path_hash("held-out " + item[0]))
    train = [item for item in kept if _path_hash(item[0]) % 100 >= HELD_OUT_PERCENT]
    return Corpus(train=train, held_out=held_out, sha256=checksum.hexdigest())


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of ``vocab_size`` entries on the training files; lossless on any UTF-8 text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in corpus.train), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_positions: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": SPECIAL_TOKENS[2],
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def encode_files(tokenizer: Tokenizer, files: list[tuple[str, str]]) -> list[Tensor]:
    """Token ids of each file as BOS + text + EOS, int64 on the CPU."""
    encoded = tokenizer.encode_batch([text for _, text in files], add_special_tokens=False)
    return [torch.tensor([BOS_ID, *item.ids, EOS_ID]) for item in encoded]


class WindowSampler:
    """Cuts windows at seeded random offsets out of one long stream of documents."""

    def __init__(self, documents: list[Tensor], seed: int, device: torch.device) -> None:
        self.stream = torch.cat(documents).to(device)
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int, length: int) -> Tensor:
        """Token ids [batch, length], int64 on the sampler's device."""
        starts = torch.randint(0, self.stream.numel() - length, (batch, 1), generator=self._generator)
        return self.stream[starts.to(self.stream.device) + torch.arange(length, device=self.stream.device)]
