"""The LLM front: what goes in, what comes out, and what each wrong input is answered with."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
from fake_model import FakeBackend, FakeModel, FakeTokenizer, build_llm, plain_greedy

import nextn
from nextn.engine.config import EngineConfig, build_config
from nextn.engine.llm import LLM, Prompt
from nextn.engine.sampling import SamplingParams
from nextn.errors import ConfigError, RequestError

SHORT = SamplingParams(max_new_tokens=10, ignore_eos=True)


@pytest.mark.parametrize(
    ("prompts", "count"),
    [("abc", 1), (["abc", "b"], 2), ([2, 3, 4], 1), ([[2, 3], [4]], 2), (["ab", [5, 6]], 2), ([], 0)],
)
def test_a_prompt_is_text_or_token_ids_alone_or_in_a_list(prompts: Any, count: int) -> None:
    completions = build_llm().generate(prompts, SHORT)
    assert len(completions) == count
    listed = prompts if count != 1 else [prompts]
    for prompt, completion in zip(listed, completions):
        ids = FakeTokenizer().encode(prompt) if isinstance(prompt, str) else prompt
        assert list(completion.token_ids) == plain_greedy(ids, 10)
        assert completion.text == FakeTokenizer().decode(list(completion.token_ids))
        assert completion.prompt_tokens == len(ids)


def test_parameters_may_differ_by_prompt() -> None:
    params = [
        SamplingParams(max_new_tokens=3, ignore_eos=True),
        SamplingParams(max_new_tokens=7, next_n=1, ignore_eos=True),
    ]
    first, second = build_llm().generate(["ab", "ab"], params)
    assert (len(first.token_ids), len(second.token_ids)) == (3, 7)
    assert second.stats.accepted_per_position == ()
    assert second.stats.acceptance_length == 1.0
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        build_llm().generate("ab", params)


@pytest.mark.parametrize("next_n", [1, 2, 4, 8])
def test_a_stop_string_inside_an_accepted_run_ends_the_text_before_it(next_n: int) -> None:
    llm = build_llm(FakeModel(error_percent=5), next_n=next_n)
    for letters in ("abc", "hello", "xyz", "nextn"):
        whole = llm.generate(letters, SamplingParams(max_new_tokens=30, ignore_eos=True))[0]
        for place in range(2, 12, 3):
            stop = whole.text[place : place + 2]
            params = SamplingParams(max_new_tokens=30, ignore_eos=True, stop=stop)
            pieces = list(llm.stream(letters, params))
            stopped = pieces[-1].completion
            assert stopped is not None
            assert stopped.finish_reason == "stop"
            assert stopped.text == whole.text[: whole.text.index(stop)]
            assert "".join(event.text for event in pieces) == stopped.text
            assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
            assert FakeTokenizer().decode(list(stopped.token_ids)).endswith(stop)


def test_streamed_text_holds_whole_characters_only() -> None:
    class HalfTokenizer(FakeTokenizer):
        """Every token is half of a character, the first or the second."""

        def decode(self, ids: list[int]) -> str:
            return bytes(0xC3 if token < 16 else 0xA9 for token in ids).decode(errors="replace")

    llm = LLM.from_parts(FakeModel(), FakeBackend(), HalfTokenizer(), config=EngineConfig())
    text, ids, num_halves = "", [], 0
    for event in llm.stream([2, 3], SamplingParams(max_new_tokens=100, ignore_eos=True)):
        text += event.text
        ids += event.token_ids
        whole = HalfTokenizer().decode(ids)
        is_half = event.completion is None and whole.endswith("\ufffd")
        num_halves += is_half
        assert text == (whole[:-1] if is_half else whole)
    assert num_halves > 3, "no step ended inside a character"
    assert text.count("é") > 10


def test_load_and_prefill_are_reported() -> None:
    reports: list[tuple[str, int, int]] = []
    llm = LLM.from_parts(
        FakeModel(),
        FakeBackend(),
        FakeTokenizer(),
        config=EngineConfig(prefill_chunk=16),
        progress=lambda *report: reports.append(report),
    )
    llm.generate([[2] * 40, [3] * 10], SHORT)
    assert reports == [("prefill", done, 50) for done in (16, 32, 40, 48, 50)]


def test_closing_a_stream_frees_its_pages() -> None:
    llm = build_llm()
    stream = llm.stream(["abc", "de"], SamplingParams(max_new_tokens=100, ignore_eos=True))
    next(stream)
    assert llm.core.pool.num_free < llm.core.pool.num_usable
    stream.close()
    assert llm.core.pool.num_free == llm.core.pool.num_usable
    assert not llm.core.has_work


def test_a_stream_inside_a_stream_and_threads_beside_it_get_their_own_output() -> None:
    llm = build_llm()
    results: dict[str, str] = {}

    def run(text: str) -> None:
        results[text] = llm.generate(text, SHORT)[0].text

    outer = llm.stream("outer", SHORT)
    pieces = [next(outer).text]
    threads = [threading.Thread(target=run, args=(text,)) for text in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    run("inner")
    pieces += [event.text for event in outer]
    for thread in threads:
        thread.join(timeout=60)
    results["outer"] = "".join(pieces)
    for text, result in results.items():
        assert result == FakeTokenizer().decode(plain_greedy(FakeTokenizer().encode(text), 10))
    assert len(results) == 5


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ("a\ud800b", r"not valid UTF-8 at character 1 \('\\ud800'\)"),
        ([[2, 32]], "prompt token 32 is outside the vocabulary of 32"),
        ([[2, -1]], "prompt token -1 is outside"),
        ([[2, "a"]], "prompt token 'a' is not an integer"),
        ([3.5], "prompt 3.5 is neither text nor a list"),
        ("a" * 256, "the prompt has 256 tokens, but the context holds 256"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_runs(prompt: Prompt, message: str) -> None:
    llm = build_llm()
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, SHORT)
    assert not llm.core.has_work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 is not an integer of at least 1"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens 2\.5"),
        ({"temperature": -0.1}, r"temperature -0\.1 is negative"),
        ({"temperature": float("nan")}, "temperature nan is not a finite number"),
        ({"top_p": 0.0}, r"top_p 0\.0 is outside \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p 1\.5"),
        ({"top_k": -1}, "top_k -1"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"stop": ("a", "")}, "stop"),
        ({"next_n": 0}, r"next_n 0 is outside 1\.\.8"),
        ({"next_n": 9}, r"next_n 9 is outside 1\.\.8"),
        ({"next_n": True}, "next_n True"),
    ],
)
def test_wrong_sampling_parameters_name_the_value_and_the_limit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"next_n": 0}, r"next_n 0 is outside 1\.\.8"),
        ({"next_n": 9}, "next_n 9"),
        ({"next_n": "4"}, "next_n '4'"),
        ({"max_batch": 0}, "max_batch 0 is not an integer of at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk 0"),
        ({"max_context": 1}, "max_context 1"),
        ({"cache_tokens": 0}, "cache_tokens 0"),
        ({"cache_format": "fp4"}, "cache_format 'fp4' is unknown; use one of fp8, bf16, fp32"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ({"max_bacth": 4}, "unknown engine option 'max_bacth'; did you mean 'max_batch'"),
        ({"zzz": 4}, "unknown engine option 'zzz'; known options are"),
    ],
)
def test_wrong_engine_options_name_the_value_and_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(options)
    with pytest.raises(ConfigError, match=message):
        LLM("/nowhere", **options)


def test_devices_that_are_not_here_are_named() -> None:
    with pytest.raises(ConfigError, match="device 'quantum' is unknown"):
        LLM(device="quantum")
    with pytest.raises(ConfigError, match="device 'cuda:99' is not here"):
        LLM(device="cuda:99")


def test_a_model_without_a_draft_layer_serves_plain_decoding_only() -> None:
    model = FakeModel()
    model.mtp, model.indexer_layers = None, (True,)
    with pytest.raises(ConfigError, match="next_n 4 needs drafts"):
        build_llm(model)
    llm = build_llm(model, next_n=1)
    assert list(llm.generate([2, 3], SHORT)[0].token_ids) == plain_greedy([2, 3], 10)
    with pytest.raises(RequestError, match="next_n 2 needs drafts"):
        llm.generate([2, 3], SamplingParams(next_n=2))


def test_max_context_is_bounded_by_the_model() -> None:
    with pytest.raises(ConfigError, match="max_context 257 is above the model's 256 positions"):
        build_llm(max_context=257)
    completion = build_llm(max_context=12).generate([2, 3], SamplingParams(ignore_eos=True))[0]
    assert len(completion.token_ids) == 10


@pytest.mark.parametrize(
    ("config", "max_context", "tokens"),
    [
        (EngineConfig(max_batch=8), 4096, 32768),
        (EngineConfig(max_batch=8), 163840, 163840),
        (EngineConfig(max_batch=8), 16384, 65536),
        (EngineConfig(cache_tokens=100), 4096, 100),
    ],
)
def test_the_page_pool_is_sized_from_the_context_unless_told(
    config: EngineConfig, max_context: int, tokens: int
) -> None:
    assert config.choose_cache_tokens(max_context) == tokens


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, nextn; assert 'torch' not in sys.modules; nextn.LLM; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert set(nextn.__all__) <= set(dir(nextn))
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        nextn.LLMs  # noqa: B018
