"""One layer's verify step as tensors: drafts whose selections nearly agree, both caches, and what should be selected.

Hides how agreeing drafts are drawn.
"""

from __future__ import annotations

import dataclasses

import torch

from nextn.backend import LayerCache
from nextn.batch import ForwardBatch, ForwardMode
from nextn.bench import op_calls
from nextn.bench.op_calls import OpCall, Results
from nextn.bench.shapes import IndexLogitsShape, SelectTopkShape, SparseMlaShape
from nextn.bench.workloads import PAGE, make_index_cache, make_latent_cache, make_page_table, visible_lens_of
from nextn.cache_format import LATENT_ROW_DIM, IndexCacheFormat, LatentCacheFormat
from nextn.hardware import describe_device
from nextn.ops._pages import translate_positions
from nextn.ops.index_logits.problem import problem_of as index_logits_problem
from nextn.ops.select_topk.problem import problem_of as select_topk_problem
from nextn.plan import DSASpec

INDEX_HEADS = 64
SCALE = LATENT_ROW_DIM**-0.5
# Weight of a draft's own noise in its index query: gave 90 % of neighbouring drafts' selections in common at 2048 of
# 32768 tokens, with all of the query otherwise shared; each row of results carries what it measured.
DRIFT = 0.06


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Sizes of one layer's verify step; ``topk`` of ``context`` tokens each."""

    requests: int
    context: int
    next_n: int
    heads: int
    topk: int

    @property
    def name(self) -> str:
        return f"{self.requests} x {self.context} n {self.next_n} heads {self.heads}"

    def floor_us(self, overlap: float) -> float:
        """The three ops' floors, one after the other."""
        rows = self.requests * self.next_n
        logits = IndexLogitsShape(requests=self.requests, context=self.context, next_n=self.next_n)
        selection = SelectTopkShape(rows=rows, length=self.context, topk=self.topk)
        attention = SparseMlaShape(
            requests=self.requests, next_n=self.next_n, heads=self.heads, overlap=overlap, topk=self.topk
        )
        return sum(shape.cost.floor_us for shape in (logits, selection, attention))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer's tensors.

    Attributes:
        shape: its sizes.
        spec: what planning needs.
        batch: one verify step of all requests.
        cache: both caches.
        index_q: e4m3 ``[R, 64, 128]``.
        weights: float32 ``[R, 64]``.
        q: bfloat16 (float32 on a CPU) ``[R, heads, 576]``.
        scores: the reference's logits, to 0 where they may be anything.
        visible: bool ``[R, context]``, where they may not.
        selected: the reference's selection from those, int32 positions ``[R, topk]``.
        slots: their slots.
    """

    shape: LayerShape
    spec: DSASpec
    batch: ForwardBatch
    cache: LayerCache
    index_q: torch.Tensor
    weights: torch.Tensor
    q: torch.Tensor
    scores: OpCall
    expected_scores: Results
    selected: torch.Tensor
    slots: torch.Tensor

    @property
    def visible_lens(self) -> torch.Tensor:
        return self.scores.arguments["visible_lens"]


def make_layer(shape: LayerShape, device: torch.device, drift: float, *, seed: int = 0) -> Layer:
    """Draw a layer whose drafts' index queries are nearly alike, and compute what it should select."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, pages = shape.requests * shape.next_n, -(-shape.context // PAGE)
    num_pages = shape.requests * pages
    table = make_page_table(shape.requests, pages, device, generator)
    batch = ForwardBatch.build(
        ForwardMode.TARGET_VERIFY,
        row_counts=(shape.next_n,) * shape.requests,
        context_lens=[shape.context] * shape.requests,
        page_table=table,
    )
    cache = LayerCache(
        kv=make_latent_cache(num_pages, device, generator), index=make_index_cache(num_pages, device, generator)
    )
    q = torch.randn(rows, shape.heads, LATENT_ROW_DIM, device=device, generator=generator)
    index_q = _draw_drafts(shape, (INDEX_HEADS, 128), drift, device, generator).to(torch.float8_e4m3fn)
    weights = _draw_drafts(shape, (INDEX_HEADS,), drift, device, generator)
    lens = visible_lens_of(batch.row_counts, shape.context, device)
    scores = _score_call(batch, lens, index_q, weights, cache)
    expected = scores.run(op_calls.find_kernel("index_logits", "reference"))
    selected = select_positions(expected["logits"], lens, shape.topk)
    return Layer(
        shape=shape,
        spec=DSASpec(
            num_heads=shape.heads,
            index_heads=INDEX_HEADS,
            index_topk=shape.topk,
            softmax_scale=SCALE,
            index_format=IndexCacheFormat(name="fp8"),
            latent_format=LatentCacheFormat(name="fp8"),
        ),
        batch=batch,
        cache=cache,
        index_q=index_q,
        weights=weights,
        q=q if device.type == "cpu" else q.to(torch.bfloat16),
        scores=scores,
        expected_scores=expected,
        selected=selected,
        slots=translate_to_slots(selected, batch),
    )


