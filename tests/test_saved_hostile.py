"""Saved files from strangers: forged with a right digest, pipes and devices, other people's files.

None of them runs anything, changes anything, or ends in more than one line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import llama_cpp
import numpy as np
import pytest
from forged import CHANGES, Forged, sealed
from test_session import DOCUMENT, OPTIONS, SPEC, Loaded, turn

from laserkv_gguf import machine as memory
from laserkv_gguf import models, policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.cli import commands
from laserkv_gguf.cli.app import run
from laserkv_gguf.cli.editing import Plain
from laserkv_gguf.cli.loop import Loop
from laserkv_gguf.cli.options import EngineOptions
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.conversation import Conversation as Talk
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama import state as llama_state
from laserkv_gguf.llama.sampler import Sampler, Sampling
from laserkv_gguf.llama.sequence import MAIN, Sequence
from laserkv_gguf.planning.settings import Settings
from laserkv_gguf.recall.disk import MAGIC, DiskStore
from laserkv_gguf.saving import conversation as saved_talk
from laserkv_gguf.saving import document as saved_document
from laserkv_gguf.saving import fields, kinds
from laserkv_gguf.saving import schema as saved_schema

READ: dict[str, Any] = {"block_size": 64, "ratio": 0.3, "lookahead": 2}
OTHER = "rivers run to seas and " * 9
WAYS: dict[str, dict[str, Any]] = {
    "document": {},
    "compact": {"positions": "compact"},
    "parked": {"recall": "ram"},
    "signed": {"recall": "ram", "recall_mode": "shortlist"},
    "units": {"recall": "ram", "policy": "quest"},
    "chat": {"talk": True, "recall": "off"},
    "recalling": {"talk": True, "recall": "ram", "positions": "compact"},
}
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs what POSIX has")


class Scene:
    """An engine with a conversation in it, and saved files of all kinds to forge.

    Attributes:
        files: what was saved, by what it is.
        answer: what the conversation in the engine says next to `asked`.
    """

    asked = "And iron?"

    def __init__(self, folder: Path) -> None:
        self.folder, self.one = folder, Loaded(folder, SPEC)
        self.files = {name: Forged(self._save(name).read_bytes()) for name in WAYS}
        self.old = self.folder / "old"
        self.engine = LaserKV(self.one.model, context=OPTIONS, recall="ram", **READ)
        talk = self.engine.conversation(document=DOCUMENT, max_tokens=2)
        turn(talk, "What is ore?")
        talk.save(self.old)
        self.talk = self.again()
        self.likely = self.likelihood()
        self.settings = self.engine.settings
        self.counts: Counter[str] = Counter()
        # what finds rows is used by an engine of the same ways alone
        self.alike = {
            name: LaserKV(self.one.model, context=OPTIONS, **READ, **WAYS[name])
            for name in ("signed", "units")
        }

    def _save(self, name: str) -> Path:
        way, path = dict(WAYS[name]), self.folder / name
        talks = way.pop("talk", False)
        with LaserKV(self.one.model, context=OPTIONS, **READ, **way) as engine:
            if talks:
                talk = engine.conversation(document=DOCUMENT, system="Be brief.", max_tokens=2)
                turn(talk, "What is ore?")
                talk.add("rivers.txt", OTHER)
                turn(talk, "And rivers?")
                talk.save(path)
            else:
                document = Conversation(engine, document=DOCUMENT, max_tokens=2)
                document.read()
                document.save(path)
        return path

    def close(self) -> None:
        for engine in (self.engine, *self.alike.values()):
            engine.close()
        self.one.model.close()

    def again(self) -> Talk:
        """The conversation that must survive, loaded anew."""
        self.talk = saved_talk.load(self.engine, self.old)
        return self.talk

    def likelihood(self) -> float:
        """Changes nothing, and is another if a single row or token of the conversation is."""
        return self.talk.log_likelihood(self.asked, "No.")

    def stays(self, *, thoroughly: bool = True) -> None:
        """The conversation in the engine is what it was."""
        assert self.engine.residents.holds(self.talk)
        assert self.engine.settings is self.settings
        if thoroughly:
            assert self.likelihood() == self.likely

    def meets(self, path: Path, name: str = "") -> str:
        """What becomes of a file: "refused", or "loaded" and asked something.

        Args:
            name: of the one that it was forged from.
        """
        before = set(sys.modules)
        if name in self.alike:
            try:
                self._asked(self.alike[name].load(path, max_tokens=2))
            except LaserKVError as error:
                check_line(error)
        try:
            talk = self.engine.load(path, max_tokens=2)
        except LaserKVError as error:
            check_line(error)
            self.counts["refused"] += 1
            self.stays(thoroughly=self.counts["refused"] % 16 == 0)
            return "refused"
        finally:
            assert not {name for name in set(sys.modules) - before if "evil" in name}
        self.counts["loaded"] += 1
        try:
            self._asked(talk)
            talk.save(self.folder / "more")
        except LaserKVError as error:
            check_line(error)
        self.engine.settings = self.settings
        self.again()
        self.stays(thoroughly=self.counts["loaded"] % 16 == 0)
        return "loaded"

    def _asked(self, talk: Conversation) -> None:
        said = turn(talk, self.asked)
        assert all(0 <= token < SPEC.vocab for token in said.tokens)


def check_line(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 1000
    assert text.isprintable()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    one = Scene(tmp_path_factory.mktemp("hostile"))
    yield one
    one.close()


# ---- the attack: 840 files ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", CHANGES)
def test_forged_files_do_nothing(mode: str, scene: Scene, tmp_path: Path) -> None:
    """120 of each mode: refused in one line with everything as it was, or answered."""
    random, path, found = Random(mode), tmp_path / "forged", Counter[str]()
    memory.reset_peak_rss()
    before = memory.peak_rss() or 0
    names = [n for n, file in scene.files.items() if mode != "state" or "state" in file.arrays]
    for number in range(120):
        name = names[number % len(names)]
        data = CHANGES[mode](scene.files[name].copy(), random)
        path.write_bytes(data)
        found[scene.meets(path, name)] += 1
        if mode == "flip":
            assert found["refused"] == number + 1
    assert (memory.peak_rss() or 0) - before < 256 << 20
    assert found["refused"] > 60 or mode in ("about", "state", "little")
    scene.stays()


def test_whole_files_still_load(scene: Scene, tmp_path: Path) -> None:
    """What is forged above loads when nothing is changed in it: as it was, and written anew."""
    for name, file in scene.files.items():
        assert scene.meets(scene.folder / name, name) == "loaded", name
        assert scene.meets(file.write(tmp_path / name), name) == "loaded", name
    scene.stays()


def test_files_from_before_the_white_list_load(scene: Scene, tmp_path: Path) -> None:
    """The form's number is the same: settings that are no longer written are there, unused."""
    for file in (scene.files["parked"].copy(), scene.files["recalling"].copy()):
        file.about["settings"] |= {
            "scoring": "device",
            "recall_file": None,
            "recall_first": "keydiff",
        }
        assert scene.meets(file.write(tmp_path / "before")) == "loaded"
    file = scene.files["chat"].copy()
    del file.about["parked"]
    assert scene.meets(file.write(tmp_path / "before")) == "loaded"


