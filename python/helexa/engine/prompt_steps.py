"""Short chunks of prompts on a CUDA device, by graphs: launched one by one, they would wait for the host.

They are padded to few sizes. What comes before the tokens is a sequence of its own in the scratch page, so
that the last row is the chunk's last token in all chunks of a size.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from helexa import ops
from helexa.engine.cache import KVCache, StateCache
from helexa.engine.device import Device
from helexa.engine.device_step import PaddedInputs
from helexa.engine.memory import is_out_of_memory
from helexa.engine.sequence import Sequence
from helexa.layers.step import Step
from helexa.log import fields
from helexa.models import Model

logger = logging.getLogger(__name__)

FEWEST_TOKENS = ops.MAX_MATVEC_ROWS + 1  # fewer give what they give alone, in any company
MOST_TOKENS = 512  # more keep the device busy for longer than the host
FREE_BYTES = 256 << 20  # of the device, without which nothing is captured


def size_of(num_tokens: int) -> int:
    """How many rows a chunk is padded to: those that kernels multiply at a time, or little more."""
    step = 32 if num_tokens <= ops.MAX_MIDDLE_ROWS else 64
    return -(-num_tokens // step) * step


class PromptSteps:
    """Computes chunks on the device thread.

    A size is computed launch by launch at first, which loads its code, and captured when it comes again, or
    before, when there is nothing else to do.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        states: StateCache,
        device: Device,
        *,
        max_context: int,
        capture: bool,
    ):
        self._model, self._cache, self._states = model, cache, states
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle() if capture else None
        self._inputs = PaddedInputs(
            device,
            rows=MOST_TOKENS,
            max_pages=-(-max_context // cache.page_tokens),
            page_tokens=cache.page_tokens,
        )
        self._logits: dict[int, Tensor] = {}  # of captured steps, by size
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._waiting: list[int] = []  # sizes that have come, and are not captured

    @staticmethod
    def serve(sequence: Sequence, num_tokens: int) -> bool:
        """Whether a chunk of so many tokens is computed here: of one whose rows nobody but sampling reads."""
        return sequence.rows is None and FEWEST_TOKENS <= num_tokens <= MOST_TOKENS

    def logits(self, sequence: Sequence, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the chunk's last token the logits [1, V], the slot of its sequence [1] and its position [1].

        What is queued until the next call reads them.
        """
        size = size_of(num_tokens)
        inputs = self._inputs
        inputs.fill(sequence, num_tokens, size)
        if size in self._waiting:
            self._capture(size)
        if size in self._graphs:
            self._graphs[size].replay()
            logits = self._logits[size]
        else:
            logits = self._model(self._step(size))
            if self._pool is not None:
                self._waiting.append(size)
        return logits, inputs.state_slots[1:], inputs.positions[size - 1 : size]

    def capture_next(self) -> bool:
        """Captures a size that has come; False if there is none."""
        if not self._waiting:
            return False
        self._capture(self._waiting[-1])
        return True

    def _capture(self, size: int) -> None:
        self._waiting.remove(size)
        if torch.cuda.mem_get_info(self._device.tensors)[0] < FREE_BYTES:
            return
        graph = torch.cuda.CUDAGraph()
        try:
            with ops.captured(graph, self._pool):
                self._logits[size] = self._model(self._step(size))
        except RuntimeError as error:  # a device that is lost for good will say so without a graph
            if is_out_of_memory(error):  # others may need it for a short time only
                return
            logger.warning("prompts_not_captured", extra=fields(tokens=size), exc_info=True)
            self._pool = None
            self._waiting.clear()
        else:
            self._graphs[size] = graph

    def _step(self, size: int) -> Step:
        inputs = self._inputs
        return Step(
            token_ids=inputs.token_ids[:size],
            positions=inputs.positions[:size],
            slots=inputs.slots[:size],
            query_start=inputs.query_start,
            kv_lengths=inputs.kv_lengths,
            page_table=inputs.page_table,
            k_cache=self._cache.k,
            v_cache=self._cache.v,
            logits_rows=slice(size - 1, size),
            state_slots=inputs.state_slots,
            conv_states=self._states.conv,
            states=self._states.recurrent,
        )
