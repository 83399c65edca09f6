"""`--ctx-size` alone: as much is kept as fits into these cells."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import TinySpec, make

pytest.importorskip("llama_cpp")

from test_cli import CHATML

from laserkv_gguf import policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.cli.app import run
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.planning.settings import block_for

SPEC = TinySpec(layers=1, heads=2, kv_heads=1, n_ff=64, ctx_train=4096, chat_template=CHATML)
DOCUMENT = "All work and no play makes Jack a dull boy. " * 30  # a token a character
BLOCK, DRAFTS, ANSWER = 128, 3, 6
LASER = policies.make("laser")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(make(tmp_path_factory.mktemp("ctx"), spec=SPEC).path) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def engine(model: Model, **settings: Any) -> LaserKV:
    options = ContextOptions(BLOCK, 64, threads=1)
    return LaserKV(model, context=options, block_size=BLOCK, lookahead=DRAFTS, **settings)


def largest(tokens: int, prompt: int, cells: int) -> float:
    """By trying every thousandth."""
    for thousandths in range(1000, 0, -1):
        budget = LASER.budget(tokens, BLOCK, thousandths / 1000, 4)
        if budget.cells(prompt, DRAFTS, prompt + ANSWER) <= cells:
            return thousandths / 1000
    return 0.0


@pytest.mark.parametrize("cells", [300, 512, 700, 1000, 1300])
def test_the_largest_ratio_that_fits_is_used(cells: int, model: Model) -> None:
    with engine(model, ctx_size=cells) as loaded:
        account = loaded.ask("Who?", document=DOCUMENT, max_tokens=ANSWER).account
    assert account.ratio == largest(account.document_tokens, account.prompt_tokens, cells)
    assert 0 < account.ratio < 1
    assert account.ctx_cells <= cells
    assert account.kept_tokens < account.document_tokens


def test_a_ratio_that_is_given_stays(model: Model) -> None:
    with engine(model, ctx_size=1000, ratio=0.2) as loaded:
        account = loaded.ask("Who?", document=DOCUMENT, max_tokens=ANSWER).account
    assert account.ratio == 0.2
    assert account.kept_fraction == pytest.approx(0.2, abs=0.01)
    with engine(model, ratio=None) as loaded:  # neither
        account = loaded.ask("Who?", document=DOCUMENT, max_tokens=ANSWER).account
    assert account.ratio == 0.25


def test_where_all_fits_nothing_is_evicted(model: Model) -> None:
    with engine(model, ctx_size=2000) as loaded:
        account = loaded.ask("Who?", document=DOCUMENT, max_tokens=ANSWER).account
    assert account.ratio == 1
    assert account.kept_tokens == account.document_tokens
    assert account.probe_seconds == account.evict_seconds == 0


def test_where_nothing_fits_the_least_is_named(model: Model) -> None:
    def asked(cells: int) -> None:
        with engine(model, ctx_size=cells) as loaded:
            loaded.ask("Who?", document=DOCUMENT, max_tokens=ANSWER)

    with pytest.raises(UserError, match="ctx_size=100 is too small") as caught:
        asked(100)
    named = re.search(r"use ctx_size=(\d+)", str(caught.value))
    assert named is not None
    with pytest.raises(UserError):
        asked(int(named[1]) - 1)
    asked(int(named[1]))


def test_a_block_is_at_most_half_of_the_cells(model: Model) -> None:
    """So that cells alone are enough, however long the document is."""
    for cells, block in ((None, 4096), (9000, 4096), (8192, 4096), (8191, 2048), (4096, 2048)):
        assert block_for(cells) == block
    text = DOCUMENT * (1 + 5000 // len(model.tokenize(DOCUMENT)))
    with LaserKV(model, ctx_size=1024) as loaded:
        account = loaded.ask("Who?", document=text, max_tokens=ANSWER).account
        assert account.block_size == 512
        assert account.used_cells <= 1024
        assert 0 < account.kept_tokens < account.document_tokens
    with LaserKV(model, ctx_size=1024, block_size=900, ratio=0.01) as loaded:
        assert loaded.settings.block_size == 900


def test_positions_stay_within_the_trained_context(tmp_path: Path) -> None:
    """A document beyond it: more cells than it has positions must not be filled."""
    with Model(make(tmp_path, spec=SPEC, ctx_train=512).path) as short:
        with engine(short, ctx_size=1300) as loaded:
            account = loaded.ask("Who?", document=DOCUMENT, max_tokens=ANSWER).account
        assert account.positions == "compact"
        assert account.ratio == largest(account.document_tokens, account.prompt_tokens, 512)
        with engine(short, ctx_size=1300, positions="original") as loaded:
            more = loaded.ask("Who?", document=DOCUMENT, max_tokens=ANSWER).account
        assert more.ratio > account.ratio


@pytest.mark.parametrize("asked", [None, "Who?"])
def test_a_conversation_has_room_for_turns(asked: str | None, model: Model) -> None:
    """Whether it begins with a question or not."""
    with engine(model, ctx_size=800) as loaded:
        talk = loaded.conversation(document=DOCUMENT, max_tokens=20)
        reading = talk.read(question=asked)
        assert 0.2 < reading.budget.ratio < 0.5
        assert 800 - talk.cells_used >= 800 // 4
        for _ in range(2):
            list(talk.ask("And?"))
        assert talk.turns == 2


@pytest.mark.parametrize(("cells", "low"), [("240", True), ("700", False)])
def test_a_low_ratio_is_warned_of(
    cells: str,
    low: bool,
    model: Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "long.txt").write_text(DOCUMENT)
    asked = ["ask", "-m", str(model.path), "-d", str(tmp_path / "long.txt"), "-q", "Who?", "-c"]
    assert run([*asked, cells, "-n", "6", "-t", "1", "--block-size", str(BLOCK)]) == 0
    err = capsys.readouterr().err
    found = re.match(r"warning: --ctx-size 240 leaves room for 0\.0\d+ of \d+ tokens.*\n", err)
    assert (found is not None) if low else ("warning" not in err)


@pytest.mark.parametrize("cells", [4096, 6000])
def test_more_cells_than_the_model_was_trained_for(cells: int, model: Model) -> None:
    """A short document stays where it was read, and leaves the turns what positions there are."""
    with engine(model, ctx_size=cells, ratio=0.5) as one:
        for talk in (one.conversation(document=DOCUMENT), Conversation(one, document=DOCUMENT)):
            talk.max_tokens = ANSWER
            reading = talk.read()
            assert reading.next_position == len(reading.tokens)
            answer = talk.ask("And?")
            list(answer)
            assert answer.reply.account.positions == "original"


def test_a_long_document_with_more_cells_than_positions(model: Model) -> None:
    """It moves together, and what is kept with its turns stays below the trained context."""
    with engine(model, ctx_size=6000, ratio=0.25, recall="off") as one:
        talk = one.conversation(document=DOCUMENT * 4, max_tokens=ANSWER)
        reading = talk.read()
        assert len(reading.tokens) > SPEC.ctx_train
        assert reading.next_position == len(reading.kept) < SPEC.ctx_train / 2
