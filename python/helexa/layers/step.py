"""One forward pass as the models see it: everything that changes from one pass to the next."""

from dataclasses import dataclass, field

from torch import Tensor

from helexa.ops import PAGE_TOKENS

__all__ = ["PAGE_TOKENS", "Step"]


@dataclass
class Step:
    """T tokens of S sequences: prefill chunks and decode steps in any mixture, each sequence's side by side.

    Keys and values of all T tokens are appended before a layer attends, so `kv_lengths` counts them too.
    Entries of `page_table` beyond a sequence's length are never read.  A captured forward reads these
    tensors anew at each replay; their shapes, the caches and `logits_rows` are fixed by the capture.
    """

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32, counted from the start of the token's sequence
    slots: Tensor  # [T] int32, page · PAGE_TOKENS + offset of the key and value; a negative one is not kept
    query_start: Tensor  # [S + 1] int32, sequence s owns the rows from query_start[s] to query_start[s + 1]
    kv_lengths: Tensor  # [S] int32, tokens in the cache of each sequence
    page_table: Tensor  # [S, max_pages] int32, the pages of each sequence in order
    k_cache: list[Tensor]  # one per attention layer, shaped as models.kv_cache_shapes says
    v_cache: list[Tensor]
    logits_rows: slice  # the rows, of all T, whose logits are wanted; it may be empty
    # Of models with recurrent layers only: the slot of each sequence, [S] int32, and for each such layer the
    # convolution's and the recurrence's states, shaped as models.state_shapes says.
    state_slots: Tensor | None = None
    conv_states: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
