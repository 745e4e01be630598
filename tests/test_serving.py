"""Listening, TLS in both directions, and names that anybody may own."""

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from helexa.errors import ConfigError
from helexa.gateway.poller import reason
from helexa.server import serve
from helexa.serving import (
    TlsConfig,
    check_secret,
    client_tls,
    is_loopback,
    is_public_name,
    listen,
    server_settings,
    url_of,
)


class Certificates:
    """Two authorities, and what the first has signed for 127.0.0.1 and for a client; `openssl` makes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        for authority in ("ca", "other"):
            self._run(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca", authority
            )
        for name in ("server", "client"):
            self._run("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=helexa", name, "csr")
            (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
            sign = "x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -in"
            subprocess.run(
                ["openssl", *sign.split(), f"{name}.csr", "-out", f"{name}.pem"],
                cwd=folder,
                check=True,
                capture_output=True,
            )

    def __call__(self, name: str) -> str:
        return str(self.folder / name)

    def _run(self, arguments: str, name: str, kind: str = "pem") -> None:
        command = ["openssl", *arguments.split(), "-keyout", f"{name}.key", "-out", f"{name}.{kind}"]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    return Certificates(tmp_path_factory.mktemp("tls"))


async def hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})


@asynccontextmanager
async def serving(tls: TlsConfig) -> AsyncIterator[str]:
    tls.check()
    with listen("127.0.0.1", 0) as listener:
        url, stop = url_of(listener, tls), asyncio.Event()
        settings = server_settings(listener, 0.2, tls)
        server = asyncio.create_task(serve(hello, settings, stop.wait))
        try:
            yield url
        finally:
            stop.set()
            await server


async def ask(url: str, context: Any) -> bytes:
    async with aiohttp.ClientSession() as client, client.get(url, ssl=context) as response:
        return await response.read()


async def test_without_a_certificate_it_is_plain_http() -> None:
    async with serving(TlsConfig()) as url:
        assert url.startswith("http://127.0.0.1:")
        assert await ask(url, True) == b"hello"


async def test_a_client_believes_only_whom_its_authority_has_signed(certificates: Certificates) -> None:
    async with serving(TlsConfig(certificates("server.pem"), certificates("server.key"))) as url:
        assert url.startswith("https://127.0.0.1:")
        assert await ask(url, client_tls(certificates("ca.pem"), None, None)) == b"hello"
        for context in (client_tls(certificates("other.pem"), None, None), client_tls(None, None, None)):
            with pytest.raises(aiohttp.ClientConnectorCertificateError) as failed:
                await ask(url, context)
            assert reason(failed.value).startswith("its certificate is not trusted: ")
        with pytest.raises(
            aiohttp.ClientConnectorCertificateError, match=r"IP address mismatch|Hostname mismatch"
        ):
            await ask(url.replace("127.0.0.1", "localhost"), client_tls(certificates("ca.pem"), None, None))


async def test_a_server_with_a_client_ca_answers_only_whom_that_has_signed(
    certificates: Certificates,
) -> None:
    ca, own = certificates("ca.pem"), (certificates("server.pem"), certificates("server.key"))
    async with serving(TlsConfig(*own, client_ca=ca)) as url:
        known = client_tls(ca, certificates("client.pem"), certificates("client.key"))
        assert await ask(url, known) == b"hello"
        for stranger in (
            client_tls(ca, None, None),
            client_tls(ca, certificates("other.pem"), certificates("other.key")),
        ):
            with pytest.raises(aiohttp.ClientError):
                await ask(url, stranger)


def test_files_that_do_not_fit_are_told_before_anything_listens(certificates: Certificates) -> None:
    with pytest.raises(ConfigError, match="no file at /nowhere"):
        TlsConfig("/nowhere", "/nowhere").check()
    with pytest.raises(ConfigError, match=r"tls: .*mismatch"):
        TlsConfig(certificates("server.pem"), certificates("client.key")).check()
    with pytest.raises(ConfigError, match="tls: "):
        client_tls(certificates("san"), None, None)


@pytest.mark.parametrize("files", [{"cert": "a"}, {"key": "a"}, {"client_ca": "a"}])
def test_half_a_tls_configuration_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"tls\."):
        TlsConfig(**files)


def test_an_address_that_is_taken_is_one_sentence() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *[(host, True) for host in ("evil.example", "evil.example.:80", "10.0.0.1.evil.example")],
        *[
            (host, False)
            for host in ("a.local", "10.0.0.1:80", "[fe80::1]:80", "localhost:80", "x.localhost")
        ],
    ],
)
def test_public_names_are_those_that_anybody_may_own(host: str, expected: bool) -> None:
    assert is_public_name(host) is expected


def test_loopback_is_this_machine_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "")))


@pytest.mark.parametrize(
    "secret", ["short", "with a blank in it!", "öööööööööööööööööö", "a" * 15, "a" * 20 + "\n"]
)
def test_a_secret_is_long_and_fits_a_header(secret: str) -> None:
    with pytest.raises(ValueError, match=r"auth\.secret must have at least 16"):
        check_secret("auth.secret", secret)
    check_secret("auth.secret", "a" * 16)
    check_secret("auth.secret", None)


def test_the_system_notices_clients_that_vanish_without_a_word() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            silent_s = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            silent_s += 3 * accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            assert silent_s <= 300
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 300_000
