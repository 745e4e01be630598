"""API keys."""

import pytest

from helexa.errors import Unauthorized
from helexa.gateway.auth import Keys
from helexa.gateway.config import AuthSection, GatewayConfig, GatewaySection

KEY, OTHER = "sk-helexa-one", "sk-helexa-two"


def keys(listen="0.0.0.0:31313", known=(KEY, OTHER)):
    return Keys(GatewayConfig(gateway=GatewaySection(listen=listen), auth=AuthSection(known)))


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {OTHER}"},
        {"x-api-key": KEY},
        {"authorization": "Bearer placeholder", "x-api-key": KEY},
    ],
)
def test_a_known_key_passes(headers):
    keys().check(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer nope"},
        {"authorization": f"Basic {KEY}"},
        {"x-api-key": KEY + "x"},
        {"x-api-key": "ключ"},
    ],
)
def test_anything_else_is_unauthorized(headers):
    with pytest.raises(Unauthorized) as caught:
        keys().check(headers)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer placeholder"}])
def test_keys_are_not_asked_for_on_loopback(headers):
    assert keys("127.0.0.1:31313").check(headers).id == ""


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer placeholder"}])
def test_a_network_is_not_served_only_because_there_is_no_key(headers):
    with pytest.raises(Unauthorized):
        keys(known=()).check(headers)


async def test_the_api_wants_the_key_and_health_does_not(make_site, neuron):
    config = GatewayConfig(auth=AuthSection((KEY,)))
    site = await make_site(neuron, config=config, listen="0.0.0.0:31313")
    status, body, _ = await site.chat()
    assert (status, body["error"]["code"], body["error"]["param"]) == (401, "invalid_api_key", None)
    for path, expected in (
        ("/v1/models", 401),
        ("/v1/models/tiny", 401),
        ("/fleet", 401),
        ("/health", 200),
        ("/", 200),
    ):
        async with site.client.get(site.url + path) as response:
            assert response.status == expected
    async with site.client.get(
        site.url + "/v1/models", headers={"authorization": f"Bearer {KEY}"}
    ) as response:
        assert response.status == 200
    assert neuron.requests == []
