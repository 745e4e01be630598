"""Who may speak to a neuron."""

from dataclasses import replace

import pytest

from helexa.neuron.app import Neuron
from helexa.neuron.config import AuthSection, NeuronConfig, NeuronSection
from helexa.serving import TlsConfig

SECRET = "a-secret-of-the-fleet"
ROUTES = [
    ("GET", "/health"),
    ("GET", "/models"),
    ("GET", "/discovery"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/nowhere"),
    ("POST", "/models/load"),
    ("POST", "/models/unload"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
]


@pytest.fixture
def guarded(make_neuron):
    """A neuron with a secret."""

    def make() -> Neuron:
        neuron = make_neuron()
        neuron.config = replace(neuron.config, auth=AuthSection(SECRET))
        return neuron

    return make


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_without_the_secret_no_route_answers(guarded, serve_neuron, method, path):
    wrong = [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": SECRET},
        {"authorization": f"Basic {SECRET}"},
        {"authorization": f"Bearer {SECRET}x"},
        {"x-api-key": SECRET},
        {"x-helexa-principal": "root"},
    ]
    async with serve_neuron(guarded()) as client:
        for headers in wrong:
            answer = await client.request(method, path, headers=headers, json={"model": "m"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "x-request-id" in answer.headers


async def test_with_the_secret_it_answers_and_a_probe_needs_none(guarded, serve_neuron):
    async with serve_neuron(guarded()) as client:
        answer = await client.get("/health", headers={"authorization": f"bearer  {SECRET}"})
        assert answer.status_code == 200
        assert (await client.get("/")).json()["name"] == "helexa-neuron"
        assert (await client.head("/")).status_code == 200


async def test_a_web_page_is_refused_with_or_without_a_secret(guarded, make_neuron, serve_neuron):
    for neuron in (guarded(), make_neuron()):
        async with serve_neuron(neuron) as client:
            for origin in ("https://evil.example", "null", "http://localhost:3000"):
                headers = {
                    "origin": origin,
                    "authorization": f"Bearer {SECRET}",
                    "content-type": "text/plain",
                }
                answer = await client.post("/models/load", headers=headers, content='{"model_id": "x"}')
                assert answer.status_code == 403
        assert not list(neuron.registry)


async def test_a_public_name_for_this_machine_is_refused_without_a_secret(guarded, make_neuron, serve_neuron):
    foreign = {"host": "evil.example:13131"}
    async with serve_neuron(make_neuron()) as client:
        assert (await client.get("/models", headers=foreign)).status_code == 403
        assert (await client.get("/models")).status_code == 200
    async with serve_neuron(guarded()) as client:
        headers = foreign | {"authorization": f"Bearer {SECRET}"}
        assert (await client.get("/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "attic"])
def test_a_neuron_does_not_open_itself_to_a_network_unasked(host):
    section = NeuronSection(host=host)
    with pytest.raises(ValueError, match=f"neuron.host is {host}, which other machines can reach"):
        NeuronConfig(neuron=section)
    NeuronConfig(neuron=section, auth=AuthSection(SECRET))
    NeuronConfig(neuron=section, auth=AuthSection(open=True))
    NeuronConfig(neuron=section, tls=TlsConfig("cert", "key", "ca"))
    with pytest.raises(ValueError, match="other machines can reach"):
        NeuronConfig(neuron=section, tls=TlsConfig("cert", "key"))
