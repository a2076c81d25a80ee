"""Parity with transformers' DeepseekV32 and GlmMoeDsa models, which run without pages, absorption or quantisation.

How transformers differs, and what is done about it here:

- Its indexer neither rotates by Hadamard nor quantises. With the fp32 cache format ours does not quantise either, and
  the Hadamard rotation, being orthonormal, changes no score beyond rounding.
- Its q_a and kv_a norms have eps 1e-6 whatever ``rms_norm_eps`` is, so the configurations have 1e-6.
- It rotates GLM's indexer in interleaved pairs whatever the config says, as ours does unless the config says otherwise.
- ``torch.topk`` breaks ties as it likes, and two float32 scorers order near ties differently. A selection may differ
  from ours only in tokens whose scores lie within ``NEAR_TIE`` of the last chosen one. The test always goes on with
  transformers' selection, so that the logits compared follow from the same sets.
"""

from __future__ import annotations

import pytest
import torch
from model_harness import YARN, Session, random_prompts, random_tensor, small_config

from nextn import ops
from nextn.model import load_model
from nextn.model.config import DEEPSEEK, GLM

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

# Both sides compute in float32 in other orders (absorbed against expanded keys). An error of 2^-24 per operation grows
# with the square root of the summed width (at most 512) and of the number of sums (4 layers of 2) to about
# 2^-24 * 23 * 3 = 4e-6 of a logit's size, which reaches 4. 6e-6 was measured; the rest is for other machines.
LOGIT_TOLERANCE = 5e-5
NEAR_TIE = 1e-5  # of the row's largest score

CASES = {
    "deepseek": small_config(DEEPSEEK, num_nextn_predict_layers=0),
    "deepseek many groups": small_config(
        DEEPSEEK,
        num_nextn_predict_layers=0,
        num_hidden_layers=4,
        n_routed_experts=12,
        n_group=3,
        topk_group=1,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        routed_scaling_factor=1.5,
        index_topk=64,
        v_head_dim=24,
        rope_scaling=YARN | {"factor": 3.0, "mscale_all_dim": 0.7, "mscale": 0.7},
    ),
    "deepseek without yarn": small_config(
        DEEPSEEK, num_nextn_predict_layers=0, rope_scaling=None, num_attention_heads=5, n_shared_experts=2, n_group=1,
        topk_group=1, index_topk=33,
    ),
    "glm": small_config(GLM, num_nextn_predict_layers=0, n_group=1, topk_group=1, index_topk=32),
    "glm shared indexers": small_config(
        GLM,
        num_nextn_predict_layers=0,
        num_hidden_layers=4,
        indexer_types=["full", "shared", "shared", "full"],
        rope_theta=1000000.0,
        qk_nope_head_dim=48,
        v_head_dim=64,
    ),
}  # fmt: skip
LENGTHS = [230, 201, 90]


class Oracle:
    """transformers' model with the checkpoint it was saved to, and what it computes for each prompt."""

    def __init__(self, config: dict, folder) -> None:
        family = "DeepseekV32" if config["architectures"] == [DEEPSEEK] else "GlmMoeDsa"
        chosen = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
        self.config = getattr(transformers, f"{family}Config")(**chosen)
        self.model = getattr(transformers, f"{family}ForCausalLM")(self.config).eval()
        generator = torch.Generator().manual_seed(11)
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(random_tensor(name, tensor.shape, generator))
        self.model.save_pretrained(folder)
        self.ours = load_model(folder)
        self.prompts = random_prompts(LENGTHS, config["vocab_size"])
        self.selected: list[list[torch.Tensor]] = []
        self.logits = [self._run(prompt) for prompt in self.prompts]

    def _run(self, prompt: list[int]) -> torch.Tensor:
        """Logits ``[T, vocab]``; notes every full layer's selection, int32 ``[T, k]``."""
        noted: list[torch.Tensor] = []
        indexers = [layer.self_attn.indexer for layer in self.model.model.layers if layer.self_attn.indexer is not None]
        hooks = [indexer.register_forward_hook(lambda _, __, out: noted.append(out[0])) for indexer in indexers]
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt])).logits[0]
        for hook in hooks:
            hook.remove()
        self.selected.append(noted)
        return logits


