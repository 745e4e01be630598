"""What both daemons need to be reached over HTTP: listening sockets, the server's settings, TLS, who is near.

The settings are hypercorn's; helexa.server follows them.
"""

import ipaddress
import logging
import re
import socket
import ssl
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import hypercorn.config

from helexa.errors import ConfigError

BACKLOG = 1024
_GONE_S = 300  # without a word from a client, or without its taking any of what waits for it
_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")


@dataclass(frozen=True)
class TlsConfig:
    """[tls]: with a certificate a daemon speaks https alone, with client_ca only to whom that has signed."""

    cert: str | None = None  # PEM files
    key: str | None = None
    client_ca: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("tls.cert and tls.key belong together")
        if self.client_ca and not self.cert:
            raise ValueError("tls.client_ca needs tls.cert and tls.key")

    def check(self) -> None:
        """Raises ConfigError unless the files are what they should be."""
        if self.cert:
            _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.client_ca, self.cert, self.key)


def client_tls(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    """How a client trusts servers that `ca` has signed, and no others, and shows its own certificate.

    Without `ca` those that the system trusts. Raises ConfigError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is None:
        context.load_default_certs()
    _load(context, ca, cert, key)
    return context


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections. Raises ConfigError if the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    made.setblocking(False)
    end_when_gone(made, _GONE_S)  # which the connections that it accepts inherit
    return made


def end_when_gone(connection: socket.socket, after_s: int) -> None:
    """Has the system end it when nothing is heard of the other side for long, as of a machine without power.

    So it does when the other side is there and takes nothing of what waits for it.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        *(("TCP_KEEPIDLE", after_s // 4), ("TCP_KEEPINTVL", after_s // 4), ("TCP_KEEPCNT", 3)),
        ("TCP_USER_TIMEOUT", after_s * 1000),  # the same while there is something to send
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def url_of(listener: socket.socket, tls: TlsConfig | None = None) -> str:
    """Where a client on this machine finds the listener."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls and tls.cert else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def server_settings(
    listener: socket.socket, grace_s: float, tls: TlsConfig | None = None
) -> hypercorn.config.Config:
    """How the listener is served, which is theirs from then on; grace_s: for last words at its end."""
    settings = hypercorn.config.Config()
    settings.bind = [f"fd://{listener.detach()}"]
    settings.errorlog = logging.getLogger("hypercorn.error")
    settings.errorlog.setLevel(logging.WARNING)
    settings.accesslog = None
    settings.include_server_header = False
    settings.keep_alive_timeout = 75.0
    settings.keep_alive_max_requests = 2**31
    settings.graceful_timeout = grace_s
    settings.h11_max_incomplete_size = 64 * 1024
    settings.backlog = BACKLOG
    settings.alpn_protocols = ["http/1.1"]
    if tls and tls.cert:
        settings.certfile, settings.keyfile = tls.cert, tls.key
        if tls.client_ca:
            settings.ca_certs, settings.verify_mode = tls.client_ca, ssl.CERT_REQUIRED
    return settings


def check_secret(name: str, secret: str | None) -> None:
    """Raises ValueError for a shared secret that is weak or that no header can carry."""
    if secret is not None and re.fullmatch(r"[\x21-\x7e]{16,}", secret) is None:
        raise ValueError(f"{name} must have at least 16 printable ASCII characters and no blanks")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")


@lru_cache(64)
def is_public_name(host: str) -> bool:
    """Whether a Host header has a name that anybody may own.

    A page of a foreign site reaches this machine's loopback by letting its own name point there. Addresses
    cannot be owned so, nor can names that only private networks have.
    """
    name = re.sub(r":\d+$", "", host).strip("[]").rstrip(".").lower()
    if "." not in name or name.endswith(_PRIVATE_SUFFIXES):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return True
    return False


def _load(context: ssl.SSLContext, ca: str | None, cert: str | None, key: str | None) -> None:
    for path in (ca, cert, key):
        if path and not Path(path).is_file():
            raise ConfigError(f"tls: no file at {path}")
    try:
        if ca:
            context.load_verify_locations(ca)
        if cert:
            context.load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"tls: {ca or ''} {cert or ''} {key or ''}: {error}") from None
