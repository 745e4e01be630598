"""Logging as logfmt on stderr, configured once per process.

`logger.info("model_loaded", extra=fields(model=…, seconds=…))` becomes one line of `key=value` pairs.
"""

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

_PLAIN = re.compile(r'[^\s"=\\\x00-\x1f\x7f]+')


def fields(**values: Any) -> dict[str, Any]:
    """What to pass as `extra` of a logging call: the values become pairs of the line, None is left out."""
    return {"fields": {key: value for key, value in values.items() if value is not None}}


class LogfmtFormatter(logging.Formatter):
    """One line per record; a traceback follows on indented lines."""

    def format(self, record: logging.LogRecord) -> str:
        pairs: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "thread": record.threadName,
            "logger": record.name,
        }
        values = getattr(record, "fields", None)
        message = record.getMessage()
        if values is not None:
            pairs |= {"event": message, **values}
        elif not message.startswith("event="):
            pairs["msg"] = message
        line = " ".join(f"{key}={quote(value)}" for key, value in pairs.items())
        if values is None and message.startswith("event="):
            line += " " + message.replace("\n", "\\n")
        if record.exc_info:
            line += "\n  " + self.formatException(record.exc_info).replace("\n", "\n  ")
        return line


def quote(value: Any) -> str:
    """`value` as logfmt writes it: bare where that is unambiguous, else in double quotes on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    escaped = (
        text.replace("\\", "\\\\")
        .replace('"', '\\"')
        .replace("\n", "\\n")
        .replace("\r", "\\r")
        .replace("\t", "\\t")
    )
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", escaped) + '"'


def configure_logging(level: str = "info", stream: TextIO | None = None) -> None:
    """Makes the root logger write logfmt to `stream` (stderr) from `level` on, replacing what was there."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("hypercorn.access", "asyncio", "httpx", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
