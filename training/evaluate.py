"""Measures an exported checkpoint on files it never saw: sparse against dense loss, acceptance length, samples.

Hides how chained speculation is simulated exactly from one plain greedy continuation.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training.attention import AttentionMode
from training.config import Recipe
from training.corpus import BOS_ID, collect, encode_files
from training.decoding import DECODE, generate
from training.export import load
from training.model import TinyModel

DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8)
EVALUATION_BATCH = 4
# Prompts end in a visible character: a new line and the indentation after it are one token of this vocabulary.
SAMPLE_PROMPTS = (
    "def fibonacci(n):",
    'class Stack:\n    """A last-in, first-out collection."""\n\n    def __init__(self):',
    "import os\nimport sys\n\n\ndef main():",
    "import unittest\n\n\nclass TestStack(unittest.TestCase):",
)


@torch.no_grad()
def position_losses(model: TinyModel, documents: list[Tensor], mode: AttentionMode) -> Tensor:
    """Next-token loss of each position [documents, window]; NaN where a document has ended."""
    window = model.shape.max_positions
    device = model.embed.weight.device
    losses = torch.full((len(documents), window), float("nan"))
    for start in range(0, len(documents), EVALUATION_BATCH):
        group = documents[start : start + EVALUATION_BATCH]
        cut = [document[: window + 1] for document in group]
        padded = torch.stack([F.pad(document, (0, window + 1 - len(document))) for document in cut]).to(device)
        logits = model.head(model(padded[:, :-1], mode).hidden).float()
        loss = F.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none").view(len(group), -1)
        for row, document in enumerate(group):
            count = min(window, len(document) - 1)
            losses[start + row, :count] = loss[row, :count].cpu()
    return losses


def compare_selection(model: TinyModel, documents: list[Tensor], max_files: int) -> dict[str, Any]:
    """Mean loss beyond ``index_topk``, dense and sparse, over held-out files long enough to be sparse for long."""
    topk = model.shape.index_topk
    chosen = [document for document in documents if len(document) > 2 * topk][:max_files]
    modes = {
        "dense": AttentionMode(quantise_caches=True),
        "sparse": AttentionMode(sparse=True, quantise_caches=True),
        "dense_unquantised_caches": AttentionMode(),
    }
    table = {name: position_losses(model, chosen, mode) for name, mode in modes.items()}
    result: dict[str, Any] = {"files": len(chosen), "index_topk": topk}
    for name, losses in table.items():
        beyond = losses[:, topk:]
        result[f"{name}_loss"] = round(float(beyond.nanmean()), 5)
        far = losses[:, model.shape.max_positions // 2 :]
        result[f"{name}_loss_second_half"] = round(float(far.nanmean()), 5)
    result["positions"] = int((~table["dense"][:, topk:].isnan()).sum())
    result["sparse_over_dense"] = round(result["sparse_loss"] / result["dense_loss"], 5)
    return result


@torch.no_grad()
def matched_drafts(model: TinyModel, tokens: Tensor, depths: int) -> tuple[Tensor, Tensor]:
    """How many chained drafts from each slot agree with the continuation.

    ``tokens`` [B, T] end in the target's own greedy text, where agreement with the text is
    acceptance. Returns the leading matches [B, T] (capped at ``depths``), and where the parallel forward's own
    argmax is the text's next token [B, T - 1], a check of cached decoding.
    """
    hidden = model(tokens, DECODE).hidden
    shifted = F.pad(tokens[:, 1:], (0, 1))
    drafts: list[Tensor] = []

    def consume(depth: int, previous: Tensor | None) -> Tensor:
        if previous is None or depth == 1:
            return shifted
        drafts.append(model.head(previous).argmax(dim=-1))
        return drafts[-1]

    outputs, _ = model.draft_chain(hidden, consume, depths, AttentionMode(sparse=True, quantise_caches=True))
    drafts.append(model.head(outputs[-1]).argmax(dim=-1))
    hits = [
        draft == F.pad(tokens[:, depth + 1 :], (0, depth + 1), value=-1) for depth, draft in enumerate(drafts, start=1)
    ]
    agreement = model.head(hidden).argmax(dim=-1)[:, :-1] == tokens[:, 1:]
    return torch.stack(hits, dim=-1).long().cumprod(dim=-1).sum(dim=-1), agreement


def simulate_rounds(matches: Tensor, first_slot: int, next_n: int) -> tuple[int, int]:
    """Replay speculation over one row of ``matches`` [T]: (tokens committed, verify steps).

    A round that starts with slot s final and x_{s+1} known drafts next_n - 1 tokens, and commits the matching ones
    and one more. Rounds too near the end of the text to be judged are left out.
    """
    slot, rounds, last = first_slot, 0, matches.shape[0] - 1 - next_n
    while slot <= last:
        slot += min(int(matches[slot]), next_n - 1) + 1
        rounds += 1
    return slot - first_slot, rounds


def measure_acceptance(model: TinyModel, documents: list[Tensor], recipe: Recipe, temperature: float) -> dict[str, Any]:
    """Acceptance length for next_n 1 to 8 on continuations of held-out prefixes.

    Drafting is greedy, so at a temperature above 0 a draft d is accepted with the target's probability p(d): as often
    as it equals the token the target samples, which is what is counted.
    """
    num_prompt, depths = recipe.evaluation_prompt_tokens, DEPTHS[-1] - 1
    prompts = [document[:num_prompt] for document in documents if len(document) >= num_prompt]
    # Short of files, later parts of the long ones serve too, with BOS in front as at any start of a context.
    for document in documents:
        starts = range(num_prompt, len(document) - num_prompt, 4 * num_prompt)
        prompts.extend(F.pad(document[start : start + num_prompt - 1], (1, 0), value=BOS_ID) for start in starts)
    batch = torch.stack(prompts[: recipe.evaluation_prompts]).to(model.embed.weight.device)
    temperatures = torch.full((len(batch),), temperature, device=batch.device)
    texts = generate(model, batch, recipe.evaluation_new_tokens, temperatures, recipe.seed)
    groups = texts.split(EVALUATION_BATCH)
    pairs = [matched_drafts(model, group, depths) for group in groups]
    matches = torch.cat([pair[0] for pair in pairs]).cpu()
    result: dict[str, Any] = {"temperature": temperature, "prompts": len(batch), "prompt_tokens": num_prompt}
    result["new_tokens"] = recipe.evaluation_new_tokens
    result["acceptance_length"] = {}
    for next_n in DEPTHS:
        counts = [simulate_rounds(row, num_prompt - 1, next_n) for row in matches]
        steps = sum(rounds for _, rounds in counts)
        result["acceptance_length"][str(next_n)] = round(sum(tokens for tokens, _ in counts) / steps, 4)
    usable = matches[:, num_prompt - 1 : -1 - DEPTHS[-1]]
    result["accepted_by_depth"] = [round(float((usable >= depth).float().mean()), 4) for depth in range(1, depths + 1)]
    if temperature == 0:
        agreement = torch.cat([pair[1] for pair in pairs])[:, num_prompt - 1 :]
        result["parallel_forward_agreement"] = round(float(agreement.float().mean()), 5)
    result["distinct_4grams"] = round(_distinct_ngrams(texts[:, num_prompt:].cpu()), 4)
    return result


def _distinct_ngrams(texts: Tensor, size: int = 4) -> float:
    """Share of different n-grams in each row, averaged: 1 is no repetition, near 0 is a loop."""
    windows = texts.unfold(1, size, 1)
    return sum(len(set(map(tuple, row.tolist()))) / len(row) for row in windows) / len(windows)


def write_samples(model: TinyModel, tokenizer: Tokenizer, seed: int) -> list[dict[str, str]]:
    """Greedy and sampled continuations of three short prompts."""
    device = model.embed.weight.device
    samples = []
    for prompt in SAMPLE_PROMPTS:
        ids = torch.tensor([[BOS_ID, *tokenizer.encode(prompt, add_special_tokens=False).ids]] * 2, device=device)
        texts = generate(model, ids, 200, torch.tensor([0.0, 0.7], device=device), seed)
        decoded = [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in texts]
        samples.append({"prompt": prompt, "greedy": decoded[0], "temperature_0.7": decoded[1]})
    return samples


MEASUREMENTS = {
    "selection": lambda model, tokenizer, held_out, recipe: compare_selection(model, held_out, recipe.evaluation_files),
    "acceptance": lambda model, tokenizer, held_out, recipe: measure_acceptance(model, held_out, recipe, 0.0),
    "acceptance_sampled": lambda model, tokenizer, held_out, recipe: measure_acceptance(model, held_out, recipe, 0.8),
    "samples": lambda model, tokenizer, held_out, recipe: write_samples(model, tokenizer, recipe.seed),
}


def evaluate(
    model: TinyModel, tokenizer: Tokenizer, held_out: list[Tensor], recipe: Recipe, names: Sequence[str]
) -> dict[str, Any]:
    """The named ``MEASUREMENTS``, in float32 with the weights and caches as exported."""
    return {name: MEASUREMENTS[name](model, tokenizer, held_out, recipe) for name in names}


def main() -> None:
    """Measure an exported folder: ``python -m training.evaluate FOLDER --out results.json``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=sorted(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--prompts", type=int, default=Recipe().evaluation_prompts)
    parser.add_argument("--new-tokens", type=int, default=Recipe().evaluation_new_tokens)
    options = parser.parse_args()
    recipe = replace(Recipe(), evaluation_prompts=options.prompts, evaluation_new_tokens=options.new_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    held_out = encode_files(tokenizer, collect(options.corpus).held_out)
    results = evaluate(load(options.folder, recipe.shape, device), tokenizer, held_out, recipe, options.only)
    results["environment"] = {"torch": torch.__version__, "device": str(device)}
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
