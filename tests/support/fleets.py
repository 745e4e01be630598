"""Fleets made by hand, of nodes that never answered anybody."""

from helexa.gateway.catalogue import Catalogue, ModelEntry
from helexa.gateway.fleet import Fleet, Node
from helexa.wire.control import Activation, Cpu, Device, DeviceHealth, Discovery, Health, ModelInfo

MIB = 2**20


def gpu(total, free=None):
    return (total, total if free is None else free)


def make_node(name, *gpus, models=(), loads=(), ram=1000, status="ok", **more):
    """gpus: (total, free) in MiB; models: id → status, or id → (status, MiB)."""
    node = Node(name, f"http://{name}", **{"healthy": True, **more})
    cpu = Cpu(name="CPU", cores=2, threads=2, instruction_sets=[], memory_total_bytes=ram * MIB)
    devices = [
        Device(index=i, name="GPU", memory_total_bytes=total * MIB) for i, (total, _) in enumerate(gpus)
    ]
    node.discovery = Discovery(hostname=name, os="Linux", kernel="6", cpu=cpu, devices=devices)
    readings = [
        DeviceHealth(index=i, memory_used_bytes=0, memory_free_bytes=free * MIB)
        for i, (_, free) in enumerate(gpus)
    ]
    node.health = Health(
        status=status,
        uptime_s=1.0,
        memory_available_bytes=ram * MIB,
        activation=Activation(state="ready"),
        models=[],
        devices=readings,
    )
    for model, told in dict(models).items():
        state, mib = told if isinstance(told, tuple) else (told, 0)
        node.models[model] = ModelInfo(id=model, status=state, source=model, memory_bytes=mib * MIB)
    node.loads = {load.id: load for load in loads}
    return node


def make_fleet(*nodes, **more):
    return Fleet({node.name: node for node in nodes}, **more)


def catalogue(*entries):
    return Catalogue({entry.id: entry for entry in entries})


BIG = ModelEntry("big", vram_mb=600)
BARE = Catalogue()