def measure_overlap(layer: Layer) -> tuple[float, float]:
    """Share of a row's selection that its request's next row selects too, and distinct tokens per request."""
    shape = layer.shape
    chosen = torch.zeros(len(layer.selected), shape.context, dtype=torch.bool, device=layer.q.device)
    chosen.scatter_(1, layer.selected.long(), True)
    chosen = chosen.view(shape.requests, shape.next_n, shape.context)
    common = (chosen[:, 1:] & chosen[:, :-1]).sum(dim=-1).float()
    overlap = float(common.mean()) / shape.topk if shape.next_n > 1 else 1.0
    return overlap, float(chosen.any(dim=1).sum(dim=-1).float().mean())


def _draw_drafts(
    shape: LayerShape, sizes: tuple[int, ...], drift: float, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """Standard normal ``[R, *sizes]``, the rows of a request alike but for ``drift`` of their own."""
    common = torch.randn(shape.requests, 1, *sizes, device=device, generator=generator)
    own = torch.randn(shape.requests, shape.next_n, *sizes, device=device, generator=generator)
    return ((1 - drift**2) ** 0.5 * common + drift * own).flatten(0, 1)


def _score_call(
    batch: ForwardBatch, lens: torch.Tensor, index_q: torch.Tensor, weights: torch.Tensor, cache: LayerCache
) -> OpCall:
    assert cache.index is not None
    arguments = {
        "q": index_q,
        "weights": weights,
        "index_cache": cache.index,
        "query_offsets": batch.query_offsets,
        "visible_lens": lens,
        "page_table": batch.page_table,
    }
    problem = index_logits_problem(
        describe_device(index_q.device),
        q=index_q,
        index_cache=cache.index,
        page_table=batch.page_table,
        max_context=batch.max_context,
        next_n=batch.next_n,
        max_rows=batch.max_rows,
    )
    defined = torch.arange(batch.max_context, device=index_q.device) < lens[:, None]
    return op_calls.index_logits_call(problem, arguments, defined)


def select_positions(logits: torch.Tensor, lens: torch.Tensor, topk: int) -> torch.Tensor:
    """The reference's selection, int32 positions."""
    problem = select_topk_problem(describe_device(logits.device), logits=logits, k=topk)
    arguments = {"logits": logits, "visible_lens": lens, "query_offsets": None, "page_table": None}
    call = op_calls.select_topk_call(problem, arguments)
    return call.run(op_calls.find_kernel("select_topk", "reference"))["selected"]


def translate_to_slots(positions: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """int32 ``[R, k]`` slots of int32 positions."""
    counts = torch.tensor(batch.row_counts, device=positions.device)
    requests = torch.arange(batch.num_requests, device=positions.device).repeat_interleave(counts)
    return translate_positions(positions.long(), requests, batch.page_table, PAGE).to(torch.int32)
