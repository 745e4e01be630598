"""Puts together what serves a model on its device thread: caches, scheduler, runner, archive."""

from collections.abc import Callable

from helexa.engine.archive import Archive
from helexa.engine.cache import (
    DEFAULT_SHARE,
    DEVICE_SHARE,
    DEVICE_SNAPSHOTS,
    SNAPSHOTS,
    KVCache,
    StateCache,
    kv_dtype,
    page_nbytes,
    plan_capacity,
    plan_snapshots,
    state_nbytes,
)
from helexa.engine.core import EngineCore
from helexa.engine.cpu_runner import CpuRunner
from helexa.engine.cuda_runner import CudaRunner
from helexa.engine.device import Device
from helexa.engine.device_sampler import DeviceSampler
from helexa.engine.flight import Runner, bucket_of
from helexa.engine.options import EngineOptions
from helexa.engine.pages import PagePool
from helexa.engine.phases import Phases
from helexa.engine.prefix_cache import PrefixCache
from helexa.engine.preflight import reserved_nbytes
from helexa.engine.scheduler import Scheduler
from helexa.engine.snapshots import Snapshots
from helexa.engine.state_store import StateStore
from helexa.engine.workspace import activation_nbytes
from helexa.layers.step import PAGE_TOKENS
from helexa.models import Model, ModelConfig, kv_cache_shapes, state_shapes

STALL_S = 0.05  # how long a chunk of a prompt may hold up running streams


def build_core(
    model: Model,
    config: ModelConfig,
    options: EngineOptions,
    post: Callable[[Callable[[], object]], None],
    store: StateStore | None = None,
    model_key: str = "",
    phases: Phases | None = None,
) -> EngineCore:
    """A core with caches that fit the free memory. Raises OutOfMemory or InvalidParameter.

    store: what outlives the caches; `model_key` says there which weights these are. phases: counts the time.
    """
    phases = phases or Phases()
    device = Device(options.device)
    dtype = kv_dtype(options.kv_dtype, on_cuda=device.is_cuda)
    free_bytes = device.free_bytes() - reserved_nbytes(config, options, device)
    num_slots = options.max_sequences + 1
    num_snapshots = _num_snapshots(config, options, device, free_bytes)
    states = state_shapes(config, num_slots + num_snapshots)
    num_pages, max_context = plan_capacity(
        page_bytes=page_nbytes(kv_cache_shapes(config, 1), dtype),
        page_tokens=PAGE_TOKENS,
        model_context=config.max_position_embeddings,
        max_context=options.max_context,
        max_sequences=options.max_sequences,
        kv_cache_tokens=options.kv_cache_tokens,
        free_bytes=free_bytes - state_nbytes(states),
        share=DEVICE_SHARE if device.has_streams else DEFAULT_SHARE,
    )
    with phases("caches"):
        cache = KVCache(kv_cache_shapes(config, num_pages + 1), dtype, device.tensors)
        state_cache = StateCache(states, device.tensors)
    pool = PagePool(num_pages, cache.page_tokens)
    prefix = archive = None
    if options.prefix_cache and (num_snapshots or not states):
        slots = range(num_slots, num_slots + num_snapshots)
        prefix = PrefixCache(pool, Snapshots(slots, state_cache.copy) if states else None)
        if store is not None:
            archive = Archive(store, model_key, cache, state_cache, prefix)
    runner = _runner(model, config, cache, state_cache, device, options, max_context)
    runner.claim = device.claim(activation_nbytes(config, options))
    runner.prepare(phases)
    scheduler = Scheduler(
        pool,
        prefix,
        max_context=max_context,
        max_sequences=options.max_sequences,
        prefill_chunk=options.prefill_tokens,
        stall_s=STALL_S if device.has_streams else None,
        archive=archive,
    )
    return EngineCore(runner, scheduler, pool, prefix, post, archive)


def _runner(
    model: Model,
    config: ModelConfig,
    cache: KVCache,
    states: StateCache,
    device: Device,
    options: EngineOptions,
    max_context: int,
) -> Runner:
    sizes = {"max_sequences": options.max_sequences, "max_context": max_context}
    if not device.is_cuda:
        return CpuRunner(model, cache, states, **sizes, capture=options.capture)
    rows = bucket_of(options.max_sequences)
    chooser = DeviceSampler(config.vocab_size, options.max_sequences + 1, rows, device.tensors)
    return CudaRunner(
        model,
        cache,
        states,
        chooser,
        device,
        **sizes,
        capture=options.capture,
    )


def _num_snapshots(config: ModelConfig, options: EngineOptions, device: Device, free_bytes: int) -> int:
    slot_bytes = state_nbytes(state_shapes(config, 1))
    if not slot_bytes or not options.prefix_cache:
        return 0
    return plan_snapshots(
        slot_bytes=slot_bytes,
        budget_bytes=options.snapshot_bytes,
        free_bytes=free_bytes,
        most=DEVICE_SNAPSHOTS if device.has_streams else SNAPSHOTS,
    )