# ---- a file runs nothing, and chooses nothing but how it was read --------------------------------


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module that leaves a mark when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("evil.py").write_text(
        "from pathlib import Path\n"
        "from laserkv_gguf.policies.laser import Laser\n"
        "Path('mark').touch()\n"
        "class Policy(Laser):\n"
        "    name = 'laser'\n"
    )
    yield tmp_path
    sys.modules.pop("evil", None)


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = run(["ask", "-t", "1", "-n", "2", "-q", "What?", *arguments])
    return code, capsys.readouterr().err


TYPES = ("-ctk", "f32", "-ctv", "f32")


@pytest.mark.parametrize("name", ["document", "chat"])
def test_no_file_chooses_what_is_run(
    name: str, scene: Scene, evil: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("-m", str(scene.one.path), *TYPES)
    file = scene.files[name].copy()
    file.about["settings"]["policy"] = "evil:Policy"
    path = str(file.write(evil / "file"))
    code, error = ask(capsys, *model, "--load", path)
    assert (code, error.count("\n")) == (2, 1)
    assert "--policy evil:Policy, which is not installed" in error
    assert "evil" not in sys.modules
    assert not Path("mark").exists()
    # the user's own word is another matter, and another policy of theirs too
    code, said = ask(capsys, *model, "--load", path, "--policy", "evil:Policy")
    assert (code, re.findall("error|warning", said)) == (0, [])
    assert Path("mark").exists()
    for option in ("recall_first", "policy"):  # nor in the engine, which has its own policy
        file = scene.files[name].copy()
        file.about["settings"][option] = "evil2:Policy"
        assert scene.meets(file.write(evil / "file")) == "loaded"


NEVER: dict[str, Any] = {
    "model": "/dev/zero",
    "recall_file": "TARGET",
    "threads": 1,
    "threads_batch": 1,
    "gpu_layers": 99,
    "debug": True,
    "seed": 5,
    "ctx_size": 1 << 30,
    "batch_size": 1 << 30,
    "ubatch_size": 1 << 30,
    "preset": "paper",
    "hash_tables": 10**9,
    "hash_bits": 64,
    "recall_bits": 2**20,
    "block_size": 2**40,
    "lookahead": 10**6,
    "recall_shortlist": 1e9,
    "pool": 10**9 + 1,
    "ratio": float("nan"),
}


@pytest.mark.parametrize("setting", NEVER)
def test_no_file_chooses_what_it_costs(
    setting: str, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, paths, threads and sizes: refused for the field, by `ask` and by an engine."""
    target = tmp_path / "empty"
    target.touch()
    for name in ("parked", "chat"):
        file = scene.files[name].copy()
        file.about["settings"] |= {setting: NEVER[setting], "recall": "disk"}
        if NEVER[setting] == "TARGET":
            file.about["settings"][setting] = str(target)
        path = file.write(tmp_path / "file")
        code, error = ask(capsys, "--load", str(path))
        assert (code, error.count("\n")) == (2, 1)
        assert f"settings.{setting}" in error or setting == "ratio"
        assert "no saved file that can be used" in error
        assert scene.meets(path) == "refused"
    assert target.exists()
    scene.stays()


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("laser", {"hash_tables": 10**9}),
        ("infllm", {"representatives": 10**9}),
        ("compactor", {"sketch": 10**9}),
        ("quest", {"page": 10**12}),
        ("laser", {"rule": "x" * 5000}),
        ("laser", {"a b": 1}),
        ("laser", {"rule": ["fraction"]}),
    ],
)
def test_options_of_policies_are_bounded(
    policy: str, options: dict[str, Any], scene: Scene, tmp_path: Path
) -> None:
    file = scene.files["document"].copy()
    file.about["settings"] |= {"policy": policy, "policy_options": options}
    with pytest.raises(UserError, match=r"settings\.policy_options"):
        saved_schema.read(file.write(tmp_path / "file"))


def test_only_listed_flags_come_out_of_a_file() -> None:
    """Of everything that a file may say, and of everything that flags may be."""
    options = EngineOptions()
    names = {*NEVER, *_names(Settings), *_names(EngineOptions)} - {
        "policy_options",
        "policy_option",
    }
    options.take_over({name: f"taken {name}" for name in names})
    options.policy_option = None
    changed = {f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default}
    assert changed == {
        *("policy", "keep", "block_size", "protection_divisor", "alpha", "lookahead"),
        *("probe_tokens", "positions", "recall"),
        *("recall_mode", "flash_attn"),
    }


def _names(kind: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]


def test_what_is_written_is_what_may_be_read() -> None:
    assert set(fields.SETTINGS) <= set(_names(Settings))
    kinds.Fields(fields.SETTINGS).check(
        {**{name: getattr(Settings(), name) for name in fields.SETTINGS}}, ""
    )
    for name in policies.available():  # defaults of every policy can be carried
        options = policies._options(policies.find(name))
        fields.Options().check(options, "policy_options")


def test_what_no_file_can_hold_is_not_saved(scene: Scene, tmp_path: Path) -> None:
    with LaserKV(scene.one.model, context=OPTIONS, **READ, hash_tables=5000) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=2)
        turn(talk, "What?")
        with pytest.raises(UserError, match=r"cannot save: settings\.hash_tables is 5000"):
            talk.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_the_model_that_is_needed_is_named(
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file made with another model does not choose it; the line says which to give."""
    size = scene.one.path.stat().st_size
    other = Loaded(tmp_path, dataclasses.replace(SPEC, layers=1))
    entry = next(iter(models.entries().values()))
    monkeypatch.setattr(
        models, "entries", lambda: {"tiny": dataclasses.replace(entry, name="tiny", size=size)}
    )
    file = scene.files["document"].copy()
    file.about["model"]["name"] = "\x1b]0;gotcha\x07" + "A" * 900
    path = file.write(tmp_path / "file")
    code, error = ask(capsys, "-m", str(other.path), "--load", str(path))
    assert (code, error.count("\n")) == (2, 1)
    assert error.endswith("give that one with --model tiny\n")
    assert "?]0;gotcha?AAA" in error
    assert "A" * 250 not in error
    other.model.close()


# ---- what a file holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("token", [SPEC.vocab, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize(
    ("name", "array"),
    [
        *(("document", "tokens"), ("parked", "tokens"), ("chat", "tokens"), ("chat", "pending")),
        ("recalling", "parked 1.tokens"),
    ],
)
def test_tokens_are_of_the_vocabulary(
    name: str, array: str, token: int, scene: Scene, tmp_path: Path
) -> None:
    """llama.cpp ends the process for one that is not."""
    file = scene.files[name].copy()
    file.arrays[array].reshape(-1)[-1:] = token
    if not file.arrays[array].size:
        file.arrays[array] = np.array([token], np.int32)
    path = file.write(tmp_path / "file")
    with pytest.raises(UserError, match=f"array '{array}' has values that are not from 0 to 383"):
        scene.engine.load(path)
    scene.stays()


def test_no_token_ends_the_process(scene: Scene) -> None:
    for token in (SPEC.vocab, -1, 2**31 - 1):
        with pytest.raises(LaserKVError, match="no token of this model"):
            scene.one.model.piece(token)


def _set(array: str, where: Any, value: Any) -> Any:
    def change(file: Forged) -> None:
        file.arrays[array][where] = value

    return change


def _say(*path: Any, value: Any) -> Any:
    def change(file: Forged) -> None:
        at = file.about
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def _swap(array: str) -> Any:
    def change(file: Forged) -> None:
        flat = file.arrays[array].reshape(-1)
        flat[0], flat[1] = flat[1].copy(), flat[0].copy()

    return change


def _extra(file: Forged) -> None:
    file.arrays["more"] = np.zeros(1, np.uint8)


CONTENTS: dict[str, tuple[str, Any, str]] = {
    # what is kept
    "kept twice": ("document", _set("kept", 1, 0), "'kept' is not in ascending order"),
    "kept beyond": ("parked", _set("kept", -1, 10**6), "'kept' goes out of bounds"),
    "kept below": ("parked", _set("kept", 0, -1), "'kept' goes out of bounds"),
    "held": ("document", _set("held", 0, 7), "'held' is not what rows are for"),
    "positions": ("document", _set("positions", 0, 5), "'positions' does not fit kept"),
    "compact positions": ("compact", _set("positions", 3, 9), "'positions' does not fit kept"),
    "next position": ("document", _say("next_position", value=1), "next_position is not"),
    "where read": ("parked", _set("positions", 5, 6), "'positions' is not where they were read"),
    "parked": ("document", _say("parked", value=True), "is of shape"),
    "keeps all": ("parked", _say("budget", "ratio", value=1), "keeps everything"),
    "an array more": ("document", _extra, "'more' is none that is known"),
    # what a budget takes to go through
    "budget": ("parked", _say("budget", "tokens", value=10**9), "blocks, more than"),
    "tokens": ("parked", _say("budget", "tokens", value=1000), "'tokens' is of shape"),
    "blocks": ("chat", _say("budget", "block_size", value=0), "budget.block_size is 0"),
    "chat's budget": ("chat", _say("budget", "tokens", value=2**31), "blocks, more than"),
    "anchors": ("parked", _say("budget", "protected", value=100), "without some anchors"),
    # what finds rows
    "units": ("units", _set("units", 0, 1), "'units' does not begin with the first token"),
    "units' order": ("units", _set("units", 2, 5), "'units' is not in ascending order"),
    # a conversation's ledger
    "segment": ("chat", _set("rows", (0, 3), 77), "'rows' has tokens of no segment"),
    "index": ("chat", _set("rows", (1, 3), 10**7), "out of their segment's bounds"),
    "negative": ("chat", _set("rows", (1, 3), -1), "out of their segment's bounds"),
    "position": ("chat", _set("rows", (2, 3), 0), "positions is not in ascending order"),
    "far": ("chat", _set("rows", (2, -1), 2**40), "positions goes out of bounds"),
    "order": ("chat", _set("rows", (1, 4), 3), "tokens not in ascending order"),
    "moved": ("chat", _set("rows", (2, -1), 2**20), "holds other positions than 'rows'"),
    "pools": ("chat", _set("pools", 0, 3), "'pools' has values that are not from 0 to 2"),
    "text": ("chat", _set("text 0", 0, 0xFF), "'text 0' is no UTF-8"),
    "turns": ("chat", _say("turns", value=50), "turns is 50, with 2 that were said"),
    "open": ("chat", _say("turn_open", value=0), "turn_open is no turn"),
    "name": ("chat", _say("names", 0, value="x"), "a document without a text"),
    "names": ("chat", _say("names", 0, value="rivers.txt"), "names has a name twice"),
    "kind": ("chat", _say("segments", 0, 1, value="document"), "does not begin with what opens"),
    "numbers": ("chat", _say("segments", 1, 0, value=0), "segments has a number twice"),
    "lengths": ("chat", _say("segments", 1, 3, value=5), "pools, not 5"),
    # and what is parked of it
    "no document": ("recalling", _say("parked", 0, "number", value=2), "is no document"),
    "offset": ("recalling", _say("parked", 1, "offset", value=0), "stands in the wrong place"),
    "first": ("recalling", _say("parked", 1, "first", value=True), "wrong place"),
    "most": ("recalling", _say("parked", 0, "most", value=10**6), "most is 1000000, not"),
    "least": ("recalling", _say("parked", 0, "most", value=0), "most is 0, not"),
    "where": ("recalling", _set("parked 1.where", 0, 3), "where"),
    "where out": ("recalling", _set("parked 1.where", -1, -1), "where is not of 'kept'"),
    "other tokens": ("recalling", _swap("parked 1.tokens"), "tokens are not the document's"),
    "stood": ("recalling", _set("parked 1.positions", 0, 5), "goes out of bounds"),
    # llama.cpp's state
    "magic": ("chat", _set("state", 0, 0), "'state' is no state of llama.cpp"),
    "cells": ("chat", _set("state", slice(12, 16), 255), "'state' is not laid out"),
    "no cells": ("chat", _set("state", slice(12, 16), 0), "'state' has bytes without cells"),
    "sequences": ("chat", _set("state", 20, 2), "'state' is not laid out"),
    "cell": ("chat", _set("state", 16, 99), "holds other positions than 'rows'"),
}


def test_older_files_say_which_document_is_first(scene: Scene, tmp_path: Path) -> None:
    """What the offset says, too: it is loaded as before."""
    file = scene.files["recalling"].copy()
    for entry in file.about["parked"]:
        assert "first" not in entry
        entry["first"] = entry["offset"] == 0
    path = file.write(tmp_path / "file")
    assert scene.meets(path) == scene.meets(scene.files["recalling"].write(tmp_path / "same"))
    assert scene.meets(path) != "refused"


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_do_not_agree(case: str, scene: Scene, tmp_path: Path) -> None:
    name, change, said = CONTENTS[case]
    file = scene.files[name].copy()
    change(file)
    with pytest.raises(UserError) as raised:
        scene.engine.load(file.write(tmp_path / "file"))
    check_line(raised.value)
    assert said in str(raised.value)
    scene.stays(thoroughly=False)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ('{"a": 1, "a": 2}', "no plain JSON"),
        ('{"a": NaN}', "no plain JSON"),
        ('{"a": Infinity}', "no plain JSON"),
        ('{"a": 1e999}', "no plain JSON"),
        ('{"a": ' + "9" * 50_000 + "}", "no plain JSON"),
        ('{"a": ' * 50_000, "no plain JSON"),
        ("[" * 100_000 + "]" * 100_000, "no plain JSON"),
        ("[]", "about is no object"),
        ("null", "about is no object"),
        ('{"model": {}}', "model.name is missing"),
        ('{"\\u202e\\u001b[2J": 1}', "??[2J is no field"),
    ],
)
def test_what_a_file_says_of_itself_is_plain(
    about: str, said: str, scene: Scene, tmp_path: Path
) -> None:
    file = scene.files["document"].copy()
    path = file.write(tmp_path / "file", about=about)
    with pytest.raises(UserError) as raised:
        saved_schema.read(path)
    check_line(raised.value)
    assert said in str(raised.value) or said == "model.name is missing"


