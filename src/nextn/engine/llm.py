"""LLM: prompts in, completions out.

Hides loading, tokenising and the stepping of the engine. Several threads, or a stream inside a stream, may use one LLM:
whoever waits steps the engine for everyone.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nextn.batch import ForwardBatch, ForwardMode
from nextn.engine.config import EngineConfig, build_config
from nextn.engine.core import EngineCore
from nextn.engine.request import Completion, Request, StreamEvent
from nextn.engine.sampling import SamplingParams
from nextn.errors import ConfigError, RequestError

Prompt = str | Sequence[int]
Progress = Callable[[str, int, int], None]  # stage ("load" or "prefill"), done, total

SHIPPED_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "nextn_tiny"


class LLM:
    """A model and an engine around it.

    Args:
        model: checkpoint folder in the Hugging Face format; the small checkpoint that ships inside if None.
        next_n: tokens verified per request and step, 1 (plain decoding) to 8.
        progress: called with (stage, done, total) while weights load (bytes) and prompts are cached (tokens).
        options: every other field of :class:`~nextn.engine.config.EngineConfig`.

    Raises:
        ConfigError: an option is unknown or out of range, or drafts are asked of a model without a NextN layer.
        CheckpointError: the checkpoint is missing, truncated or inconsistent.

    Example:
        >>> llm = LLM(next_n=4)  # doctest: +SKIP
        >>> llm.generate("def main():", SamplingParams(max_new_tokens=32))[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        next_n: int = 4,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        config = build_config({"model": model, "next_n": next_n, **options})
        parts = _load_parts(config, progress)
        self._assemble(*parts, config=config, progress=progress)

    @classmethod
    def from_parts(
        cls, model: Any, backend: Any, tokenizer: Any, *, config: EngineConfig, progress: Progress | None = None
    ) -> LLM:
        """An LLM of parts made elsewhere.

        Args:
            model: a DeepseekV32ForCausalLM, or anything with its interface; ``model.config`` must have ``vocab_size``,
                ``max_position_embeddings`` and ``index_share_for_mtp_iteration``.
            backend: its DSABackend.
            tokenizer: ``encode``, ``decode`` and ``eos_ids``.
            config: settings; ``model``, ``cache_format`` and ``dtype`` are not read.
            progress: as in the constructor.

        Raises:
            ConfigError: drafts are asked of a model without a NextN layer, or max_context is above the model's.
        """
        llm = cls.__new__(cls)
        llm._assemble(model, backend, tokenizer, config=config, progress=progress)
        return llm

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete every prompt.

        Args:
            prompts: a text, a list of token ids, or a list of texts and lists of token ids.
            params: one for all prompts or one per prompt; the defaults if None.

        Returns:
            One completion per prompt, in the order of the prompts.

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing was run.
        """
        completions: dict[int, Completion] = {}
        for event in self.stream(prompts, params):
            if event.completion is not None:
                completions[event.index] = event.completion
        return [completions[index] for index in range(len(completions))]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[StreamEvent, None, None]:
        """Like :meth:`generate`, as it happens.

        Returns:
            An iterator of events, each with new tokens or a completion; every prompt's last one has its completion.
            Closing the iterator early aborts what is unfinished.

        Raises:
            RequestError: as :meth:`generate`, before anything is run.
        """
        texts = _as_prompts(prompts)
        each = _as_params(params, len(texts))
        events: deque[StreamEvent] = deque()
        requests = [
            self.core.build_request(self.encode(text), wanted, index=index, on_event=events.append)
            for index, (text, wanted) in enumerate(zip(texts, each))
        ]
        return self._stream(requests, events)

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids; ids are passed through.

        Raises:
            RequestError: the text is empty or not valid Unicode, or an id is not an integer.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; give at least one character")
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"the prompt is not valid UTF-8 at character {error.start} ({prompt[error.start]!r}); remove it"
                ) from None
            return self.tokenizer.encode(prompt)
        for token in prompt:
            if not isinstance(token, int) or isinstance(token, bool):
                raise RequestError(f"prompt token {token!r} is not an integer; pass text or a list of token ids")
        return list(prompt)

    @cached_property
    def kernels(self) -> dict[str, str]:
        """Op name to the kernel that runs it, for a verify step of one request."""
        batch = ForwardBatch.build(
            ForwardMode.TARGET_VERIFY if self.config.next_n > 1 else ForwardMode.DECODE,
            row_counts=[self.config.next_n],
            context_lens=[self.config.next_n],
            page_table=torch.zeros(1, 1, dtype=torch.int32, device=self._backend.device),
            page_size=self.core.pool.page_size,
        )
        return self._backend.kernels(self._backend.init_forward_metadata(batch))

    @property
    def device_name(self) -> str:
        """The device's own name."""
        return self._backend.hardware.name

    def _assemble(
        self, model: Any, backend: Any, tokenizer: Any, *, config: EngineConfig, progress: Progress | None
    ) -> None:
        limit = model.config.max_position_embeddings
        max_context = limit if config.max_context is None else config.max_context
        if max_context > limit:
            raise ConfigError(f"max_context {max_context} is above the model's {limit} positions; lower it")
        if config.next_n > 1 and model.mtp is None:
            raise ConfigError(f"next_n {config.next_n} needs drafts, but the model has no NextN layer; use next_n 1")
        self.config = config
        self.tokenizer = tokenizer
        self.core = EngineCore(
            model,
            backend,
            decode=tokenizer.decode,
            eos_ids=tokenizer.eos_ids,
            vocab_size=model.config.vocab_size,
            next_n=config.next_n,
            max_batch=config.max_batch,
            max_context=max_context,
            cache_tokens=config.choose_cache_tokens(max_context),
            prefill_chunk=config.prefill_chunk,
            page_size=backend.spec.page_size,
            shares_draft_topk=model.config.index_share_for_mtp_iteration,
        )
        self._backend = backend
        self._progress = progress
        self._stepping = threading.Lock()

    def _stream(self, requests: Sequence[Request], events: deque[StreamEvent]) -> Generator[StreamEvent, None, None]:
        prefilled = dict.fromkeys(range(len(requests)), 0)
        num_unfinished = len(requests)
        for request in requests:
            self.core.submit(request)
        try:
            while num_unfinished:
                event = self._next_event(events)
                if self._progress is not None and event.prefilled > prefilled[event.index]:
                    prefilled[event.index] = event.prefilled
                    total = sum(request.prompt_len for request in requests)
                    self._progress("prefill", sum(prefilled.values()), total)
                num_unfinished -= event.completion is not None
                if event.token_ids or event.completion is not None:
                    yield event
        finally:
            self._abort([request for request in requests if not request.is_finished])

    def _next_event(self, events: deque[StreamEvent]) -> StreamEvent:
        """The oldest event of one stream, stepping the engine until there is one."""
        while not events:
            with self._stepping:
                if not events:  # another thread's steps may have brought one
                    self.core.step()
        return events.popleft()

    def _abort(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        for request in requests:
            self.core.abort(request)
        with self._stepping:
            self.core.take_messages()


def _load_parts(config: EngineConfig, progress: Progress | None) -> tuple[Any, Any, Any]:
    """Model, backend and tokenizer of the checkpoint the settings name."""
    from nextn.backend import DSABackend
    from nextn.model.config import load_config
    from nextn.model.rotary import build_rope_table
    from nextn.model.tokenizer import load_tokenizer
    from nextn.model.weights import load_model

    folder = Path(SHIPPED_MODEL if config.model is None else config.model)
    device = _find_device(config.device)
    model_config = load_config(folder)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        config.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16
    )
    backend = DSABackend(
        model_config.attention_spec(config.cache_format), build_rope_table(model_config), device=device, dtype=dtype
    )
    tokenizer = load_tokenizer(folder)
    report = None if progress is None else (lambda done, total: progress("load", done, total))
    model = load_model(folder, device=device, dtype=dtype, progress=report)
    return model, backend, tokenizer


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not here: PyTorch sees {torch.cuda.device_count()} GPUs; use cpu")
    return device


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]  # type: ignore[list-item]
    for item in listed:
        if not isinstance(item, (str, Sequence)):
            raise RequestError(f"prompt {item!r} is neither text nor a list of token ids")
    return listed  # type: ignore[return-value]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts; pass one for all, or one each")
    return list(params)
