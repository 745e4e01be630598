"""Keys and values of all sequences: a tensor of pages for each layer, owned by the device thread.

Memory is reserved when the cache is made and, on the CPU, committed by the system when a page is first
written.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from helexa.errors import InvalidParameter, OutOfMemory
from helexa.ops import cache_shape

KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
KEPT_FREE = 0.05  # share of the free memory that a cache which was asked for must leave
DEFAULT_SHARE = 0.5  # share of the free memory that the default size may take
DEVICE_SHARE = 0.9  # the same of a device that does nothing else
SNAPSHOTS = 64  # of recurrent states, in at most this share of the free memory
DEVICE_SNAPSHOTS = 16  # the same of a device: a few conversations; older ones wait in the state store
SNAPSHOT_SHARE = 0.125


def kv_dtype(name: str, *, on_cuda: bool) -> torch.dtype:
    """The dtype called `name`; raises InvalidParameter for one that is unknown, or not known to the CPU."""
    if name not in KV_DTYPES:
        raise InvalidParameter(
            f"kv_dtype is {name!r}; expected one of {', '.join(KV_DTYPES)}", param="kv_dtype"
        )
    if KV_DTYPES[name].itemsize == 1 and not on_cuda:
        raise InvalidParameter(
            f"kv_dtype is {name!r}, which only CUDA devices have; expected bfloat16", param="kv_dtype"
        )
    return KV_DTYPES[name]


def page_nbytes(shapes: Iterable[Sequence[int]], dtype: torch.dtype) -> int:
    """Bytes that one page takes over all layers, keys and values."""
    return sum(2 * math.prod(cache_shape(shape[1:], dtype)) * dtype.itemsize for shape in shapes)


def plan_capacity(
    *,
    page_bytes: int,
    page_tokens: int,
    model_context: int,
    max_context: int | None,
    max_sequences: int,
    kv_cache_tokens: int | None,
    free_bytes: int,
    share: float = DEFAULT_SHARE,
) -> tuple[int, int]:
    """(number of pages, context in tokens) that fit the free memory.

    By default the cache holds one full context or 8192 tokens for each sequence, whichever is more, in at
    most that share of the free memory, and a context that nobody asked for shrinks to that. Raises
    OutOfMemory, with the bytes, if what was asked for does not fit.
    """
    context = min(model_context, max_context or model_context)
    if kv_cache_tokens is None:
        wanted = max(_pages(context, page_tokens), max_sequences * _pages(min(context, 8192), page_tokens))
        num_pages = min(wanted, int(free_bytes * share) // page_bytes)
        if max_context is not None:
            num_pages = max(num_pages, _pages(context, page_tokens))
    else:
        num_pages = _pages(kv_cache_tokens, page_tokens)
    usable = int(free_bytes * (1 - KEPT_FREE))
    needed = (num_pages + 1) * page_bytes  # one more as scratch
    if num_pages < 1 or needed > usable:
        needed = max(needed, 2 * page_bytes)
        raise OutOfMemory(
            f"a KV cache of {max(num_pages, 1) * page_tokens} tokens needs {needed} bytes, "
            f"but only {usable} bytes of memory are free for it; ask for a smaller context or cache",
            needed_bytes=needed,
            free_bytes=usable,
        )
    return num_pages, min(context, num_pages * page_tokens)


def plan_snapshots(
    *, slot_bytes: int, budget_bytes: int | None, free_bytes: int, most: int = SNAPSHOTS
) -> int:
    """How many snapshots to have slots for, by default `most`.

    Raises OutOfMemory if there is no memory for what was asked.
    """
    if budget_bytes is None:
        return min(most, int(free_bytes * SNAPSHOT_SHARE) // slot_bytes)
    if budget_bytes > free_bytes:
        raise OutOfMemory(
            f"snapshots may take {budget_bytes} bytes, but only {free_bytes} bytes of memory are free",
            needed_bytes=budget_bytes,
            free_bytes=free_bytes,
        )
    return budget_bytes // slot_bytes


def _pages(num_tokens: int, page_tokens: int) -> int:
    return -(-num_tokens // page_tokens)


class KVCache:
    """`k` and `v`: per layer [num_pages, num_key_value_heads, page_tokens, head_dim]; page 0 is scratch."""

    def __init__(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        self.page_tokens = shapes[0][2]
        self.num_pages = shapes[0][0]
        both = [cache_shape(shape, dtype) for shape in shapes for _ in range(2)]
        self._stacks, layers = _stacked(both, dtype, device)
        self.k, self.v = layers[::2], layers[1::2]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in (*self.k, *self.v))

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copies the first num_tokens positions of a page to another, in all layers."""
        for stack in self._stacks:
            old, new = stack[:, source], stack[:, target]
            new[:, :, :num_tokens].copy_(old[:, :, :num_tokens])
            if stack.shape[3] > self.page_tokens:  # the scales of the whole page
                new[:, :, self.page_tokens :].copy_(old[:, :, self.page_tokens :])

    def parts(self, page: int, num_tokens: int) -> list[Tensor]:
        """Where the first num_tokens positions of a page lie, in all layers."""
        layers = [layer[page] for layer in (*self.k, *self.v)]
        scales = [layer[:, self.page_tokens :] for layer in layers if layer.shape[1] > self.page_tokens]
        return [layer[:, :num_tokens] for layer in layers] + scales


class StateCache:
    """Of each recurrent layer the convolution's and the recurrence's states, float32; slot 0 is scratch.

    There are none of models without such layers. A sequence that begins finds its slot as others left it; the
    kernels start it from zero. Slots that no sequence runs in hold snapshots.
    """

    def __init__(
        self, shapes: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu"
    ):
        conv_stacks, self.conv = _stacked([conv for conv, _ in shapes], torch.float32, device)
        stacks, self.recurrent = _stacked([state for _, state in shapes], torch.float32, device)
        self._stacks = conv_stacks + stacks

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in (*self.conv, *self.recurrent))

    def copy(self, source: int, target: int) -> None:
        """Copies one slot to another, in all layers."""
        for stack in self._stacks:
            stack[:, target].copy_(stack[:, source])


def _stacked(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device | str
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of each shape as one, so that one call copies in all of them; and each of them alone."""
    counts = Counter(tuple(shape) for shape in shapes)
    stacks = {
        shape: torch.empty((count, *shape), dtype=dtype, device=device) for shape, count in counts.items()
    }
    layers = {shape: iter(stack) for shape, stack in stacks.items()}
    return list(stacks.values()), [next(layers[tuple(shape)]) for shape in shapes]


def state_nbytes(shapes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Bytes of a StateCache of these shapes."""
    return sum(4 * (math.prod(conv) + math.prod(state)) for conv, state in shapes)