class ComparingBackend:
    """Our backend, whose every selection is compared with transformers'; near ties are resolved its way."""

    def __init__(self, backend, oracle: Oracle) -> None:
        self.backend = backend
        self.oracle = oracle
        self.rope_table = backend.rope_table
        self.write_cache = backend.write_cache
        self.attend = backend.attend
        self.layer = 0
        self.num_compared = 0
        self.num_resolved = 0

    def get_topk_paged(self, cache, metadata, *, q, weights):
        slots = self.backend.get_topk_paged(cache, metadata, q=q, weights=weights).clone()
        positions, slots_of_theirs = self._find_theirs(metadata)
        for row in (slots != slots_of_theirs).any(dim=1).nonzero().flatten().tolist():
            scores = self._score(cache, metadata, q, weights)[row, : metadata.visible_lens[row]]
            self._check_near_tie(scores, positions[row][positions[row] >= 0])
            self.num_resolved += 1
        self.num_compared += slots.shape[0]
        self.layer = (self.layer + 1) % len(self.oracle.selected[0])
        return slots_of_theirs

    def _find_theirs(self, metadata) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' selection of every row: positions int64 ``[R, k]`` ascending with -1 after, and their slots.

        Its rows hold masked positions too where fewer than k tokens are visible.
        """
        top_k = self.backend.spec.index_topk
        later = 10**6
        positions = torch.full((metadata.batch.num_rows, top_k), later)
        for row, (request, position) in enumerate(zip(metadata.request_of_row.tolist(), metadata.positions.tolist())):
            noted = self.oracle.selected[request][self.layer][position].long()
            positions[row, : len(noted)] = noted.where(noted <= position, later)
        positions = positions.sort(dim=1).values
        positions[positions == later] = -1
        table = metadata.batch.page_table[metadata.request_of_row].long()
        slots = table.gather(1, positions.clamp(min=0) // 64) * 64 + positions % 64
        return positions, slots.where(positions >= 0, -1).int()

    def _check_near_tie(self, scores: torch.Tensor, theirs: torch.Tensor) -> None:
        """Sets of the same size may differ only in tokens next to the last chosen one."""
        assert len(theirs) == min(len(scores), self.backend.spec.index_topk)
        threshold = scores.topk(len(theirs)).values[-1]
        allowed = NEAR_TIE * scores.abs().max()
        is_theirs = torch.zeros_like(scores, dtype=torch.bool).scatter(0, theirs, True)
        assert (scores[is_theirs] >= threshold - allowed).all()
        assert (scores[~is_theirs] <= threshold + allowed).all()

    def _score(self, cache, metadata, q, weights):
        query, folded = ops.prepare_query(
            q,
            weights,
            metadata.positions,
            self.rope_table,
            interleaved=self.backend.spec.index_rope_interleaved,
            quantise=False,
        )
        batch = metadata.batch
        return ops.index_logits(
            query,
            folded,
            cache.index,
            batch.query_offsets,
            metadata.visible_lens,
            batch.page_table,
            max_context=batch.max_context,
        )


@pytest.fixture(scope="module", params=CASES)
def oracle(request, tmp_path_factory):
    return Oracle(CASES[request.param], tmp_path_factory.mktemp("parity"))


def run(oracle: Oracle, sizes: list[int], cache_format: str = "fp32"):
    """Our logits per request, running all requests in one ragged batch in forwards of ``sizes`` rows each."""
    model = oracle.ours
    wrapped = []

    def wrap(backend):
        wrapped.append(ComparingBackend(backend, oracle))
        return wrapped[0]

    session = Session(model, len(LENGTHS), cache_format=cache_format, capacity=256, wrap=wrap)
    hidden = session.extend_in_chunks(oracle.prompts, sizes)
    return [model.compute_logits(rows) for rows in hidden], wrapped[0]


@pytest.mark.parametrize(
    "sizes", [[230], [100, 77, 64], [226, 1], [218, 4]], ids=["prefill", "chunks", "step by step", "verify 4 rows"]
)
def test_logits_and_selections_equal_transformers(oracle, sizes):
    logits, comparing = run(oracle, sizes)
    worst = max((ours - theirs).abs().max().item() for ours, theirs in zip(logits, oracle.logits))
    print(f"max logit error {worst:.1e}; {comparing.num_resolved} of {comparing.num_compared} selections near-tied")
    assert worst < LOGIT_TOLERANCE
    assert comparing.num_compared == sum(LENGTHS) * len(oracle.selected[0])
    assert comparing.num_resolved <= 0.01 * comparing.num_compared


def test_the_selection_matters_in_these_models(oracle):
    """Without it the logits would be others, so that the parity above says something."""
    dense = [layer.self_attn.indexer for layer in oracle.model.model.layers if layer.self_attn.indexer is not None]
    for indexer in dense:
        indexer.index_topk = 10**6
    with torch.no_grad():
        logits = oracle.model(torch.tensor([oracle.prompts[0]])).logits[0]
    for indexer in dense:
        indexer.index_topk = oracle.config.index_topk
    assert (logits - oracle.logits[0])[-100:].abs().max() > 1000 * LOGIT_TOLERANCE


def test_transformers_agrees_with_itself_step_by_step(oracle):
    """Its cached decoding is one more way to the same logits; eight steps behind a prefill."""
    prompt = torch.tensor([oracle.prompts[1]])
    with torch.no_grad():
        output = oracle.model(prompt[:, :-8], use_cache=True)
        steps = [output.logits[0, -1]]
        for position in range(prompt.shape[1] - 8, prompt.shape[1] - 1):
            output = oracle.model(
                prompt[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
            )
            steps.append(output.logits[0, -1])
    ours, _ = run(oracle, [230])
    torch.testing.assert_close(torch.stack(steps), ours[1][-9:-1], atol=LOGIT_TOLERANCE, rtol=0)
