"""A scripted engine behind a neuron that listens on loopback."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from helexa.engine.chat_template import ChatTemplate
from helexa.engine.engine import Engine
from helexa.engine.grammar import GrammarSpec
from helexa.engine.output import OutputFormat
from helexa.engine.sampling_params import SamplingParams
from helexa.engine.sequence import GenerationProgress
from helexa.engine.state_store import StateStore
from helexa.engine.stream import Delta, TokenLogprob, Usage
from helexa.errors import HelexaError, InvalidParameter, ShuttingDown, SourceError
from helexa.neuron.app import Neuron
from helexa.neuron.config import (
    AdmissionSection,
    ModelEntry,
    NeuronConfig,
    NeuronSection,
    PromptSection,
    StateCacheSection,
)
from helexa.server import serve
from helexa.serving import listen, server_settings, url_of
from helexa.weights.load import LoadProgress


class FakeTokenizer:
    """Bytes as tokens."""

    vocab_size = 256
    eos_token_ids = frozenset({0})

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        return list(text.encode())

    def least_tokens(self, text: str) -> int:
        return len(text)

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def is_special(self, token_id: int) -> bool:
        return False


class FakeTemplate(ChatTemplate):
    """A plain template that remembers what it was last given."""

    def __init__(self) -> None:
        super().__init__(
            "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        )

    def _render(self, messages: Any, tools: Any, prompt: bool, variables: dict[str, Any]) -> str:
        self.messages, self.keywords = messages, variables
        return super()._render(messages, tools, prompt, variables)


@dataclass
class Script:
    """How the fake engines of one test behave; changed by the test while they run."""

    reply: str = "Hi you"
    delay_s: float = 0.0
    max_context: int = 200
    max_sequences: int = 2
    output_format: OutputFormat = field(default_factory=OutputFormat)
    hold: asyncio.Event | None = None  # generation waits for it before its first token
    prefilled: int = 0  # tokens of the prompt that are computed meanwhile
    fail_at: int | None = None  # token at which generation fails
    error: Exception = field(default_factory=lambda: HelexaError("the device broke"))
    load_hold: threading.Event | None = None
    load_error: Exception | None = None
    poisoned: str | None = None
    loads: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    reserved_bytes: list[int] = field(default_factory=list)  # at each load
    engines: list["FakeEngine"] = field(default_factory=list)


class FakeEngine:
    """The interface of helexa.engine.engine.Engine, with a script in place of a model."""

    def __init__(self, script: Script):
        self.script = script
        self.tokenizer = FakeTokenizer()
        self.chat_template = FakeTemplate()
        self.pooling = "last"
        self.output_format = script.output_format
        self.max_context = script.max_context
        self.config = SimpleNamespace(vocab_size=256, hidden_size=4, model_type="fake")
        self.options = SimpleNamespace(max_sequences=script.max_sequences, device="cpu")
        self.weight_bytes = self.cache_bytes = 0
        self.model_key = ""
        self.running = 0
        self.cancelled = 0
        self.params: list[SamplingParams] = []
        self.namespaces: list[str] = []
        self.is_closed = False

    async def generate(
        self,
        token_ids: list[int],
        params: SamplingParams,
        *,
        namespace: str,
        priority: int,
        progress: GenerationProgress,
    ) -> AsyncIterator[Delta]:
        if self.is_closed:
            raise ShuttingDown("closed")
        self.running += 1
        self.params.append(params)
        self.namespaces.append(namespace)
        is_done = False
        try:
            if self.script.hold:
                progress.computed_tokens, progress.prompt_tokens = self.script.prefilled, len(token_ids)
                progress.is_prefilling = self.script.prefilled > 0
                await self.script.hold.wait()
                progress.is_prefilling = False
            data = self.script.reply.encode()[: params.max_tokens]
            for position, token_id in enumerate(data):
                if position == self.script.fail_at:
                    is_done = True
                    raise self.script.error
                await asyncio.sleep(self.script.delay_s)
                logprobs = None if params.logprobs is None else [self._logprob(token_id, params.logprobs)]
                yield Delta(chr(token_id), [token_id], logprobs)
            is_done = True
            reason = "length" if len(data) == params.max_tokens else "stop"
            yield Delta(
                "", [], None, reason, Usage(len(token_ids), len(data), 3, len(token_ids) - 3, 1.0, 2.0, 3.0)
            )
        finally:
            self.running -= 1
            self.cancelled += not is_done

    async def check_grammar(self, spec: GrammarSpec) -> None:
        if "wrong" in spec.source:
            raise InvalidParameter("the grammar is wrong", param="response_format")

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(
            kv_tokens_used=self.running,
            kv_tokens_total=400,
            kv_tokens_cached=0,
            snapshots_used=0,
            snapshots_total=0,
            stored_tokens=0,
            prefill_tok_s=10.0,
            decode_tok_s=5.0,
            poisoned=self.script.poisoned,
        )

    def close(self, drain_s: float = 0.0) -> None:
        self.is_closed = True

    def _logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        return TokenLogprob(token_id, -0.5, [(token_id, -0.5), (200, -1.5)][:num_top])


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def make_neuron(script: Script) -> Callable[..., Neuron]:
    """A neuron of fake engines; `models` are loaded at its start."""

    def load(path: Path, *, progress: Callable[[LoadProgress], None], **options: Any) -> FakeEngine:
        script.reserved_bytes.append(options.pop("reserved_bytes"))
        script.loads.append((str(path), options))
        progress(LoadProgress("weights", 40.0))
        while script.load_hold and not script.load_hold.wait(0.02):
            progress(LoadProgress("weights", 50.0))
        if script.load_error:
            raise script.load_error
        progress(LoadProgress("ready", 100.0))
        engine = FakeEngine(script)
        script.engines.append(engine)
        return engine

    def fetch(source: str, report: Callable[[str, float], None]) -> Path:
        if source == "nowhere":
            raise SourceError("no model is named 'nowhere'")
        return Path("/models") / source

    def make(
        *models: str,
        admission: AdmissionSection | None = None,
        state_cache: StateCacheSection | None = None,
        **section: Any,
    ) -> Neuron:
        config = NeuronConfig(
            neuron=replace(NeuronSection(keep_alive_s=0.05, shutdown_grace_s=0.2), **section),
            admission=admission or AdmissionSection(),
            state_cache=state_cache or StateCacheSection(),
            models=tuple(ModelEntry(id=model) for model in models),
        )
        neuron = Neuron(config, load=load, fetch=fetch)  # type: ignore[arg-type]
        neuron.recovery.look_s = 3600.0  # tests of it have one of their own
        return neuron

    return make


@asynccontextmanager
async def listening(neuron: Neuron) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `neuron`, which listens on loopback."""
    listener = listen("127.0.0.1", 0)
    url = url_of(listener)
    app, stop = neuron.app, asyncio.Event()
    async with app.router.lifespan_context(app):
        server = asyncio.create_task(serve(app, server_settings(listener, 0.5), stop.wait))
        try:
            async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
                yield client
        finally:
            stop.set()
            await server


