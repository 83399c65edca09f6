"""Documents that stay: the same answers after loading, and nothing that does not fit is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from test_session import DOCUMENT, OPTIONS, SPEC, Loaded, first_turn, in_cache, turn

from laserkv_gguf.api import LaserKV
from laserkv_gguf.cli.app import run
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.files import archive as saved
from laserkv_gguf.llama import library, rows
from laserkv_gguf.llama.sequence import MAIN, Sequence
from laserkv_gguf.saving import conversation as saved_talk
from laserkv_gguf.saving import document as saved_document

QUESTIONS = ("What is ore?", "Where is tin9?")
READ: dict[str, Any] = {"block_size": 64, "ratio": 0.3, "lookahead": 2}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("saved"), SPEC)
    yield one
    one.model.close()


def engine_of(loaded: Loaded, **settings: Any) -> LaserKV:
    options = settings.pop("context", OPTIONS)
    return LaserKV(loaded.model, context=options, **{**READ, **settings})


@pytest.fixture(scope="module")
def kept(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document with parked rows."""
    path = tmp_path_factory.mktemp("kept") / "document.laserkv"
    with engine_of(loaded, recall="ram") as engine:
        talk = Conversation(engine, document=DOCUMENT, max_tokens=6)
        talk.read()
        talk.save(path)
    return path


WAYS: list[dict[str, Any]] = [
    {},
    {"recall": "ram"},
    {"recall": "disk", "recall_mode": "shortlist"},
    {"recall": "ram", "policy": "quest"},
    {"recall": "ram", "policy": "infllm"},
    {"context": replace(OPTIONS, type_k="q8_0", type_v="q8_0", flash_attn="on")},
    {"context": replace(OPTIONS, type_k="f16", type_v="f16"), "recall": "ram"},
]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values()))[:40])
def test_the_same_answers_after_loading(
    way: dict[str, Any], positions: str, loaded: Loaded, tmp_path: Path
) -> None:
    """Greedy tokens of two turns, and every row in the cache."""
    if positions == "compact" and "q8_0" in str(way):
        way = {**way, "context": replace(OPTIONS, type_k="f16", type_v="q8_0", flash_attn="on")}
    path, answers, caches = tmp_path / "saved", [], []
    with engine_of(loaded, positions=positions, **way) as engine:
        talk = Conversation(engine, document=DOCUMENT, system="Be brief.", max_tokens=6)
        talk.read()
        size = talk.save(path)
        assert size == path.stat().st_size
        caches.append(cache_of(engine))
        answers.append([turn(talk, question).tokens for question in QUESTIONS])
    with engine_of(loaded, **way) as engine:
        engine.ask("Something else?", document=DOCUMENT[::-1], max_tokens=2)
        talk = engine.load(path, max_tokens=6)
        caches.append(cache_of(engine))
        replies = [turn(talk, question) for question in QUESTIONS]
        answers.append([reply.tokens for reply in replies])
        assert in_cache(engine) == talk.cells_used
        assert replies[0].account.positions == positions
        assert replies[0].account.recall == way.get("recall", "off")
        assert replies[0].account.document_tokens == len(first_turn("")[0]) + len(
            "[system]Be brief.\n"
        )
    assert answers[0] == answers[1]
    for before, after in zip(*caches, strict=True):
        assert np.array_equal(before, after)


def cache_of(engine: LaserKV) -> list[np.ndarray]:
    """Positions and rows in order; keys that were moved are turned first, as for a next token."""
    context = engine._context
    assert context is not None
    context.decode(np.array([5], np.int32), 0, 6)
    Sequence(context, 6).remove()
    taken = rows.take(context, rows.known(context), MAIN)
    order = np.argsort(taken.positions)
    return [taken.positions[order], taken.keys[:, order], taken.values[:, order]]


