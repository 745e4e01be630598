"""A configuration that changes while requests run."""

import asyncio
import logging
import os
import signal
import sys

import aiohttp
import pytest

from helexa.errors import ConfigError
from helexa.gateway.app import create_app
from helexa.gateway.config import load_config
from helexa.gateway.gateway import running
from helexa.gateway.keys import add_key, revoke_key
from helexa.gateway.metrics import Meter
from helexa.gateway.reload import Reloader, watch_keys
from helexa.gateway.upstream import Call

pytestmark = pytest.mark.timeout(60)


class Files:
    """gateway.toml and models.toml of a test."""

    def __init__(self, folder):
        self.path = folder / "gateway.toml"
        self.keys = folder / "keys.jsonl"
        self._models = folder / "models.toml"

    def write(self, text="", models="", neurons=()):
        entries = (f'[[neurons]]\nname = "{n.name}"\nendpoint = "{n.url}"\n' for n in neurons)
        self.path.write_text(text + "\n" + "".join(entries))
        self._models.write_text(models)

    def read(self):
        return load_config(self.path)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@pytest.fixture
async def neurons(make_neuron, make_site):
    """Two neurons that listen, with a model each."""
    made = make_neuron("a", name="n0"), make_neuron("b", name="n1")
    await make_site(*made)
    return made


async def chat(app_url, model, **more):
    async with aiohttp.ClientSession() as client:
        body = {"model": model, "messages": [], **more}
        async with client.post(app_url + "/v1/chat/completions", json=body) as response:
            return response.status, await response.read()


async def test_neurons_come_and_go_and_those_that_stay_keep_what_is_known(files, neurons):
    files.write(neurons=neurons[:1])
    async with running(*files.read()) as gateway:
        stays = gateway.fleet.nodes["n0"]
        files.write(neurons=neurons)
        report = await Reloader(gateway, files.read).reload()
        assert gateway.fleet.nodes["n0"] is stays
        await gateway.poller.first_round()
        assert gateway.fleet.nodes["n1"].is_loaded("b")
        assert report["changed"]["neurons.n1.endpoint"] == (None, neurons[1].url)
        assert report["needs_restart"] == []
        files.write(neurons=neurons[1:])
        await Reloader(gateway, files.read).reload()
        assert list(gateway.fleet.nodes) == ["n1"]


async def test_a_neuron_with_another_address_or_secret_is_a_new_one(files, neurons):
    files.write(neurons=neurons)
    async with running(*files.read()) as gateway:
        before = dict(gateway.fleet.nodes)
        files.write('[auth]\nneuron_secret = "a-secret-of-the-fleet"', neurons=neurons)
        report = await Reloader(gateway, files.read).reload()
        assert report["changed"] == {"auth.neuron_secret": (None, "***")}
        assert all(gateway.fleet.nodes[name] is not node for name, node in before.items())
        assert gateway.fleet.nodes["n0"].headers == {"authorization": "Bearer a-secret-of-the-fleet"}


