"""API keys."""

import pytest

from helexa.errors import ConfigError, Forbidden, Unauthorized
from helexa.gateway.auth import Keys, Principal
from helexa.gateway.config import AuthSection, GatewayConfig, GatewaySection
from helexa.gateway.keys import Limit, add_key, revoke_key

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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.jsonl"


def of_file(path, listen="127.0.0.1:31313", **auth):
    section = AuthSection(keys_file=str(path), **auth)
    return Keys(GatewayConfig(gateway=GatewaySection(listen=listen), auth=section))


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_a_key_of_the_file_is_who_it_is_made_for(path):
    limit = Limit("requests", 1, 60)
    key, record = add_key(path, "ada", models=["qwen*"], limits=[limit], priority=7)
    found = of_file(path).check(bearer(key))
    assert found == Principal(record.id, "ada", ("qwen*",), (limit,), 7, is_admin=False)
    assert found.headers == {"x-helexa-principal": record.id, "x-helexa-priority": "7"}


def test_a_revoked_key_is_refused_even_where_none_is_needed(path):
    key, _ = add_key(path, "ada")
    keys = of_file(path)
    revoke_key(path, "ada")
    assert keys.refresh()
    with pytest.raises(Unauthorized, match="may have been revoked"):
        keys.check(bearer(key))
    assert keys.check({}).id == ""


def test_keys_are_read_again_when_the_file_has_changed_and_only_then(path):
    keys = of_file(path)
    assert not keys.refresh()
    key, _ = add_key(path, "ada")
    assert keys.refresh()
    assert keys.check(bearer(key)).name == "ada"
    assert not keys.refresh()


def test_a_bad_keys_file_is_told_once_and_leaves_the_keys_as_they_were(path):
    key, _ = add_key(path, "ada")
    keys = of_file(path)
    path.write_text('{"id": "half')
    with pytest.raises(ConfigError, match="not written completely"):
        keys.refresh()
    assert not keys.refresh()
    assert keys.check(bearer(key)).name == "ada"


def test_a_gateway_does_not_start_with_a_keys_file_that_it_cannot_trust(path):
    add_key(path, "ada")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="others may write"):
        of_file(path)


@pytest.mark.parametrize(
    ("listen", "anonymous", "served"),
    [
        ("127.0.0.1:1", None, True),
        ("127.0.0.1:1", False, False),
        ("0.0.0.0:1", None, False),
        ("[::]:1", None, False),
        ("0.0.0.0:1", True, True),
    ],
)
def test_those_without_a_key_are_served_on_loopback_or_as_configured(listen, anonymous, served):
    config = GatewayConfig(
        gateway=GatewaySection(listen=listen), auth=AuthSection((KEY,), anonymous=anonymous)
    )
    if served:
        assert Keys(config).check({"authorization": "Bearer placeholder"}).models == ()
    else:
        with pytest.raises(Unauthorized):
            Keys(config).check({"authorization": "Bearer placeholder"})


@pytest.mark.parametrize(
    ("host", "served"),
    [
        *[(host, True) for host in ("localhost:31313", "127.0.0.1:31313", "[::1]:31313", "", "attic:1")],
        *[(host, True) for host in ("192.168.1.2:31313", "host.docker.internal:31313", "attic.local")],
        *[(host, False) for host in ("evil.example:31313", "127.0.0.1.evil.example", "localhost.evil.org.")],
    ],
)
def test_a_foreign_name_for_this_machine_is_not_served_without_a_key(host, served):
    lenient = keys("127.0.0.1:31313")
    assert lenient.check({"host": host, "x-api-key": KEY}).name.startswith("config-")
    if served:
        assert lenient.check({"host": host}).id == ""
    else:
        with pytest.raises(Unauthorized):
            lenient.check({"host": host})


def test_a_key_without_a_name_is_the_same_one_wherever_it_stands():
    def name(*known):
        principal = keys(known=known).check({"x-api-key": KEY})
        assert principal.id == principal.name
        return principal.id

    assert name(KEY) == name(OTHER, KEY) == name("sk-helexa-three", KEY, OTHER) == "config-033166036b"
    assert KEY not in name(KEY)
    assert keys().check({"x-api-key": OTHER}).id not in ("config-2", name(KEY))