def test_recall_goes_on_as_it_was(kept: Path, loaded: Loaded) -> None:
    """Also in an engine without recall, and with another policy and mode than it was read with."""
    with engine_of(loaded, recall="ram") as engine:
        talk = Conversation(engine, document=DOCUMENT, max_tokens=6)
        expected = [turn(talk, question).tokens for question in QUESTIONS]
    with engine_of(loaded, ratio=0.9, block_size=100) as engine:  # the file's win
        talk = engine.load(kept, max_tokens=6)
        assert [turn(talk, question).tokens for question in QUESTIONS] == expected
        assert engine.settings.recall == "auto"
        talk.reset()
        assert turn(talk, QUESTIONS[0]).tokens == expected[0]
    answers = []
    for again in (False, True):
        way: dict[str, Any] = {"recall": "ram", "recall_mode": "shortlist", "policy": "exact"}
        with engine_of(loaded, **way) as engine:
            talk = (
                engine.load(kept, max_tokens=6)
                if again
                else Conversation(engine, document=DOCUMENT, max_tokens=6)
            )
            answers.append([turn(talk, question).tokens for question in QUESTIONS])
    assert answers[0] == answers[1]
    with (
        engine_of(loaded, policy="infllm", recall="ram") as engine,
        pytest.raises(UserError, match="not read with policy infllm"),
    ):
        engine.load(kept)
    with (
        engine_of(loaded, policy="streamingllm") as engine,
        pytest.raises(UserError, match="does not look at the question"),
    ):
        engine.load(kept)


def test_it_is_a_plain_safetensors_file(kept: Path) -> None:
    """Read by the library alone: tokens, what is kept, rows, positions; about it in JSON."""
    tokens = first_turn("")[0]
    with safe_open(kept, framework="numpy") as file:
        assert file.get_tensor("tokens").tolist() == tokens
        held = file.get_tensor("held")
        assert held.tolist() == list(range(len(tokens)))
        row = SPEC.kv_heads * SPEC.head_dim * 4
        assert file.get_slice("keys").get_shape() == [SPEC.layers, len(tokens), row]
        assert set(file.get_tensor("kept").tolist()) < set(held.tolist())
        about = json.loads(file.metadata()["about"])
    assert about["model"]["name"] == "tiny-llama-0"
    assert about["build"].startswith("llama-cpp-python ")
    assert about["settings"]["ratio"] == 0.3
    assert about["budget"]["tokens"] == len(tokens)
    folder = Path(saved.__file__).parent
    for source in folder.rglob("*.py"):
        assert not re.search(r"import (pickle|dill|joblib|marshal)", source.read_text("utf-8"))


# ---- files that are refused ---------------------------------------------------------------------


def refused(loaded: Loaded, path: Path, said: str, **settings: Any) -> None:
    with engine_of(loaded, **settings) as engine:
        with pytest.raises(UserError, match=said) as raised:
            engine.load(path)
        assert "\n" not in str(raised.value)
        assert not engine.residents.inside
        reply = engine.ask(QUESTIONS[0], document=DOCUMENT[:50], max_tokens=3)
        assert len(reply.tokens) == 3  # the engine works on


