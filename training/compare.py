"""Runs one held-out file through this training form and through the engine's model, and prints how far they differ.

Hides the engine's paged caches; the two implementations share no code, so agreement is evidence for both.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nextn.backend import DSABackend
from nextn.batch import ForwardBatch, ForwardMode
from nextn.model import build_rope_table, load_config, load_model
from training.attention import AttentionMode
from training.config import Recipe
from training.corpus import BOS_ID
from training.export import load

CHUNK = 128
PAGE_SIZE = 64


@torch.no_grad()
def training_logits(folder: Path, tokens: Tensor, mode: AttentionMode) -> tuple[Tensor, Tensor]:
    """Target and first-draft logits [T, vocabulary] of ``tokens`` [T]."""
    model = load(folder, Recipe().shape, torch.device("cpu"))
    hidden = model(tokens[None], mode).hidden
    drafted = model.draft_once(tokens.roll(-1)[None], hidden, mode).hidden
    return model.head(hidden)[0], model.head(drafted)[0]


@torch.no_grad()
def engine_logits(folder: Path, tokens: Tensor, cache_format: str) -> tuple[Tensor, Tensor]:
    """The same from ``nextn.model``, prefilled in chunks through paged caches."""
    config, model = load_config(folder), load_model(folder)
    assert model.mtp is not None
    backend = DSABackend(config.attention_spec(cache_format=cache_format), build_rope_table(config))
    num_pages = -(-len(tokens) // PAGE_SIZE) + 1
    caches = backend.allocate_caches(num_pages, model.indexer_layers)
    page_table = torch.arange(1, num_pages, dtype=torch.int32)[None]
    target, drafted, next_tokens = [], [], tokens.roll(-1)
    for start in range(0, len(tokens), CHUNK):
        end = min(start + CHUNK, len(tokens))
        batch = ForwardBatch.build(
            ForwardMode.EXTEND, row_counts=[end - start], context_lens=[end], page_table=page_table
        )
        metadata = backend.init_forward_metadata(batch)
        hidden = model(tokens[start:end], metadata, caches[:-1], backend)
        target.append(model.compute_logits(hidden))
        output = model.mtp(next_tokens[start:end], hidden, metadata, caches[-1], backend)
        drafted.append(model.mtp.compute_logits(output.hidden))
    return torch.cat(target), torch.cat(drafted)


def main() -> None:
    """Compare on a file: ``python -m training.compare FOLDER``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--file", type=Path, default=Path(sysconfig.get_paths()["stdlib"]) / "turtle.py")
    parser.add_argument("--tokens", type=int, default=640)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    ids = tokenizer.encode(options.file.read_text(), add_special_tokens=False).ids
    tokens = torch.tensor([BOS_ID, *ids])[: options.tokens]
    for cache_format in ("fp32", "fp8"):
        mode = AttentionMode(sparse=True, quantise_caches=cache_format == "fp8")
        ours, theirs = (
            training_logits(options.folder, tokens, mode),
            engine_logits(options.folder, tokens, cache_format),
        )
        for name, left, right in zip(("target", "draft"), ours, theirs):
            error, same = (left - right).abs(), (left.argmax(-1) == right.argmax(-1)).float().mean()
            print(f"{cache_format} {name}: max {error.max():.2e}, mean {error.mean():.2e}, same argmax {same:.4f}")


if __name__ == "__main__":
    main()
