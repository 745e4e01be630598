"""Who asks, as the gateway stamps it on a request; a client of the neuron itself is nobody in particular."""

from dataclasses import dataclass

from starlette.requests import Request

from helexa.neuron.registry import LoadedModel
from helexa.wire.generation import PRINCIPAL_HEADER, PRIORITY_HEADER


@dataclass(frozen=True)
class Caller:
    principal: str = ""
    priority: int = 0


def caller_of(request: Request) -> Caller:
    """The caller by the headers of the request; a priority that is no number is 0."""
    priority = request.headers.get(PRIORITY_HEADER, "")
    is_number = len(priority) <= 9 and priority.removeprefix("-").isdecimal() and priority.isascii()
    return Caller(request.headers.get(PRINCIPAL_HEADER, ""), int(priority) if is_number else 0)


def turn_owner(model: LoadedModel, caller: Caller) -> tuple[str, ...]:
    """Whose turns may be continued: the caller's, on the same model, or else on this load of it."""
    key = model.engine.model_key if model.engine else ""
    return caller.principal, model.id, key or str(model.loaded_at)