def test_the_header_is_plain_too(scene: Scene, tmp_path: Path) -> None:
    """A name twice, gaps, overlaps, a length that is not there, a header larger than the file."""
    file = scene.files["document"].copy()
    entries, body = file.header()
    path = tmp_path / "file"
    whole = file.bytes()
    for data in (
        whole[:8],
        (2**63).to_bytes(8, "little") + whole[8:],
        (len(whole)).to_bytes(8, "little") + whole[8:],
        sealed(whole[8 : 8 + int.from_bytes(whole[:8], "little")].rstrip()[:-1], body),
        sealed(b'{"__metadata__": 5}', b""),
        sealed(b'{"__metadata__": {"format": "laserkv-gguf document 2"}}', b""),
        sealed(b"[" * 300_000, b""),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"its beginning is damaged|is damaged"):
            saved_schema.read(path)
    for name, change in (("kept", 8), ("tokens", -4)):
        changed = json.loads(json.dumps(entries))
        changed[name]["data_offsets"] = [at + change for at in changed[name]["data_offsets"]]
        path.write_bytes(file.bytes(changed))
        with pytest.raises(UserError, match=r"does not follow the one before it|data_offsets"):
            saved_schema.read(path)
    path.write_bytes(sealed(whole[8:].split(b" " * 1)[0], b""))
    file.format = "laserkv-gguf document 1"
    with pytest.raises(UserError, match="has version 1 of the form of saved files, this reads 2"):
        saved_schema.read(file.write(path))