async def until(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    """Waits for something that the other side does."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def serve_neuron() -> Callable[[Neuron], Any]:
    return listening


@pytest.fixture
def eventually() -> Callable[..., Any]:
    return until


@pytest.fixture
async def client(make_neuron: Callable[..., Neuron]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a neuron on which model "m" is loaded."""
    neuron = make_neuron("m")
    async with listening(neuron) as client:
        await until(lambda: neuron.registry.activation().state == "ready")
        client.neuron = neuron  # type: ignore[attr-defined]
        yield client


@asynccontextmanager
async def serving(
    engine: Engine | Callable[[StateStore], Engine],
    state_cache: StateCacheSection | None = None,
    **prompt: Any,
) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client of a neuron on which `engine` is model "m"."""

    def load(path: Path, *, store: StateStore | None = None, **_: Any) -> Engine:
        return engine if isinstance(engine, Engine) else engine(store)

    config = NeuronConfig(
        neuron=NeuronSection(keep_alive_s=0.05, shutdown_grace_s=0.2),
        prompt=PromptSection(**prompt),
        state_cache=state_cache or StateCacheSection(),
        models=(ModelEntry(id="m"),),
    )
    neuron = Neuron(config, load=load, fetch=lambda source, _: Path(source))
    async with listening(neuron) as http:
        await until(lambda: neuron.registry.activation().state == "ready")
        url = f"{str(http.base_url).rstrip('/')}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as api:
            yield api


@pytest.fixture(scope="session")
def serve_engine() -> Callable[..., Any]:
    return serving
