"""The admin routes: to whom they answer, which neuron they mean, and what they pass on."""

import asyncio

import pytest

from helexa.gateway.catalogue import ModelEntry
from helexa.gateway.config import AuthSection, GatewayConfig

USER, ADMIN = "sk-user-0123456789", "sk-admin-0123456789"


async def post(site, path, body=None, key=None):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with site.client.post(site.url + path, json=body or {}, headers=headers) as response:
        return response.status, await response.json()


async def test_a_model_is_loaded_and_unloaded_on_the_only_neuron(make_site, neuron):
    site = await make_site(neuron)
    status, told = await post(site, "/models/load", {"model_id": "new", "options": {"max_context": 64}})
    assert (status, told["id"], told["node"], told["status"]) == (200, "new", "n0", "loaded")
    assert neuron.loads == [{"model_id": "new", "options": {"max_context": 64}}]
    assert site.gateway.fleet.nodes["n0"].is_loaded("new")
    status, told = await post(site, "/models/unload", {"model_id": "new", "drain_s": 1})
    assert (status, told) == (200, {"model_id": "new", "status": "unloaded", "node": "n0"})
    assert neuron.unloads == ["new"]
    assert not site.gateway.fleet.nodes["n0"].is_loaded("new")


async def test_the_catalogue_says_where_a_model_comes_from_and_what_an_alias_means(
    make_site, neuron, catalogue
):
    site = await make_site(
        neuron, catalogue=catalogue(ModelEntry("big", name="org/repo", quant="Q8_0"), b="big")
    )
    await post(site, "/models/load", {"model_id": "b"})
    await post(site, "/models/load", {"model_id": "b", "source": "/other.gguf"})
    assert [(asked["model_id"], asked["source"]) for asked in neuron.loads] == [
        ("big", "org/repo:Q8_0"),
        ("big", "/other.gguf"),
    ]


async def test_among_several_neurons_the_one_that_has_most_room_or_is_named_loads(make_site, make_neuron):
    small, large = make_neuron(total_bytes=10**9), make_neuron(total_bytes=2 * 10**9)
    site = await make_site(small, large)
    assert (await post(site, "/models/load", {"model_id": "a"}))[1]["node"] == "n1"
    assert (await post(site, "/models/load", {"model_id": "a", "node": "n0"}))[1]["node"] == "n0"
    status, told = await post(site, "/models/unload", {"model_id": "a"})
    assert (status, told["error"]["param"]) == (400, "node")
    assert "n0, n1" in told["error"]["message"]
    assert (await post(site, "/models/unload", {"model_id": "a", "node": "n1"}))[0] == 200
    assert (await post(site, "/models/unload", {"model_id": "a"}))[1]["node"] == "n0"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/models/load", {}, 400, "invalid_parameter"),
        ("/models/load", {"model_id": "a", "nod": "n0"}, 400, "invalid_parameter"),
        ("/models/load", {"model_id": "a", "node": "attic"}, 400, "invalid_request"),
        ("/models/load", {"model_id": "a" * 70_000}, 413, "payload_too_large"),
        ("/models/unload", {"model_id": "a"}, 404, "model_not_found"),
        ("/reload", {}, 400, "invalid_request"),
    ],
)
async def test_what_is_wrong_is_named(make_site, neuron, path, body, status, code):
    site = await make_site(neuron)
    told = await post(site, path, body)
    assert (told[0], told[1]["error"]["code"]) == (status, code)


async def test_the_error_of_a_neuron_is_passed_on_as_it_is(make_site, make_neuron):
    error = {"message": "tensor 7 is cut off", "code": "invalid_model_file", "type": "invalid_request_error"}
    site = await make_site(make_neuron(load_error=(422, error)))
    status, told = await post(site, "/models/load", {"model_id": "a"})
    assert (status, told["error"]["code"]) == (422, "invalid_model_file")
    assert told["error"]["message"] == "tensor 7 is cut off"


@pytest.mark.parametrize(
    ("auth", "listen", "key", "status"),
    [
        (AuthSection(), "127.0.0.1:1", None, 404),
        (AuthSection((USER,)), "127.0.0.1:1", None, 404),
        (AuthSection((USER,)), "127.0.0.1:1", USER, 403),
        (AuthSection((USER,), (ADMIN,)), "127.0.0.1:1", None, 403),
        (AuthSection((USER,), (ADMIN,)), "127.0.0.1:1", ADMIN, 404),
        (AuthSection((USER,), (ADMIN,)), "0.0.0.0:1", None, 401),
        (AuthSection((USER,), (ADMIN,)), "0.0.0.0:1", USER, 403),
        (AuthSection((USER,), (ADMIN,)), "0.0.0.0:1", ADMIN, 404),
        (AuthSection(anonymous=True), "0.0.0.0:1", None, 403),
    ],
)
async def test_who_may_administrate(make_site, neuron, auth, listen, key, status):
    site = await make_site(neuron, config=GatewayConfig(auth=auth), listen=listen)
    assert (await post(site, "/models/unload", {"model_id": "nowhere"}, key))[0] == status
    assert (await post(site, "/reload", {}, key))[0] == (400 if status == 404 else status)


async def test_a_body_that_is_too_large_is_413_and_a_client_that_leaves_no_fault(
    make_site, neuron, caplog, eventually
):
    site = await make_site(neuron)
    async with site.client.post(site.url + "/models/load", data=b"x" * 70_000) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (413, "payload_too_large")
    host, port = site.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    caplog.set_level("INFO", "helexa.gateway.handlers")
    writer.write(b"POST /models/load HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await eventually(lambda: any(getattr(r, "fields", {}).get("status") == 499 for r in caplog.records))
    assert not any(record.exc_info for record in caplog.records)


async def test_a_path_of_the_catalogue_is_loaded_with_its_quant_unless_told_otherwise(
    make_site, make_neuron, catalogue
):
    neuron = make_neuron()
    site = await make_site(neuron, catalogue=catalogue(ModelEntry("m", path="/m", quant="q8_0")))
    await post(site, "/models/load", {"model_id": "m"})
    await post(site, "/models/load", {"model_id": "m", "options": {"quant": "q4_k"}})
    await post(site, "/models/load", {"model_id": "m", "source": "/other"})
    assert [(asked["source"], asked["options"].get("quant")) for asked in neuron.loads] == [
        ("/m", "q8_0"),
        ("/m", "q4_k"),
        ("/other", None),
    ]
