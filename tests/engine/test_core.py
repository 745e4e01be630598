"""Scheduler, runner and a model that reads its history back from the pages, without threads."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa.engine.cache import KVCache, StateCache
from helexa.engine.collector import LogitsCollector
from helexa.engine.core import EngineCore
from helexa.engine.cpu_runner import CpuRunner
from helexa.engine.cuda_runner import CudaRunner
from helexa.engine.device import Device
from helexa.engine.flight import bucket_of
from helexa.engine.pages import PagePool
from helexa.engine.prefix_cache import PrefixCache
from helexa.engine.sampler import Sampler, SamplingParams
from helexa.engine.scheduler import Scheduler
from helexa.engine.sequence import Finished, Sequence
from helexa.engine.snapshots import Snapshots
from helexa.errors import BadRequest, ContextTooLong, DevicePoisoned, OutOfMemory, ShuttingDown

PAGE = 4
VOCAB = 17


class Inbox:
    """Receives on the spot."""

    mailbox = None

    def __init__(self):
        self.tokens = []
        self.end = None

    def receive(self, event):
        assert self.end is None, "nothing may follow the last event"
        if isinstance(event, Finished):
            self.end = event
        else:
            self.tokens.append(event.token_id)


class Bench:
    """A core whose jobs run when `run` is called."""

    def __init__(
        self,
        model,
        greedy,
        num_pages=16,
        max_sequences=4,
        prefill_chunk=8,
        max_context=None,
        chooser=None,
        num_snapshots=0,
    ):
        """chooser: makes what chooses the tokens on a device, and so has steps started ahead."""
        self.model = model
        self.greedy = greedy
        self.jobs = deque()
        context = max_context or num_pages * PAGE
        # Memory that nobody wrote is never read: it would be found out.
        cache = KVCache([(num_pages + 1, 1, PAGE, 2)], torch.float32)
        for tensor in (*cache.k, *cache.v):
            tensor.fill_(float("nan"))
        shape = (max_sequences + 1 + num_snapshots, 1, 1, 1)
        states = StateCache([(shape, shape)] if num_snapshots else [])
        for tensor in states.recurrent:
            tensor.fill_(float("nan"))
        self.pool = PagePool(num_pages, PAGE)
        slots = range(max_sequences + 1, shape[0])
        self.prefix = PrefixCache(self.pool, Snapshots(slots, states.copy) if num_snapshots else None)
        scheduler = Scheduler(
            self.pool,
            self.prefix,
            max_context=context,
            max_sequences=max_sequences,
            prefill_chunk=prefill_chunk,
            snapshot_interval=8,
            snapshot_gap=1,
        )
        sizes = {"max_sequences": max_sequences, "max_context": context}
        if chooser is None:
            runner = CpuRunner(model, cache, states, **sizes, capture=False)
        else:
            rows = bucket_of(max_sequences)
            device = chooser(model.vocab_size, max_sequences + 1, rows)
            runner = CudaRunner(model, cache, states, device, Device("cpu"), **sizes)
        self.core = EngineCore(runner, scheduler, self.pool, self.prefix, self.jobs.append)

    def submit(self, prompt, num_new=5, sampler=None, stop=(), receiver=None, rows=None):
        length = min(len(prompt) + num_new, self.core.scheduler.max_context)
        sequence = Sequence(
            list(prompt),
            length,
            sampler=sampler or self.greedy,
            stop_token_ids=frozenset(stop),
            receiver=receiver or Inbox(),
            rows=rows,
        )
        self.core.submit(sequence)
        return sequence

    def run(self, steps=100_000):
        for _ in range(steps):
            if not self.jobs:
                return
            self.jobs.popleft()()


@pytest.fixture(params=["cpu", "ahead"])
def bench(request, history_model, greedy, largest):
    """A bench on the CPU, and one whose steps start before the tokens of the ones before have landed."""
    chooser = largest if request.param == "ahead" else None
    return lambda **options: Bench(history_model(VOCAB), greedy, **({"chooser": chooser} | options))


def test_a_sequence_gets_its_tokens_and_a_reason(bench, expected):
    machine = bench()
    sequence = machine.submit([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 5)
    machine.run()
    assert sequence.receiver.tokens == expected(list(range(1, 11)), 5, VOCAB)
    assert sequence.receiver.end.reason == "length"
    assert machine.pool.num_used == 0


def test_a_stop_token_ends_the_sequence_and_is_its_last_token(bench, expected):
    machine = bench()
    tokens = expected([1, 2], 8, VOCAB)
    sequence = machine.submit([1, 2], 50, stop=[tokens[7]])
    machine.run()
    assert sequence.receiver.tokens == tokens[: tokens.index(tokens[7]) + 1]
    assert sequence.receiver.end.reason == "stop"


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4, 5])
def test_a_batch_of_any_size_gives_what_each_sequence_gives_alone(bench, expected, num_sequences):
    machine = bench(num_pages=32, max_sequences=5)
    prompts = [[i, i + 1, i + 2] for i in range(num_sequences)]
    sequences = [machine.submit(prompt, 4 + 3 * i) for i, prompt in enumerate(prompts)]
    machine.run()
    for i, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        assert sequence.receiver.tokens == expected(prompt, 4 + 3 * i, VOCAB)


def test_batches_are_padded_to_powers_of_two():
    assert [bucket_of(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]


def test_a_cancelled_sequence_hears_nothing_more_and_frees_its_pages_before_the_next_step(bench):
    machine = bench()
    sequence = machine.submit([1, 2, 3], 50)
    machine.run(steps=4)
    heard = len(sequence.receiver.tokens)
    machine.core.cancel(sequence)
    assert machine.pool.num_used == 0
    machine.run()
    assert len(sequence.receiver.tokens) == heard
    assert sequence.receiver.end is None
    assert not machine.core.is_busy


def test_a_prompt_that_is_too_long_is_told_so_and_others_go_on(bench, expected):
    machine = bench(num_pages=4)
    long, short = machine.submit([1] * 16), machine.submit([1, 2], 2)
    machine.run()
    assert isinstance(long.receiver.end.error, ContextTooLong)
    assert short.receiver.tokens == expected([1, 2], 2, VOCAB)


def test_a_sampler_that_refuses_ends_only_its_own_sequence(bench, expected):
    class Refusing(Sampler):
        def sample(self, logits, position):
            raise BadRequest("cannot choose")

    machine = bench()
    bad, good = (
        machine.submit([1, 2], 5, sampler=Refusing(SamplingParams(typical_p=0.5).resolve(), [])),
        machine.submit([3, 4], 5),
    )
    machine.run()
    assert bad.receiver.end.error.message == "cannot choose"
    assert good.receiver.tokens == expected([3, 4], 5, VOCAB)
    assert machine.pool.num_used == 0


def test_a_step_that_reports_an_error_ends_its_sequences_and_the_next_one_runs(bench, expected):
    machine = bench()
    machine.model.fail_with = OutOfMemory("no room for the activations")
    first = machine.submit([1, 2, 3], 3)
    machine.run()
    assert isinstance(first.receiver.end.error, OutOfMemory)
    machine.model.fail_with = None
    second = machine.submit([1, 2, 3], 3)
    machine.run()
    assert second.receiver.tokens == expected([1, 2, 3], 3, VOCAB)


def test_failing_all_ends_running_and_queued_ones_and_refuses_later_ones(bench):
    machine = bench(max_sequences=1)
    sequences = [machine.submit([1, 2, 3], 50) for _ in range(3)]
    machine.run(steps=5)
    machine.core.fail_all(DevicePoisoned("broken"))
    sequences.append(machine.submit([1], 1))
    assert all(isinstance(s.receiver.end.error, DevicePoisoned) for s in sequences)
    machine.run()


def test_everybody_is_told_of_a_fault_even_if_the_scheduler_is_beyond_repair(bench, monkeypatch):
    machine = bench()
    sequences = [machine.submit([1, 2, 3], 50) for _ in range(3)]
    machine.run(steps=5)

    def broken(sequence):
        raise AssertionError("page 3 is released more often than it was held")

    monkeypatch.setattr(machine.core.scheduler, "remove", broken)
    with pytest.raises(AssertionError):
        machine.core.fail_all(DevicePoisoned("broken"))
    assert all(isinstance(s.receiver.end.error, DevicePoisoned) for s in sequences)


def test_a_closed_core_holds_no_model(bench):
    machine = bench()
    sequence = machine.submit([1, 2, 3], 50)
    machine.run(steps=3)
    machine.core.close()
    machine.run()
    assert isinstance(sequence.receiver.end.error, ShuttingDown)
    assert machine.core.runner is None


def test_all_logits_come_in_chunks_and_never_from_the_prefix_cache(bench, expected):
    machine = bench()
    prompt = [(i * i) % VOCAB for i in range(20)]
    for _ in range(2):
        collector = LogitsCollector(20, VOCAB)
        machine.submit(prompt, 0, receiver=collector, rows=collector)
        machine.run()
        logits = collector.future.result(0)
        assert logits.argmax(1).tolist() == [expected(prompt[: i + 1], 1, VOCAB)[0] for i in range(20)]
    assert machine.pool.num_used == 0


def test_who_waits_for_the_last_of_its_rows_has_no_step_of_nothing(bench, monkeypatch):
    machine = bench()
    start, lengths = machine.core.runner.start, []

    def started(plan):
        lengths.append(plan.num_tokens)
        return start(plan)

    monkeypatch.setattr(machine.core.runner, "start", started)
    collector = LogitsCollector(20, VOCAB)
    machine.submit([*range(1, 17), 3, 1, 4, 1], 0, receiver=collector, rows=collector)
    machine.run()
    assert lengths == [8, 8, 4]


def test_a_decode_that_outgrows_the_pages_resumes_where_it_was(bench, expected):
    machine = bench(num_pages=6)
    prompts = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    sequences = [machine.submit(prompt, 15) for prompt in prompts]
    machine.run()
    assert machine.core.scheduler.num_preemptions > 0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.receiver.tokens == expected(prompt, 15, VOCAB)


def test_the_last_event_is_sent_even_if_no_step_follows(bench):
    class Box:
        def __init__(self):
            self.events = []

        def post(self, batch):
            self.events += [event for _, event in batch]
            return True

    class Reader(Inbox):
        def __init__(self, mailbox):
            super().__init__()
            self.mailbox = mailbox

    machine, box = bench(), Box()
    own = Sampler(SamplingParams(temperature=0.0, typical_p=0.5).resolve(), [])  # no device has it
    machine.submit([1, 2, 3], 3, sampler=own, receiver=Reader(box))
    machine.run()
    assert isinstance(box.events[-1], Finished)
    assert len(box.events) == 4


def test_events_of_a_step_travel_in_one_batch_and_a_dead_reader_is_cancelled(bench):
    class Box:
        def __init__(self):
            self.batches = []
            self.is_open = True

        def post(self, batch):
            self.batches.append(batch)
            return self.is_open

    machine = bench()
    box = Box()
    for i in range(3):
        inbox = Inbox()
        inbox.mailbox = box
        machine.submit([1, 2, i], 50, receiver=inbox)
    machine.run(steps=20)
    assert len(box.batches[-1]) == 3
    box.is_open = False
    machine.run()
    assert not machine.core.is_busy
    assert machine.pool.num_used == 0


@settings(max_examples=40)
@given(
    arrivals=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=20),
            st.integers(1, 10),
            st.integers(0, 8),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    ),
    num_pages=st.integers(6, 20),
    prefill_chunk=st.sampled_from([2, 8, 16]),
    is_ahead=st.booleans(),
    stop=st.sets(st.integers(0, VOCAB - 1), max_size=3),
    num_snapshots=st.sampled_from([0, 0, 3, 12]),
)
def test_pages_and_states_hold_what_the_model_wrote_under_any_load(
    history_model,
    state_model,
    greedy,
    largest,
    expected,
    arrivals,
    num_pages,
    prefill_chunk,
    is_ahead,
    stop,
    num_snapshots,
):
    machine = Bench(
        (state_model if num_snapshots else history_model)(VOCAB),
        greedy,
        num_pages=num_pages,
        prefill_chunk=prefill_chunk,
        chooser=largest if is_ahead else None,
        num_snapshots=num_snapshots,
    )
    sequences = []
    for prompt, num_new, steps, is_cancelled in arrivals:
        if sequences and len(prompt) % 3 == 0:  # goes on where another one has ended
            prompt = (sequences[-1][2].token_ids + prompt)[: num_pages * PAGE - 2]
        sequence = machine.submit(prompt, num_new, stop=stop)
        machine.run(steps)
        if is_cancelled and not sequence.finished:
            machine.core.cancel(sequence)
        sequences.append((prompt, num_new, sequence))
    machine.run()
    for prompt, num_new, sequence in sequences:
        inbox = sequence.receiver
        assert inbox.tokens == expected(prompt, len(inbox.tokens), VOCAB)
        if inbox.end is not None and inbox.end.error is None:
            has_stopped = inbox.tokens[-1] in stop
            assert not stop & set(inbox.tokens[:-1])
            assert has_stopped or len(inbox.tokens) == min(num_new, num_pages * PAGE - len(prompt))
            assert inbox.end.reason == ("stop" if has_stopped else "length")
    assert machine.pool.num_used == 0