def test_only_admins_administrate_once_there_is_one(path):
    keys = of_file(path)
    keys.check({}).require_admin()
    admin, _ = add_key(path, "root", admin=True)
    user, _ = add_key(path, "ada")
    keys.refresh()
    keys.check(bearer(admin)).require_admin()
    for headers in ({}, bearer(user)):
        with pytest.raises(Forbidden, match="needs an admin key") as caught:
            keys.check(headers).require_admin()
        assert (caught.value.status, caught.value.code) == (403, "permission_denied")


def test_nobody_without_a_key_administrates_a_network(path):
    anonymous = of_file(path, "0.0.0.0:1", anonymous=True).check({})
    assert anonymous.id == "anonymous"
    with pytest.raises(Forbidden):
        anonymous.require_admin()


def test_an_admin_key_of_the_configuration_is_one():
    keys = Keys(GatewayConfig(auth=AuthSection((KEY,), (OTHER,))))
    keys.check(bearer(OTHER)).require_admin()
    with pytest.raises(Forbidden):
        keys.check(bearer(KEY)).require_admin()


def test_models_are_allowed_by_name_or_pattern():
    principal = Principal("x", models=("qwen*", "helexa/small"))
    principal.require_model("qwen3-0.6b")
    principal.require_model("helexa/small", "anything")
    principal.require_model("alias", "qwen3-0.6b")
    with pytest.raises(Forbidden, match="may not use model 'llama'"):
        principal.require_model("llama", "llama")


async def test_neurons_are_told_who_asks_and_never_what_a_client_claims(make_site, neuron, path):
    key, record = add_key(path, "ada", priority=5)
    site = await make_site(neuron, config=GatewayConfig(auth=AuthSection(keys_file=str(path))))
    spoofed = {"X-Helexa-Principal": "root", "x-helexa-PRIORITY": "100", "x-helexa-usage": "x", "cookie": "c"}
    for headers, told in ((bearer(key), {"principal": record.id, "priority": "5"}), ({}, {})):
        neuron.headers.clear()
        body = {"model": "tiny", "messages": []}
        url = site.url + "/v1/chat/completions"
        async with site.client.post(url, json=body, headers=[*spoofed.items(), *headers.items()]) as response:
            assert response.status == 200
        (seen,) = neuron.headers
        claimed = {name[9:]: value for name, value in seen.items() if name.startswith("x-helexa-")}
        assert claimed == {"usage": "comment", **told}
        assert not {"authorization", "x-api-key", "cookie"} & seen.keys()


async def test_a_key_sees_and_uses_its_models_alone(make_site, make_neuron, catalogue, path):
    key, _ = add_key(path, "ada", models=["tiny", "nick"])
    neuron = make_neuron("tiny", "other", "third")
    config = GatewayConfig(auth=AuthSection(keys_file=str(path)))
    site = await make_site(neuron, config=config, catalogue=catalogue(nick="other"))
    site.client.headers.update(bearer(key))
    listed = await site.get("/v1/models")
    assert [card["id"] for card in listed["data"]] == ["nick", "tiny"]
    for model, expected in (("tiny", 200), ("nick", 200), ("other", 403), ("third", 403), ("nowhere", 403)):
        assert (await site.chat(model))[0] == expected
        async with site.client.get(f"{site.url}/v1/models/{model}") as response:
            assert response.status == expected
    assert [asked["model"] for asked in neuron.requests] == ["tiny", "other"]


async def test_only_those_who_may_use_all_models_see_the_whole_fleet(make_site, neuron, path):
    whole, _ = add_key(path, "ada")
    some, _ = add_key(path, "bob", models=["other"])
    admin, _ = add_key(path, "root", models=["other"], admin=True)
    neuron.hold(
        "broken", status="failed", error={"code": "x", "message": "/srv/models/secret.gguf is cut off"}
    )
    config = GatewayConfig(auth=AuthSection(keys_file=str(path)))
    site = await make_site(neuron, config=config, listen="0.0.0.0:1")
    for key, status in ((whole, 200), (admin, 200), (some, 403), ("nobody", 401)):
        async with site.client.get(site.url + "/fleet", headers=bearer(key)) as response:
            assert response.status == status
        async with site.client.get(site.url + "/health", headers=bearer(key)) as response:
            told = await response.json()
            assert (response.status, told["status"]) == (200, "impaired")
            assert ("unservable" in told) is (status == 200)