async def test_models_aliases_and_limits_change_for_the_next_request(files, neurons, serving):
    files.write(neurons=neurons, models='[aliases]\n"nick" = "a"')
    async with running(*files.read()) as gateway:
        url = "http://{}:{}".format(*await serving(create_app(gateway)))
        assert (await chat(url, "nick"))[0] == 200
        files.write(
            "[gateway]\nmax_body_bytes = 40",
            neurons=neurons,
            models='[aliases]\n"other" = "b"\n[[models]]\nid="m"',
        )
        report = await Reloader(gateway, files.read).reload()
        assert report["changed"] == {
            "gateway.max_body_bytes": (67108864, 40),
            "aliases": ({"nick": "a"}, {"other": "b"}),
            "models.m.id": (None, "m"),
            "models.m.vram_mb": (None, 0),
            "models.m.min_devices": (None, 1),
            "models.m.min_device_vram_mb": (None, 0),
        }
        assert (await chat(url, "nick"))[0] == 404
        assert (await chat(url, "other"))[0] == 200
        assert (await chat(url, "other", stop=["x" * 40]))[0] == 413


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gateway]\nlisten = ", "not valid TOML"),
        ("[gateway]\nlisten_on = 1", "unknown key"),
        (
            '[[neurons]]\nname = "n0"\nendpoint = "https://x:1"\ntls_ca = "/nowhere.pem"',
            "no file at /nowhere",
        ),
    ],
)
async def test_a_bad_file_is_told_and_leaves_everything_as_it_was(files, neurons, caplog, text, message):
    files.write(neurons=neurons)
    async with running(*files.read()) as gateway:
        before = vars(gateway).copy(), dict(gateway.fleet.nodes)
        files.write(text)
        with pytest.raises(ConfigError, match=message):
            await Reloader(gateway, files.read).reload()
        assert (vars(gateway), gateway.fleet.nodes) == before
        assert await gateway.poller.poll(gateway.fleet.nodes["n0"])
    (record,) = [record for record in caplog.records if record.message == "reload_failed"]
    assert message in record.fields["error"]


async def test_a_bad_keys_file_is_a_bad_configuration(files, neurons):
    files.write(neurons=neurons)
    async with running(*files.read()) as gateway:
        files.keys.write_text("{")
        with pytest.raises(ConfigError, match="not written completely"):
            await Reloader(gateway, files.read).reload()


async def test_a_running_stream_ends_as_it_began(files, make_neuron, make_site, serving, eventually):
    neuron = make_neuron("a", words=["word"] * 20, pause_s=0.03)
    await make_site(neuron)
    files.write(neurons=[neuron])
    async with running(*files.read()) as gateway:
        url = "http://{}:{}".format(*await serving(create_app(gateway)))
        streaming = asyncio.create_task(chat(url, "a", stream=True))
        await eventually(lambda: neuron.running == 1)
        files.write()
        await Reloader(gateway, files.read).reload()
        assert (await chat(url, "a"))[0] in (404, 503)
        status, text = await streaming
        assert status == 200
        assert text.count(b"word") == 20
        assert text.endswith(b"[DONE]\n\n")


async def test_a_load_under_way_is_waited_for_across_a_reload(
    files, make_neuron, make_site, serving, eventually
):
    neuron = make_neuron(load_s=0.5)
    await make_site(neuron)
    models = '[[models]]\nid = "m"\n'
    files.write(neurons=[neuron], models=models)
    async with running(*files.read()) as gateway:
        url = "http://{}:{}".format(*await serving(create_app(gateway)))
        waiting = [asyncio.create_task(chat(url, "m"))]
        await eventually(lambda: neuron.loads)
        files.write("[eviction]\nstrategy = 'lru'", neurons=[neuron], models=models)
        await Reloader(gateway, files.read).reload()
        waiting.append(asyncio.create_task(chat(url, "m")))
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]
        assert len(neuron.loads) == 1
        assert not gateway.fleet.loading


async def test_a_load_ends_with_the_neuron_that_left(files, make_neuron, make_site, serving, eventually):
    leaving, staying = make_neuron(load_s=30, name="n0"), make_neuron("b", name="n1")
    await make_site(leaving, staying)
    models = '[[models]]\nid = "m"\npinned_on = ["n0"]\n'
    files.write(neurons=[leaving, staying], models=models)
    async with running(*files.read()) as gateway:
        url = "http://{}:{}".format(*await serving(create_app(gateway)))
        waiting = asyncio.create_task(chat(url, "m"))
        await eventually(lambda: leaving.loads)
        files.write(neurons=[staying], models=models)
        await Reloader(gateway, files.read).reload()
        assert (await asyncio.wait_for(waiting, 5))[0] == 404
        assert len(leaving.loads) == 1
        assert not gateway.fleet.loading


