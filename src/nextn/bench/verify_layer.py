"""``nextn bench verify-layer``: scores, selection and attention of one layer's verify step as one captured graph.

Hides how our kernels and other people's are put together to do the same work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nextn import ops
from nextn.backend import DSABackend
from nextn.bench import op_calls, peers
from nextn.bench.layer import (
    DRIFT,
    SCALE,
    Layer,
    LayerShape,
    make_layer,
    measure_overlap,
    select_positions,
    translate_to_slots,
)
from nextn.bench.op_calls import Results, Verdict
from nextn.bench.ops import check_rounds, open_clock, time_candidates
from nextn.bench.rows import Row, collect_rows, open_device
from nextn.bench.workloads import (
    PAGE,
    Candidate,
)
from nextn.env import Environment, read_environment
from nextn.errors import InputError
from nextn.hardware import Arch, describe_device
from nextn.ops._kernel import OPS, discover
from nextn.ops.sparse_mla.problem import problem_of as sparse_mla_problem
from nextn.plan import DSAMetadata, plan_forward
from nextn.testing.timing import Clock

FILE_NAME = "verify_layer.jsonl"
OWN = "nextn"  # the composition of our kernels alone


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VerifyLayerOptions:
    """What to measure and where to keep it.

    Attributes:
        batch: requests.
        context: cached tokens of each.
        next_n: rows per request.
        heads: query heads of the attention.
        topk: tokens each row selects.
        drift: weight of a draft's own noise in its index query; 0 makes all drafts select the same.
        device: ``cuda`` or ``cpu``.
        out: folder whose ``verify_layer.jsonl`` is appended to and not measured again; None stores nothing.
        peers_dir: folder with further peers.
        commit: the commit these files are of, where git cannot say.
        rounds: turns per candidate and protocol.
        seconds: start no shape after this long.
    """

    batch: tuple[int, ...] = (64,)
    context: tuple[int, ...] = (32768,)
    next_n: tuple[int, ...] = (4,)
    heads: tuple[int, ...] = (16,)
    topk: int = 2048
    drift: float = DRIFT
    device: str = "cuda"
    out: Path | None = None
    peers_dir: Path | None = None
    commit: str | None = None
    rounds: int = 30
    seconds: float = 500.0


def bench_verify_layer(options: VerifyLayerOptions, *, on_row: Callable[[Row], None] | None = None) -> list[Row]:
    """Measure our layer and the peers' compositions at every combination of sizes asked for.

    Returns:
        One row per composition and shape.

    Raises:
        InputError: a size is below 1, the context is shorter than ``topk`` plus ``next_n``, or an unknown device.
        UnsupportedError: there is no GPU here.
    """
    device = open_device(
        options.device, instead="try it with --device cpu --batch 2 --context 512 --topk 128, on the references"
    )
    shapes = _list_shapes(options)
    if options.peers_dir is not None:
        peers.add_peers_folder(options.peers_dir)
    run, clock = open_clock(device, options.commit)
    return collect_rows(
        [((shape.name,), shape) for shape in shapes],
        lambda shape: bench_layer(make_layer(shape, device, options.drift), clock, options.rounds),
        run=run,
        keys=("shape",),
        file=options.out / FILE_NAME if options.out else None,
        seconds=options.seconds,
        on_row=on_row,
    )


def bench_layer(layer: Layer, clock: Clock, rounds: int) -> Iterator[Row]:
    """Check and time every composition.

    Yields:
        One row each: shape, kernel (the composition), kernels (op to what does it), passed, diff, error, note, overlap
        (share of a draft's selection that the next draft's has too), union (distinct tokens per request), floor_us and
        the times of ``bench_shape``.
    """
    candidates, names = zip(*_our_compositions(layer), *_peer_compositions(layer))
    overlap, union = measure_overlap(layer)
    floor = layer.shape.floor_us(overlap)
    common = {
        "stage": "verify_layer",
        "shape": layer.shape.name,
        "sizes": dataclasses.asdict(layer.shape),
        "overlap": round(overlap, 3),
        "union": round(union),
        "floor_us": round(floor, 1),
    }
    timed = time_candidates(candidates, clock, rounds=rounds, floor_us=floor)
    for (candidate, row), kernels in zip(timed, names):
        described = {"kernel": candidate.name, "kind": candidate.kind, "chosen": candidate.name == OWN}
        yield {**common, **described, "kernels": kernels, **row}


def _list_shapes(options: VerifyLayerOptions) -> list[LayerShape]:
    check_rounds(options.rounds)
    if not 0 <= options.drift <= 1:
        raise InputError(f"drift {options.drift} is not within 0 and 1")
    shapes = [
        LayerShape(requests=batch, context=context, next_n=next_n, heads=heads, topk=options.topk)
        for batch in options.batch
        for context in options.context
        for next_n in options.next_n
        for heads in options.heads
    ]
    for shape in shapes:
        if min(shape.requests, shape.next_n, shape.heads, shape.topk) < 1:
            raise InputError(f"{shape.name} with topk {shape.topk} has a size below 1")
        if shape.context < shape.topk + shape.next_n:
            raise InputError(
                f"context {shape.context} is below topk {shape.topk} and next_n {shape.next_n} together; every row "
                "must see more tokens than it selects"
            )
    return shapes


def _our_compositions(layer: Layer) -> Iterator[tuple[Candidate, dict[str, str]]]:
    """Our kernels alone; with other people's libraries where they would be chosen; and in deterministic mode."""
    settings = read_environment()
    libraries = {kernel.name for op in OPS for kernel in discover(op) if kernel.allocates_output}
    alone = dataclasses.replace(settings, disabled_kernels=settings.disabled_kernels | libraries)
    own = _our_composition(OWN, layer, alone, deterministic=False)
    yield own
    mixed = _our_composition("nextn_with_libraries", layer, settings, deterministic=False)
    if mixed[1] != own[1]:
        yield mixed
    if layer.q.device.type == "cuda":
        yield _our_composition("nextn_deterministic", layer, alone, deterministic=True)


