"""What the gateway shows of its fleet: /v1/models, /health and /fleet, from catalogue and last polls."""

import time
from typing import Any

import msgspec

from helexa.errors import UnknownModel
from helexa.gateway.catalogue import Catalogue, ModelEntry
from helexa.gateway.fleet import Claim, Fleet, Node
from helexa.gateway.router import is_feasible
from helexa.wire.control import Limit, ModelInfo


def model_list(fleet: Fleet, catalogue: Catalogue, created: int) -> dict[str, Any]:
    """All models that a request may name, aliases included, in the form of OpenAI's list."""
    return {
        "object": "list",
        "data": [_model(fleet, catalogue, name, created) for name in _names(fleet, catalogue)],
    }


def model_card(fleet: Fleet, catalogue: Catalogue, name: str, created: int) -> dict[str, Any]:
    """One entry of the list. Raises UnknownModel."""
    if name not in _names(fleet, catalogue):
        raise UnknownModel(f"model {name!r} is not known here; GET /v1/models lists what is", param="model")
    return _model(fleet, catalogue, name, created)


def health(fleet: Fleet) -> dict[str, Any]:
    """ok; impaired: a model that should serve cannot; degraded: no neuron is up."""
    nodes = fleet.nodes.values()
    healthy = [node for node in nodes if node.healthy]
    unservable = [
        {
            "node": node.name,
            "model": info.id,
            "reason": "poisoned" if info.status == "loaded" else info.status,
            "detail": _reason(node, info),
        }
        for node in healthy
        for info in node.models.values()
        if info.status in ("failed", "poisoned") or (info.status == "loaded" and not node.is_loaded(info.id))
    ]
    status = "degraded" if not healthy else "impaired" if unservable else "ok"
    body: dict[str, Any] = {"status": status, "nodes": {"healthy": len(healthy), "total": len(nodes)}}
    return {**body, "unservable": unservable} if unservable else body


def fleet_report(fleet: Fleet, catalogue: Catalogue) -> dict[str, Any]:
    """Everything that `helexa status` shows."""
    nodes = [
        {
            "name": node.name,
            "endpoint": node.endpoint,
            "state": _state(node),
            "error": node.error,
            "hostname": node.discovery.hostname if node.discovery else None,
            "uptime_s": node.health.uptime_s if node.health else None,
            "devices": [vars(device) for device in node.devices],
            "models": [
                {
                    **msgspec.to_builtins(info),
                    "serving": node.is_loaded(info.id),
                    "active": node.active[info.id],
                    "load": msgspec.to_builtins(node.loads[info.id]) if info.id in node.loads else None,
                }
                for info in sorted(node.models.values(), key=lambda info: info.id)
            ],
        }
        for node in fleet.nodes.values()
    ]
    return {
        "nodes": nodes,
        "loading": dict(fleet.loading),
        "waiting": {model: _waiting(claim) for model, claim in fleet.claims.items()},
        "aliases": dict(catalogue.aliases),
    }


def _waiting(claim: Claim) -> dict[str, Any]:
    """A model that waits for its turn."""
    seconds = round(time.monotonic() - claim.since, 1)
    told = {"node": claim.node, "seconds": seconds, "requests": claim.num_requests}
    return {**told, "displaces": list(claim.displaces)}


def _names(fleet: Fleet, catalogue: Catalogue) -> list[str]:
    known = {
        *catalogue.models,
        *(
            model
            for node in fleet.nodes.values()
            if node.healthy
            for model in (*node.models, *node.displaced)
        ),
    }
    return sorted(known | {alias for alias, target in catalogue.aliases.items() if target in known})


def _model(fleet: Fleet, catalogue: Catalogue, name: str, created: int) -> dict[str, Any]:
    model = catalogue.resolve(name)
    entry = catalogue.models.get(model)
    nodes = list(fleet.nodes.values())
    serving = [node for node in nodes if node.healthy and node.is_loaded(model)]
    loaded = [node.models[model] for node in serving]
    infos = loaded or [node.seen[model] for node in nodes if model in node.seen]
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": max((info.loaded_at or 0 for info in loaded), default=0) or created,
        "owned_by": "helexa",
        "loaded": bool(serving),
        "feasible_on": [
            node.name
            for node in nodes
            if (is_feasible(node, entry) if entry else node.knows(model)) or node in serving
        ],
        "locations": _locations(fleet, model),
        "capabilities": sorted({c for info in infos for c in info.capabilities})
        or list(entry.capabilities if entry else ()),
        "tool_call": any(info.tool_call for info in infos),
        "reasoning": any(info.reasoning for info in infos),
    }
    if entry and entry.cost:
        card["cost"] = {name: value for name, value in vars(entry.cost).items() if value is not None}
    return card | _limits(infos, entry)


def _locations(fleet: Fleet, model: str) -> list[dict[str, Any]]:
    locations = []
    for node in fleet.nodes.values():
        info = node.models.get(model)
        is_loading = fleet.loading.get(model) == node.name
        if not node.healthy or (info is None and not is_loading):
            continue
        status = "loading" if info is None or is_loading else info.status
        place: dict[str, Any] = {"node": node.name, "status": status}
        if info is not None and info.memory_bytes:
            place["vram_estimate_mb"] = info.memory_bytes >> 20
        if status == "loading":
            place["progress"] = msgspec.to_builtins(node.progress(model))
        locations.append(place)
    return locations


def _limits(infos: list[ModelInfo], entry: ModelEntry | None) -> dict[str, Any]:
    """The tightest context of the replicas, else the catalogue's; flat too, for clients that look there."""
    told = [info.limit for info in infos if info.limit]
    limit: dict[str, int | None]
    if told:
        tightest: Limit = min(told, key=lambda limit: limit.context)
        limit = {"context": tightest.context, "output": tightest.output}
    elif entry and entry.limit:
        limit = vars(entry.limit)
    else:
        return {}
    known = {name: value for name, value in limit.items() if value}
    flat = {"max_model_len": "context", "max_input_tokens": "input", "max_output_tokens": "output"}
    return {"limit": known} | {name: known[key] for name, key in flat.items() if key in known}


def _state(node: Node) -> str:
    if not node.healthy:
        return "down" if node.failures or node.discovery else "unknown"
    states = {"suspect": node.suspect, "draining": node.draining, "tripped": node.tripped, "up": True}
    return next(name for name, holds in states.items() if holds)


def _reason(node: Node, info: ModelInfo) -> str | None:
    if info.error:
        return info.error.message
    load = node.loads.get(info.id)
    return load.poisoned if load else None
