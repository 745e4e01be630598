"""docs/api.md lists exactly the routes, request fields, errors and headers that the daemons have."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.routing import Route

from helexa import errors
from helexa.gateway import admin
from helexa.gateway.app import create_app, create_metrics_app
from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig
from helexa.gateway.gateway import running
from helexa.neuron.app import Neuron
from helexa.neuron.config import NeuronConfig
from helexa.wire import control
from helexa.wire.anthropic import MessagesRequest
from helexa.wire.anthropic.errors import _TYPES
from helexa.wire.chat import ChatRequest
from helexa.wire.completions import CompletionRequest
from helexa.wire.embeddings import EmbeddingRequest
from helexa.wire.responses import ResponsesRequest
from helexa.wire.tokenize import DetokenizeRequest, TokenizeRequest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/helexa"
TEXT = re.sub(r"```.*?```", "", (ROOT / "docs/api.md").read_text("utf-8"), flags=re.DOTALL)
HEADING = re.compile(r"^(#{2,4}) (.+)$", re.MULTILINE)
ROUTE = re.compile(r"`(GET|HEAD|POST|PUT|PATCH|DELETE) (/[^\s`?]*)`")
OWN_HEADER = re.compile(r"(x|anthropic|request)-[a-z]+(-[a-z]+)*")  # of no standard
# Methods that a route has not are told by the framework; which request is no HTTP, by the server.
ERRORS_OF_FRAMEWORK = {("405", "method_not_allowed")}


def section(heading: str) -> str:
    """The text below a heading, with what is below its own headings."""
    marks = list(HEADING.finditer(TEXT))
    (place,) = [place for place, mark in enumerate(marks) if mark[2] == heading]
    level = len(marks[place][1])
    ends = [mark.start() for mark in marks[place + 1 :] if len(mark[1]) <= level]
    return TEXT[marks[place].end() : ends[0] if ends else len(TEXT)]


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of all rows of the tables that begin with `header`."""
    tables = re.findall(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n?)+)", text, re.MULTILINE)
    assert tables, f"no table that begins with {header!r}"
    found = [re.split(r" *(?<!\\)\| *", line.strip("| ")) for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in row] for row in found]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def words(text: str) -> set[str]:
    return {word for span in spans(text) for word in re.findall(r"\w+", span)}


def plain(path: str) -> str:
    """A route without the names of its parameters."""
    return re.sub(r"\{[^}]*\}", "{}", path)


async def gateway_routes() -> set[tuple[str, str]]:
    async with running(GatewayConfig(), Catalogue()) as gateway:
        app = create_app(gateway)._app._app  # type: ignore[attr-defined]
        return routes(app) | routes(create_metrics_app(gateway))


async def neuron_routes() -> set[tuple[str, str]]:
    return routes(Neuron(NeuronConfig()).app)


def routes(app: Any) -> set[tuple[str, str]]:
    """Method and path of all routes; HEAD goes with GET."""
    assert all(isinstance(route, Route) for route in app.routes)
    return {
        (method, plain(route.path)) for route in app.routes for method in route.methods if method != "HEAD"
    }


def documented_routes(*headings: str) -> set[tuple[str, str]]:
    text = "".join(row[0] + "\n" for heading in headings for row in rows(section(heading), "route"))
    return {(method, plain(path)) for method, path in ROUTE.findall(text) if method != "HEAD"}


async def test_the_routes_of_the_gateway_are_listed():
    assert documented_routes("Gateway", "OpenAI Responses") == await gateway_routes()


async def test_the_routes_of_a_neuron_are_listed():
    assert documented_routes("Neuron") == await neuron_routes()


async def test_no_other_route_is_mentioned():
    mentioned = {(method, plain(path)) for method, path in ROUTE.findall(TEXT)}
    existing = await gateway_routes() | await neuron_routes()
    assert mentioned <= existing | {("HEAD", path) for method, path in existing if method == "GET"}


def fields(*kinds: type) -> set[str]:
    return {name for kind in kinds for name in kind.__struct_fields__}  # type: ignore[attr-defined]


def inner_fields(*kinds: Any) -> set[str]:
    """The fields of all types within the types."""
    found: set[str] = set()
    seen: set[Any] = set()

    def visit(info: msgspec.inspect.Type) -> None:
        for name in info.__struct_fields__:
            value = getattr(info, name)
            for inner in value if isinstance(value, tuple) else (value,):
                if isinstance(inner, msgspec.inspect.Field):
                    visit(inner.type)
                elif isinstance(inner, msgspec.inspect.StructType):
                    if inner.cls not in seen:
                        seen.add(inner.cls)
                        found.update(fields(inner.cls))
                        visit(inner)
                elif isinstance(inner, msgspec.inspect.Type):
                    visit(inner)

    for kind in kinds:
        seen.add(kind)
        visit(msgspec.inspect.type_info(kind))
    return found


