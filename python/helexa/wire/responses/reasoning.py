"""Reasoning as the opaque `encrypted_content` of an item, for clients that keep conversations themselves.

The value is packed, not secret: it holds what the client may see anyway.
"""

import base64
import zlib

_MARK = "hx1."
MAX_BYTES = 8 << 20  # of the text that one value may unpack to


def seal(text: str) -> str:
    """An opaque value that `unseal` makes the text of again."""
    return _MARK + base64.urlsafe_b64encode(zlib.compress(text.encode(), 1)).decode()


def unseal(value: str) -> str | None:
    """The text, or None for a value of another server. Raises ValueError if it is ours and damaged."""
    if not value.startswith(_MARK):
        return None
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(base64.b64decode(value[len(_MARK) :], b"-_", validate=True), MAX_BYTES)
        if not unpacker.eof:
            raise ValueError("it is cut short or too large")
        return text.decode()
    except zlib.error as error:
        raise ValueError(str(error)) from error
