"""Conversations of several threads in one context, against each of them alone.

A program is what one thread does: it opens conversations, asks, stops answers and readings
half-way, resets, and leaves conversations to whoever wants their cells. What it is answered must be
what the same program gets from an engine of its own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_session import DOCUMENT, OPTIONS, SPEC, Loaded

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import Busy, Cancelled, LaserKVError, UserError
from laserkv_gguf.llama import rows
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.llama.sequence import Sequence

PATIENCE = 300.0
SHARE = 1024  # cells of one conversation
THREADS, RESIDENTS, PARALLEL = 8, 5, 4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("turns"), SPEC)
    yield one
    one.model.close()


def engine_of(loaded: Loaded, residents: int, **settings: Any) -> LaserKV:
    settings = {"block_size": 64, "ratio": 0.4, "lookahead": 3, **settings}
    return LaserKV(
        loaded.model,
        context=OPTIONS,
        ctx_size=SHARE * residents,
        residents=residents,
        aside=1 << 18,
        **settings,
    )


# ---- programs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What is done: `number` says of which document or conversation, `count` how much of it."""

    kind: str
    number: int
    count: int
    sampled: bool = False


def program(random: np.random.Generator, length: int) -> list[Step]:
    kinds = ["ask", "turn", "turn", "turn", "stop", "stop reading", "reset", "leave", "read"]
    return [
        Step(
            str(random.choice(kinds)),
            int(random.integers(0, 3)),
            int(random.integers(1, 6)),
            bool(random.integers(0, 2)),
        )
        for _ in range(length)
    ]


def text_of(owner: int, number: int) -> str:
    start = (owner * 31 + number * 17) % 150
    return f"House {owner}-{number} has {owner * 7 + number} doors. " + DOCUMENT[start:]


@dataclass
class Runner:
    """Runs one program; `said` is what it was answered."""

    engine: LaserKV
    owner: int
    said: list[list[int]] = field(default_factory=list)
    talks: dict[int, Any] = field(default_factory=dict)

    def run(self, steps: list[Step]) -> list[list[int]]:
        for at, step in enumerate(steps):
            self.said.append(self.do(step, at))
        return self.said

    def talk(self, step: Step) -> Any:
        if step.number not in self.talks:
            self.talks[step.number] = self.engine.conversation(
                document=text_of(self.owner, step.number), max_tokens=6
            )
        return self.talks[step.number]

    def do(self, step: Step, at: int) -> list[int]:
        question = f"What of {at}?"
        sampling = Sampling(temperature=0.9, seed=at) if step.sampled else None
        if step.kind == "ask":
            text = text_of(self.owner, step.number)
            reply = self.engine.ask(
                question, document=text, max_tokens=step.count, sampling=sampling
            )
            return reply.tokens
        if step.kind == "leave":
            self.talks.pop(step.number, None)
            return []
        talk = self.talk(step)
        if step.kind == "reset":
            talk.reset()
        elif step.kind == "read":
            talk.read(question=question)
        elif step.kind == "stop reading":
            self.stop_reading(step, question)
        else:
            talk.sampling = sampling or Sampling()
            answer = talk.ask(question)
            with answer:
                for count, _ in enumerate(answer, 1):
                    if step.kind == "stop" and count == min(step.count, 5):
                        break
            return answer.reply.tokens if step.kind == "turn" else []
        return []

    def stop_reading(self, step: Step, question: str) -> None:
        """Cancelled in a micro-batch of its document."""
        seen: list[int] = []

        def on_progress(_: Any) -> None:
            seen.append(0)
            if len(seen) == step.count:
                answer.stop()

        text = text_of(self.owner, step.number)
        answer = self.engine.stream(question, document=text, on_progress=on_progress)
        with pytest.raises(Cancelled):
            list(answer)


