"""Conversations that outgrow their cache, against NumPy forward passes that cannot see what went.

What llama.cpp's cache holds is asked of llama.cpp before every decode, and the forward pass's mask
is made of that: logits, the keys and the queries that a policy sees must all be those of a model
for which evicted tokens do not exist.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from test_engine import Cache, error, standing
from test_session import DOCUMENT, OPTIONS, TEMPLATE, Loaded, chars, in_cache, said, turn
from tiny import BOS, TinySpec, forward

from laserkv_gguf import policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.conversation import Conversation as Talk
from laserkv_gguf.conversation.space import Space, Thinning
from laserkv_gguf.errors import Cancelled, LaserKVError, UserError
from laserkv_gguf.llama import rows, state
from laserkv_gguf.llama.context import SEQUENCES, Context
from laserkv_gguf.llama.sequence import MAIN, PROBE, Sequence
from laserkv_gguf.policies import Candidates, Needs, Policy
from laserkv_gguf.policies.laser import PAPER_OPTIONS
from laserkv_gguf.recall.recaller import Recaller
from laserkv_gguf.saving.conversation import load, save

SPEC = TinySpec(layers=2, ctx_train=4096, chat_template=TEMPLATE)
SHORT = TinySpec(layers=1, ctx_train=400, chat_template=TEMPLATE)
SYSTEM = "You know ore."
CELLS = 400


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("talk"), SPEC)
    yield one
    one.model.close()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A model trained for 400 tokens only."""
    one = Loaded(tmp_path_factory.mktemp("short"), SHORT)
    yield one
    one.model.close()


@dataclass(frozen=True)
class Watching(Policy):
    """`laser`, and what it saw."""

    name: ClassVar[str] = "watching"
    needs: ClassVar[Needs] = Needs(queries=True, keys=True, precise=True)
    seen: ClassVar[list[tuple[int, Candidates, NDArray[np.int64]]]] = []
    now: ClassVar[Callable[[], int]] = lambda: 0

    def warm_up(self) -> None:
        """Nothing is to be seen but conversations."""

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        chosen = policies.make("laser", **PAPER_OPTIONS).select(candidates, budget)
        self.seen.append((Watching.now(), candidates, np.sort(chosen)))
        return chosen


@dataclass(frozen=True)
class Looking(Watching):
    """Asks for no queries."""

    name: ClassVar[str] = "looking"
    needs: ClassVar[Needs] = Needs(keys=True, precise=True)
    seen: ClassVar[list[tuple[int, Candidates, NDArray[np.int64]]]] = []

    def select(self, candidates: Candidates, budget: int) -> NDArray[np.int64]:
        chosen = policies.make("keydiff").select(candidates, budget)
        self.seen.append((Watching.now(), candidates, np.sort(chosen)))
        return chosen


@dataclass
class Decode:
    """A batch of the main sequence, what stood there before it, and the logits after it."""

    tokens: NDArray[np.int32]
    start: int
    before: list[int]
    logits: NDArray[np.float32] | None = None
    held: list[int] = field(default_factory=list)


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[Decode]:
    found: list[Decode] = []
    real = Context.decode

    def decode(self: Context, tokens: Any, start: int, sequence: int, **options: Any) -> None:
        if sequence == MAIN:
            found.append(Decode(np.array(tokens), start, standing(self)))
        real(self, tokens, start, sequence, **options)
        if sequence == MAIN and options.get("outputs"):
            found[-1].logits = self.logits()

    monkeypatch.setattr(Context, "decode", decode)
    return found


