"""The choice of tokens on a CUDA device, with the rules and the random numbers of helexa.engine.sampler.

What a sequence is chosen by lies in its slot, as its recurrent states do; slot 0 is of the rows that pad a
batch. A token goes from the device to the host for the client and stays on the device for the next step.
Work is queued on torch's current stream, and nothing here waits for it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from helexa import ops
from helexa.engine.sampler import FLOOR, GREEDY_BELOW, Sampler
from helexa.engine.sampling_params import ResolvedParams
from helexa.errors import DeviceError

_WORD = 32  # tokens in a word of a mask
_COPIED = ("top_p", "typical_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class DeviceSampler:
    """Chooses the tokens of the sequences that are bound to slots, a batch of rows of logits at a time.

    last_tokens: [num_slots] int32 on the device, the token chosen last in each slot.
    records: [max_rows, words] int32 on the device, what the last launch found; `read` understands a copy.
    """

    def __init__(self, vocab_size: int, num_slots: int, max_rows: int, device: torch.device):
        self.last_tokens = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.records = torch.zeros(
            (max_rows, ops.SAMPLE_RECORD.itemsize // 4), dtype=torch.int32, device=device
        )
        self._vocab_size = vocab_size
        self._device = device
        self._is_guided = [False] * num_slots
        self._forced_now = [ops.ANY_TOKEN] * num_slots
        self._forced = torch.full((num_slots,), ops.ANY_TOKEN, dtype=torch.int32, device=device)
        self._masks = torch.zeros((num_slots, -(-vocab_size // _WORD)), dtype=torch.int32, device=device)
        nothing = np.zeros(num_slots, ops.SAMPLE_PARAMETERS)
        nothing["num_top"] = -1
        self._parameters = torch.from_numpy(nothing.view(np.uint8).reshape(num_slots, -1)).to(device)
        # Of the slots that ever needed them.
        self._counts: dict[int, Tensor] = {}
        self._biases: dict[int, Tensor] = {}
        self._workspace = ops.sample_workspace(max_rows, vocab_size, device)

    def serves(self, params: ResolvedParams) -> bool:
        """Whether the device can choose by these parameters; where it cannot, the host's Sampler does."""
        return self._vocab_size <= ops.MAX_VOCABULARY

    def bind(self, slot: int, sampler: Sampler, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """From now on rows of the slot are chosen as by this sampler, and any token may come.

        Penalties begin with these tokens: a prompt, and what was generated behind it.
        """
        params = sampler.params
        row = np.zeros(1, ops.SAMPLE_PARAMETERS)
        if params.temperature >= GREEDY_BELOW:
            row["temperature"] = params.temperature
        row["seed"] = sampler.seed
        # Beyond the vocabulary there is nothing to leave out.
        row["top_k"] = min(max(params.top_k, 0), self._vocab_size)
        row["num_top"] = -1 if params.logprobs is None else params.logprobs
        for name in _COPIED:
            row[name] = getattr(params, name)
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            prompt = token_ids[:num_prompt_tokens] if params.repetition_penalty != 1.0 else ()
            counts = self._count(prompt, token_ids[num_prompt_tokens:])
            row["counts"] = self._keep(self._counts, slot, counts)
        if params.logit_bias:
            bias = np.zeros(self._vocab_size, np.float32)
            bias[list(params.logit_bias)] = list(params.logit_bias.values())
            row["bias"] = self._keep(self._biases, slot, bias)
        self._is_guided[slot] = sampler.guide is not None
        self._upload(row.view(np.uint8), self._parameters[slot])
        self.allow(slot, None)

    def allow(self, slot: int, allowed: npt.NDArray[np.bool_] | int | None) -> None:
        """What may come next in the slot, until this is called again: a token, some, or any."""
        forced = ops.ANY_TOKEN if allowed is None else ops.MASKED_TOKENS
        if isinstance(allowed, int):
            forced = allowed
        elif allowed is not None:
            bits = np.zeros(4 * self._masks.shape[1], np.uint8)
            packed = np.packbits(allowed[: self._vocab_size], bitorder="little")
            bits[: packed.size] = packed
            self._upload(bits.view(np.int32), self._masks[slot])
        if forced != self._forced_now[slot]:
            self._forced_now[slot] = forced
            self._forced[slot : slot + 1].fill_(forced)

    def launch(self, logits: Tensor, slots: Tensor, positions: Tensor, *, greedy_only: bool = False) -> None:
        """Chooses for rows of logits [R, V] float32, whose slots [R] int32 says; capturable.

        positions: [R] int32, of the tokens that the logits follow. greedy_only: `is_greedy` holds for the
        parameters of all rows, which then takes one kernel instead of three. Does nothing where it serves no
        parameters at all.
        """
        if self._vocab_size > ops.MAX_VOCABULARY:
            return
        ops.sample(
            logits,
            slots,
            positions,
            parameters=self._parameters,
            forced=self._forced,
            masks=self._masks,
            last_tokens=self.last_tokens,
            records=self.records,
            workspace=self._workspace,
            greedy_only=greedy_only,
        )

    def read(
        self, records: npt.NDArray[np.int32], row: int, slot: int
    ) -> tuple[int, float | None, list[tuple[int, float]]]:
        """(token, its log-probability, the most likely ones with theirs) of a row of copied records.

        Raises DeviceError if the logits of the row were not finite; the device goes on with token 0 then.
        """
        record = records[row].view(ops.SAMPLE_RECORD)[0]
        token_id, status = int(record["token_id"]), int(record["status"])
        if status == ops.NOT_FINITE:
            raise DeviceError(
                f"the logits at position {record['position']} are not finite: the largest is {record['peak']}"
            )
        if record["asked"] < 0:
            return token_id, None, []
        if status == ops.FORCED:
            return token_id, 0.0, []
        log_total = math.log(float(record["total"]) / ops.WEIGHT_ONE)

        def logprob(gap: np.float32) -> float:
            return max(FLOOR, -float(gap) - log_total)

        gaps = record["top_gaps"][: record["num_top"]]
        top = [(int(index), logprob(gap)) for index, gap in zip(record["top_ids"], gaps, strict=False)]
        if self._is_guided[slot]:  # a token that a grammar excludes is no alternative
            top = top[: np.count_nonzero(np.isfinite(gaps))]
        return token_id, logprob(record["largest"] - record["logit"]), top

    def _upload(self, values: npt.NDArray[Any], target: Tensor) -> None:
        staged = torch.from_numpy(values)
        if target.is_cuda:
            staged = staged.pin_memory()  # kept until it is copied
        target.copy_(staged, non_blocking=True)

    def _keep(self, kept: dict[int, Tensor], slot: int, values: npt.NDArray[Any]) -> int:
        """Puts what a slot needs of every token onto the device; returns its address."""
        if slot not in kept:
            kept[slot] = torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, device=self._device)
        self._upload(values, kept[slot])
        return kept[slot].data_ptr()

    def _count(self, prompt: Sequence[int], generated: Sequence[int]) -> npt.NDArray[np.int32]:
        counts = 2 * np.bincount(np.asarray(generated, np.int64), minlength=self._vocab_size).astype(np.int32)
        counts[np.asarray(prompt, np.int64)] |= 1
        return counts


def device_sampler_nbytes(vocab_size: int, num_slots: int, max_rows: int) -> int:
    """Bytes of device memory of a DeviceSampler all of whose slots have penalties and biases."""
    per_slot = 4 + 4 + 4 * -(-vocab_size // _WORD) + ops.SAMPLE_PARAMETERS.itemsize + 8 * vocab_size
    return (
        num_slots * per_slot
        + max_rows * ops.SAMPLE_RECORD.itemsize
        + ops.sample_workspace_bytes(max_rows, vocab_size)
    )


def is_greedy(params: ResolvedParams) -> bool:
    """Whether the largest logit is all that these parameters ask for."""
    return params.temperature < GREEDY_BELOW and params.logprobs is None
