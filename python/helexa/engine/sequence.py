"""One request as the scheduler and the runner see it: its tokens, its pages, how far it is computed."""

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from helexa.engine.prefix_cache import Node
    from helexa.engine.sampler import Sampled, Sampler
    from helexa.engine.state_store import Stored
    from helexa.errors import HelexaError

_numbers = itertools.count()


@dataclass(slots=True)
class Finished:
    """The last event of a sequence: why it ended, or the error that ended it."""

    reason: str
    error: "HelexaError | None" = None


@dataclass(slots=True)
class GenerationProgress:
    """How far a prompt is computed; the device thread writes it, anybody may read it at any time."""

    computed_tokens: int = 0  # with those that the prefix cache spared
    prompt_tokens: int = 0  # after a preemption, with the answer so far, which is computed again
    is_prefilling: bool = False


class Receiver(Protocol):
    """Where the events of a sequence go; without a mailbox, `receive` is called on the device thread."""

    @property
    def mailbox(self) -> "Mailbox | None": ...

    def receive(self, event: "Sampled | Finished") -> None: ...


class Mailbox(Protocol):
    """Carries the events of many receivers to their thread in one go."""

    def post(self, batch: "list[tuple[Receiver, Sampled | Finished]]") -> bool: ...


class Rows(Protocol):
    """Takes rows that the model computes of a prompt: logits or hidden states, of all tokens or the last."""

    wants_hidden: bool
    wants_all: bool

    def take(self, rows: Any, start: int, /) -> None: ...


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens whose first `num_computed` positions are in the KV cache, in `pages`.

    Every token but the newest is computed before a new one is sampled, so a sequence with one pending token
    decodes and one with more prefills; after a preemption the generated tokens are prefilled like a prompt.
    A token that a step under way will choose is expected: the device may go on from it before it is known.
    """

    token_ids: list[int]
    max_length: int  # tokens, prompt included, at which generation ends
    sampler: "Sampler | None" = None
    stop_token_ids: frozenset[int] = frozenset()
    receiver: Receiver | None = None
    namespace: str = ""  # sequences share cached prefixes only within one namespace
    priority: int = 0  # higher goes first
    progress: GenerationProgress | None = None
    snapshot_at: tuple[int, ...] = ()  # where other prompts may part from this one
    rows: "Rows | None" = None  # where what is computed of the prompt goes; nothing is sampled then

    num_prompt_tokens: int = 0
    num_computed: int = 0
    num_expected: int = 0  # tokens after those in token_ids that steps under way will choose
    pages: list[int] = field(default_factory=list)
    pages_version: int = 0  # changes whenever `pages` does
    slot: int = 0  # of the recurrent states, while the sequence runs
    node: "Node | None" = None  # the deepest full page of this sequence in the prefix cache
    cuts: list[int] = field(default_factory=list)  # where snapshots are taken of its prompt, the last first
    stored: "list[Stored]" = field(default_factory=list)  # to be fetched before anything is computed
    snapshot_position: int = 0  # where it was continued, or a snapshot taken
    depth: int = 0  # how many pages lie on the path to `node`
    cached_tokens: int = 0  # prompt tokens that the prefix cache spared
    prefilled_tokens: int = 0
    num_preemptions: int = 0
    last_turn: int = -1
    finished: bool = False

    number: int = field(default_factory=lambda: next(_numbers))
    arrived_s: float = field(default_factory=time.perf_counter)
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """The order in which sequences are served: the highest priority first, then the oldest."""
        return -self.priority, self.number

    @property
    def num_pending(self) -> int:
        """Tokens that are there, known or expected, and not yet computed."""
        return len(self.token_ids) + self.num_expected - self.num_computed

    @property
    def is_decoding(self) -> bool:
        return (
            len(self.token_ids) + self.num_expected - self.num_computed == 1
            and self.rows is None
            and not self.is_awaited
        )

    @property
    def is_awaited(self) -> bool:
        """Whether the steps under way will bring its last token."""
        return self.num_expected > 0 and len(self.token_ids) + self.num_expected >= self.max_length

    @property
    def is_prefilling(self) -> bool:
        """Whether there is something to compute of it in a step of its own."""
        return self.num_pending > 0 and not (self.is_decoding or self.is_awaited)

    @property
    def shares_pages(self) -> bool:
        """Whether the prefix cache may serve this sequence; who wants all rows must compute all tokens."""
        return self.rows is None