def test_cells_are_no_more_than_the_file_explains(
    scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """10⁹ cells would be 2 TB; what was read, and room to go on, is what they are for."""
    file = scene.files["chat"].copy()
    file.about["cells"] = 10**9
    with LaserKV(scene.one.model, context=OPTIONS, **READ) as engine:
        talk = engine.load(file.write(tmp_path / "file"), max_tokens=2)
        assert engine._context is not None
        assert engine._context.cells < 10_000
        assert "saved with 1000000000 cells" in caplog.text
        assert turn(talk, "And?").tokens


def test_rows_that_are_no_numbers_make_no_answer(scene: Scene, tmp_path: Path) -> None:
    """Keys and values may be any bytes; what is computed of them is looked at before sampling."""
    for name in ("chat", "document"):
        file = scene.files[name].copy()
        if name == "chat":
            cells = int(file.arrays["state"][12:16].view("<u4")[0])
            file.arrays["state"][16 + 12 * cells + 8 + 12 : 16 + 12 * cells + 8 + 12 + 400] = 0xFF
        else:
            file.arrays["values"][...] = 0xFF
        with LaserKV(scene.one.model, context=OPTIONS, **READ) as engine:
            talk = engine.load(file.write(tmp_path / "file"), max_tokens=2)
            talk.sampling = Sampling(temperature=1.0)
            with pytest.raises(LaserKVError, match="computed no numbers"):
                turn(talk, "What?")


def test_numbers_are_looked_at_before_sampling(scene: Scene, monkeypatch: Any) -> None:
    context = scene.engine._context
    assert context is not None
    scene.likelihood()
    with Sampler(Sampling(), scene.engine.model) as sampler:
        context.decode(np.array([5], np.int32), 0, 6, outputs=1)
        try:
            assert 0 <= sampler.sample(context.handle) < SPEC.vocab
        finally:
            Sequence(context, 6).remove()


# ---- the conversation so far ---------------------------------------------------------------------


class Line:
    """A chat with the scene's conversation."""

    def __init__(self, scene: Scene) -> None:
        self.loop = Loop(scene.engine, scene.talk, Plain(lambda: ""), commands.run)

    def types(self, line: str) -> None:
        assert commands.run(self.loop, line)


def test_load_of_a_refused_state_leaves_the_conversation(scene: Scene, tmp_path: Path) -> None:
    """Rows of another type, fewer, other positions: looked at before the cache is emptied."""
    file = scene.files["chat"].copy()
    state, cells = file.arrays["state"], int(file.arrays["state"][12:16].view("<u4")[0])
    first = 16 + 12 * cells + 8
    for change in ((first, 1), (first + 4, 1), (16 + 12 * cells, 0), (16 + 12 * cells + 4, 7)):
        at, value = change
        file.arrays["state"] = state.copy()
        file.arrays["state"][at] = value
        path = file.write(tmp_path / "file")
        chat = Line(scene)
        with pytest.raises(UserError, match="array 'state' is not laid out"):
            chat.types(f"/load {path}")
        assert chat.loop.talk is scene.talk
        scene.stays()


@pytest.mark.parametrize("name", ["chat", "recalling", "document", "parked"])
@pytest.mark.parametrize("grows", [False, True], ids=["", "larger"])
def test_whatever_fails_the_conversation_comes_back(
    name: str, grows: bool, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp takes no state, or rows find no place: cells, parked rows and settings are back."""
    file, calls = scene.files[name].copy(), []
    if grows and "cells" in file.about:
        file.about["cells"] = 3000
    path = file.write(tmp_path / "file")
    restore, put = llama_state.restore, saved_document._put
    parked = scene.talk.parked_bytes
    before = scene.engine._context

    def refuses(handle: Any, sequence: int, blob: Any) -> None:
        calls.append(len(blob))
        if len(calls) == 1:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle), False)
            raise LaserKVError("llama.cpp does not take the saved state")
        restore(handle, sequence, blob)

    def fails(*args: Any) -> None:
        put(*args)
        raise LaserKVError("the cache has no room")

    monkeypatch.setattr(saved_talk.llama_state, "restore", refuses)
    monkeypatch.setattr(saved_document, "_put", fails)
    if name == "parked":
        monkeypatch.setattr("laserkv_gguf.machine.free_ram", lambda: 1)
        calls.append(0)
    elif name == "document":
        calls.append(0)
    with pytest.raises(LaserKVError):
        scene.engine.load(path, max_tokens=2500 if grows else 2)
    monkeypatch.undo()
    assert (scene.engine._context is before) or grows
    assert scene.talk.parked_bytes == parked
    scene.stays()
    recalled = scene.talk.recall("What is ore?")
    assert recalled is not None
    scene.again()
    scene.stays()


def test_interrupted_while_loading(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_talk, "_parked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scene.engine.load(scene.files["recalling"].write(tmp_path / "file"))
    scene.stays()


def test_a_named_recall_file_is_given_up_first(
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is one of that name: what is loaded gets it, and where that fails it is told."""
    rows = tmp_path / "rows"
    settings = {**READ, "recall": "disk", "recall_file": str(rows)}
    path = scene.files["recalling"].write(tmp_path / "file")
    with LaserKV(scene.one.model, context=OPTIONS, **settings) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=2)
        turn(talk, "What is ore?")
        likely = talk.log_likelihood("And?", "No.")
        restore = llama_state.restore
        seen: list[int] = []

        def refuses(*args: Any) -> None:
            seen.append(1)
            if len(seen) == 1:
                raise LaserKVError("no")
            restore(*args)

        monkeypatch.setattr(llama_state, "restore", refuses)
        with pytest.raises(LaserKVError, match="no"):
            engine.load(path)
        monkeypatch.undo()
        assert talk.log_likelihood("And?", "No.") == pytest.approx(likely, abs=1e-5)
        assert "is gone, so nothing is recalled until" in caplog.text
        assert not rows.exists()
        loaded = engine.load(path, max_tokens=2)
        assert rows.exists()
        assert turn(loaded, "And?").tokens
    assert not rows.exists()


def test_nothing_is_held_for_nobody(scene: Scene, tmp_path: Path, monkeypatch: Any) -> None:
    """A fresh engine that cannot load is empty, and works."""
    monkeypatch.setattr(saved_talk.llama_state, "restore", lambda *_: 1 / 0)
    path = scene.files["chat"].write(tmp_path / "file")
    with LaserKV(scene.one.model, context=OPTIONS, **READ) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.load(path)
        monkeypatch.undo()
        assert engine._context is not None
        assert Sequence(engine._context, MAIN).last == -1
        assert turn(engine.load(path, max_tokens=2), "And?").tokens


# ---- what is no file -----------------------------------------------------------------------------


@pytest.fixture
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    kind = request.param
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            folder = os.getcwd()  # noqa: PTH109
            os.chdir(tmp_path)  # such a path has a length limit
            end.bind("it")
            os.chdir(folder)
            yield path, "a socket"
            return
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path(kind)
    named = {"folder": "a folder", "pipe": "a pipe", "link to a pipe": "a pipe"}
    yield path, named.get(kind, "a device")


KINDS = ["pipe", "link to a pipe", "socket", "/dev/zero", "/dev/null", "folder"]


@posix
@pytest.mark.parametrize("no_file", KINDS, indirect=True)
def test_loading_what_is_no_file(
    no_file: tuple[Path, str], scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe is not waited for, and a device is not read until the memory is full."""
    path, said = no_file
    wanted = "Is a directory" if said == "a folder" else f"it is {said}"
    before = memory.peak_rss() or 0
    code, error = ask(capsys, "-m", str(scene.one.path), "--load", str(path))
    assert (code, error) == (2, f"error: cannot read {path}: {wanted}; name a saved file\n")
    with pytest.raises(UserError, match=wanted):
        Line(scene).types(f"/load {path}")
    assert (memory.peak_rss() or 0) - before < 64 << 20
    scene.stays()


@posix
@pytest.mark.parametrize("no_file", KINDS, indirect=True)
def test_saving_over_what_is_no_file(
    no_file: tuple[Path, str], scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left what it is, before anything long is done and at the end."""
    path, said = no_file
    mode, around = path.stat().st_mode, sorted(path.parent.iterdir())
    flags = ("-m", str(scene.one.path), "--load", str(scene.old), "--save", str(path))
    code, error = ask(capsys, *flags)
    assert (code, error) == (2, f"error: cannot save to {path}: it is {said}; give a file\n")
    with pytest.raises(UserError, match=f"it is {said}"):
        Line(scene).types(f"/save {path}")
    assert path.stat().st_mode == mode
    assert path.parent == Path("/dev") or sorted(path.parent.iterdir()) == around


def test_names_that_no_file_has(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("-m", str(scene.one.path))
    for flag in ("--save", "--load"):
        more = ("--load", str(scene.old)) if flag == "--save" else ()
        code, error = ask(capsys, *model, *more, flag, "")
        assert (code, error) == (2, f"error: {flag} is empty; name a file\n")
        for name in ("a\0b", "x" * 300):
            code, error = ask(capsys, *model, *more, flag, name)
            assert code == 2
            assert error.count("\n") == 1
            assert error.startswith("error: ")
            assert "debug" not in error
    with pytest.raises(UserError, match="name a file"):
        Line(scene).types("/save")
    for name in ("a\0b", "x" * 300):
        with pytest.raises(UserError):
            Line(scene).types(f"/load {name}")
        with pytest.raises(UserError):
            Line(scene).types(f"/save {name}")
    scene.stays()


# ---- what is written -----------------------------------------------------------------------------


@posix
def test_saved_files_are_their_owners(scene: Scene, tmp_path: Path) -> None:
    """Whatever the umask, and also where the file before was open to all."""
    path = tmp_path / "file"
    path.touch(0o666)
    path.chmod(0o666)
    before = os.umask(0)
    try:
        scene.talk.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


HELD = """
import os, sys
from pathlib import Path
from laserkv_gguf.files import archive as saved
file, name = saved._beside(Path(sys.argv[1]), 0)
file.write((1000).to_bytes(8, "little") + saved._BEGINS + b'document 2"')
file.flush()
print(name, flush=True)
sys.stdin.readline()
"""


@posix
def test_what_a_killed_save_left_is_removed(scene: Scene, tmp_path: Path) -> None:
    """At the next save to the same target, if it is ours and nobody is writing it any more."""
    path = tmp_path / "file"
    mine = tmp_path / ".file.notours1.part"
    mine.write_text("notes of my own")
    others = [
        tmp_path / name for name in (".file.12345678", "file.abcdefgh.part", ".else.abc.part")
    ]
    for other in others:
        other.write_bytes(b"")
    (tmp_path / ".file.linkedto.part").symlink_to(mine)
    command = [sys.executable, "-c", HELD, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    alive, killed = (subprocess.Popen(command, **pipes) for _ in range(2))
    names = [child.stdout.readline().strip() for child in (alive, killed)]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert all(Path(name).exists() for name in names)
    scene.talk.save(path)
    assert Path(names[0]).exists()
    assert not Path(names[1]).exists()
    assert mine.read_text() == "notes of my own"
    assert all(other.exists() for other in others)
    alive.communicate("\n")
    scene.talk.save(path)
    assert not Path(names[0]).exists()
    assert scene.meets(path) == "loaded"


def test_a_save_that_is_killed_early_leaves_an_empty_file(scene: Scene, tmp_path: Path) -> None:
    left = tmp_path / ".file.abcdefgh.part"
    left.touch()
    scene.talk.save(tmp_path / "file")
    assert not left.exists()


# ---- the file of parked rows ---------------------------------------------------------------------


@posix
def test_a_recall_file_is_its_owners(tmp_path: Path) -> None:
    """Also one that was there before, from a crash or made by hand."""
    path = tmp_path / "rows"
    for begins in (b"", MAGIC):
        path.write_bytes(begins)
        path.chmod(0o666)
        store = DiskStore(10, 2, 64, 64, path=path)
        assert path.stat().st_mode & 0o777 == 0o600
        store.close()
        path.unlink(missing_ok=True)


def test_closing_removes_only_the_file_that_was_made(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    store = DiskStore(10, 2, 64, 64, path=path)
    path.unlink()
    path.write_text("somebody's own")
    store.close()
    assert path.read_text() == "somebody's own"
    path.write_bytes(b"")  # was there, and stays: empty as it was
    store = DiskStore(10, 2, 64, 64, path=path)
    store.write(np.ones((2, 10, 64), np.uint8), np.ones((2, 10, 64), np.uint8), np.arange(10))
    store.close()
    assert path.read_bytes() == b""
    path.write_bytes(MAGIC)  # what a crash left is ours
    DiskStore(10, 2, 64, 64, path=path).close()
    assert not path.exists()


@posix
@pytest.mark.parametrize("no_file", KINDS, indirect=True)
def test_rows_are_parked_in_files_only(no_file: tuple[Path, str]) -> None:
    path, _ = no_file
    mode = path.stat().st_mode
    with pytest.raises(UserError, match=r"give another (recall_file|place)"):
        DiskStore(10, 2, 64, 64, path=path)
    assert path.stat().st_mode == mode
    with pytest.raises(UserError, match="another place with recall_file"):
        DiskStore(10, 2, 64, 64, path="a\0b")


def test_signatures_of_more_bits_than_any(scene: Scene, tmp_path: Path) -> None:
    """Older files say how many bits theirs have; nothing is counted through that they cannot be."""
    file = scene.files["signed"].copy()
    file.about["settings"]["recall_bits"] = 2**20
    with pytest.raises(UserError, match=r"settings\.recall_bits is 1048576"):
        scene.engine.load(file.write(tmp_path / "file"))
    scene.stays()
