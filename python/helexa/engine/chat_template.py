"""Chat templates: the messages of a request as the text that the model was trained on.

The template is the model's own and says everything; nothing is added to the messages and nothing left out.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jinja2

from helexa.engine.output.arguments import whole_arguments
from helexa.engine.output.tools import Tool
from helexa.engine.template_sandbox import Sandbox
from helexa.engine.tokenizer import Tokenizer
from helexa.errors import BadRequest, InvalidFile, InvalidParameter
from helexa.log import fields

logger = logging.getLogger(__name__)

# For files with the tokens of ChatML and no template.
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
MAX_SOURCE = 1 << 18  # characters of a template

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_PROBE = "probe-of-a-text-part"

Message = Mapping[str, Any]


class ChatTemplate:
    """One model's chat template, compiled."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "", *, tool_use: str | None = None):
        """tool_use: a template to use instead when there are tools. Raises InvalidFile for a syntax error."""
        self.source = source
        self.tool_use_source = tool_use or source
        self._special = {"bos_token": bos_token, "eos_token": eos_token}
        self._sandbox = Sandbox()
        self._template = self._compile(source)
        self._with_tools = self._compile(tool_use) if tool_use else self._template
        self._takes_parts = self._probe_parts()
        self._takes_late_system = self._probe_late_system()
        self._takes_text_arguments = self._probe_text_arguments()

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> Self | None:
        """The template of a GGUF file, or ChatML if the file has its tokens and no template; else None."""
        source = metadata.get("tokenizer.chat_template")
        if source is None and "<|im_start|>" in tokenizer.special_tokens:
            logger.info("chat_template_assumed", extra=fields(template="chatml"))
            source = CHATML
        if source is None:
            return None
        tool_use = metadata.get("tokenizer.chat_template.tool_use")
        if not isinstance(source, str) or not isinstance(tool_use, str | None):
            raise InvalidFile("tokenizer.chat_template is not a text")
        return cls(source, tokenizer.bos_token, tokenizer.eos_token, tool_use=tool_use)

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`, in the form of OpenAI's chat API; the messages are not modified.

        variables: whatever else the template understands, such as enable_thinking. Raises BadRequest with the
        template's words if it refuses the messages, InvalidParameter for content that is not text.
        """
        prepared = [self._prepare(index, message) for index, message in enumerate(messages)]
        if not self._takes_late_system:
            prepared = _with_one_system(prepared)
        plain = [_without_empty_fields(tool) for tool in tools or ()]
        try:
            return self._render(prepared, plain, add_generation_prompt, variables)
        except BadRequest:
            complete = [_complete(tool) for tool in plain]
            if complete == plain:
                raise
            return self._render(prepared, complete, add_generation_prompt, variables)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        prompt: bool,
        variables: dict[str, Any],
    ) -> str:
        given = {"messages": messages, "tools": tools or None, "add_generation_prompt": prompt}
        template = self._with_tools if tools else self._template
        try:
            return self._sandbox.render(template, {**self._special, **variables, **given})
        except Exception as error:  # a template is a foreign program and may fail in any way
            reason = str(error) or type(error).__name__
            raise BadRequest(f"the model's chat template refused the messages: {reason}") from error

    def _compile(self, source: str) -> jinja2.Template:
        if len(source) > MAX_SOURCE:
            raise InvalidFile(
                f"the chat template has {len(source)} characters, expected at most {MAX_SOURCE}"
            )
        try:
            return self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidFile(
                f"the chat template is wrong in line {error.lineno}: {error.message}"
            ) from error
        except (RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise InvalidFile(f"the chat template cannot be compiled: {error}") from error

    def _probe_parts(self) -> bool:
        """Whether the template itself takes content apart that is a list of parts."""
        message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
        try:
            written = self._render([message], None, False, {})
        except BadRequest:
            return False
        return _PROBE in written and f"'{_PROBE}'" not in written and f'"{_PROBE}"' not in written

    def _probe_late_system(self) -> bool:
        """Whether the template takes system messages that are not the first message."""
        messages = [{"role": "user", "content": "a"}, {"role": "system", "content": _PROBE}]
        try:
            return _PROBE in self._render(messages, None, False, {})
        except BadRequest:
            return False

    def _probe_text_arguments(self) -> bool:
        """Whether the template writes arguments of calls that are no object."""
        call = {"type": "function", "function": {"name": "f", "arguments": _PROBE}}
        messages: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            return _PROBE in self._render(messages, None, False, {})
        except BadRequest:
            return False

    def _prepare(self, index: int, message: Message) -> dict[str, Any]:
        """A message as templates expect it: no empty fields, content as text, arguments as objects."""
        prepared = {name: value for name, value in message.items() if value is not None}
        content = prepared.get("content", "")
        if not isinstance(content, str):
            texts = _text_parts(content, f"messages[{index}].content")
            parts = [{"type": "text", "text": text} for text in texts]
            content = parts if self._takes_parts and parts else "".join(texts)
        prepared["content"] = content
        if prepared.get("role") == "developer" and "developer" not in self.source:
            prepared["role"] = "system"
        if "tool_calls" in prepared:
            prepared["tool_calls"] = [self._prepare_call(call) for call in prepared["tool_calls"]]
        return prepared

    def _prepare_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A tool call with its arguments as an object: templates walk through it.

        Arguments that are none, as those of a call that was cut off, stay a text if the template takes one.
        """
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str | None):
            return dict(call)
        text = function.get("arguments") or "{}"
        try:
            arguments = json.loads(text)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            if self._takes_text_arguments:
                return dict(call)
            arguments = json.loads(whole_arguments(Tool("", None), text))
        return {**call, "function": {**function, "arguments": arguments}}


def _with_one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leading system messages as one; later ones are said with a user's words before them, or as a user's."""
    found = list[dict[str, Any]]()
    for message in messages:
        before = found[-1].get("role") if found else None
        if message.get("role") != "system" or before is None:
            found.append(message)
        elif before in ("system", "user"):
            found[-1] = {**found[-1], "content": _joined(found[-1]["content"], message["content"])}
        else:
            found.append({**message, "role": "user"})
    return found


def _joined(first: Any, second: Any) -> Any:
    """Two contents, each a text or parts, a blank line apart."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    one, other = (
        [{"type": "text", "text": content}] if isinstance(content, str) else content
        for content in (first, second)
    )
    return [*one, {"type": "text", "text": "\n\n"}, *other]


def _text_parts(content: Any, param: str) -> list[str]:
    texts = []
    for index, part in enumerate(content if isinstance(content, list | tuple) else [content]):
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get(_TEXT_PARTS.get(str(kind), "")) if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            name = f"{param}[{index}]"
            expected = "it has no text" if str(kind) in _TEXT_PARTS else "this model reads only text"
            raise InvalidParameter(f"{name} is of type {kind!r:.80}; {expected}", param=name)
        texts.append(text)
    return texts


def _without_empty_fields(tool: Any) -> Any:
    """A tool and its function without what is null, which a template would write down."""
    if not isinstance(tool, Mapping):
        return tool
    plain = {name: value for name, value in tool.items() if value is not None}
    if isinstance(function := plain.get("function"), Mapping):
        plain["function"] = {name: value for name, value in function.items() if value is not None}
    return plain


def _complete(tool: Any) -> Any:
    """A tool with the fields that a template may take for granted."""
    if not isinstance(tool, Mapping) or not isinstance(function := tool.get("function"), Mapping):
        return tool
    usual = {"description": "", "parameters": {"type": "object", "properties": {}, "required": []}}
    return {**tool, "function": {**usual, **function}}