def together(*work: Callable[[], Any]) -> list[Any]:
    """What each returns, or raises, in a thread of its own."""
    found: list[Any] = [None] * len(work)

    def run(number: int) -> None:
        try:
            found[number] = work[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "hangs"
    return found


def widths_of(engine: LaserKV) -> list[int]:
    """Gets how many calls had a part in each batch from now on."""
    turns, widths = engine.access.turns, list[int]()
    real = turns._compute

    def compute(context: Any, chosen: list[Any], own: Any) -> None:
        widths.append(len(chosen))
        real(context, chosen, own)

    turns._compute = compute  # type: ignore[method-assign]
    return widths


def no_cell_is_lost(engine: LaserKV) -> None:
    """What stands in the context is what the residents' ledgers say, and nothing else does."""
    context, inside = engine.context, engine.residents.inside
    assert context is not None
    form = rows.known(context)
    numbers = {place.sequence: one for one, place in inside.items()}
    assert len(numbers) == len(inside) <= engine.residents.most
    assert sum(place.cells for place in inside.values()) <= context.cells
    for number in range(engine.options.sequences):
        if number not in numbers:
            assert Sequence(context, number).last == -1, number
            continue
        talk: Any = numbers[number]
        talk.cells.settle()
        held = np.sort(rows.take(context, form, number).positions)
        assert np.array_equal(held, np.sort(talk.ledger.position))
        assert len(held) <= inside[talk].cells


@pytest.mark.parametrize(
    "settings", [{}, {"recall": "ram", "read_policy": "random"}, {"positions": "compact"}]
)
@pytest.mark.parametrize("programs", [12, pytest.param(100, marks=pytest.mark.long)])
def test_programs_together_are_answered_as_alone(
    programs: int, settings: dict[str, Any], loaded: Loaded
) -> None:
    random = np.random.default_rng(programs)
    steps = [program(random, 6) for _ in range(programs)]
    expected = []
    for owner, one in enumerate(steps):
        with engine_of(loaded, 1, **settings) as engine:
            expected.append(Runner(engine, owner).run(one))
    with engine_of(loaded, RESIDENTS, parallel=PARALLEL, **settings) as engine:
        mine = iter(range(programs))
        found: dict[int, Any] = {}

        def work() -> None:
            while (owner := next(mine, None)) is not None:
                found[owner] = Runner(engine, owner).run(steps[owner])

        widths = widths_of(engine)
        errors = together(*[work] * THREADS)
        assert errors == [None] * THREADS
        assert max(widths) > 1  # conversations were generating in one batch
        for owner in range(programs):
            assert found[owner] == expected[owner], (owner, steps[owner])
        no_cell_is_lost(engine)


# ---- batches ------------------------------------------------------------------------------------


def test_all_that_generate_are_one_batch(loaded: Loaded) -> None:
    """Eight answers of forty tokens take little more than forty batches, not 320."""
    with engine_of(loaded, 8, parallel=8) as engine:
        engine.ask("What?", max_tokens=1)
        before, widths = engine.access.turns.steps, widths_of(engine)
        begin = threading.Barrier(8)

        def ask(number: int) -> list[int]:
            begin.wait()
            return engine.ask(f"What of {number}?", max_tokens=40).tokens

        found = together(*[lambda n=n: ask(n) for n in range(8)])  # type: ignore[misc]
        assert engine.access.turns.steps - before < 160
        assert widths.count(8) > 20
    with engine_of(loaded, 1) as engine:
        for number, tokens in enumerate(found):
            assert engine.ask(f"What of {number}?", max_tokens=40).tokens == tokens


def test_a_short_question_does_not_wait_for_a_document(loaded: Loaded) -> None:
    """At most one micro-batch of it goes before the first token."""
    with engine_of(loaded, 2, parallel=2, ratio=0.1) as engine:
        engine.ask("What?", max_tokens=1)
        computed: list[tuple[int, int]] = []  # of each batch: whose, and how many tokens
        real = engine.access.turns._compute

        def compute(context: Any, chosen: list[Any], own: Any) -> None:
            computed.extend((one.turn.number, len(one.job)) for one in chosen)
            real(context, chosen, own)

        engine.access.turns._compute = compute  # type: ignore[method-assign]
        reads, asked, answered = threading.Event(), threading.Event(), threading.Event()
        marks: list[int] = []

        def on_progress(state: Any) -> None:
            if state.read >= 1024 and not asked.is_set():
                reads.set()
                while not engine.access.turns._ready:  # until the question is there
                    asked.wait(0.001)
                asked.set()
                marks.append(len(computed))

        def ask() -> None:
            reads.wait()

            def on_text(_: str) -> None:
                if not answered.is_set():
                    marks.append(len(computed))
                    answered.set()

            engine.ask("And this?", max_tokens=2, on_text=on_text)

        def read() -> None:
            engine.ask("What?", document=DOCUMENT * 8, max_tokens=1, on_progress=on_progress)

        assert together(read, ask) == [None, None]
        before, after = marks
        reader = computed[before - 1][0]
        assert sum(number == reader for number, _ in computed[before:after]) <= 1
        assert sum(number == reader for number, _ in computed[after:]) > 10


def test_readings_take_turns(loaded: Loaded) -> None:
    with engine_of(loaded, 2, parallel=2, ratio=0.1) as engine:
        engine.ask("What?", max_tokens=1)
        order: list[int] = []

        def read(number: int) -> None:
            engine.ask(
                "What?",
                document=f"{number}. " + DOCUMENT * 4,
                max_tokens=1,
                on_progress=lambda _: order.append(number),
            )

        assert together(lambda: read(0), lambda: read(1)) == [None, None]
        both = order[order.index(1) :][: len(order) // 2]
        longest = max(len(list(group)) for _, group in itertools.groupby(both))
        assert longest <= 12  # a call that comes later catches up, and then they alternate


def test_what_is_captured_for_one_is_not_overwritten_for_another(loaded: Loaded) -> None:
    """Capturing stops and goes on; what is decoded meanwhile leaves no trace in it."""
    tokens = np.arange(20, 28, dtype=np.int32)
    with Context(loaded.model, 256, OPTIONS) as context:
        probe = context.probe
        expected, found = probe.new("queries", 8), probe.new("queries", 8)
        with probe.armed(queries=(expected, 0)):
            context.decode(tokens, 0, 0)
        Sequence(context, 0).remove()
        with probe.armed(queries=(found, 0)):
            context.decode(tokens[:5], 0, 0)
            mine = probe.disarm()
            assert mine is not None
            with probe.armed():  # another call's, that wants nothing
                context.decode(tokens[::-1], 0, 1)
            probe.arm(mine)
            context.decode(tokens[5:], 5, 0)
        assert np.allclose(found, expected, atol=1e-5)


# ---- who waits ----------------------------------------------------------------------------------


def test_a_file_is_loaded_while_an_answer_is_under_way(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "read"
    with engine_of(loaded, 2, parallel=2, recall="ram") as engine:
        talk = Conversation(engine, document=text_of(0, 0), max_tokens=6)
        talk.read()
        talk.save(path)
        expected = list(talk.ask("How many doors?"))
        undisturbed = list(engine.stream("How many windows?", max_tokens=8))
        begun, go_on, answer = threading.Event(), threading.Event(), list[str]()

        def answering() -> None:
            for piece in engine.stream("How many windows?", max_tokens=8):
                answer.append(piece)
                begun.set()
                assert go_on.wait(PATIENCE)

        def loading() -> None:
            assert begun.wait(PATIENCE)
            back = engine.load(path, max_tokens=6)
            again.extend(back.ask("How many doors?"))

        again: list[str] = []
        threads = [threading.Thread(target=one) for one in (answering, loading)]
        for thread in threads:
            thread.start()
        threads[1].join(PATIENCE)
        held = threads[1].is_alive()
        go_on.set()
        for thread in threads:
            thread.join()
        assert not held
        assert "".join(again) == "".join(expected)
        assert "".join(answer) == "".join(undisturbed)


def test_what_does_not_fit_waits_or_is_refused(loaded: Loaded) -> None:
    """Cells of one that is idle are taken, and those of one at work are waited for."""
    with engine_of(loaded, 2, parallel=2, positions="original") as engine:
        talk = engine.conversation(document=text_of(0, 0), max_tokens=6)
        first = talk.ask("What?")
        next(first)  # it stays at work, with half of the cells
        with pytest.raises(UserError, match=r"needs [0-9]+ cells; use ctx_size=[0-9]+"):
            together_one(lambda: engine.ask("What?", document=DOCUMENT * 14))
        wide = DOCUMENT * 9  # wants more than the other half
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.append(engine.ask("What?", document=wide, max_tokens=2).tokens)
        )
        thread.start()
        while thread.is_alive() and not engine.access.turns.waiting_for_cells():
            thread.join(0.001)
        assert not found
        assert list(first)  # it goes on
        thread.join(PATIENCE)
    with engine_of(loaded, 2) as engine:
        engine.ctx_size = 4 * SHARE
        assert found == [engine.ask("What?", document=wide, max_tokens=2).tokens]


def together_one(work: Callable[[], Any]) -> Any:
    """What it returns, or raises, in another thread."""
    found = together(work)[0]
    if isinstance(found, BaseException):
        raise found
    return found


def test_a_queue_has_an_end(loaded: Loaded) -> None:
    with loaded.engine(queue=1, positions="original") as engine:
        first = engine.stream("What?", max_tokens=100_000)
        next(first)
        waiting = engine.stream("What?", max_tokens=1)
        thread = threading.Thread(target=lambda: list(waiting))
        thread.start()
        while thread.is_alive() and not engine.access._queue:
            thread.join(0.001)
        with pytest.raises(Busy, match="1 calls wait"):
            together_one(lambda: engine.ask("What?"))
        first.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert len(waiting.reply.tokens) == 1


def test_one_that_waits_is_closed_alone(loaded: Loaded) -> None:
    """Without waiting for the one that is inside."""
    with loaded.engine(positions="original") as engine:
        first = engine.stream("What?", max_tokens=100_000)
        next(first)
        waiting = engine.stream("What?", max_tokens=1)
        thread = threading.Thread(target=lambda: together(lambda: list(waiting)))
        thread.start()
        while thread.is_alive() and not engine.access._queue:
            thread.join(0.001)
        waiting.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert next(first)
        first.close()


def test_what_fails_in_a_batch_fails_alone(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of those that were in it is tried by itself."""
    with engine_of(loaded, 4, parallel=4) as engine:
        expected = [engine.ask(f"What of {n}?", max_tokens=8).tokens for n in range(4)]
        real = Context.compute

        def compute(context: Context, jobs: Any, **options: Any) -> None:
            if len(jobs) > 1 or int(jobs[0].tokens[0]) == expected[2][3]:
                raise LaserKVError("broken")
            real(context, jobs, **options)

        monkeypatch.setattr(Context, "compute", compute)
        work = [lambda n=n: engine.ask(f"What of {n}?", max_tokens=8).tokens for n in range(4)]
        found = together(*work)
        for n in range(4):
            failed = expected[2][3] in expected[n][:-1]
            assert isinstance(found[n], LaserKVError) if failed else found[n] == expected[n]
        assert isinstance(found[2], LaserKVError)
        monkeypatch.undo()
        assert together(*work) == expected
        no_cell_is_lost(engine)