def _our_composition(
    name: str, layer: Layer, environment: Environment, *, deterministic: bool
) -> tuple[Candidate, dict[str, str]]:
    device = layer.q.device
    rope_table = torch.zeros(layer.shape.context, 64)
    backend = DSABackend(layer.spec, rope_table, device=device, deterministic=deterministic)
    metadata = plan_forward(
        layer.batch, layer.spec, describe_device(device), deterministic=deterministic, environment=environment
    )
    kernels = backend.kernels(metadata)
    names = {op: kernels[op] for op in ("index_logits", "select_topk", "sparse_mla")}
    candidate = Candidate(
        name=name,
        kind="ours",
        build=lambda: lambda: _run_ours(layer, backend, metadata),
        read=lambda result: dict(zip(("logits", "slots", "out"), result)),
        poison=_poison_all,
        judge=lambda results: _judge_ours(layer, results),
    )
    return candidate, names


def _run_ours(
    layer: Layer, backend: DSABackend, metadata: DSAMetadata
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, cache = layer.batch, layer.cache
    assert cache.index is not None
    logits = ops.index_logits(
        layer.index_q,
        layer.weights,
        cache.index,
        batch.query_offsets,
        metadata.visible_lens,
        batch.page_table,
        max_context=batch.max_context,
        plan=metadata.index_logits,
    )
    slots = ops.select_topk(
        logits,
        metadata.visible_lens,
        layer.shape.topk,
        query_offsets=batch.query_offsets,
        page_table=batch.page_table,
        page_size=PAGE,
        plan=metadata.select_topk,
    )
    return logits, slots, backend.attend(cache, metadata, q=layer.q, topk_slots=slots)


def _peer_compositions(layer: Layer) -> Iterator[tuple[Candidate, dict[str, str]]]:
    """DeepGEMM, vLLM's selection and FlashMLA, as far as all three are here.

    Positions are not translated to slots in the graph: FlashMLA is given the exact selection's slots. So the number
    lacks a launch that every server makes.
    """
    rows, topk = layer.scores.problem.num_rows, layer.shape.topk
    select = "persistent_topk" if rows > 64 else "cooperative_topk"
    missing = peers.find_deep_gemm() or peers.find_vllm_topk() or peers.find_flash_mla()
    problem = layer.scores.problem
    if problem.arch is not Arch.SM90 or missing or peers.rejects_vllm_topk(rows, topk, select):
        return
    for form in ("native", "flattened"):
        if peers.rejects_deep_gemm(layer.scores, is_native=form == "native") is None:
            names = {"index_logits": f"deep_gemm {form}", "select_topk": f"vllm {select}", "sparse_mla": "flash_mla"}
            yield _peer_composition(layer, form, select), names


def _peer_composition(layer: Layer, form: str, select_name: str) -> Candidate:
    def build() -> Callable[[], Any]:
        score = peers.build_deep_gemm(layer.scores, is_native=form == "native")
        select = peers.build_vllm_topk(select_name, layer.visible_lens, layer.shape.topk, layer.shape.context)
        attend = peers.build_flash_mla(layer.q, layer.cache.kv, layer.slots, SCALE)

        def launch() -> tuple[torch.Tensor, ...]:
            logits = score()
            return logits, select(logits), *attend()

        return launch

    def read(result: tuple[torch.Tensor, ...]) -> Results:
        attention = peers.read_flash_mla((result[2], result[3]), layer.shape.heads)
        return {"logits": result[0], "selected": result[1], "out": attention["out"]}

    return Candidate(
        name=f"peers_{form}",
        kind="peer",
        build=build,
        read=read,
        poison=_poison_all,
        judge=lambda results: _judge_peers(layer, results),
    )


def _poison_all(result: tuple[torch.Tensor, ...]) -> None:
    for tensor in result:
        op_calls.poison(tensor)


def _judge_ours(layer: Layer, results: Results) -> Verdict:
    """Each stage is judged on what the stage before it gave."""
    selected = select_positions(results["logits"], layer.visible_lens, layer.shape.topk)
    wrong = int((translate_to_slots(selected, layer.batch) != results["slots"]).any(dim=1).sum())
    selection = Verdict(passed=not wrong, note=f"{wrong} rows select other slots" if wrong else "")
    return _join(_judge_scores(layer, results), selection, _judge_attention(layer, results, results["slots"]))


def _judge_peers(layer: Layer, results: Results) -> Verdict:
    logits, lens = results["logits"], layer.visible_lens
    selection = peers.judge_selection(
        logits, lens, results["selected"], select_positions(logits, lens, layer.shape.topk)
    )
    return _join(_judge_scores(layer, results), selection, _judge_attention(layer, results, layer.slots))


def _judge_scores(layer: Layer, results: Results) -> Verdict:
    layer.scores.outputs["out"].copy_(results["logits"])
    return layer.scores.compare(layer.scores.read(), layer.expected_scores)


def _judge_attention(layer: Layer, results: Results, slots: torch.Tensor) -> Verdict:
    problem = sparse_mla_problem(
        describe_device(layer.q.device), q=layer.q, kv_cache=layer.cache.kv, indices=slots, next_n=layer.shape.next_n
    )
    tensors = {"q": layer.q, "kv_cache": layer.cache.kv, "indices": slots, "scale": SCALE, "query_offsets": None}
    call = op_calls.sparse_mla_call(problem, tensors)
    expected = call.run(op_calls.find_kernel("sparse_mla", "reference"))
    return call.compare({"out": results["out"], "lse": expected["lse"]}, expected)


def _join(*verdicts: Verdict) -> Verdict:
    return Verdict(
        passed=all(verdict.passed for verdict in verdicts),
        diff=max(verdict.diff for verdict in verdicts),
        error=max(verdict.error for verdict in verdicts),
        note="; ".join(verdict.note for verdict in verdicts if verdict.note),
    )
