"""Messages and their blocks as canonical messages. What cannot be told to a model is refused by its path."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from helexa.errors import InvalidParameter
from helexa.wire.anthropic.billing import normalize_billing_line

Canonical = dict[str, Any]


class Source(msgspec.Struct):
    """Where an image or a document is."""

    type: str
    data: str | None = None
    url: str | None = None
    media_type: str | None = None
    content: "str | list[Block] | None" = None


class Block(msgspec.Struct):
    """One block of any type, with the members that mean something here; others are ignored."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    source: Source | str | None = None
    title: str | None = None
    tool_name: str | None = None


Content = str | list[Block]


class Message(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: Content


def canonical_messages(
    system: Content | None, messages: Sequence[Message], *, normalize_billing: bool
) -> list[Canonical]:
    """The conversation; what is said to the system before its first turn is one message.

    A system message later on keeps its place, so that what came before it stays as it was.
    """
    first = next((index for index, message in enumerate(messages) if message.role != "system"), 0)
    texts = _system_texts(system or "", "system")
    for index, message in enumerate(messages[:first]):
        texts += _system_texts(message.content, f"messages[{index}].content")
    if normalize_billing:
        texts = [normalize_billing_line(text) for text in texts]
    found = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    for index, message in enumerate(messages[first:], first):
        path = f"messages[{index}].content"
        if message.role == "assistant":
            found.append(_assistant(message.content, path))
        elif message.role == "user":
            found += _user(message.content, path)
        elif texts := _system_texts(message.content, path):
            found.append({"role": "system", "content": "\n\n".join(texts)})
    return found


def _system_texts(content: Content, path: str) -> list[str]:
    texts = [content] if isinstance(content, str) else []
    for at, block in _blocks(content, path):
        if block.type != "text":
            raise _unexpected(block, at, "expected 'text'")
        texts.append(_required(block.text, at, "text"))
    return [text for text in texts if text]


def _user(content: Content, path: str) -> list[Canonical]:
    """Results of tools first, each as a message, then what the user says besides."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    found, parts = [], list[Canonical]()
    for at, block in _blocks(content, path):
        if block.type == "tool_result":
            call = _required(block.tool_use_id, at, "tool_use_id")
            said = _joined(_parts(block.content or "", f"{at}.content"))
            found.append({"role": "tool", "tool_call_id": call, "content": said})
        else:
            parts += _part(block, at)
    if parts or not found:
        found.append({"role": "user", "content": _joined(parts)})
    return found


def _assistant(content: Content, path: str) -> Canonical:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts, thoughts, calls = list[str](), list[str](), list[Canonical]()
    for at, block in _blocks(content, path):
        if block.type == "text":
            texts.append(_required(block.text, at, "text"))
        elif block.type == "thinking":
            thoughts.append(_required(block.thinking, at, "thinking"))
        elif block.type == "tool_use":
            name, call = _required(block.name, at, "name"), _required(block.id, at, "id")
            arguments = msgspec.json.encode(_required(block.input, at, "input")).decode()
            calls.append({"id": call, "type": "function", "function": {"name": name, "arguments": arguments}})
        elif block.type != "redacted_thinking":  # another provider's, which nobody else can read
            raise _unexpected(block, at, "expected 'text', 'thinking' or 'tool_use'")
    text = "".join(texts)
    found: Canonical = {"role": "assistant", "content": text if text or not calls else None}
    if reasoning := "\n\n".join(thought for thought in thoughts if thought):
        found["reasoning_content"] = reasoning
    if calls:
        found["tool_calls"] = calls
    return found


def _parts(content: Content, path: str) -> list[Canonical]:
    if isinstance(content, str):
        return [_text(content)] if content else []
    return [part for at, block in _blocks(content, path) for part in _part(block, at)]


def _part(block: Block, at: str) -> list[Canonical]:
    """A block of a user or a tool as parts of a canonical message."""
    if block.type == "text":
        text = _required(block.text, at, "text")
        return [_text(text)] if text else []
    if block.type == "image":
        return [{"type": "image_url", "image_url": {"url": _image_url(block.source, at)}}]
    if block.type == "document":
        return _titled(block.title, _document(block.source, at))
    if block.type == "search_result":
        source = block.source if isinstance(block.source, str) else None
        return _titled(source, _titled(block.title, _parts(block.content or "", f"{at}.content")))
    if block.type == "tool_reference":  # all tools are in the prompt already, also those to be loaded later
        return [_text(_required(block.tool_name, at, "tool_name"))]
    raise _unexpected(block, at, "expected 'text', 'image', 'document', 'search_result' or 'tool_result'")


def _image_url(source: Source | str | None, at: str) -> str:
    if isinstance(source, Source) and source.type == "base64":
        media_type = _required(source.media_type, f"{at}.source", "media_type")
        return f"data:{media_type};base64,{_required(source.data, f'{at}.source', 'data')}"
    if isinstance(source, Source) and source.type == "url":
        return str(_required(source.url, f"{at}.source", "url"))
    raise _wrong_source(source, at, "'base64' or 'url'")


def _document(source: Source | str | None, at: str) -> list[Canonical]:
    if isinstance(source, Source) and source.type == "text":
        return [_text(_required(source.data, f"{at}.source", "data"))]
    if isinstance(source, Source) and source.type == "content":
        return _parts(source.content or "", f"{at}.source.content")
    raise _wrong_source(source, at, "'text' or 'content', as only text can be read here")


def _titled(title: str | None, parts: list[Canonical]) -> list[Canonical]:
    return [_text(f"{title}\n"), *parts] if title else parts


def _text(text: str) -> Canonical:
    return {"type": "text", "text": text}


def _joined(parts: list[Canonical]) -> str | list[Canonical]:
    """As a text where there is only one."""
    if not parts:
        return ""
    return str(parts[0]["text"]) if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _blocks(content: Content, path: str) -> list[tuple[str, Block]]:
    if isinstance(content, str):
        return []
    return [(f"{path}[{index}]", block) for index, block in enumerate(content)]


def _required(value: Any, at: str, name: str) -> Any:
    if value is None:
        raise InvalidParameter(f"missing required field '{at}.{name}'", param=f"{at}.{name}")
    return value


def _unexpected(block: Block, at: str, expectation: str) -> InvalidParameter:
    message = f"'{at}' is a block of type {block.type!r:.80}, which is not supported here; {expectation}"
    return InvalidParameter(message, param=f"{at}.type")


def _wrong_source(source: Source | str | None, at: str, expectation: str) -> InvalidParameter:
    found = f"of type {source.type!r:.80}" if isinstance(source, Source) else "no source object"
    return InvalidParameter(f"'{at}.source' is {found}; expected {expectation}", param=f"{at}.source")