def documented_fields(text: str) -> set[str]:
    """The fields that the first cells of tables of fields name: `a`, `a.b`, `a: value`."""
    named = [span for row in rows(text, "field") for span in spans(row[0])]
    return {re.split(r"[.:]", span)[0] for span in named}


@pytest.mark.parametrize(
    ("heading", "kinds"),
    [
        ("Chat completions and completions", (ChatRequest, CompletionRequest)),
        ("OpenAI Responses", (ResponsesRequest,)),
        ("Anthropic Messages", (MessagesRequest,)),
        ("Embeddings", (EmbeddingRequest,)),
        ("Tokens", (TokenizeRequest, DetokenizeRequest)),
        ("Loading", (control.LoadRequest,)),
        ("Unloading", (control.UnloadRequest,)),
        ("Administration", (admin._Load, admin._Unload)),
    ],
)
def test_the_fields_of_a_request_are_listed(heading, kinds):
    text = section(heading)
    if heading == "Chat completions and completions":
        text = text.split("\n### ")[0]
    assert documented_fields(text) == fields(*kinds)
    mentioned = words(text)
    if heading != "Administration":  # whose options are those of a neuron
        assert sorted(inner_fields(*kinds) - mentioned) == []


def test_what_a_gateway_is_asked_to_load_is_what_a_neuron_takes():
    assert fields(admin._Load) == fields(control.LoadRequest) | {"node"}
    assert fields(admin._Unload) == fields(control.UnloadRequest) | {"node"}


@pytest.mark.parametrize(
    "kind",
    [control.VersionInfo, control.Discovery, control.Health, control.ModelInfo, control.DefragReply],
)
def test_the_members_of_a_control_answer_are_told(kind):
    assert sorted((fields(kind) | inner_fields(kind)) - words(section("Neuron"))) == []


def tree(kind: type[errors.HelexaError] = errors.HelexaError) -> Iterator[type[errors.HelexaError]]:
    yield kind
    for derived in kind.__subclasses__():
        yield from tree(derived)


def shown(kind: type[errors.HelexaError]) -> tuple[str, str]:
    return str(kind.status), kind.code


def called(*parts: str) -> set[str]:
    """The names of all that the source of some packages calls, as it does with errors that it raises."""
    files = [file for part in parts for file in (PACKAGE / part).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    return {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def documented_errors(heading: str) -> set[tuple[str, str]]:
    table = rows(section(heading), "status")
    return {(row[0], code) for row in table for code in spans(row[1])}


GATEWAY_ERRORS = documented_errors("Errors of the gateway")
NEURON_ERRORS = documented_errors("Errors of a neuron")


def test_every_error_is_listed_and_no_other():
    known = {shown(kind) for kind in tree()} | ERRORS_OF_FRAMEWORK
    assert known == GATEWAY_ERRORS | NEURON_ERRORS


@pytest.mark.parametrize(
    ("listed", "parts"),
    [
        (GATEWAY_ERRORS, ("gateway", "wire")),
        (NEURON_ERRORS, ("neuron", "engine", "weights", "models", "wire")),
    ],
    ids=["gateway", "neuron"],
)
def test_the_errors_of_a_daemon_are_those_that_its_code_raises(listed, parts):
    names = called(*parts)
    possible = {shown(kind) for kind in tree() if kind.__name__ in names} | ERRORS_OF_FRAMEWORK
    assert listed <= possible
    own = {shown(kind) for kind in tree() if kind.__name__ in called(parts[0])}
    assert own <= listed


def test_the_types_of_errors_of_each_api_are_told():
    assert set(_TYPES.values()) | {"api_error"} <= words(section("Anthropic Messages"))
    assert {kind.type for kind in tree()} <= words(section("Errors of the gateway"))


def headers_in_code() -> set[str]:
    """All strings in the code of the daemons that are names of headers."""
    files = [
        PACKAGE / "server.py",
        *(f for part in ("gateway", "neuron", "wire") for f in (PACKAGE / part).rglob("*.py")),
    ]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                value = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
                found.add(value.lower())
    return found


def test_every_header_of_ours_is_listed_and_no_other():
    listed = {span.lower() for row in rows(section("Headers"), "header") for span in spans(row[0])}
    known = headers_in_code()
    assert sorted(listed - known) == []
    assert {name for name in known if OWN_HEADER.fullmatch(name)} <= listed
    mentioned = {span for span in spans(TEXT) if OWN_HEADER.fullmatch(span)}
    assert sorted(mentioned - listed) == []
