"""Browsers: only pages of origins that are allowed get through, whatever they ask for."""

import pytest

from helexa.gateway.config import CorsSection, GatewayConfig

PAGE, FOREIGN = "https://chat.example", "https://evil.example"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-foo"}


@pytest.fixture
def make_open(make_site, neuron):
    async def make(*origins):
        return await make_site(neuron, config=GatewayConfig(cors=CorsSection(origins)))

    return make


@pytest.mark.parametrize("origin", [FOREIGN, PAGE + ".evil.example", "http://chat.example", "null", ""])
@pytest.mark.parametrize("origins", [(), (PAGE,)])
async def test_a_foreign_page_neither_reads_nor_causes_anything(make_open, neuron, origin, origins):
    site = await make_open(*origins)
    body = {"model": "tiny", "messages": []}
    for method, path in (("POST", "/v1/chat/completions"), ("POST", "/models/unload"), ("GET", "/v1/models")):
        headers = {"origin": origin, "content-type": "text/plain"}
        async with site.client.request(method, site.url + path, json=body, headers=headers) as response:
            assert response.status == 403
            assert (await response.json())["error"]["code"] == "permission_denied"
            assert not any(name.lower().startswith("access-control") for name in response.headers)
    async with site.client.options(
        site.url + "/v1/models", headers=PREFLIGHT | {"origin": origin}
    ) as response:
        assert response.status == 403
        assert "access-control-allow-origin" not in response.headers
    assert neuron.requests == []
    assert neuron.unloads == []


async def test_the_log_tells_which_page_was_refused_what(make_open, caplog):
    caplog.set_level("INFO", "helexa.gateway")
    site = await make_open(PAGE)
    url = site.url + "/v1/chat/completions"
    async with site.client.post(
        url, json={}, headers={"origin": FOREIGN, "x-request-id": "mine"}
    ) as response:
        assert response.status == 403
    (record,) = [record for record in caplog.records if record.message == "request"]
    assert (record.levelname, record.fields) == (
        "INFO",
        {
            "method": "POST",
            "path": "/v1/chat/completions",
            "request": "mine",
            "origin": FOREIGN,
            "status": 403,
            "error": "permission_denied",
        },
    )


async def test_an_allowed_page_gets_its_preflight_and_its_answer(make_open, neuron):
    site = await make_open(PAGE)
    url = site.url + "/v1/chat/completions"
    async with site.client.options(url, headers=PREFLIGHT | {"origin": PAGE}) as response:
        assert response.status == 204
        assert response.headers["access-control-allow-origin"] == PAGE
        assert response.headers["access-control-allow-headers"] == "authorization,x-foo"
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in response.headers
    body = {"model": "tiny", "messages": [], "stream": True}
    async with site.client.post(url, json=body, headers={"origin": PAGE}) as response:
        assert response.status == 200
        assert response.headers["access-control-allow-origin"] == PAGE
        assert response.headers["vary"] == "origin"
        assert (await response.read()).endswith(b"[DONE]\n\n")


async def test_the_refusal_has_the_form_of_the_api_that_was_called(make_open):
    site = await make_open(PAGE)
    async with site.client.post(site.url + "/v1/messages", json={}, headers={"origin": FOREIGN}) as response:
        told = await response.json()
        assert (response.status, told["type"], told["error"]["type"]) == (403, "error", "permission_error")
        assert response.headers["x-request-id"].startswith("req_")


async def test_errors_can_be_read_by_an_allowed_page_too(make_open):
    site = await make_open("*")
    async with site.client.get(site.url + "/nowhere", headers={"origin": FOREIGN}) as response:
        assert (response.status, response.headers["access-control-allow-origin"]) == (404, "*")


async def test_programs_send_no_origin_and_see_nothing_of_this(make_open):
    site = await make_open(PAGE)
    async with site.client.get(site.url + "/v1/models") as response:
        assert response.status == 200
        assert not any(name.lower().startswith("access-control") for name in response.headers)
    async with site.client.options(site.url + "/v1/models") as response:
        assert response.status == 405


@pytest.mark.parametrize(
    "origin", ["chat.example", "https://chat.example/", "https://a.example/path", "https://"]
)
def test_what_is_no_origin_is_refused_in_the_configuration(origin):
    with pytest.raises(ValueError, match="allow_origins"):
        CorsSection((origin,))
