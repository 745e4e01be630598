"""The Jinja environment in which the chat template of a model file runs.

To a template it looks like that of `transformers` (utils/chat_template_utils.py): the same whitespace
rules, loop controls, `tojson`, `raise_exception` and `strftime_now`. A template is foreign code: beyond
Jinja's sandbox, its time and the size of all that it makes are bounded.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 10.0
MAX_SIZE = (
    1 << 23
)  # of one value: characters of a text, items of a list, values in a nest of lists and objects
MAX_TOTAL = 1 << 28  # of all values that one rendering makes
MAX_WIDTH = 1000  # to which a text is padded
MAX_BITS = 1 << 16  # of a whole number

_SCOPE = ("_loop_vars", "_block_vars")
_ITEM = 32  # characters as which a value other than a text counts

# Padding or unbounded in ways that no chat template needs, or not a function of the input.
_WITHOUT_FILTERS = {"batch", "center", "format", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr"}
_WITHOUT_METHODS = {"expandtabs", "translate"}
_TEXT_FILTERS = {
    "capitalize",
    "e",
    "escape",
    "forceescape",
    "lower",
    "string",
    "title",
    "trim",
    "upper",
    "urlencode",
}
_PADDING_METHODS = {"center", "ljust", "rjust", "zfill"}
_WIDE_FORMAT = re.compile(r"\d{4}|\*|\{[^{}]*:[^{}]*\{")  # a large width, or one given as an argument


class TooMuch(jinja2.TemplateError):
    """The template takes more time or memory than any real one does."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders chat templates within bounds; several threads may render at once."""

    intercepted_binops = frozenset(["*", "+", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self._finalize,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self._run = threading.local()  # deadline and total of the rendering in this thread
        filters = self.filters | {name: _unavailable(name) for name in _WITHOUT_FILTERS}
        filters |= {"indent": _indent, "join": _join_filter, "replace": _replace, "tojson": _tojson}
        self.filters = {name: self._bounded(name, function) for name, function in filters.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """The text that a template makes. Raises TooMuch, or whatever the template raises."""
        self._run.deadline, self._run.total = time.monotonic() + MAX_SECONDS, 0
        pieces, size = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_SIZE:
                raise TooMuch(f"it writes more than {MAX_SIZE} characters")
        return "".join(pieces)

    def tick(self) -> None:
        """Runs at each turn of a loop and each call of a macro: nothing else in a template can last."""
        if time.monotonic() > self._run.deadline:
            raise TooMuch(f"it takes more than {MAX_SECONDS:g} seconds")

    def concatenate(self, *values: Any) -> str:
        """What the operator ~ does."""
        texts = [_text(value) for value in values]
        _check_size(sum(map(len, texts)))
        return str(self._count("".join(texts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _CHECKS[operator](left, right)
        return self._count(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            # Jinja adds the variables of the scope; only functions that take a context get them.
            given = {name: value for name, value in kwargs.items() if name not in _SCOPE}
            if method.__name__ in ("join", "replace"):
                guarded: Callable[..., str] = _join if method.__name__ == "join" else _replace
                return __self._count(guarded(owner, *args, **given))
            _check_method(owner, method.__name__, args, given)
        return __self._count(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute."""
        forbidden = isinstance(obj, str) and attr in _WITHOUT_METHODS
        return not forbidden and super().is_safe_attribute(obj, attr, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _Bounds().visit(template)
        return template.set_environment(self)  # type: ignore[return-value]

    def _finalize(self, value: Any) -> Any:
        return self._count(_text(value)) if isinstance(value, list | tuple | dict) else self._count(value)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # with the marks by which Jinja knows what to pass
        def run(*args: Any, **keywords: Any) -> Any:
            if name == "round" and any(isinstance(digits, int) and digits > MAX_WIDTH for digits in args[1:]):
                raise TooMuch(f"it rounds to more than {MAX_WIDTH} digits")
            if name in _TEXT_FILTERS:
                for value in args:
                    _check_nest(value)
            return self._count(function(*args, **keywords))

        return run

    def _count(self, value: Any) -> Any:
        """`value`, with its size added to the total of this rendering."""
        if isinstance(value, str | list | tuple | dict):
            size = len(value)
            _check_size(size)
            self._run.total += size + 16
            if self._run.total > MAX_TOTAL:
                raise TooMuch("it makes more text than any real one does")
        return value


class _Bounds(NodeTransformer):
    """Lets each turn of a loop and each macro tick, and the operator ~ be checked."""

    def _ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _ticking

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        function = nodes.EnvironmentAttribute("concatenate")
        return nodes.Call(function, node.nodes, [], None, None).set_lineno(node.lineno)


class _Generation(Extension):
    """{% generation %} marks the assistant's text for training; for inference it is only a block."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
            line
        )


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TooMuch(f"it makes a value of more than {MAX_SIZE} characters or items")


def _check_nest(value: Any) -> int:
    """What a nest of lists and objects takes written out, about; shared parts count wherever they stand."""
    size, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
        size += len(item) if isinstance(item, str) else _ITEM
        _check_size(size + len(pending))
    return size


def _text(value: Any) -> str:
    if not isinstance(value, str):
        _check_nest(value)
    return str(value)


def _check_product(left: Any, right: Any) -> None:
    numbers = isinstance(left, int) and isinstance(right, int)
    if numbers and left.bit_length() + right.bit_length() > MAX_BITS:
        raise TooMuch(f"it makes a number of more than {MAX_BITS} bits")
    for times, value in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(value, str | list | tuple):
            _check_size(times * len(value))


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_BITS:
        raise TooMuch(f"it makes a number of more than {MAX_BITS} bits")


def _check_sum(left: Any, right: Any) -> None:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_size(len(left) + len(right))


def _check_format(pattern: Any, values: Any) -> None:
    if isinstance(pattern, str):
        if _WIDE_FORMAT.search(pattern):
            raise TooMuch(f"it formats with {pattern[:40]!r}")
        fields = pattern.count("{") + pattern.count("%")
        _check_size(len(pattern) + fields * _check_nest(values))


_CHECKS = {"*": _check_product, "**": _check_power, "+": _check_sum, "%": _check_format}


def _check_method(text: str, name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if name in ("format", "format_map"):
        _check_format(text, [*args, *keywords.values()])
    elif name in _PADDING_METHODS and any(isinstance(width, int) and width > MAX_WIDTH for width in args):
        raise TooMuch(f"it pads a text to more than {MAX_WIDTH} characters")


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = _text(text), _text(old), _text(new)
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    _check_size(len(text) + times * len(new))
    return str(text.replace(old, new, times))


def _join(separator: str, values: Iterable[Any]) -> str:
    texts = [_text(value) for value in values]
    _check_size(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


@jinja2.pass_context
def _join_filter(
    context: Context, values: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        keywords = {"attribute": attribute}
        values = context.environment.call_filter("map", values, kwargs=keywords, context=context)
    return _join(_text(d), values)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * min(width, MAX_WIDTH)
    lines = _text(text).split("\n")
    _check_size(sum(map(len, lines)) + len(lines) * (len(margin) + 1))
    indented = [margin + line if line or blank else line for line in lines]
    return "\n".join([indented[0] if first else lines[0], *indented[1:]])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check_nest(value)
    indent = min(indent, 16) if indent else indent
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _unavailable(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **keywords: Any) -> NoReturn:
        raise TooMuch(f"the filter {name!r} is not available to chat templates")

    return refuse


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    _check_format(pattern, ())
    return datetime.now().strftime(pattern)
