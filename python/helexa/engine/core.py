"""What happens on the device thread: scheduler, runner and samplers in one loop of steps.

Each step is one job that queues the next, so whatever was posted in the meantime, such as a cancellation,
takes effect before the next step. Only token ids and numbers leave, all those of one step in one batch for
each event loop.

A device is kept busy: a step takes off before the tokens of the one before it have landed here. So a sequence
that ends has been computed one token further by then, its last one; what followed from that is dropped.
"""

import time
from collections.abc import Callable
from contextlib import suppress

from helexa.engine.archive import Archive
from helexa.engine.flight import Flight, Runner
from helexa.engine.pages import PagePool
from helexa.engine.prefix_cache import PrefixCache
from helexa.engine.sampler import Sampled
from helexa.engine.scheduler import Plan, Scheduler
from helexa.engine.sequence import Finished, Mailbox, Receiver, Sequence
from helexa.engine.state_store import Stored
from helexa.errors import DeviceError, HelexaError, ShuttingDown


class Rate:
    """Tokens per second, weighted towards the last hundred steps or so, and the total of tokens."""

    def __init__(self) -> None:
        self.total_tokens = 0
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        self.total_tokens += num_tokens
        self._tokens = 0.98 * self._tokens + num_tokens
        self._seconds = 0.98 * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0


