"""The training stages in order: dense, indexer warm-up, sparse, self-generated text, chained drafting.

Hides which parameters learn when, on which loss, and what each step logs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from training.attention import AttentionMode
from training.config import Recipe, StagePlan
from training.corpus import WindowSampler
from training.decoding import DECODE, generate
from training.model import TinyModel
from training.optimizer import Optimizers

Log: TypeAlias = "Callable[[dict[str, float | int | str]], None]"
LOG_EVERY = 10
VALIDATE_EVERY = 100
VALIDATION_WINDOWS = 24


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 matrix products on a GPU, plain float32 elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def learning_rate_scale(step: int, steps: int, *, warm_up: int, final: float) -> float:
    """Linear warm-up, then linear decay to ``final`` at the last step."""
    ramp = min(1.0, (step + 1) / max(1, min(warm_up, steps // 4)))
    return ramp * (1 - (1 - final) * step / max(1, steps - 1))


class StageClock:
    """Logs one line every few steps, with the mean losses since the last one and the step time."""

    def __init__(self, name: str, log: Log, steps: int) -> None:
        self._name, self._log, self._steps = name, log, steps
        self._sums: dict[str, Tensor] = {}
        self._count, self._started = 0, time.perf_counter()

    def record(self, step: int, losses: dict[str, Tensor]) -> None:
        """Add one step's losses; synchronises only when it logs."""
        for key, value in losses.items():
            self._sums[key] = self._sums.get(key, torch.zeros_like(value)) + value.detach()
        self._count += 1
        if self._count < LOG_EVERY and step + 1 < self._steps:
            return
        means = {key: round(float(value) / self._count, 5) for key, value in self._sums.items()}
        elapsed = time.perf_counter() - self._started
        self._log({"stage": self._name, "step": step + 1, "ms": round(1000 * elapsed / self._count, 1), **means})
        self._sums, self._count, self._started = {}, 0, time.perf_counter()


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Trainer:
    """Holds the model and data of one run and executes its stages."""

    def __init__(
        self, model: TinyModel, sampler: WindowSampler, held_out: WindowSampler, recipe: Recipe, log: Log
    ) -> None:
        self.model, self.sampler, self.recipe, self._log = model, sampler, recipe, log
        self._validation = held_out.draw(VALIDATION_WINDOWS, recipe.sparse.window + 1)
        self.device = model.embed.weight.device
        self._generator = torch.Generator().manual_seed(recipe.seed + 1)

    def run_dense(self, plan: StagePlan, *, final: float, name: str) -> None:
        """Next-token loss with dense attention, and the NextN layer's first depth beside it; the indexer rests."""
        model, mode = self.model, AttentionMode()
        model.train()
        named = [(key, value) for key, value in model.named_parameters() if ".indexer." not in key]
        optimizers = Optimizers(named, plan.learning_rate, self.recipe.weight_decay)
        clock = StageClock(name, self._log, plan.steps)
        for step in range(plan.steps):
            with autocast(self.device):
                lm_loss, draft_loss, _ = self._language_losses(plan, mode)
            (lm_loss + self.recipe.draft_loss_weight * draft_loss).backward()
            optimizers.step(learning_rate_scale(step, plan.steps, warm_up=100, final=final))
            model.balance_experts()
            clock.record(step, {"lm": lm_loss, "draft": draft_loss})
            self._validate(name, step, plan, mode)

    def run_warm_up(self, plan: StagePlan) -> None:
        """Only the indexers learn: KL to the dense attention they will replace."""
        model = self.model
        model.eval()
        optimizers = Optimizers(self._indexer_parameters(), plan.learning_rate, 0.0)
        clock = StageClock("warm_up", self._log, plan.steps)
        with self._only_indexers_learn():
            for step in range(plan.steps):
                mode = AttentionMode(quantise_caches=True, kl_rows=self._draw_rows(plan.window))
                with autocast(self.device):
                    tokens = self.sampler.draw(plan.batch, plan.window + 1)
                    result = model(tokens[:, :-1], mode)
                    drafted = model.draft_once(tokens[:, 1:], result.hidden, mode)
                    loss = result.indexer_loss + drafted.indexer_loss
                loss.backward()
                optimizers.step(learning_rate_scale(step, plan.steps, warm_up=20, final=0.1))
                clock.record(step, {"kl": loss / (len(model.layers) + 1)})

    def run_sparse(self, plan: StagePlan) -> None:
        """Everything learns under top-k selection, FP8 caches and FP8 weights; the indexer on its own loss."""
        model = self.model
        model.train()
        model.set_quantised(True)
        named = [(key, value) for key, value in model.named_parameters() if ".indexer." not in key]
        optimizers = Optimizers(named, plan.learning_rate, self.recipe.weight_decay)
        indexers = Optimizers(self._indexer_parameters(), self.recipe.warm_up.learning_rate / 2, 0.0)
        clock = StageClock("sparse", self._log, plan.steps)
        for step in range(plan.steps):
            mode = AttentionMode(sparse=True, quantise_caches=True, kl_rows=self._draw_rows(plan.window))
            with autocast(self.device):
                lm_loss, draft_loss, kl = self._language_losses(plan, mode)
            (lm_loss + self.recipe.draft_loss_weight * draft_loss + kl).backward()
            scale = learning_rate_scale(step, plan.steps, warm_up=20, final=0.05)
            optimizers.step(scale)
            indexers.step(scale)
            model.balance_experts()
            clock.record(step, {"lm": lm_loss, "draft": draft_loss, "kl": kl / (len(model.layers) + 1)})
            self._validate("sparse", step, plan, DECODE)

    @torch.no_grad()
    def generate_text(self) -> Tensor:
        """Continuations of training prefixes by the target itself: half greedy, half sampled. [B, T] token ids."""
        recipe = self.recipe
        prompts = self.sampler.draw(recipe.generated_prompts, recipe.draft.window - recipe.generated_tokens)
        temperatures = torch.zeros(len(prompts), device=self.device)
        temperatures[len(prompts) // 2 :] = 0.8
        with autocast(self.device):
            return generate(self.model, prompts, recipe.generated_tokens, temperatures, recipe.seed)

    def run_draft(self, plan: StagePlan, generated: Tensor) -> None:
        """Only the NextN layer learns: chained depths, distilled from the frozen target's distribution."""
        model, depths = self.model, self.recipe.draft_depths
        model.eval()
        model.requires_grad_(False)
        model.nextn.requires_grad_(True)
        named = [(f"nextn.{key}", value) for key, value in model.nextn.named_parameters()]
        main = [(key, value) for key, value in named if ".indexer." not in key]
        optimizers = Optimizers(main, plan.learning_rate, 0.0)
        indexers = Optimizers([item for item in named if ".indexer." in item[0]], plan.learning_rate, 0.0)
        clock = StageClock("draft", self._log, plan.steps)
        for step in range(plan.steps):
            with autocast(self.device):
                tokens = self._mixed_windows(plan, generated)
                losses, kl = self._draft_losses(tokens, depths)
                loss = torch.stack([0.9**depth * value for depth, value in enumerate(losses)]).sum()
            (loss + kl).backward()
            scale = learning_rate_scale(step, plan.steps, warm_up=20, final=0.02)
            optimizers.step(scale)
            indexers.step(scale)
            clock.record(step, {f"depth{depth + 1}": value for depth, value in enumerate(losses)} | {"kl": kl})

    def _language_losses(self, plan: StagePlan, mode: AttentionMode) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.sampler.draw(plan.batch, plan.window + 2)
        result = self.model(tokens[:, :-2], mode)
        lm_loss = token_loss(self.model.head(result.hidden), tokens[:, 1:-1])
        drafted = self.model.draft_once(tokens[:, 1:-1], result.hidden, mode)
        draft_loss = token_loss(self.model.head(drafted.hidden), tokens[:, 2:])
        return lm_loss, draft_loss, result.indexer_loss + drafted.indexer_loss

    def _draft_losses(self, tokens: Tensor, depths: int) -> tuple[list[Tensor], Tensor]:
        """Cross-entropy of every depth against the target's distribution at the position it predicts."""
        num_slots = tokens.shape[1] - depths - 1
        with torch.no_grad():
            hidden = self.model(tokens, DECODE).hidden
            wanted = self.model.head(hidden).softmax(dim=-1)
        rows = self._draw_rows(num_slots)
        mode = AttentionMode(sparse=True, quantise_caches=True, kl_rows=rows)
        outputs, kl = self.model.draft_chain(
            hidden[:, :num_slots], lambda depth, _: tokens[:, depth : depth + num_slots], depths, mode
        )
        losses = []
        for depth, z in enumerate(outputs, start=1):
            target = wanted[:, depth : depth + num_slots]
            losses.append(F.cross_entropy(self.model.head(z).float().flatten(0, 1), target.float().flatten(0, 1)))
        return losses, kl

    def _mixed_windows(self, plan: StagePlan, generated: Tensor) -> Tensor:
        """One quarter corpus, three quarters the target's own text, where drafts are really verified."""
        num_corpus = max(1, plan.batch // 4)
        chosen = torch.randint(0, len(generated), (plan.batch - num_corpus,), generator=self._generator)
        own = generated[chosen.to(generated.device)]
        return torch.cat([self.sampler.draw(num_corpus, own.shape[1]), own])

    @torch.no_grad()
    def _validate(self, name: str, step: int, plan: StagePlan, mode: AttentionMode) -> None:
        """Log the loss on fixed held-out windows, at positions beyond top-k where the window reaches them."""
        if (step + 1) % VALIDATE_EVERY and step + 1 < plan.steps:
            return
        was_training = self.model.training
        self.model.eval()
        skipped, losses = min(self.model.shape.index_topk, plan.window // 2), []
        with autocast(self.device):
            for tokens in self._validation[:, : plan.window + 1].split(4):
                hidden = self.model(tokens[:, :-1], mode).hidden[:, skipped:]
                losses.append(token_loss(self.model.head(hidden), tokens[:, skipped + 1 :]))
        self._log({"stage": name, "step": step + 1, "held_out": round(float(torch.stack(losses).mean()), 5)})
        self.model.train(was_training)

    def _draw_rows(self, window: int) -> Tensor:
        count = min(window, self.recipe.kl_rows)
        return torch.randperm(window, generator=self._generator)[:count].sort().values.to(self.device)

    def _indexer_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(key, value) for key, value in self.model.named_parameters() if ".indexer." in key]

    @contextlib.contextmanager
    def _only_indexers_learn(self) -> Iterator[None]:
        self.model.requires_grad_(False)
        for _, parameter in self._indexer_parameters():
            parameter.requires_grad_(True)
        yield
        self.model.requires_grad_(True)
