"""Entry point: ``python -m training.train --corpus LIB --out DIR`` trains, exports and evaluates nextn-tiny.

Hides the order of stages and that every stage leaves a usable checkpoint behind, whatever follows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sysconfig
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from training import attention
from training.config import Recipe, smoke_recipe
from training.corpus import Corpus, WindowSampler, collect, encode_files, train_tokenizer
from training.evaluate import MEASUREMENTS, evaluate
from training.export import export, load, snap_to_checkpoint
from training.model import TinyModel
from training.stages import Trainer

STAGES = ("dense", "dense_long", "warm_up", "sparse", "draft")


class RunLog:
    """Appends JSON lines to a file and echoes them."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        self._started = time.perf_counter()

    def __call__(self, record: dict[str, Any]) -> None:
        line = json.dumps({**record, "seconds": round(time.perf_counter() - self._started, 1)})
        self._file.write(line + "\n")
        print(line, flush=True)


def calibration_recipe(recipe: Recipe) -> Recipe:
    """``recipe`` at full sizes and few steps, to measure times."""
    plans = {name: dataclasses.replace(getattr(recipe, name), steps=12) for name in STAGES}
    plans["dense"] = dataclasses.replace(recipe.dense, steps=60)
    return dataclasses.replace(recipe, **plans)


def describe_environment(corpus: Corpus) -> dict[str, Any]:
    """Versions, GPU and corpus identity, for the record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "corpus_sha256": corpus.sha256,
        "corpus_bytes": corpus.num_bytes,
        "train_files": len(corpus.train),
        "held_out_files": len(corpus.held_out),
    }


def run_stages(trainer: Trainer, tokenizer: Tokenizer, folder: Path, log: RunLog) -> None:
    """All stages; the checkpoint in ``folder`` is rewritten after each one that leaves it complete."""
    recipe, model = trainer.recipe, trainer.model
    trainer.run_dense(recipe.dense, final=0.25, name="dense")
    export(model, tokenizer, folder)
    trainer.run_dense(recipe.dense_long, final=0.4, name="dense_long")
    trainer.run_warm_up(recipe.warm_up)
    export(model, tokenizer, folder)
    trainer.run_sparse(recipe.sparse)
    snap_to_checkpoint(model, model)
    model.set_quantised(False)
    export(model, tokenizer, folder)
    generated = trainer.generate_text()
    log({"stage": "generated", "rows": len(generated), "tokens": generated.numel()})
    for module in model.nextn.modules():
        if isinstance(module, attention.QuantisableLinear):
            module.quantised = True
    trainer.run_draft(recipe.draft, generated)
    num_bytes = export(model, tokenizer, folder)
    log({"stage": "exported", "bytes": num_bytes})


def run(recipe: Recipe, corpus_path: Path, out: Path, device: torch.device) -> None:
    """Train, export and evaluate; writes ``checkpoint/``, ``log.jsonl`` and ``results.json`` under ``out``."""
    folder = out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(out / "log.jsonl")
    torch.manual_seed(recipe.seed)
    corpus = collect(corpus_path)
    environment = describe_environment(corpus)
    tokenizer = train_tokenizer(corpus, recipe.shape.vocab_size)
    documents, held_out = encode_files(tokenizer, corpus.train), encode_files(tokenizer, corpus.held_out)
    environment["train_tokens"] = sum(document.numel() for document in documents)
    log({"stage": "corpus", **environment})
    model = TinyModel(recipe.shape, recipe.dropout).to(device)
    sampler, held_out_sampler = (WindowSampler(part, recipe.seed, device) for part in (documents, held_out))
    trainer = Trainer(model, sampler, held_out_sampler, recipe, log)
    try:
        run_stages(trainer, tokenizer, folder, log)
    except Exception:  # A late failure must not cost the checkpoint of the stages before it.
        traceback.print_exc()
        log({"stage": "failed", "error": traceback.format_exc(limit=1)})
    if device.type == "cuda":
        log({"stage": "memory", "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)})
    del trainer, model
    attention.fuse_indexer(False)
    exported = load(folder, recipe.shape, device)
    results = {"environment": environment, **evaluate(exported, tokenizer, held_out, recipe, tuple(MEASUREMENTS))}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    log(
        {
            "stage": "evaluated",
            **{key: json.dumps(results[key]) for key in ("selection", "acceptance", "acceptance_sampled")},
        }
    )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--calibrate", action="store_true", help="full sizes, few steps")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = smoke_recipe() if options.smoke else Recipe()
    recipe = calibration_recipe(recipe) if options.calibrate else recipe
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        attention.fuse_indexer(True)
    run(recipe, options.corpus, options.out, device)


if __name__ == "__main__":
    main()
