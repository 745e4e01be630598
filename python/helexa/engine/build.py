"""Puts together what serves a model on its device thread: caches, scheduler, runner, archive."""

from collections.abc import Callable

from helexa.engine.archive import Archive
from helexa.engine.cache import (
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
from helexa.engine.memory import available_bytes
from helexa.engine.options import EngineOptions
from helexa.engine.pages import PagePool
from helexa.engine.prefix_cache import PrefixCache
from helexa.engine.scheduler import Scheduler
from helexa.engine.snapshots import Snapshots
from helexa.engine.state_store import StateStore
from helexa.layers.step import PAGE_TOKENS
from helexa.models import Model, ModelConfig, kv_cache_shapes, state_shapes


def build_core(
    model: Model,
    config: ModelConfig,
    options: EngineOptions,
    post: Callable[[Callable[[], object]], None],
    store: StateStore | None = None,
    model_key: str = "",
) -> EngineCore:
    """A core with caches that fit the free memory. Raises OutOfMemory or InvalidParameter.

    store: what outlives the caches; `model_key` says there which weights these are.
    """
    dtype = kv_dtype(options.kv_dtype)
    num_slots, num_snapshots = options.max_sequences + 1, _num_snapshots(config, options)
    states = state_shapes(config, num_slots + num_snapshots)
    num_pages, max_context = plan_capacity(
        page_bytes=page_nbytes(kv_cache_shapes(config, 1), dtype),
        page_tokens=PAGE_TOKENS,
        model_context=config.max_position_embeddings,
        max_context=options.max_context,
        max_sequences=options.max_sequences,
        kv_cache_tokens=options.kv_cache_tokens,
        free_bytes=available_bytes() - options.reserved_bytes - state_nbytes(states),
    )
    cache, state_cache = KVCache(kv_cache_shapes(config, num_pages + 1), dtype), StateCache(states)
    pool = PagePool(num_pages, cache.page_tokens)
    prefix = archive = None
    if options.prefix_cache and (num_snapshots or not states):
        slots = range(num_slots, num_slots + num_snapshots)
        prefix = PrefixCache(pool, Snapshots(slots, state_cache.copy) if states else None)
        if store is not None:
            archive = Archive(store, model_key, cache, state_cache, prefix)
    runner = CpuRunner(
        model,
        cache,
        state_cache,
        max_sequences=options.max_sequences,
        max_context=max_context,
        capture=options.capture,
    )
    scheduler = Scheduler(
        pool,
        prefix,
        max_context=max_context,
        max_sequences=options.max_sequences,
        prefill_chunk=options.prefill_chunk,
        archive=archive,
    )
    return EngineCore(runner, scheduler, pool, prefix, post, archive)


def _num_snapshots(config: ModelConfig, options: EngineOptions) -> int:
    slot_bytes = state_nbytes(state_shapes(config, 1))
    if not slot_bytes or not options.prefix_cache:
        return 0
    return plan_snapshots(
        slot_bytes=slot_bytes,
        budget_bytes=options.snapshot_bytes,
        free_bytes=available_bytes() - options.reserved_bytes,
    )
