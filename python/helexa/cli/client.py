"""HTTP for the commands that talk to a running gateway or neuron: JSON in and out, and server-sent events."""

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Annotated, Any, Self

import aiohttp
import orjson
import typer

from helexa.errors import HelexaError, UpstreamClosed, UpstreamTimeout
from helexa.wire import sse
from helexa.wire.errors import parse_error

GATEWAY_URL = "http://127.0.0.1:31313"

Key = Annotated[str | None, typer.Option(help="API key, where one is required", envvar="HELEXA_API_KEY")]


class Client:
    """One server. Every failure is a HelexaError whose message can be shown as it is."""

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float | None = 30):
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=5)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, path: str) -> Any:
        """The JSON answer of GET."""
        return orjson.loads(b"".join([chunk async for chunk in self._send("GET", path, None)]))

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer of POST."""
        return orjson.loads(b"".join([chunk async for chunk in self._send("POST", path, body)]))

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The data of each event until `[DONE]`. Raises the error that an event carries."""
        parser = sse.Parser()
        async for chunk in self._send("POST", path, body):
            for event in parser.feed(chunk):
                if event.data == "[DONE]":
                    return
                data = orjson.loads(event.data)
                if "error" in data:
                    raise parse_error(502, event.data.encode())
                yield data

    async def _send(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncGenerator[bytes, None]:
        try:
            async with self._session.request(method, self.url + path, json=body) as response:
                if response.status >= 400:
                    retry_after = response.headers.get("retry-after")
                    raise parse_error(response.status, await response.read(), retry_after)
                async for chunk in response.content.iter_any():
                    yield chunk
        except aiohttp.InvalidURL as error:
            raise HelexaError(f"{self.url} is not a URL; write for example {GATEWAY_URL}") from error
        except TimeoutError as error:
            raise UpstreamTimeout(f"{self.url} did not answer in time") from error
        except aiohttp.ClientConnectorError as error:
            raise UpstreamClosed(f"nothing answers at {self.url}; is it running? (`helexa up`)") from error
        except aiohttp.ClientError as error:
            raise UpstreamClosed(f"{self.url} closed the connection: {error}") from error