class EngineCore:
    """Serves sequences until they finish, on the device thread; the counters may be read anywhere."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        pool: PagePool,
        prefix: PrefixCache | None,
        post: Callable[[Callable[[], object]], None],
        archive: Archive | None = None,
    ):
        self.runner: Runner | None = runner
        self.scheduler = scheduler
        self.pool = pool
        self.prefix = prefix
        self.prefill_rate = Rate()
        self.decode_rate = Rate()
        self._post = post
        self.archive = archive
        self._is_stepping = False
        self._is_saving = False
        self._closed: HelexaError | None = None
        self._flight: Flight | None = None  # the step that runs while the next one is planned
        self._landed_s = 0.0
        self.step_started_s: float | None = None  # by time.monotonic; None between two steps
        self._outbox: dict[Mailbox, list[tuple[Receiver, Sampled | Finished]]] = {}

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence; one that can never run is told so at once."""
        try:
            if self._closed is not None:
                raise self._closed
            self.scheduler.add(sequence)
        except HelexaError as error:
            self._emit(sequence, Finished("error", error))
            self._send()
        else:
            self._wake()

    def cancel(self, sequence: Sequence) -> None:
        """Forgets a sequence and frees its pages; its receiver hears nothing more."""
        sequence.finished = True
        self.scheduler.remove(sequence)
        self._wake()

    def fail_all(self, error: HelexaError) -> None:
        """Ends every sequence with the error, and every later one."""
        self._closed = error
        sequences = [*self.scheduler.running, *self.scheduler.waiting]
        # First everybody is told: after a fault, taking them out of the scheduler may fail as well.
        for sequence in sequences:
            sequence.finished = True
            self._emit(sequence, Finished("error", error))
        self._send()
        for sequence in sequences:
            self.scheduler.remove(sequence)

    def stop(self) -> None:
        """Ends what still runs."""
        self.fail_all(ShuttingDown("the model is being unloaded"))

    def close(self) -> None:
        """Ends what still runs and lets go of model and caches."""
        self.stop()
        if self._flight is not None:
            self._flight.wait()
        self.forget()
        if self.archive is not None:
            self.archive.close()

    def forget(self) -> None:
        """Lets go of model and caches where the device thread cannot."""
        self.runner = self._flight = None

    def step(self) -> None:
        """Starts one plan, takes what the one before it has chosen, and queues the next step or rests."""
        self.step_started_s = time.monotonic()
        try:
            self._step()
        finally:
            self.step_started_s = None

    def _step(self) -> None:
        runner = self.runner
        if runner is None:
            self._is_stepping = False
            return
        if self._flight is not None and not self._flight.may_be_followed:
            self._end(self._land(self._flight))
        plan = self.scheduler.next()
        if plan is None and self._flight is None:
            self._send()  # what has just landed
            if runner.prepare_next():
                self._post(self.step)
                return
            self._is_stepping = False
            self._save_next()
            return
        flight = None if plan is None else self._take_off(runner, plan)
        ended = [] if self._flight is None else self._land(self._flight)
        if flight is not None:
            self._complete(flight)
            if not runner.runs_ahead:
                ended += self._land(flight)
        self._end(ended)
        self._send()
        self._post(self.step)

    def save(self, deadline_s: float) -> None:
        """Saves what the caches hold until a time of the monotonic clock."""
        if self.archive is not None:
            self.archive.save_all(deadline_s)

    @property
    def is_busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def _wake(self) -> None:
        if not self._is_stepping and self._closed is None:
            self._is_stepping = True
            self._post(self.step)

    def _fetch(self, plan: Plan, stored: Stored) -> None:
        assert self.archive is not None
        (sequence,) = plan.sequences
        self._report(sequence)
        if self.archive.fetch(stored, sequence.pages[sequence.depth], sequence.slot):
            self.scheduler.complete(plan)
        else:
            self.scheduler.fetch_failed(plan)
        self._report(sequence)

    def _save_next(self) -> None:
        """Has one more entry saved as long as there is nothing else to do."""
        if self.archive is not None and self.runner is not None and not self.is_busy and not self._is_saving:
            self._is_saving = self.archive.save_next(self._saved)

    def _saved(self) -> None:
        def go_on() -> None:
            self._is_saving = False
            self._save_next()

        with suppress(HelexaError):  # closed in the meantime
            self._post(go_on)

    def _take_off(self, runner: Runner, plan: Plan) -> Flight | None:
        """The plan under way, or None if there is nothing to wait for."""
        for copy in plan.copies:
            runner.cache.copy(copy.source, copy.target, copy.num_tokens)
        self.scheduler.copied(plan)
        if plan.stored is not None:
            self._fetch(plan, plan.stored)
            return None
        if plan.is_prefill:
            self._report(plan.sequences[0])
        try:
            return runner.start(plan)
        except HelexaError as error:
            for sequence in plan.sequences:
                self._finish(sequence, Finished("error", error))
            return None

    def _complete(self, flight: Flight) -> None:
        """Goes on behind the step, now that all tokens that it computes are known."""
        self._flight = flight
        self.scheduler.complete(flight.plan)
        for sequence in flight.plan.sequences:
            if not sequence.finished:
                sequence.num_expected = int(flight.chooses)
        flight.choose()

    def _land(self, flight: Flight) -> list[tuple[Sequence, Finished]]:
        """Waits for the step and gives its tokens to their sequences; those that end with them."""
        self._flight = None
        flight.wait()
        now_s = time.perf_counter()
        plan = flight.plan
        rate = self.prefill_rate if plan.is_prefill else self.decode_rate
        rate.add(plan.num_tokens * len(plan.sequences), now_s - max(flight.started_s, self._landed_s))
        if plan.is_prefill:
            self.scheduler.adapt(rate.tokens_per_s)
        self._landed_s = now_s
        ended = []
        for index, sequence in enumerate(plan.sequences):
            if sequence.finished:
                continue
            if plan.is_prefill:
                self._report(sequence)
            end = self._receive(flight, index, sequence, now_s)
            if end is not None:
                ended.append((sequence, end))
        return ended

    def _receive(self, flight: Flight, index: int, sequence: Sequence, now_s: float) -> Finished | None:
        if sequence.rows is not None:
            sequence.rows.take(flight.rows(), flight.start)
            return Finished("stop") if sequence.num_pending == 0 else None
        if not flight.chooses:
            return None
        sequence.num_expected = 0
        try:
            sampled = flight.sampled(index)
        except HelexaError as error:
            if isinstance(error, DeviceError):
                self.scheduler.holdings.distrust(sequence)
            self._finish(sequence, Finished("error", error))
            return None
        sequence.token_ids.append(sampled.token_id)
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        sequence.last_token_s = now_s
        self._emit(sequence, sampled)
        if sampled.is_last or sampled.token_id in sequence.stop_token_ids:
            return Finished("stop")
        return Finished("length") if len(sequence.token_ids) >= sequence.max_length else None

    def _report(self, sequence: Sequence) -> None:
        if (progress := sequence.progress) is not None:
            progress.computed_tokens = sequence.num_computed
            progress.prompt_tokens = len(sequence.token_ids)
            progress.is_prefilling = sequence.num_computed < len(sequence.token_ids)

    def _end(self, ended: list[tuple[Sequence, Finished]]) -> None:
        for sequence, event in ended:
            self._finish(sequence, event)

    def _finish(self, sequence: Sequence, event: Finished) -> None:
        sequence.finished = True
        self.scheduler.remove(sequence)
        self._emit(sequence, event)

    def _emit(self, sequence: Sequence, event: Sampled | Finished) -> None:
        receiver = sequence.receiver
        if receiver is None:
            return
        if receiver.mailbox is None:
            receiver.receive(event)
        else:
            self._outbox.setdefault(receiver.mailbox, []).append((receiver, event))

    def _send(self) -> None:
        if not self._outbox:
            return
        outbox, self._outbox = self._outbox, {}
        for mailbox, batch in outbox.items():
            if not mailbox.post(batch):
                self._abandon(mailbox)

    def _abandon(self, mailbox: Mailbox) -> None:
        """Cancels everything whose reader is gone for good."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.receiver is not None and sequence.receiver.mailbox is mailbox:
                self.cancel(sequence)