def test_every_changed_byte_is_noticed(kept: Path, loaded: Loaded, tmp_path: Path) -> None:
    path, data = tmp_path / "changed", kept.read_bytes()
    random = np.random.default_rng(3)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    places = [*random.integers(header, len(data), 6).tolist(), header, len(data) - 1]
    settings_at = data.index(b'\\"ratio\\": 0.3') + 12
    places += [settings_at, data.index(b"data_offsets"), 3, 9]
    with engine_of(loaded) as engine:
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(UserError, match="damaged"):
                engine.load(path)
        for length in (0, 4, 100, header, header + 1, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(UserError, match="damaged"):
                engine.load(path)
        path.write_bytes(data + b"x")
        with pytest.raises(UserError, match="damaged"):
            engine.load(path)
        path.write_bytes(data)
        assert turn(engine.load(path, max_tokens=3), QUESTIONS[0]).tokens


def test_other_files(loaded: Loaded, tmp_path: Path) -> None:
    refused(loaded, tmp_path / "nothing", "no saved file at")
    refused(loaded, tmp_path, "cannot read")
    (tmp_path / "text").write_text("Call me Ishmael. Some years ago, never mind how long")
    refused(loaded, tmp_path / "text", "not a file that --save or /save wrote")
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    (tmp_path / "other").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(loaded, tmp_path / "other", "not a file that --save or /save wrote")
    refused(loaded, loaded.path, "not a file that --save or /save wrote")


def test_another_model_build_format_or_context(
    kept: Path, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Loaded(tmp_path, replace(SPEC, seed=7))
    refused(other, kept, r"saved with another model: tiny-llama-0 of \d+ bytes.*with model")
    other.model.close()
    for options, said in (
        ({"type_k": "f16"}, 'type_k="f32".* is .*type_k="f16".*the settings it was saved with'),
        ({"type_v": "f16"}, 'type_v="f32".* is .*type_v="f16"'),
        ({"flash_attn": "on"}, r'flash_attn="off"\), this is .*flash_attn="on"\);'),
    ):
        refused(loaded, kept, said, context=replace(OPTIONS, **options))
    refused(loaded, kept, r"ctx_size=150 is too small.*use ctx_size=\d+", ctx_size=150)
    monkeypatch.setattr(library, "version", lambda: "llama-cpp-python 9.9")
    with engine_of(loaded) as engine, pytest.raises(UserError, match=r"with llama-cpp.*9\.9"):
        engine.load(kept)


# ---- conversations ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talked(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """What a chat's /save writes after its first turn, and the tokens of its second one."""
    path = tmp_path_factory.mktemp("talked") / "talk.laserkv"
    with engine_of(loaded, recall="off") as engine:
        talk = engine.conversation(document=DOCUMENT, system="Be brief.", max_tokens=6)
        turn(talk, QUESTIONS[0])
        assert talk.save(path) == path.stat().st_size
        return path, turn(talk, QUESTIONS[1]).tokens


def test_load_takes_conversations_too(
    talked: tuple[Path, list[int]], kept: Path, loaded: Loaded, tmp_path: Path
) -> None:
    """Which it is stands in the file, not in its name; what was said is remembered."""
    path, expected = talked
    other = Path(shutil.copy(path, tmp_path / kept.name))
    with engine_of(loaded) as engine:
        talk = engine.load(other, max_tokens=6)
        assert talk.ageing.endless
        assert (talk.turns, talk.system) == (1, "Be brief.")
        assert turn(talk, QUESTIONS[1]).tokens == expected
        document = engine.load(kept, max_tokens=6)
        assert not document.ageing.endless
        assert document.turns == 0
        with pytest.raises(UserError, match="cache is gone"):
            turn(talk, QUESTIONS[0])
        with pytest.raises(UserError, match="holds a document, not a conversation"):
            saved_talk.load(engine, kept)
        with pytest.raises(UserError, match="holds a conversation, not a document"):
            saved_document.load(engine, path)
        assert len(turn(document, QUESTIONS[0]).tokens) == 6  # it stayed


def test_a_conversation_is_refused_as_a_document_is(
    talked: tuple[Path, list[int]],
    loaded: Loaded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, expected = talked
    other = Loaded(tmp_path, replace(SPEC, seed=7))
    refused(other, path, r"saved with another model: tiny-llama-0 of \d+ bytes.*with model")
    other.model.close()
    refused(loaded, path, 'type_v="f32"', context=replace(OPTIONS, type_v="f16"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (tmp_path / "changed").write_bytes(data)
    refused(loaded, tmp_path / "changed", "damaged")
    with engine_of(loaded, recall="ram") as engine:
        assert turn(engine.load(path, max_tokens=6), QUESTIONS[1]).tokens == expected
    assert "no parked rows: nothing can be recalled" in caplog.text
    monkeypatch.setattr(library, "version", lambda: "llama-cpp-python 9.9")
    refused(loaded, path, r"with llama-cpp.*9\.9")


# ---- saving -------------------------------------------------------------------------------------


def test_nothing_to_save_or_nowhere_to(loaded: Loaded, tmp_path: Path) -> None:
    with engine_of(loaded) as engine:
        talk = Conversation(engine, document=DOCUMENT, max_tokens=3)
        with pytest.raises(UserError, match="no read document"):
            talk.save(tmp_path / "x")
        talk.read()
        for path, said in ((tmp_path, "is a folder"), (tmp_path / "a" / "b", "no folder")):
            with pytest.raises(UserError, match=said):
                talk.save(path)
        engine.ask(QUESTIONS[0], document=DOCUMENT[:40], max_tokens=2)
        with pytest.raises(UserError, match="cache is gone"):
            talk.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_the_old_file(
    kept: Path, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "document"
    shutil.copy(kept, path)
    before = path.read_bytes()
    with engine_of(loaded) as engine:
        talk = Conversation(engine, document=DOCUMENT[::-1], max_tokens=3)
        talk.read()

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(LaserKVError, match=r"cannot save .*No space left") as raised:
            talk.save(path)
        assert raised.value.exit_code == 1
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            talk.save(path)
        assert path.read_bytes() == before
        assert [item.name for item in tmp_path.iterdir()] == ["document"]
        monkeypatch.undo()
        talk.save(path)
        assert path.read_bytes() != before
        assert [item.name for item in tmp_path.iterdir()] == ["document"]


KILLED = """
import os, sys
from pathlib import Path
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.api import LaserKV
model, target = sys.argv[1:]
options = ContextOptions(128, 32, threads=1)
with LaserKV(model, context=options, block_size=64, ratio=0.3, recall="ram") as engine:
    talk = engine.conversation(document="tin and copper " * 20, max_tokens=3)
    talk.read()
    os.fsync = lambda handle: os.kill(os.getpid(), 9)
    talk.save(target)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs kill -9")
def test_killed_while_saving(kept: Path, loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "document"
    shutil.copy(kept, path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(loaded.path), str(path)], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == kept.read_bytes()


# ---- the command line ---------------------------------------------------------------------------


def ask(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    code = run(["ask", "--json", "-t", "1", "-n", "5", *arguments])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if code == 0 else {}, printed.err


def test_ask_saves_and_loads(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags left at their defaults are those the document was read with."""
    text, path = tmp_path / "text.txt", str(tmp_path / "kept")
    text.write_text(DOCUMENT)
    model = ("-m", str(loaded.path), "-q", QUESTIONS[0])
    read = ("-d", str(text), "--block-size", "64", "--ratio", "0.3", "-ctk", "q8_0", "-s", "4")
    code, _, error = ask(*model, *read, "--save", path, capsys=capsys)
    assert (code, error) == (0, "")
    code, first, _ = ask(*model, "--load", path, capsys=capsys)
    assert code == 0
    assert first["account"]["recall"] == "off"
    more = ("--recall", "ram", "--recall-mode", "shortlist", "--policy-option", "hash-bits=6")
    code, second, _ = ask(*model, *read, *more, "--save", path, capsys=capsys)
    assert code == 0
    assert second["account"]["parked_tokens"] == second["account"]["document_tokens"]
    answers = []
    for flags in ((), ("-ctk", "q8_0")):
        code, third, error = ask(*model, "--load", path, *flags, capsys=capsys)
        assert (code, error) == (0, "")
        assert third["account"]["recall"] == "ram"
        assert third["account"]["recall_mode"] == "shortlist"
        assert third["account"]["kept_tokens"] == second["account"]["kept_tokens"]
        assert third["account"]["block_size"] == 64
        answers.append(third["answer"])
    assert answers[0] == answers[1]


def test_ask_goes_on_with_a_chat(
    talked: tuple[Path, list[int]],
    loaded: Loaded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the block size it was made with; what it adds is saved with the rest."""
    path, more = talked[0], tmp_path / "more"
    model = ("-m", str(loaded.path), "-q", QUESTIONS[1])
    types = ("-ctk", "f32", "-ctv", "f32")
    code, first, error = ask(*model, "--load", str(path), "--save", str(more), capsys=capsys)
    assert (code, error) == (0, "")
    assert first["account"]["generated_tokens"] == 5
    assert first["account"]["block_size"] == READ["block_size"]
    with engine_of(loaded) as engine:
        talk = engine.load(more)
        assert talk.turns == 2
        reply = turn(engine.load(path, max_tokens=5), QUESTIONS[1])
        assert first["answer"] == reply.text
    code, _, error = ask(*model, "--load", str(path), "-ctk", "q8_0", *types[2:], capsys=capsys)
    assert code == 2
    assert re.fullmatch("error: .*saved with -ctk f32.*-ctk q8_0.*load it with.*\n", error)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--save", "nowhere/file", "-d", "TEXT"), "no folder nowhere"),
        (("--save", "file"), "give one with --document"),
        (("--load", "file", "-d", "TEXT"), "--load brings its own document"),
        (("--load", "file"), "no saved file at file"),
        (("--recall", "tape", "-d", "TEXT"), "--recall tape is unknown"),
    ],
)
def test_ask_says_what_is_wrong_with_files(
    flags: tuple[str, ...],
    said: str,
    loaded: Loaded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(DOCUMENT)
    given = [flag.replace("TEXT", "text") for flag in flags]
    code, _, error = ask("-m", str(loaded.path), "-q", "why?", *given, capsys=capsys)
    assert code == 2
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