async def test_a_request_from_before_meets_a_new_neuron_that_is_down(
    files, make_neuron, make_site, serving, eventually
):
    busy, dead = make_neuron("m", name="n0", words=["word"] * 40, pause_s=0.05), make_neuron("m", name="n1")
    await make_site(busy, dead)
    files.write(neurons=[busy])
    async with running(*files.read()) as gateway:
        former = gateway.dispatcher
        files.write(neurons=[busy, dead])
        await Reloader(gateway, files.read).reload()
        await eventually(lambda: gateway.fleet.nodes["n1"].healthy)
        gateway.fleet.nodes["n1"].endpoint = "http://127.0.0.1:9"
        gateway.fleet.nodes["n0"].begin("m", 0.0)
        call = Call("/v1/completions", "m", b'{"model": "m"}', {}, False, Meter(gateway.metrics, "m", 0.0))
        (await former.open(call)).close()
        assert len(busy.requests) == 1


async def test_where_it_listens_needs_a_restart_and_decides_meanwhile_who_needs_a_key(files):
    files.write('[gateway]\nlisten = "0.0.0.0:31313"')
    async with running(*files.read()) as gateway:
        files.write('[gateway]\nlisten = "127.0.0.1:31313"\n[log]\nlevel = "warning"')
        level = logging.getLogger().level
        try:
            report = await Reloader(gateway, files.read).reload()
            assert logging.getLogger().level == logging.WARNING
        finally:
            logging.getLogger().setLevel(level)
        assert report["needs_restart"] == ["gateway.listen"]
        assert report["changed"].keys() == {"gateway.listen", "log.level"}
        assert gateway.config.gateway.listen == "0.0.0.0:31313"
        with pytest.raises(Exception, match="an API key is required"):
            gateway.keys.check({})


async def test_new_keys_are_there_without_being_asked_for(files, monkeypatch, eventually, caplog):
    monkeypatch.setattr("helexa.gateway.reload.KEYS_INTERVAL_S", 0.01)
    caplog.set_level(logging.INFO)
    files.write()
    async with running(*files.read()) as gateway:
        watching = asyncio.create_task(watch_keys(gateway))
        add_key(files.keys, "ada")
        await eventually(lambda: [one.name for one in gateway.keys.principals] == ["ada"])
        files.keys.write_text("{")
        await eventually(lambda: any(record.message == "keys_not_read" for record in caplog.records))
        assert [one.name for one in gateway.keys.principals] == ["ada"]
        files.keys.write_text("")
        await eventually(lambda: not gateway.keys.principals)
        watching.cancel()
    assert sum(record.message == "keys_not_read" for record in caplog.records) == 1


async def test_a_signal_and_the_route_reload_a_real_process(files, neurons):
    files.write('[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"', neurons=neurons[:1])
    command = (sys.executable, "-m", "helexa.cli.gateway", "--config", str(files.path))
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=os.environ)

    async def log_until(event):
        while f"event={event}" not in (line := (await process.stderr.readline()).decode()):
            assert line, f"the log ended before {event}"
        return line

    url = (await log_until("listening")).split("api=")[1].split()[0]
    changed = '[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\nconnect_timeout_s = 1.5'
    files.write(changed, neurons=neurons)
    process.send_signal(signal.SIGHUP)
    assert "key=gateway.connect_timeout_s before=3 after=1.5" in await log_until("configuration_changed")
    await log_until("reloaded")
    async with aiohttp.ClientSession() as client:
        files.write("nonsense")
        async with client.post(url + "/reload") as response:
            told = await response.json()
            assert (response.status, told["error"]["code"]) == (422, "invalid_configuration")
        await log_until("reload_failed")
        files.write(changed, neurons=neurons)
        async with client.post(url + "/reload") as response:
            assert await response.json() == {"changed": {}, "needs_restart": []}
        key, _ = add_key(files.keys, "ada", admin=True)
        await log_until("keys_changed")
        async with client.post(url + "/reload") as response:
            assert response.status == 403
        revoke_key(files.keys, "ada")
        await log_until("keys_changed")
        async with client.get(url + "/v1/models", headers={"x-api-key": key}) as response:
            assert response.status == 401
    process.terminate()
    assert await process.wait() == 0