def mask_of(decodes: list[Decode]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """All tokens in the order of their positions, and what each of them saw."""
    count = sum(len(decode.tokens) for decode in decodes)
    tokens, seen = np.zeros(count, np.int64), np.zeros((count, count), bool)
    for decode in decodes:
        end = decode.start + len(decode.tokens)
        tokens[decode.start : end] = decode.tokens
        seen[decode.start : end, decode.before] = True
        own = np.tri(len(decode.tokens), dtype=bool)
        seen[decode.start : end, decode.start : end] = own
    return tokens, seen


QUESTIONS = [f"What about {word} number {i}?" for i, word in enumerate(["tin", "ore", "lead"] * 6)]


# ---- the compression ---------------------------------------------------------------------------


def test_everything_computed_with_evicted_tokens_hidden(
    loaded: Loaded, decodes: list[Decode]
) -> None:
    """Logits of all answers, and what the policy saw: keys in the cache, the newest question's."""
    Watching.seen.clear()
    settings: dict[str, Any] = {"policy": f"{__name__}:Watching", "probe_tokens": 0, "lookahead": 0}
    settings["recall"] = "off"  # what recalling asks is another test
    with loaded.engine(ctx_size=CELLS, ratio=0.2, positions="original", **settings) as engine:
        talk = engine.conversation(document=DOCUMENT, system=SYSTEM, max_tokens=12)
        Watching.now = lambda: len(decodes)
        talk.read()
        reading = len(Watching.seen)
        for question in QUESTIONS[:12]:
            turn(talk, question)
            assert talk.cells_used == in_cache(engine) == len(talk.ledger) <= CELLS
            assert talk.ledger.position.tolist() == standing(engine._context)
    thinned = Watching.seen[reading:]
    assert len(thinned) > 4
    del thinned[2:-2]
    tokens, seen = mask_of(decodes)
    truth = forward(loaded.weights, loaded.spec, tokens, visible=seen)
    for decode in decodes:
        if decode.logits is not None:
            row = truth.logits[decode.start + len(decode.tokens) - 1]
            assert error(decode.logits, row) < 1e-4
    whole = forward(loaded.weights, loaded.spec, tokens).logits
    assert error(whole[-1], truth.logits[-1]) > 0.1  # what is hidden is missed

    for at, candidates, chosen in thinned:
        asked, before = decodes[at], standing_before(decodes[:at])
        # the question stands right after all that was said, in a sequence of its own
        prompt = np.concatenate((tokens[: asked.start], asked.tokens))
        rows = np.zeros((len(prompt), len(prompt)), bool)
        rows[: asked.start, : asked.start] = seen[: asked.start, : asked.start]
        rows[asked.start :, before] = True
        own = np.tri(len(asked.tokens), dtype=bool)
        rows[asked.start :, asked.start :] = own
        expected = forward(loaded.weights, loaded.spec, prompt, visible=rows)
        assert error(candidates.queries, expected.queries[:, asked.start :]) < 1e-3
        where = np.array(before)[candidates.tokens]
        assert error(candidates.keys, truth.keys[:, where]) < 1e-4
        gone = set(where.tolist()) - set(where[chosen].tolist())
        assert gone
        assert set(before) - gone == set(asked.before)


def standing_before(decodes: list[Decode]) -> list[int]:
    last = decodes[-1]
    return [*last.before, *range(last.start, last.start + len(last.tokens))]


def test_moved_positions(loaded: Loaded, decodes: list[Decode]) -> None:
    """Logits are the moving NumPy cache's, which keeps the tokens the ledger says are there."""
    cache, read, compared = Cache(loaded), 0, 0  # type: ignore[arg-type]
    Looking.seen.clear()
    Watching.now = lambda: len(decodes)
    policy = f"{__name__}:Looking"
    with loaded.engine(ctx_size=300, policy=policy, positions="compact") as engine:
        talk = engine.conversation(system=SYSTEM, max_tokens=6)
        talk.read()
        for question in QUESTIONS:
            done = len(decodes)
            pieces = iter(talk.ask(question))
            first = next(pieces)  # the question is decoded
            lengths = [len(segment.tokens) for segment in talk.ledger.segments.values()]
            starts = np.concatenate(([0], np.cumsum(lengths)))
            before = talk.ledger.position < decodes[done].start
            decodes[done].held = (starts[talk.ledger.segment] + talk.ledger.index)[before].tolist()
            assert first + "".join(pieces)
        assert talk.thinnings > 4
    looked = {at: candidates for at, candidates, _ in Looking.seen}
    for at, decode in enumerate(decodes):
        held = len(decode.before)
        if at in looked:  # keys where they stand before this turn's eviction
            rows = looked[at].tokens
            stand = np.stack([cache.turned(raw[rows], cache.positions[rows]) for raw in cache.raw])
            assert error(looked[at].keys, stand) < 1e-3
        assert decode.before == list(range(held)) == list(range(decode.start))
        if decode.held:
            assert len(decode.held) == held
            cache.keep(decode.held, compact=True)
        logits, _ = cache.decode(decode.tokens, decode.start, read)
        read += len(decode.tokens)
        if decode.logits is not None:
            assert error(decode.logits, logits[-1]) < 1e-3  # keys are turned again and again
            compared += 1
    assert compared == 6 * len(QUESTIONS)
    assert len(looked) > 4


def test_more_cells_than_positions(short: Loaded) -> None:
    """What the model was trained for is all there is."""
    with short.engine(ctx_size=900) as engine:
        talk = engine.conversation(max_tokens=300)
        for question in QUESTIONS:
            assert len(turn(talk, question).tokens) > 150
            assert Sequence(engine._context, MAIN).last < SHORT.ctx_train
        assert talk.thinnings > 3


@pytest.mark.parametrize(
    ("policy", "positions"),
    [("laser", "auto"), ("laser", "original"), ("h2o", "auto"), ("lagkv", "auto")],
)
def test_a_hundred_turns(policy: str, positions: str, short: Loaded) -> None:
    """One context, never more cells than it has, and the positions that the model knows."""
    with short.engine(policy=policy, ctx_size=256, positions=positions) as engine:
        talk = engine.conversation(system=SYSTEM, max_tokens=8)
        talk.read()
        context, used = engine._context, []
        for number in range(100):
            reply = turn(talk, QUESTIONS[number % len(QUESTIONS)])
            assert len(reply.tokens) == 8
            used.append(talk.cells_used)
            assert engine._context is context
            assert used[-1] <= 256
            if number % 10 == 9:
                assert used[-1] == in_cache(engine)
            if positions == "auto":
                assert Sequence(context, MAIN).last < SHORT.ctx_train
            # the system prompt is never touched
            head = [BOS, *chars(f"[system]{SYSTEM}\n[user]")]
            assert talk.ledger.kept(0).tolist() == list(range(len(head)))
        assert max(used[50:]) - max(used[:50]) < 32
        for number in range(PROBE, SEQUENCES):
            assert Sequence(context, number).last == -1


@pytest.mark.parametrize("policy", sorted(set(policies.available()) - {"full", "infllm"}))
def test_every_policy_lets_turns_age(policy: str, short: Loaded) -> None:
    """`full` refuses; `infllm` and `quest` score what they are shown like any other."""
    with short.engine(policy=policy, ctx_size=256) as engine:
        talk = engine.conversation(system=SYSTEM, max_tokens=8)
        for number in range(12):
            turn(talk, QUESTIONS[number % len(QUESTIONS)])
        assert talk.thinnings > 2
        assert talk.cells_used <= 256
        assert talk.cells_used == in_cache(engine)


def test_pauses_are_no_longer_than_a_block(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decoded between a question and its answer: the question twice, and the drafts."""
    counts: list[int] = []
    real = Context.decode

    def decode(self: Context, tokens: Any, start: int, sequence: int, **options: Any) -> None:
        counts.append(len(tokens))
        real(self, tokens, start, sequence, **options)

    monkeypatch.setattr(Context, "decode", decode)
    with loaded.engine(ctx_size=300, lookahead=4) as engine:
        talk = engine.conversation(max_tokens=10)
        talk.read()
        for question in QUESTIONS * 2:
            counts.clear()
            turn(talk, question)
            prompt = max(counts)
            assert sum(counts) <= 2 * prompt + 4 + 1 + 10
            assert sum(counts) - prompt - 9 <= 64  # a block of these settings
        assert talk.thinnings > 5


def test_nothing_is_compressed_that_fits(loaded: Loaded) -> None:
    with loaded.engine(ctx_size=2000) as one, loaded.engine(ctx_size=CELLS) as other:
        whole, talk = (engine.conversation(max_tokens=8) for engine in (one, other))
        same = []
        for question in QUESTIONS:
            same.append(turn(whole, question).tokens == turn(talk, question).tokens)
            if talk.thinnings:
                break
        assert all(same[:-1])
        assert 5 < len(same) < len(QUESTIONS)
        assert whole.thinnings == 0


def test_policy_full_refuses_and_goes_on_after_a_reset(loaded: Loaded) -> None:
    with loaded.engine(ctx_size=300, policy="full") as engine:
        talk = engine.conversation(max_tokens=8)
        first = turn(talk, "one?").tokens

        def go_on() -> None:
            for _ in range(30):
                turn(talk, "go on")

        with pytest.raises(UserError, match=r"policy full .*reset\(\)"):
            go_on()
        used = talk.cells_used
        assert used == in_cache(engine) <= 300
        talk.reset()
        assert turn(talk, "one?").tokens == first


def test_a_question_longer_than_the_context(loaded: Loaded) -> None:
    with loaded.engine(ctx_size=256) as engine:
        talk = engine.conversation(max_tokens=8)
        turn(talk, "one?")
        used = talk.cells_used
        with pytest.raises(UserError, match="260 tokens does not fit into a context of 256"):
            turn(talk, "x" * (260 - len(chars("\n[user]\n[assistant]")) - 1))
        assert talk.cells_used == used == in_cache(engine)
        assert len(turn(talk, "x" * 180).tokens) == 8  # everything said goes for it
        assert in_cache(engine) <= 256


def test_stopped_while_making_room(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the probe: nothing was evicted, and the next turn is as if it had not been."""
    stop = [False]
    real = Context.decode

    def decode(self: Context, tokens: Any, start: int, sequence: int, **options: Any) -> None:
        if sequence == PROBE and stop[0]:
            stop[0] = False
            raise KeyboardInterrupt
        real(self, tokens, start, sequence, **options)

    with loaded.engine(ctx_size=300) as engine:
        talk = engine.conversation(max_tokens=8)
        expected = [turn(talk, question).tokens for question in QUESTIONS]
    monkeypatch.setattr(Context, "decode", decode)
    with loaded.engine(ctx_size=300) as engine:
        talk = engine.conversation(max_tokens=8)
        for number, question in enumerate(QUESTIONS):
            stop[0] = True
            try:
                found = turn(talk, question).tokens
            except KeyboardInterrupt:
                assert talk.cells_used == in_cache(engine)
                found = turn(talk, question).tokens
            assert found == expected[number]
        assert talk.thinnings > 3


# ---- what is in the cache ----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("kind", "flash", "tolerance"),
    [("f32", "off", 1e-6), ("f16", "off", 2e-3), ("f16", "on", 2e-3), ("q8_0", "on", 0.04)],
)
def test_stored_rows_are_what_was_captured(
    dim: int, kind: str, flash: str, tolerance: float, tmp_path: Path
) -> None:
    """Keys and values of scattered cells, also transposed and Hadamard-rotated, and moved ones."""
    spec = TinySpec(layers=2, heads=2, kv_heads=1, head_dim=dim)
    one = Loaded(tmp_path, spec)
    options = replace(OPTIONS, type_k=kind, type_v=kind, flash_attn=flash)
    tokens = np.arange(40, dtype=np.int32) + 5
    with one.model, Context(one.model, 256, options) as context:
        keys, values = context.probe.new("keys", 44), context.probe.new("values", 44)
        form = rows.check(context)
        with context.probe.armed(keys=(keys[:, :40], 0), values=(values[:, :40], 0)):
            context.decode(tokens, 0, MAIN)
        Sequence(context, MAIN).remove(3, 9)
        with context.probe.armed(keys=(keys[:, 40:], 0), values=(values[:, 40:], 0)):
            context.decode(tokens[:4], 40, MAIN)  # goes into the hole: cells are out of order
        wanted = np.array([0, 2, 11, 12, 30, 41, 43])
        found = rows.read(context, form, MAIN, wanted)
        assert found.positions.tolist() == wanted.tolist()
        assert error(found.keys, keys[:, wanted]) < tolerance
        assert error(found.values, values[:, wanted]) < tolerance
        assert Sequence(context, 2).last == -1
        blob = state.save(context.handle, MAIN)
        for broken in (blob[:-1], blob[:5], np.concatenate((blob, blob[:4]))):
            with pytest.raises(rows.FormatError, match=r"llama\.cpp's state"):
                rows.parse(broken, form)


# ---- how the cells are shared ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        # 1000 - 20 - 30 = 950 left, 475 for the history: all of it fits
        (Space(1000, 20, 0, 100, (200, 175), 30, 900), None),
        # one more: 416 of 475 stay; the first turn ages, and 416 - 176 of 300 are kept
        (Space(1000, 20, 0, 100, (200, 176), 30, 900), Thinning(None, 1, 240)),
        # aged turns alone are thinned to make room for recent ones
        (Space(1000, 20, 0, 400, (50, 60), 30, 900), Thinning(None, 0, 306)),
        # documents take all but 2 · 64: nothing of them goes
        (Space(1000, 20, 822, 0, (10,), 30, 900), None),
        # the first turn after reading: nothing was said yet that would need room
        (Space(1000, 20, 900, 0, (), 30, 50), None),
        (Space(1000, 20, 901, 0, (), 30, 50), Thinning(850, 0, 0)),
        # one more must go, and the turn still fits
        (Space(1000, 20, 823, 0, (10,), 30, 900), Thinning(822, 0, 0)),
        # 475 less 40 for the next question: 381 stay
        (Space(1000, 20, 0, 400, (20, 20), 30, 900, 40), Thinning(None, 0, 341)),
        # the newest turn too may have to age
        (Space(200, 20, 0, 0, (150,), 30, 100), Thinning(None, 1, 66)),
    ],
)
def test_how_cells_are_shared(space: Space, expected: Thinning | None) -> None:
    """Worked out by hand."""
    assert space.thinning() == expected


