"""Every reference op on a GPU against itself on the CPU, since the references serve wherever no kernel does.

Hides inputs and tolerances: selections and acceptances must be equal, numbers as close as the order of float32
additions allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from nextn import ops
from nextn.cache_format import IndexCacheFormat, LatentCacheFormat
from nextn.hardware import describe_device
from nextn.ops._kernel import Kernel, discover
from nextn.ops._pages import gather_index_keys, gather_latent_rows
from nextn.ops.accept_drafts import SamplingTensors
from nextn.ops.index_logits.cases import CASES as INDEX_LOGITS_CASES
from nextn.ops.select_topk.cases import CASES as SELECT_TOPK_CASES
from nextn.ops.sparse_mla.cases import CASES as SPARSE_MLA_CASES
from nextn.testing.numerics import MAX_ERROR, assert_rows_match

_QUANTISED_MAX_DIFF = 1e-4  # a value on the edge between two e4m3 codes may round either way
_HALF_MAX_ERROR = 2.0**-7  # one step of bfloat16

Outputs = Mapping[str, torch.Tensor]


def check_references(device: torch.device) -> Iterator[tuple[str, str, str]]:
    """Run every reference on ``device`` and on the CPU.

    Yields:
        op, case and what was wrong, an empty string if nothing.
    """
    for op, cases in _RUNS.items():
        for case, run, compare in cases():
            yield op, case, _compare(run, compare, device)


def _compare(
    run: Callable[[torch.device], Outputs], compare: Callable[[Outputs, Outputs], None], device: torch.device
) -> str:
    try:
        compare(run(device), run(torch.device("cpu")))
    except Exception as error:  # whatever one reference does on a new device, the others are still to be tried
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _reference(op: str) -> Kernel:
    return next(kernel for kernel in discover(op) if kernel.name == "reference")


def _index_logits_runs() -> Iterator[tuple[str, Any, Any]]:
    for case in INDEX_LOGITS_CASES:

        def run(device: torch.device, case: Any = case) -> Outputs:
            inputs, dtype = case.inputs(device), getattr(torch, case.out_dtype)
            out = torch.zeros(sum(case.row_counts), case.max_context, dtype=dtype, device=device)
            _reference("index_logits").prepare(case.problem(describe_device(device)), **inputs.arguments, out=out)()
            return {"logits": torch.where(inputs.defined, out, 0.0)}

        yield case.name, run, _assert_close


def _select_topk_runs() -> Iterator[tuple[str, Any, Any]]:
    for case in SELECT_TOPK_CASES:

        def run(device: torch.device, case: Any = case) -> Outputs:
            inputs = case.inputs(device)
            slots = ops.select_topk(
                inputs.logits,
                inputs.visible_lens,
                case.topk,
                query_offsets=inputs.query_offsets,
                page_table=inputs.page_table,
                page_size=case.page_size,
            )
            return {"selected": slots}

        yield case.name, run, _assert_equal


def _sparse_mla_runs() -> Iterator[tuple[str, Any, Any]]:
    for case in SPARSE_MLA_CASES:

        def run(device: torch.device, case: Any = case) -> Outputs:
            inputs = case.inputs(device)
            out, lse = ops.sparse_mla(
                inputs.q, inputs.kv_cache, inputs.indices, scale=inputs.scale, query_offsets=inputs.query_offsets
            )
            return {"out": out, "lse": lse.nan_to_num(neginf=-1e4)}

        yield case.name, run, _assert_close


def _prepare_query_runs() -> Iterator[tuple[str, Any, Any]]:
    for interleaved in (False, True):

        def run(device: torch.device, interleaved: bool = interleaved) -> Outputs:
            generator = torch.Generator().manual_seed(1)
            q, weights = torch.randn(13, 32, 128, generator=generator), torch.randn(13, 32, generator=generator)
            values, folded = ops.prepare_query(
                q.to(device),
                weights.to(device),
                torch.arange(13, device=device) * 7,
                _rope_table().to(device),
                interleaved=interleaved,
            )
            return {"query": values.cpu().float() * folded.cpu()[..., None]}

        yield f"interleaved {interleaved}", run, _assert_nearly_close


def _write_cache_runs() -> Iterator[tuple[str, Any, Any]]:
    for name in ("fp8", "bf16", "fp32"):

        def run(device: torch.device, name: str = name) -> Outputs:
            latent_format = LatentCacheFormat(name=name)
            index_format = IndexCacheFormat(name="fp32" if name == "fp32" else "fp8")
            latents, keys = latent_format.allocate(4, device), index_format.allocate(4, device)
            generator = torch.Generator().manual_seed(2)
            slots = torch.randperm(4 * 64, generator=generator)[:50]
            slots[::9] = -1
            ops.write_cache(
                positions=torch.arange(50, device=device),
                rope_table=_rope_table().to(device),
                slots=slots.to(device),
                kv=torch.randn(50, 576, generator=generator).to(device),
                kv_cache=latents,
                kv_norm_weight=torch.ones(512, device=device),
                index_k=torch.randn(50, 128, generator=generator).to(device),
                index_cache=keys,
                index_norm_weight=torch.ones(128, device=device),
                index_norm_bias=torch.zeros(128, device=device),
            )
            return _decode_caches(latents.cpu(), latent_format, keys.cpu(), index_format)

        yield name, run, _assert_nearly_close


def _decode_caches(
    latents: torch.Tensor, latent_format: LatentCacheFormat, keys: torch.Tensor, index_format: IndexCacheFormat
) -> Outputs:
    values, scales = gather_index_keys(keys, index_format, torch.arange(4))
    values = values.reshape(-1, 128)
    if scales is not None:
        values = values * scales.reshape(-1, 1)
    return {"latents": gather_latent_rows(latents, latent_format, torch.arange(4 * 64)), "keys": values}


def _accept_drafts_runs() -> Iterator[tuple[str, Any, Any]]:
    for is_sampled in (False, True):

        def run(device: torch.device, is_sampled: bool = is_sampled) -> Outputs:
            generator = torch.Generator().manual_seed(3)
            sampling = SamplingTensors(
                temperature=torch.tensor([0.0, 1.0, 0.7], device=device),
                top_k=torch.tensor([0, 20, 0], dtype=torch.int32, device=device),
                top_p=torch.tensor([1.0, 1.0, 0.9], device=device),
                seed=torch.tensor([1, 2, 3], device=device),
            )
            accepted = ops.accept_drafts(
                torch.randn(9, 512, generator=generator).mul(4).to(device),
                torch.randint(0, 512, (9,), generator=generator).to(device),
                torch.tensor([0, 4, 5, 9], dtype=torch.int32, device=device),
                sampling=sampling if is_sampled else None,
                positions=torch.arange(9, device=device) if is_sampled else None,
            )
            return {"lens": accepted.accept_lens, "ids": accepted.next_ids}

        yield ("sampled" if is_sampled else "greedy"), run, _assert_equal


def _rope_table() -> torch.Tensor:
    angles = torch.arange(128)[:, None] * torch.logspace(0, -4, 32)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _assert_equal(ours: Outputs, wanted: Outputs) -> None:
    for name, expected in wanted.items():
        different = int((ours[name].cpu() != expected).sum())
        assert different == 0, f"{different} of {expected.numel()} {name} differ"


def _assert_close(ours: Outputs, wanted: Outputs) -> None:
    for name, expected in wanted.items():
        max_error = MAX_ERROR if expected.dtype == torch.float32 else _HALF_MAX_ERROR
        assert_rows_match(ours[name], expected, max_error=max_error)


def _assert_nearly_close(ours: Outputs, wanted: Outputs) -> None:
    for name, expected in wanted.items():
        assert_rows_match(ours[name], expected, max_diff=_QUANTISED_MAX_DIFF, max_error=None)


_RUNS: dict[str, Callable[[], Iterator[tuple[str, Any, Any]]]] = {
    "prepare_query": _prepare_query_runs,
    "write_cache": _write_cache_runs,
    "index_logits": _index_logits_runs,
    "select_topk": _select_topk_runs,
    "sparse_mla": _sparse_mla_runs,
    "accept_drafts": _accept_drafts_runs,
}
