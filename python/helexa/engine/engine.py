"""A loaded model that answers: token ids in, text and token ids out, as async streams.

The engine owns one device worker. Its public methods may be called from any thread and never wait for the
device, except `logits`, which returns a result, and `close`; `generate` runs on the caller's event loop.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np
import numpy.typing as npt

from helexa.engine.chat_template import ChatTemplate
from helexa.engine.collector import Collector, EmbeddingCollector, LogitsCollector, LogprobsCollector, Pooling
from helexa.engine.device import find_devices
from helexa.engine.grammar import GrammarCompiler, GrammarSpec, Matcher
from helexa.engine.guide import Guide
from helexa.engine.host import Host
from helexa.engine.options import EngineOptions, EngineStats
from helexa.engine.output import OutputFormat
from helexa.engine.parts import Progress, planned_tensors, pooling_of, read_model, text_parts
from helexa.engine.phases import Phases
from helexa.engine.preflight import place
from helexa.engine.sampler import Sampler
from helexa.engine.sampling_params import SamplingDefaults, SamplingParams
from helexa.engine.sequence import Finished, GenerationProgress, Receiver, Sequence
from helexa.engine.snapshots import borders
from helexa.engine.state_store import StateStore
from helexa.engine.stream import Answer, Delta, Stream, TokenLogprob
from helexa.engine.tokenizer import Tokenizer
from helexa.engine.weight_keeper import WeightKeeper
from helexa.errors import InvalidParameter, UnsupportedModel
from helexa.log import fields
from helexa.models import Model, ModelConfig, config_from_gguf
from helexa.weights.load import LoadProgress
from helexa.weights.model_file import open_model
from helexa.weights.parking import Parking
from helexa.weights.quantize import fingerprint

logger = logging.getLogger(__name__)


class Engine:
    """One model on one device."""

    def __init__(
        self,
        build: Callable[[], Model],
        config: ModelConfig,
        options: EngineOptions,
        *,
        name: str,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        generation_defaults: SamplingDefaults | None = None,
        pooling: Pooling | None = "last",
        store: StateStore | None = None,
        model_key: str = "",
        keeper: WeightKeeper | None = None,
        phases: Phases | None = None,
    ):
        """Calls `build` on the device thread and returns when the model is ready.

        store: keeps what the caches hold beyond this engine, for others with the same `model_key`, which says
        what weights and vocabulary these are. keeper: knows the weights by then, and parks them in the end.
        phases: counts the time.
        """
        self.config = config
        self.name = name
        self.device = find_devices(options.device)[0]
        self.options = options.on(self.device)
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.generation_defaults = generation_defaults or SamplingDefaults()
        self.pooling = pooling  # of embeddings, unless a request says; None: one that is not implemented
        self.model_key = model_key
        self.weight_bytes = 0  # of a model that was loaded from files
        self._lock = threading.Lock()
        self._grammars: GrammarCompiler | None = None
        self._host = Host(
            name,
            build,
            config,
            self.options,
            self.device,
            store=store,
            model_key=model_key,
            keeper=keeper or WeightKeeper(None, ""),
            phases=phases or Phases(),
        )
        self.max_context = self._host.max_context
        self.cache_bytes = self._host.cache_bytes

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        store: StateStore | None = None,
        parking: Parking | None = None,
        **options: Any,
    ) -> Self:
        """The model of a GGUF file or of a directory with safetensors; `options` are those of EngineOptions.

        progress is called on the device thread with LoadProgress; its last phase is "ready". A file without
        a vocabulary has no tokenizer and serves token ids. When the model is unloaded, `store` keeps prompts
        and `parking` weights that were on a CUDA device.
        Raises InvalidFile, UnsupportedModel, InvalidParameter or OutOfMemory.
        """
        started_s = time.perf_counter()
        progress = progress or (lambda progress: None)
        engine_options = EngineOptions(**options)
        phases = Phases()
        with phases("header"):
            file = open_model(path)
        try:
            with phases("plan"):
                config = config_from_gguf(file.metadata, file.tensors)
                tensors = planned_tensors(file, engine_options)
                engine_options, weight_bytes = place(tensors, config, engine_options)
            source = fingerprint(file)
            model_key = f"{source} {engine_options.quant}"
            keeper = WeightKeeper(parking, model_key)
            with ThreadPoolExecutor(1, "tokenizer") as pool:
                text = pool.submit(phases.timed, "text", partial(text_parts, file, source))
                engine = cls(
                    partial(read_model, file, config, engine_options, progress, keeper, phases),
                    config,
                    engine_options,
                    name=str(file.metadata.get("general.name") or Path(path).stem),
                    generation_defaults=SamplingDefaults.from_gguf(file.metadata),
                    pooling=pooling_of(file.metadata.get(f"{config.model_type}.pooling_type")),
                    store=store,
                    model_key=model_key,
                    keeper=keeper,
                    phases=phases,
                )
                try:
                    with phases("text_wait"):
                        parts = text.result()
                except BaseException:
                    engine.close()
                    raise
                engine.weight_bytes = weight_bytes
                engine.tokenizer, engine.chat_template = parts.tokenizer, parts.chat_template
                engine._grammars = parts.grammars
        finally:
            file.close()
        progress(LoadProgress("ready", 100.0))
        logger.info(
            "model_loaded",
            extra=fields(
                model=engine.name,
                max_context=engine.max_context,
                kv_tokens=engine.stats().kv_tokens_total,
                load_s=round(time.perf_counter() - started_s, 3),
                **phases.fields(),
            ),
        )
        return engine

    async def generate(
        self,
        token_ids: Iterable[int],
        params: SamplingParams | None = None,
        *,
        namespace: str = "",
        priority: int = 0,
        progress: GenerationProgress | None = None,
        snapshot_at: tuple[int, ...] | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The answer to the prompt, piece by piece.

        Leaving the generator cancels the request and frees its pages before the next step. Prompts share
        cached prefixes only within one namespace. Of those that wait, the highest priority comes first.
        `progress` is kept up to date until the generator is left. `snapshot_at` says where other prompts will
        part from this one, by default where its last messages begin; only recurrent layers need that. Raises
        ContextTooLong, InvalidParameter, ShuttingDown or, as soon as the device has failed, DevicePoisoned.
        """
        loop = asyncio.get_running_loop()
        stream = Stream(self._host.mailbox(loop), loop)
        params = params or SamplingParams()
        matcher = None if params.grammar is None else await self._matcher(params.grammar)
        sequence = self._sequence(self._checked(token_ids), params, stream, matcher)
        sequence.namespace, sequence.priority, sequence.progress = namespace, priority, progress
        if self.config.linear_attention is not None:
            places = borders(sequence.token_ids, self._turn_starts) if snapshot_at is None else snapshot_at
            sequence.snapshot_at = places
        answer = Answer(sequence, self.tokenizer, params.stop, params.logprobs is not None)
        self._host.submit(sequence, stream)
        try:
            while True:
                events = await stream.take()
                last = events[-1]
                error = last.error if isinstance(last, Finished) else None
                if error is not None:
                    events.pop()
                if events:
                    delta = answer.feed(events)
                    yield delta
                    if delta.finish_reason is not None:
                        return
                if error is not None:
                    raise error
        finally:
            if not sequence.finished:
                self._host.cancel(sequence)

    async def check_grammar(self, spec: GrammarSpec) -> None:
        """Raises InvalidParameter, with the reason, for a grammar that `generate` would refuse."""
        await self._matcher(spec)

    @cached_property
    def output_format(self) -> OutputFormat:
        """How the model marks its reasoning and its tool calls, by its chat template and its vocabulary."""
        template = None if self.chat_template is None else self.chat_template.tool_use_source
        return OutputFormat.detect(template, () if self.tokenizer is None else self.tokenizer.added_tokens)

    @cached_property
    def _turn_starts(self) -> frozenset[int]:
        """Control tokens that do not end anything."""
        if self.tokenizer is None:
            return frozenset()
        return frozenset(self.tokenizer.special_tokens.values()) - self.tokenizer.eos_token_ids

    def logits(self, token_ids: Iterable[int]) -> npt.NDArray[np.float32]:
        """Logits [T, V] float32 after each token; waits for the device and raises what `generate` raises."""
        tokens = self._checked(token_ids)
        collector = LogitsCollector(len(tokens), self.config.vocab_size)
        self._collect(tokens, collector)
        return collector.future.result()

    async def prompt_logprobs(
        self, token_ids: Iterable[int], num_top: int, *, priority: int = 0
    ) -> list[TokenLogprob | None]:
        """How likely the model found each token, with the most likely ones; None for the first token.

        Computes the prompt without the prefix cache. Raises what `generate` raises.
        """
        tokens = self._checked(token_ids)
        collector = LogprobsCollector(tokens, min(num_top, self.config.vocab_size - 1))
        await self._collected(tokens, collector, priority)
        return collector.found

    async def embed(
        self, token_ids: Iterable[int], pooling: str | None = None, *, priority: int = 0
    ) -> npt.NDArray[np.float32]:
        """The text as one vector [D] float32 of length 1, the mean of its hidden states or the last one.

        pooling: "mean" or "last"; None takes what the model's file names, or else the last. Raises what
        `generate` raises, and UnsupportedModel if the file wants another pooling and none is given.
        """
        pooling = pooling or self.pooling
        if pooling is None:
            raise UnsupportedModel(
                f"the model {self.name} pools its embeddings in a way that is not implemented; "
                "give pooling as 'mean' or 'last'"
            )
        if pooling not in get_args(Pooling):
            raise InvalidParameter(f"pooling is {pooling!r}; expected 'mean' or 'last'", param="pooling")
        collector = EmbeddingCollector(cast(Pooling, pooling))
        return await self._collected(self._checked(token_ids), collector, priority)

    def stats(self) -> EngineStats:
        """Counters as they stand; never waits for the device."""
        return self._host.stats()

    def close(self, drain_s: float = 0.0) -> None:
        """Refuses new requests, lets running ones go on for drain_s, ends the rest and frees the memory."""
        self._host.close(drain_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _checked(self, token_ids: Iterable[int]) -> list[int]:
        """The token ids as a list; raises InvalidParameter for none or one beyond the vocabulary."""
        tokens = list(token_ids)
        if not tokens:
            raise InvalidParameter("the prompt is empty; expected at least one token", param="prompt")
        lowest, highest = min(tokens), max(tokens)
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InvalidParameter(
                f"the prompt has token {wrong}; the model's vocabulary has {self.config.vocab_size} tokens",
                param="prompt",
            )
        return tokens

    async def _matcher(self, spec: GrammarSpec) -> Matcher:
        """A matcher at the start of the grammar; one that is new is compiled on another thread."""
        if self.tokenizer is None:
            raise spec.refusal("the model has no vocabulary, which a grammar needs")
        with self._lock:
            if self._grammars is None:
                self._grammars = GrammarCompiler(self.tokenizer)
        if self._grammars.is_compiled(spec):
            return self._grammars.compile(spec)
        return await asyncio.to_thread(self._grammars.compile, spec)

    def _guide(self, params: SamplingParams, matcher: Matcher | None) -> Guide | None:
        if matcher is None and params.thinking is None:
            return None
        if self.tokenizer is None:
            raise InvalidParameter("the model has no vocabulary, which thinking needs", param="thinking")
        return Guide(self.tokenizer, params.thinking, matcher)

    def _sequence(
        self, tokens: list[int], params: SamplingParams, receiver: Receiver, matcher: Matcher | None
    ) -> Sequence:
        params.check_vocabulary(self.config.vocab_size)
        stop_token_ids = frozenset(params.stop_token_ids)
        if self.tokenizer is not None and not params.ignore_eos:
            stop_token_ids |= self.tokenizer.eos_token_ids
        max_length = self.max_context
        if params.max_tokens is not None:
            max_length = min(max_length, len(tokens) + params.max_tokens)
        return Sequence(
            tokens,
            max_length,
            sampler=Sampler(params.resolve(self.generation_defaults), tokens, self._guide(params, matcher)),
            stop_token_ids=stop_token_ids,
            receiver=receiver,
        )

    async def _collected(
        self, tokens: list[int], collector: Collector, priority: int
    ) -> npt.NDArray[np.float32]:
        """What the collector has found; who stops waiting cancels the rest."""
        sequence = self._collect(tokens, collector, priority)
        try:
            return await asyncio.wrap_future(collector.future)
        finally:
            if not sequence.finished:
                self._host.cancel(sequence)

    def _collect(self, tokens: list[int], collector: Collector, priority: int = 0) -> Sequence:
        sequence = Sequence(tokens, len(tokens), receiver=collector, rows=collector, priority=priority)
        self._host.submit(sequence, collector)
        return sequence