def test_a_turn_always_fits_after_thinning() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        capacity = int(rng.integers(64, 4096))
        parts = rng.integers(0, capacity // 3, 5)
        space = Space(
            capacity,
            int(parts[0] // 4),
            int(parts[1]),
            int(parts[2]),
            tuple(int(n) for n in rng.integers(1, 200, parts[3] // 100 + 1)),
            int(parts[4] // 2) + 1,
            int(rng.integers(1, 2000)),
        )
        thinning = space.thinning()
        if thinning is None:
            documents, history = space.documents, space.aged + sum(space.whole)
        else:
            documents = space.documents if thinning.documents is None else thinning.documents
            recent = sum(space.whole[thinning.turns :])
            aged = space.aged + sum(space.whole[: thinning.turns])
            assert 0 <= thinning.keep <= aged
            history = recent + thinning.keep
            assert documents <= space.documents
        left = capacity - space.system - documents - space.prompt - history
        assert left >= min(space.answer, 1)


# ---- documents ---------------------------------------------------------------------------------

OTHER = " ".join(f"river{number}" for number in range(50))


def talking(engine: LaserKV, **options: Any) -> Talk:
    talk = engine.conversation(documents={"ores.txt": DOCUMENT}, max_tokens=6, **options)
    talk.read()
    return talk


@pytest.mark.parametrize("when", ["before", "between"])
def test_an_added_document_is_read_where_it_stands(
    when: str, loaded: Loaded, decodes: list[Decode]
) -> None:
    """In the user's next turn, before its question; logits against the forward pass."""
    with loaded.engine(policy="random", positions="original") as engine:
        talk = talking(engine)
        sequence = [BOS, *chars("[user]" + DOCUMENT)]
        if when == "between":
            reply = turn(talk, "one?")
            sequence += [*chars("\n\none?\n[assistant]"), *reply.tokens]
        talk.add("rivers.txt", OTHER)
        sequence += chars(("\n[user]" if when == "between" else "\n\n") + OTHER)
        names = [(document.name, document.tokens) for document in talk.documents]
        assert names[0] == ("ores.txt", len(DOCUMENT))
        assert names[1] == ("rivers.txt", len(OTHER) + 2 * (when == "before"))
        kept = [document.kept for document in talk.documents]
        assert kept[1] < 0.6 * len(OTHER)
        reply = turn(talk, "which?")
        sequence += [*chars("\n\nwhich?\n[assistant]"), *reply.tokens]
        assert talk.cells_used == in_cache(engine)
        second = turn(talk, "and then?")
        sequence += [*chars("\n[user]and then?\n[assistant]"), *second.tokens[:-1]]
    tokens, seen = mask_of(decodes)
    assert tokens.tolist() == sequence
    truth = forward(loaded.weights, loaded.spec, tokens, visible=seen).logits
    for decode in decodes:
        if decode.logits is not None:
            row = truth[decode.start + len(decode.tokens) - 1]
            assert error(decode.logits, row) < 1e-4


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_dropped_document_was_never_there(when: str, loaded: Loaded) -> None:
    with loaded.engine() as engine:
        plain = talking(engine)
        if when == "between":
            turn(plain, "one?")
        expected = [turn(plain, question).tokens for question in ("two?", "three?")]
        talk = talking(engine)
        if when == "between":
            turn(talk, "one?")
        used = talk.cells_used
        talk.add("rivers.txt", OTHER)
        talk.add("more.txt", OTHER[::-1])
        talk.drop("rivers.txt")
        assert [document.name for document in talk.documents] == ["ores.txt", "more.txt"]
        talk.drop("more.txt")
        # the last token of an answer that was cut short is decoded earlier than else
        assert talk.cells_used == in_cache(engine) == used + (when == "between")
        assert [turn(talk, question).tokens for question in ("two?", "three?")] == expected


def test_dropping_the_first_document(loaded: Loaded, decodes: list[Decode]) -> None:
    """Nothing of it is seen by any later token."""
    equal = {"shares": "equal"}  # where the anchors hold the whole opening
    with loaded.engine(positions="original", policy_options=equal) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT, "b": OTHER}, max_tokens=6)
        talk.read()
        turn(talk, "one?")
        talk.drop("a")
        done = len(decodes)
        first, last = 7, 7 + len(DOCUMENT)
        turn(talk, "two?")
        assert not set(decodes[done].before) & set(range(first, last))
        assert set(decodes[done].before) >= set(range(first))
        assert talk.cells_used == in_cache(engine)
        talk.reset()
        assert {p.name: p.kept > 0 for p in talk.documents} == {"b": True}


def test_documents_may_be_all_there_is(loaded: Loaded) -> None:
    """Added to an empty chat: as if it had begun with them, but for how they are asked."""
    with loaded.engine(policy="full") as engine:
        plain = talking(engine)
        expected = [turn(plain, question).tokens for question in ("one?", "two?")]
        talk = engine.conversation(max_tokens=6)
        talk.add("ores.txt", DOCUMENT)
        assert [turn(talk, question).tokens for question in ("one?", "two?")] == expected


@pytest.mark.parametrize("how", ["ctrl-c", "drop"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_document_dropped_while_it_is_read(how: str, positions: str, loaded: Loaded) -> None:
    with loaded.engine(positions=positions) as engine:
        plain = talking(engine)
        turn(plain, "one?")
        expected = turn(plain, "two?").tokens
        talk = talking(engine)
        turn(talk, "one?")
        used = talk.cells_used

        def stop(progress: Any) -> None:
            if progress.read > 200:
                if how == "ctrl-c":
                    raise KeyboardInterrupt
                other = threading.Thread(target=talk.drop, args=("long.txt",))
                other.start()
                other.join(300)

        with pytest.raises(KeyboardInterrupt if how == "ctrl-c" else Cancelled):
            talk.add("long.txt", OTHER * 3, stop)
        assert talk.cells_used == used == in_cache(engine)
        assert [document.name for document in talk.documents] == ["ores.txt"]
        assert turn(talk, "two?").tokens == expected


def test_documents_and_turns_fit_into_given_cells(loaded: Loaded) -> None:
    """Smaller blocks, then history makes room; then it is refused with what helps."""
    with loaded.engine(ctx_size=420, ratio=0.2) as engine:
        talk = engine.conversation(max_tokens=8)
        for number in range(12):
            turn(talk, f"go on with {number}")
        talk.add("ores.txt", DOCUMENT)
        assert in_cache(engine) <= 420
        turn(talk, "one?")
        talk.add("rivers.txt", OTHER)
        for number in range(12):
            turn(talk, f"go on with {number}")
            assert talk.cells_used == in_cache(engine) <= 420
        with pytest.raises(
            UserError, match=r"does not fit.*drop\(\) a document, or configure\(ratio=0\.0"
        ):
            talk.add("long.txt", OTHER * 8)
        assert talk.cells_used == in_cache(engine)
        with pytest.raises(UserError, match="already"):
            talk.add("rivers.txt", OTHER)
        with pytest.raises(UserError, match="no document"):
            talk.drop("seas.txt")
        turn(talk, "still there?")


def test_the_context_grows_for_a_document(loaded: Loaded) -> None:
    """Where --ctx-size does not say how large it is; what was said goes along."""
    with loaded.engine(policy="full") as engine:
        talk = engine.conversation(max_tokens=6)
        first = turn(talk, "one?").tokens
        before = engine._context
        assert before is not None
        cells = before.cells
        talk.add("long.txt", OTHER * 5)
        assert engine._context is not None
        assert engine._context.cells > cells
        grown = turn(talk, "two?").tokens
    with loaded.engine(policy="full", ctx_size=4096) as engine:
        talk = engine.conversation(max_tokens=6)
        assert turn(talk, "one?").tokens == first
        talk.add("long.txt", OTHER * 5)
        assert turn(talk, "two?").tokens == grown


def test_a_long_document_added_to_a_short_model(short: Loaded) -> None:
    with short.engine(ratio=0.05) as engine:
        talk = engine.conversation(max_tokens=6)
        turn(talk, "one?")
        talk.add("long.txt", OTHER * 4)
        for number in range(40):
            turn(talk, f"go on with {number}")
            assert Sequence(engine._context, MAIN).last < SHORT.ctx_train
            assert talk.cells_used == in_cache(engine)
        assert said(short, turn(talk, "and?").tokens)


def test_a_system_prompt_longer_than_the_anchors_stays_whole(loaded: Loaded) -> None:
    system = "Answer as a miner would. " * 6
    for policy in ("laser", "streamingllm", "snapkv"):
        with loaded.engine(policy=policy, ratio=0.3) as engine:
            talk = engine.conversation(document=DOCUMENT * 2, system=system, max_tokens=6)
            reading = talk.read()
            head = len([BOS, *chars(f"[system]{system}\n[user]")])
            assert reading.budget.anchors >= head
            assert reading.kept[:head].tolist() == list(range(head))
            assert len(reading.kept) < 0.5 * len(reading.tokens)
            assert in_cache(engine) == len(reading.kept) == reading.budget.kept


# ---- saved -------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["auto", "compact"])
@pytest.mark.parametrize("when", ["read", "thinned", "added"])
def test_a_saved_conversation_goes_on(
    positions: str, when: str, loaded: Loaded, tmp_path: Path
) -> None:
    """The same greedy answers in a fresh engine as in the one that went on."""
    file = tmp_path / "talk.safetensors"
    settings = {"ctx_size": 432, "positions": positions, "ratio": 0.3}
    with loaded.engine(**settings) as engine:
        talk = talking(engine, system=SYSTEM)
        if when != "read":
            for question in QUESTIONS[:8]:
                turn(talk, question)
            assert talk.thinnings
        if when == "added":
            talk.add("rivers.txt", OTHER)
        save(talk, file)
        kept = [document.kept for document in talk.documents]
        expected = [turn(talk, question).tokens for question in QUESTIONS[8:16]]
        assert [p.name for p in tmp_path.iterdir()] == [file.name]
    with loaded.engine(**settings) as engine:
        talk = load(engine, file)
        assert [document.kept for document in talk.documents] == kept
        assert talk.cells_used == in_cache(engine)
        assert [turn(talk, question).tokens for question in QUESTIONS[8:16]] == expected
        talk.read()  # the documents' text is there too
        talk.reset()
        assert turn(talk, "one?").account.document_tokens > len(DOCUMENT)


def test_a_saved_conversation_is_refused(loaded: Loaded, short: Loaded, tmp_path: Path) -> None:
    """Altered, cut short, of another model or cache type, or too large; what is here stays."""
    file = tmp_path / "talk.safetensors"
    with loaded.engine() as engine:
        talk = talking(engine)
        turn(talk, "one?")
        save(talk, file)
        expected = turn(talk, "two?").tokens
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[len(whole) * 2 // 3] ^= 1
    with loaded.engine() as engine:
        talk = talking(engine)
        turn(talk, "one?")
        for data, message in (
            (bytes(altered), "changed since it was saved"),
            (whole[:-9], "cut off"),
            (whole[:100], "its beginning is damaged"),
            (b"", "its beginning is damaged"),
            (b"hello" * 9, "not a file that --save or /save wrote"),
        ):
            broken = tmp_path / "broken"
            broken.write_bytes(data)
            with pytest.raises(UserError, match=message) as caught:
                load(engine, broken)
            assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="no saved file"):
            load(engine, tmp_path / "none")
        with pytest.raises(UserError, match="Is a directory"):
            load(engine, tmp_path)
        with pytest.raises(UserError, match="folder"):
            save(talk, tmp_path / "none" / "talk")
        assert turn(talk, "two?").tokens == expected
    with short.engine() as engine, pytest.raises(UserError, match="another model"):
        load(engine, file)
    with loaded.engine(ctx_size=40) as engine, pytest.raises(UserError, match="ctx_size"):
        load(engine, file)
    half = replace(OPTIONS, type_k="f16", type_v="f16")
    with (
        LaserKV(loaded.model, context=half, block_size=64) as engine,
        pytest.raises(UserError, match=r'saved with .*"f32", type_v="f32".*k="f16", type_v="f16"'),
    ):
        load(engine, file)


def test_a_save_that_fails_leaves_the_one_before(loaded: Loaded, tmp_path: Path) -> None:
    import resource

    file = tmp_path / "talk.safetensors"
    with loaded.engine() as engine:
        talk = talking(engine)
        save(talk, file)
        before = file.read_bytes()
        turn(talk, "one?")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            with pytest.raises(LaserKVError, match="nothing was saved"):
                save(talk, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert file.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == [file.name]
        assert len(turn(talk, "two?").tokens) == 6


# ---- recall ------------------------------------------------------------------------------------

RECALL: dict[str, Any] = {"recall": "ram", "read_policy": "random", "ratio": 0.3}


def agrees(talk: Talk, engine: LaserKV) -> None:
    """The ledger, what is parked and llama.cpp say the same of the cells."""
    ledger = talk.ledger
    assert ledger.position.tolist() == standing(engine._context)
    assert talk.cells_used == len(ledger) == in_cache(engine)
    where = [recaller.position_of[recaller.position_of >= 0] for recaller in talk.sources.recallers]
    for position, recaller in zip(where, talk.sources.recallers, strict=True):
        assert np.isin(position, ledger.position).all()
        assert np.array_equal(np.flatnonzero(recaller.position_of >= 0), recaller.kept)
    for parked in talk.sources.parked:
        held = [parked.recaller.position_of[parked.recaller.position_of >= 0]]
        assert ledger.position[ledger.of(parked.numbers)].tolist() == held[0].tolist()


def read_at_random(budget: Budget) -> set[int]:
    """What the first reading keeps, with a policy that looks at the candidates' numbers alone."""
    policy, inside = policies.make("random", seed=0), set[int]()
    for block in budget.blocks:
        inside |= set(range(block.start, block.end))
        if block.evicts:
            first, last = block.candidates
            tokens = np.array(sorted(t for t in inside if first <= t < last))
            seen = Candidates(tokens, (block.start, block.end), block.index)
            chosen = {int(tokens[i]) for i in policy.select(seen, block.pool)}
            inside = (inside - set(tokens.tolist())) | chosen
    return inside


def chosen_by_hand(
    one: Loaded,
    decoded: tuple[NDArray[np.int64], NDArray[np.bool_]],
    asked: list[int],
    recaller: Any,
    others: set[int],
) -> set[int]:
    """The block loop on paper: positions of a document that a question keeps.

    Args:
        decoded: all tokens so far, and what each of them saw.
        others: positions of the rest of the conversation that the question sees.
    """
    tokens, seen = decoded
    budget, offset, policy = recaller.budget, recaller.offset, policies.make("laser")
    read = forward(one.weights, one.spec, tokens, visible=seen)
    norms = np.linalg.norm(read.values, axis=-1)
    window = set(range(budget.tokens - budget.window, budget.tokens))
    inside: set[int] = set()
    memory: dict[str, Any] = {}
    for block in budget.blocks:
        inside |= set(range(block.start, block.end))
        if not block.evicts:
            continue
        visible = sorted(others | {offset + token for token in inside | window})
        before = len(tokens)
        rows = np.zeros((before + len(asked), before + len(asked)), bool)
        rows[:before, :before] = seen
        rows[before:, visible] = True
        rows[before:, before:] = np.tri(len(asked), dtype=bool)
        prompt = np.concatenate((tokens, asked))
        found = forward(one.weights, one.spec, prompt, visible=rows)
        candidates = np.array(sorted(t for t in inside if block.candidates[0] <= t))
        candidates = candidates[candidates < block.candidates[1]]
        queries = found.queries[:, before:]
        wide = np.repeat(found.keys, queries.shape[2] // found.keys.shape[2], axis=2)
        logits = np.einsum("lthd,lchd->lthc", queries, wide) / queries.shape[3] ** 0.5
        beside = rows[before:].copy()
        beside[:, offset + candidates] = False
        outside = np.log(np.where(beside[None, :, None], np.exp(logits), 0).sum(axis=-1))
        view = Candidates(
            candidates,
            (block.start, block.end),
            block.index,
            np.ascontiguousarray(queries, np.float32),
            read.keys[:, offset + candidates].astype(np.float32),
            memory=memory,
            value_norms=norms[:, offset + candidates].astype(np.float32),
            outside=outside.astype(np.float32),
        )
        kept = {int(candidates[i]) for i in policy.select(view, block.pool)}
        inside = (inside - set(candidates.tolist())) | kept
    return {offset + token for token in inside}


def test_every_document_recalls_its_own(loaded: Loaded, decodes: list[Decode]) -> None:
    """One from the start and one added between turns: what each question keeps, and its logits."""
    settings = {**RECALL, "block_size": 40, "probe_tokens": 0, "lookahead": 0}
    with loaded.engine(positions="original", **settings) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT[:100]}, max_tokens=3)
        talk.read()
        turn(talk, "one?")
        talk.add("b", OTHER[:90])
        added = talk.sources.recallers[1]
        assert set(added.kept.tolist()) == read_at_random(added.budget)
        chosen = []
        for question in ("Where is tin1?", "river4?"):
            first, second = talk.sources.recallers
            asked = [*talk.pending, *talk._prompt(question).tokens.tolist()]
            tokens, seen = mask_of(decodes)
            stand = set(standing(engine._context))
            own = [set(range(r.offset, r.offset + r.budget.tokens)) for r in (first, second)]
            inner = set(range(*second.inner))
            expected = chosen_by_hand(loaded, (tokens, seen), asked, first, stand - own[0] - inner)
            rest = stand - own[0] - own[1]
            other = chosen_by_hand(loaded, (tokens, seen), asked, second, rest | expected)
            turn(talk, question)
            agrees(talk, engine)
            now = set(standing(engine._context))
            assert now & own[0] == expected
            assert now & own[1] == other
            assert rest <= now  # turns are where they were
            chosen.append(other)
        assert chosen[0] != chosen[1]
    tokens, seen = mask_of(decodes)
    truth = forward(loaded.weights, loaded.spec, tokens, visible=seen).logits
    for decode in decodes:
        if decode.logits is not None:
            row = truth[decode.start + len(decode.tokens) - 1]
            assert error(decode.logits, row) < 1e-4


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_later_question_is_answered_as_if_it_were_the_first(
    positions: str, loaded: Loaded
) -> None:
    """As a conversation without a ledger answers it."""
    settings = {**RECALL, "positions": positions}
    with loaded.engine(**settings) as engine:
        expected = []
        for question in QUESTIONS[:3]:
            plain = Conversation(engine, document=DOCUMENT, max_tokens=6)
            expected.append(turn(plain, question).tokens)
    with loaded.engine(**settings) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=6)
        found = []
        for question in QUESTIONS[:3]:
            found.append(turn(talk, question).tokens)
            turn(talk, "go on")
            talk.reset()
            agrees(talk, engine)
    assert found == expected
    assert len({tuple(answer) for answer in found}) > 1  # they do not all say the same


@pytest.mark.parametrize("mode", ["replay", "shortlist"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_many_turns_beside_what_is_recalled(mode: str, positions: str, loaded: Loaded) -> None:
    """Turns are thinned, every question gets as many tokens of each document as the first."""
    settings = {**RECALL, "recall_mode": mode, "positions": positions, "ctx_size": 512}
    settings |= {"lookahead": 1}
    with loaded.engine(**settings) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT[:220]}, system=SYSTEM, max_tokens=8)
        turn(talk, "one?")
        talk.add("b", OTHER[:220])
        kept, context, last = [r.budget.kept for r in talk.sources.recallers], engine._context, 0
        for number in range(9):
            account = turn(talk, QUESTIONS[number % len(QUESTIONS)]).account
            agrees(talk, engine)
            assert [len(recaller.kept) for recaller in talk.sources.recallers] == kept
            assert talk.cells_used <= 512  # all that llama.cpp has allocated, too
            last = max(last, Sequence(engine._context, MAIN).last)
            assert account.recall_seconds > 0
        assert engine._context is context
        assert talk.thinnings > 1
        if positions == "compact":  # the turns move together: they have the other cells
            assert last < talk.sources.first_movable + 512 - sum(kept)
        assert {p.name: p.kept for p in talk.documents}["b"] == kept[1]
        for name in ("a", "b"):
            assert talk.parked_bytes > 0
            talk.drop(name)
            agrees(talk, engine)
            turn(talk, "still there?")
        assert (talk.parked_tokens, talk.parked_bytes) == (0, 0)
        assert talk.recall("anything?") is None
        agrees(talk, engine)


@pytest.mark.parametrize("mode", ["replay", "shortlist"])
def test_a_long_question_leaves_fewer_tokens(mode: str, loaded: Loaded) -> None:
    """But anchors and windows; the next one has them all again. Longer ones are refused.

    By equal shares: one pool is replayed with a whole block beside it, for which there is no room.
    """
    settings = {**RECALL, "recall_mode": mode, "policy_options": {"shares": "equal"}}
    with loaded.engine(**settings, ctx_size=512) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT, "b": OTHER}, max_tokens=8)
        turn(talk, "one?")
        budgets = [recaller.budget for recaller in talk.sources.recallers]
        full = [budget.kept for budget in budgets]
        least = [budget.anchors + budget.window for budget in budgets]
        yields = (sum(full) - sum(least)) // 2
        turn(talk, "y" * (talk.capacity - sum(full) + yields))
        for recaller, budget, low, high in zip(
            talk.sources.recallers, budgets, least, full, strict=True
        ):
            assert low <= len(recaller.kept) < high
            ends = {*range(budget.anchors), *range(budget.tokens - budget.window, budget.tokens)}
            assert ends <= set(recaller.kept.tolist())
        agrees(talk, engine)
        used = talk.cells_used
        with pytest.raises(UserError, match=r"does not fit .*shorten it") as caught:
            turn(talk, "y" * 500)
        assert "\n" not in str(caught.value)
        agrees(talk, engine)
        assert talk.cells_used <= used
        turn(talk, "two?")
        assert [len(recaller.kept) for recaller in talk.sources.recallers] == full
        agrees(talk, engine)


def rows_of(engine: LaserKV) -> list[NDArray[Any]]:
    """Positions, keys and values of the main sequence."""
    assert engine._context is not None
    found = rows.take(engine._context, rows.known(engine._context), MAIN)
    order = np.argsort(found.positions)
    return [found.positions[order], found.keys[:, order], found.values[:, order]]


@pytest.mark.parametrize("mode", ["replay", "shortlist"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_stopped_while_the_second_document_recalls(
    mode: str, positions: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have what they had, bit for bit, and the question can be asked again."""
    settings = {**RECALL, "recall_mode": mode, "positions": positions}
    found = []
    for stops in (False, True):
        with loaded.engine(**settings) as engine:
            talk = engine.conversation(documents={"a": DOCUMENT, "b": OTHER}, max_tokens=6)
            turn(talk, QUESTIONS[0])
            if stops:
                before = rows_of(engine)
                first, second = talk.sources.recallers
                kept, real = first.kept.tolist(), second.reader.asker.ask
                asked = 0

                def ask(*args: Any, real: Any = real, talk: Talk = talk, **options: Any) -> Any:
                    nonlocal asked
                    asked += 1
                    if asked == (6 if mode == "shortlist" else 10):
                        raise KeyboardInterrupt
                    return real(*args, **options)

                monkeypatch.setattr(second.reader.asker, "ask", ask)
                monkeypatch.setattr(first.reader.asker, "ask", ask)
                limit = {"replay": 10, "shortlist": 4}[mode]
                asked = 6 - limit if mode == "shortlist" else 0
                with pytest.raises(KeyboardInterrupt):
                    turn(talk, QUESTIONS[1])
                monkeypatch.undo()
                assert first.kept.tolist() == kept
                agrees(talk, engine)
                for was, now in zip(before, rows_of(engine), strict=True):
                    assert np.array_equal(was, now)
            found.append(turn(talk, QUESTIONS[1]).tokens)
            agrees(talk, engine)
    assert found[0] == found[1]


def test_several_documents_from_the_start(loaded: Loaded, tmp_path: Path) -> None:
    """Each in its own file; reading again and dropping one gives its file back."""
    path = tmp_path / "rows"
    settings = {**RECALL, "recall": "disk", "recall_file": str(path)}
    with loaded.engine(**settings) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT, "b": OTHER}, max_tokens=6)
        first = "".join(talk.begin(QUESTIONS[0]))
        assert [recaller.budget.tokens for recaller in talk.sources.recallers] == [
            len([BOS, *chars("[user]" + DOCUMENT)]),
            len("\n\n" + OTHER),
        ]
        assert len(list(tmp_path.iterdir())) == 2
        turn(talk, QUESTIONS[1])
        talk.reset()
        assert said(loaded, turn(talk, QUESTIONS[0]).tokens) == first
        talk.read()
        assert len(list(tmp_path.iterdir())) == 2
        assert said(loaded, turn(talk, QUESTIONS[0]).tokens) == first
        talk.drop("a")
        assert [p.name for p in tmp_path.iterdir()] != ["rows"]
        assert len(list(tmp_path.iterdir())) == 1
        turn(talk, QUESTIONS[1])
        agrees(talk, engine)
    assert not list(tmp_path.iterdir())
    with loaded.engine(**RECALL) as engine:
        other = engine.conversation(documents={"a": DOCUMENT, "b": OTHER}, max_tokens=6)
        assert "".join(other.begin(QUESTIONS[0])) == first
    ratio = {name: value for name, value in RECALL.items() if name != "ratio"}
    with LaserKV(loaded.model, context=OPTIONS, block_size=64, ctx_size=900, **ratio) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT, "b": OTHER}, max_tokens=6)
        with pytest.raises(UserError, match="give ratio too"):
            talk.read()
        talk = engine.conversation(documents={"a": DOCUMENT}, max_tokens=6)
        turn(talk, QUESTIONS[0])
        talk.add("b", OTHER[:150])
        with pytest.raises(UserError, match="give ratio too"):
            talk.read()
        turn(talk, QUESTIONS[1])  # what was read before is still there
        agrees(talk, engine)


def test_a_document_that_cannot_be_added_leaves_the_others(short: Loaded) -> None:
    """Ctrl-C while it is parked, and one too long for the positions that are left."""
    with short.engine(**RECALL) as engine:
        talk = engine.conversation(document=DOCUMENT[:150], max_tokens=6)
        turn(talk, "one?")
        before, parked = rows_of(engine), talk.parked_bytes

        def stop(progress: Any) -> None:
            if progress.read > 90:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            talk.add("b", OTHER[:130], stop)
        assert talk.parked_bytes == parked
        agrees(talk, engine)
        for was, now in zip(before, rows_of(engine), strict=True):
            assert np.array_equal(was, now)
        with pytest.raises(UserError, match=r"into \d+ positions; drop\(\)") as caught:
            talk.add("b", OTHER * 2)
        assert re.search(r"; /drop .*--positions compact", caught.value.with_flags)
        assert "\n" not in str(caught.value)
        agrees(talk, engine)
        turn(talk, "two?")


@pytest.mark.parametrize("several", [False, True])
def test_positions_end_before_cells_do(several: bool, short: Loaded) -> None:
    """A document longer than the model knows, and two short ones with turns between: it goes on."""
    with short.engine(**{**RECALL, "ratio": 0.3 if several else 0.15}) as engine:
        talk = engine.conversation(documents={"a": OTHER[: 100 if several else None]}, max_tokens=6)
        for question in QUESTIONS[:10]:
            if several and talk.turns == 2:
                talk.add("b", OTHER[100:170])
            assert len(turn(talk, question).tokens) == 6
            assert Sequence(engine._context, MAIN).last < SHORT.ctx_train
            agrees(talk, engine)
            assert all(len(r.kept) == r.budget.kept for r in talk.sources.recallers)
        assert talk.thinnings > 0


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("mode", ["replay", "shortlist"])
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_a_saved_conversation_recalls_on(
    where: str, mode: str, positions: str, loaded: Loaded, tmp_path: Path
) -> None:
    """As one that never ended; also in an engine that does not recall otherwise."""
    file, settings = tmp_path / "talk", {"recall_mode": mode, "positions": positions}
    with loaded.engine(**{**RECALL, **settings, "recall": where}) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT}, max_tokens=6)
        turn(talk, QUESTIONS[0])
        talk.add("b", OTHER)
        turn(talk, QUESTIONS[1])
        held = talk.parked_bytes
        assert save(talk, file) == file.stat().st_size > held
        kept = talk.ledger.position.tolist()
        wanted = [turn(talk, question) for question in QUESTIONS[2:5]]
        old = talk
        talk = load(engine, file)
        assert (talk.parked_bytes, old.parked_bytes) == (held, 0)
        assert talk.ledger.position.tolist() == kept
        agrees(talk, engine)
        said = [turn(talk, question) for question in QUESTIONS[2:5]]
        assert [reply.tokens for reply in said] == [reply.tokens for reply in wanted]
        assert said[0].account.recalled_tokens == wanted[0].account.recalled_tokens > 0
        agrees(talk, engine)
        talk.drop("a")
        turn(talk, QUESTIONS[0])
        agrees(talk, engine)
    with loaded.engine(ratio=0.3, positions=positions) as engine:
        talk = engine.load(file, max_tokens=6)
        assert (engine.settings.recall, engine.settings.recall_mode) == ("auto", mode)
        said = [turn(talk, question) for question in QUESTIONS[2:5]]
        assert [reply.tokens for reply in said] == [reply.tokens for reply in wanted]


def test_only_the_added_document_is_left(loaded: Loaded, tmp_path: Path) -> None:
    with loaded.engine(**RECALL) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT, "b": OTHER}, max_tokens=6)
        turn(talk, QUESTIONS[0])
        talk.drop("a")
        save(talk, tmp_path / "talk")
        wanted, held = turn(talk, QUESTIONS[1]), talk.parked_bytes
        talk = load(engine, tmp_path / "talk")
        assert talk.parked_bytes == held
        said = turn(talk, QUESTIONS[1])
        assert (said.tokens, said.account.recalled_tokens) == (
            wanted.tokens,
            wanted.account.recalled_tokens,
        )
        agrees(talk, engine)


def test_no_room_to_park_what_was_saved(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second document's rows: those of the first are given back, and one line says why.

    The conversation so far goes on.
    """
    closed: list[int] = []
    close = Recaller.close
    monkeypatch.setattr(Recaller, "close", lambda self: (closed.append(self.offset), close(self)))
    with loaded.engine(**RECALL) as engine:
        talk = engine.conversation(documents={"a": DOCUMENT, "b": OTHER}, max_tokens=6)
        turn(talk, QUESTIONS[0])
        save(talk, tmp_path / "talk")
        held, offset = talk.parked_bytes, talk.sources.recallers[1].offset
        wanted = turn(talk, QUESTIONS[1]).tokens
        free = iter([held, 1, held, held])
        monkeypatch.setattr("laserkv_gguf.machine.free_ram", lambda: next(free))
        with pytest.raises(UserError, match='use recall="disk"'):
            load(engine, tmp_path / "talk")
        assert closed == [0]  # what was made
        agrees(talk, engine)
        talk.reset()
        turn(talk, QUESTIONS[0])
        assert turn(talk, QUESTIONS[1]).tokens == wanted
        talk = load(engine, tmp_path / "talk")
        assert closed == [0, 0, offset]  # of the conversation before
        assert turn(talk, QUESTIONS[1]).tokens == wanted
