"""`helexa chat`: a conversation in the terminal, through the same API that every other client uses."""

import asyncio
import contextlib
import signal
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from helexa.cli.client import GATEWAY_URL, Client, Key
from helexa.cli.terminal import show_error
from helexa.errors import BadRequest, HelexaError

HELP = "/new forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


class Conversation:
    """The messages so far; asking appends the question and its answer."""

    def __init__(self, client: Client, options: dict[str, Any], system: str | None, console: Console):
        self._client = client
        self._options = options
        self._opening = [{"role": "system", "content": system}] if system else []
        self._console = console
        self._has_thought = False  # of which something stands at the end of the screen
        self.messages: list[dict[str, str]] = list(self._opening)

    def forget(self) -> None:
        """Starts anew with the system prompt."""
        self.messages = list(self._opening)

    async def ask(self, question: str) -> str:
        """Streams the answer to the terminal and returns it; a question without an answer is taken back."""
        self.messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        start, usage = time.perf_counter(), None
        body = {**self._options, "messages": self.messages}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with contextlib.aclosing(self._client.stream("/v1/chat/completions", body)) as events:
                async for event in events:
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", ()):
                        delta = choice["delta"]
                        self._show_thought(delta.get("reasoning_content") or "")
                        self._show(delta.get("content") or "", pieces)
        finally:
            self._has_thought = False
            self._console.out("")
            if answer := "".join(pieces):
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()
        if usage and self._console.is_terminal:
            seconds = time.perf_counter() - start
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            self._console.print(
                f"{usage['prompt_tokens']} prompt tokens ({cached} cached), "
                f"{usage['completion_tokens']} generated in {seconds:.1f} s",
                style="dim",
                highlight=False,
            )
        return answer

    def _show_thought(self, text: str) -> None:
        """On a terminal; elsewhere the answer stands alone."""
        if text and self._console.is_terminal:
            self._console.out(text, style="dim", end="", highlight=False)
            self._console.file.flush()
            self._has_thought = True

    def _show(self, text: str, pieces: list[str]) -> None:
        if text and self._has_thought:
            self._console.out("\n")
            self._has_thought = False
        pieces.append(text)
        self._console.out(text, end="", highlight=False)
        self._console.file.flush()


async def choose_model(client: Client, wanted: str | None) -> str:
    """`wanted`, or the first model that is loaded, or the only one there is."""
    if wanted is not None:
        return wanted
    models = (await client.get("/v1/models"))["data"]
    loaded = [model["id"] for model in models if model.get("loaded") or model.get("status") == "loaded"]
    if not models:
        raise BadRequest(f"{client.url} offers no model; load one: helexa load MODEL")
    return str(loaded[0] if loaded else models[0]["id"])


async def _interruptible(answer: asyncio.Task[str]) -> None:
    """Waits for the answer; Ctrl-C cancels it and returns to the prompt."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, answer.cancel)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await answer
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _converse(talk: Conversation, model: str, console: Console) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's own lets input() go on
    console.print(f"[bold]{model}[/bold] at your service. {HELP}.", highlight=False)
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            console.out("")
            return
        if question in ("/quit", "/exit"):
            return
        if question == "/new":
            talk.forget()
        elif question.startswith("/"):
            console.print(HELP, style="dim", highlight=False)
        elif question:
            try:
                await _interruptible(asyncio.create_task(talk.ask(question)))
            except HelexaError as error:
                show_error(error, console)


async def _run(
    url: str,
    key: str | None,
    model: str | None,
    system: str | None,
    message: str | None,
    options: dict[str, Any],
) -> None:
    console = Console(soft_wrap=True)
    async with Client(url, key, timeout_s=None) as client:
        name = await choose_model(client, model)
        given = {key: value for key, value in options.items() if value is not None}
        talk = Conversation(client, {"model": name, **given}, system, console)
        if message is None and sys.stdin.isatty():
            await _converse(talk, name, console)
        else:
            await talk.ask(message if message is not None else sys.stdin.read())


def chat(
    model: Annotated[
        str | None, typer.Argument(help="a model or alias; the first loaded one if not given")
    ] = None,
    url: Annotated[str, typer.Option(help="gateway or neuron", envvar="HELEXA_URL")] = GATEWAY_URL,
    key: Key = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="ask this, print the answer, leave")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is always the most likely token")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer")] = None,
    seed: Annotated[int | None, typer.Option(help="same seed, same answer")] = None,
) -> None:
    """Talk with a model; without a terminal the question is read from standard input."""
    options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    asyncio.run(_run(url, key, model, system, message, options))
