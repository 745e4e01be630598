"""What the core knows of runners: they start steps, which land later with the tokens they have chosen."""

import time
from abc import ABC, abstractmethod

from torch import Tensor

from helexa.engine.cache import KVCache, StateCache
from helexa.engine.device import Claim
from helexa.engine.phases import Phases
from helexa.engine.sampler import Sampled
from helexa.engine.scheduler import Plan


class Flight(ABC):
    """A step that was started; on a device it is under way until `wait` returns."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.started_s = time.perf_counter()
        first = plan.sequences[0]
        self.start = first.num_computed
        is_whole = self.start + plan.num_tokens == len(first.token_ids)
        self.chooses = not plan.is_prefill or (first.rows is None and is_whole)

    @property
    def may_be_followed(self) -> bool:
        """Whether a step may start on the tokens that this one chooses before they are known."""
        return False

    def choose(self) -> None:  # noqa: B027
        """Has the tokens chosen, unless that began with the step; guides know all tokens that it computes."""

    def wait(self) -> None:  # noqa: B027
        """Returns when the step is done; raises what went wrong with it."""

    @abstractmethod
    def sampled(self, index: int) -> Sampled:
        """What plan.sequences[index] gets. Raises HelexaError, DeviceError where logits are not finite."""

    @abstractmethod
    def rows(self) -> Tensor:
        """The rows that a sequence without an answer asked for, [R, V] or [R, D] float32 in main memory."""


class Runner(ABC):
    """Computes steps of a model over its caches; lives on the device thread."""

    runs_ahead = False  # whether a step is started before the one before it has landed

    def __init__(self, cache: KVCache, states: StateCache):
        self.cache = cache
        self.states = states
        self.claim: Claim | None = None  # of the memory for steps

    @abstractmethod
    def start(self, plan: Plan) -> Flight:
        """Starts a step over pages that the scheduler has assigned. Raises OutOfMemory where it cannot."""

    def prepare(self, phases: Phases) -> None:  # noqa: B027
        """Does once what would be in the way of the first steps."""

    def prepare_next(self) -> bool:
        """While nothing else is to do, a piece of what makes later steps faster; False if none is left."""
        return False


def bucket_of(num_sequences: int) -> int:
    """The captured batch size that holds num_sequences: the next power of two."""
    return 1 << (num_sequences - 1).bit_length()
