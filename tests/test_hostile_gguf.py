"""GGUF files that somebody damaged or forged: refused in one line, before they can do harm.

What is tried is in `mutated_gguf`; each file is loaded and asked in a process of its own, so that
an abort in native code is seen as the failure that it is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mutated_gguf import (
    ARRAY,
    F32,
    RAW,
    STRING,
    U32,
    Gguf,
    Outcome,
    Server,
    Value,
    build,
    damaged,
    parse,
    reads,
)
from test_cli import SMALL, environment, refusal
from tiny import make

pytest.importorskip("llama_cpp")

from laserkv_gguf.cli.app import run
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import loadable
from laserkv_gguf.models.header import Header

posix = pytest.mark.skipif(sys.platform != "linux", reason="forks, and memory without a name")
U16, U64, I32 = 2, 10, 5
F16_TYPE, I32_TYPE = 1, 26
ONE_LINE = re.compile(r"[^\n]{1,300}")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Gguf:
    raw = make(tmp_path_factory.mktemp("sound"), "m.gguf", spec=SMALL).path.read_bytes()
    made = parse(raw)
    assert build(made) == raw
    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as one:
        yield one


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


# ---- `plan` and absurd headers ------------------------------------------------------------------

Change = Callable[[Gguf], Gguf]


def key(name: str, kind: int, value: Any, **more: Any) -> Change:
    return lambda made: made.set(name, kind, value, **more)


def nested(depth: int) -> Change:
    raw = ARRAY.to_bytes(4, "little")
    raw += (ARRAY.to_bytes(4, "little") + (1).to_bytes(8, "little")) * depth
    raw += U32.to_bytes(4, "little") + (0).to_bytes(8, "little")
    return lambda made: replace(made, keys=[*made.keys, (b"deep", Value(RAW, raw))])


def first_tensor(**changes: Any) -> Change:
    return lambda made: replace(made, tensors=[replace(made.tensors[0], **changes), *made.tensors])


ABSURD: dict[str, tuple[Change, str]] = {
    "10^7 layers": (key("llama.block_count", U32, 10**7), "block_count is 10000000"),
    "10^9 layers": (key("llama.block_count", U32, 10**9), "block_count is 1000000000"),
    "10^19 layers": (key("llama.block_count", U64, 10**19), "block_count is 1"),
    "513 layers": (key("llama.block_count", U32, 513), "block_count is 513"),
    "-1 layers": (key("llama.block_count", I32, -1), "block_count is -1"),
    "endless layers": (key("llama.block_count", F32, float("inf")), "block_count is inf"),
    "no number of layers": (key("llama.block_count", F32, float("nan")), "block_count is nan"),
    "layers in words": (key("llama.block_count", STRING, b"many"), "block_count is many"),
    "heads": (key("llama.attention.head_count", U32, 2**32 - 1), "head_count is 4294967295"),
    "kv heads": (
        key("llama.attention.head_count_kv", ARRAY, [2**32 - 1], element=U32),
        "head_count_kv is",
    ),
    "width": (key("llama.embedding_length", U32, 2**31), "embedding_length is 2147483648"),
    "keys": (lambda made: replace(made, keys_said=2**40), "1099511627776 keys"),
    "keys that are not there": (lambda made: replace(made, keys_said=1000), "incomplete"),
    "tensors": (lambda made: replace(made, tensors_said=2**60), "tensors"),
    "tensors that are not there": (lambda made: replace(made, tensors_said=9999), "incomplete"),
    "texts": (key("some.list", ARRAY, [], element=STRING, count=2**62), "some.list has"),
    "numbers": (key("some.list", ARRAY, [], element=U32, count=2**62), "incomplete"),
    "texts that are not there": (
        key("some.list", ARRAY, [], element=STRING, count=2**24),
        "incomplete",
    ),
    "nested": (nested(2), "array of arrays"),
    "nested deeply": (nested(100_000), "array of arrays"),
    "twice": (lambda made: replace(made, keys=[*made.keys, made.keys[0]]), "twice"),
    "dimensions": (first_tensor(dims=(2,) * 1000), "1000 dimensions"),
    "elements": (first_tensor(dims=(2**63, 2**63, 2**63)), "elements"),
    "a type": (first_tensor(kind=2**31), "upgrade gguf"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_headers(
    name: str, sound: Gguf, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F8: at once, for `plan` and for what loads; llama.cpp is not asked."""
    change, said = ABSURD[name]
    path.write_bytes(build(change(sound)))
    line = refusal(capsys, ["plan", "-m", str(path), "--tokens", "5000"])
    assert said in line
    assert ONE_LINE.fullmatch(line.strip())
    with pytest.raises(UserError, match=r"m\.gguf|tensor ") as caught:
        loadable.check(path)
    assert ONE_LINE.fullmatch(str(caught.value))


def test_a_length_beyond_any_address(sound: Gguf, path: Path) -> None:
    """The second text of a list begins where no pointer reaches."""
    raw = build(sound.set("some.list", ARRAY, [b"x" * 8, b"y"], element=STRING))
    at = raw.index(b"some.list") + len(b"some.list") + 4 + 4 + 8
    path.write_bytes(raw[:at] + b"\xff" * 8 + raw[at + 8 :])
    for use in (Header, loadable.check):
        with pytest.raises(UserError, match="incomplete or damaged"):
            use(path)


@pytest.mark.parametrize("count", [3, 10**12, 2**64 - 1])
def test_parts_that_cannot_be(count: int, sound: Gguf, tmp_path: Path) -> None:
    """F8: the file's name says how many there are."""
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(build(sound.set("split.count", U64, count)))
    for use in (Header, loadable.check):
        with pytest.raises(UserError, match=r"says it has \d+ parts"):
            use(first)


@pytest.mark.parametrize("context", [0, 2**32 - 1])
def test_any_trained_length_is_planned(
    context: int, sound: Gguf, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F8: a length that nobody trains for is no reason to count to it."""
    path.write_bytes(build(sound.set("llama.context_length", U32, context)))
    assert run(["plan", "-m", str(path), "--json", "--positions", "original"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["document_tokens"] <= 4096 * 4096


def test_a_text_that_is_not_utf_8_is_no_damage(sound: Gguf, path: Path) -> None:
    """llama.cpp takes any bytes, so does what looks before it."""
    path.write_bytes(build(sound.set("general.description", STRING, b"na\xefve")))
    assert "\ufffd" in Header(path).metadata["general.description"]
    loadable.check(path)


@posix
def test_no_plain_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe that nobody writes to is not waited for."""
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in (tmp_path / "pipe.gguf", Path("/dev/zero")):
        for command in (["plan"], ["ask", "-q", "why?"]):
            assert "is no plain file" in refusal(capsys, [*command, "-m", str(name)])


# ---- what llama.cpp would abort on --------------------------------------------------------------


def without_token(text: bytes) -> Change:
    def change(made: Gguf) -> Gguf:
        tokens = list(made.value("tokenizer.ggml.tokens"))
        tokens[tokens.index(text)] = b"another"
        return made.set("tokenizer.ggml.tokens", ARRAY, tokens, element=STRING)

    return change


def of_type(name: str, kind: int) -> Change:
    """A tensor said to be of a type whose values are as large as those it has."""

    def change(made: Gguf) -> Gguf:
        tensors = [
            replace(info, kind=kind) if info.name == name.encode() else info
            for info in made.tensors
        ]
        return replace(made, tensors=tensors)

    return change


def both(*changes: Change) -> Change:
    def change(made: Gguf) -> Gguf:
        for one in changes:
            made = one(made)
        return made

    return change


ABORTS: dict[str, tuple[Change, str]] = {
    "layers": (key("llama.block_count", U32, 513), "block_count"),
    "no layers": (key("llama.block_count", U32, 0), "block_count"),
    "predicting layers": (key("llama.nextn_predict_layers", U32, 99), "nextn_predict_layers"),
    "experts": (key("llama.expert_count", U32, 1025), "expert_count"),
    "experts unused": (key("llama.expert_count", U32, 8), "expert_used_count"),
    "experts used": (key("llama.expert_used_count", U32, 8), "expert_used_count"),
    "groups": (key("llama.expert_group_count", U32, 2), "expert_group_count"),
    "alignment": (key("general.alignment", U32, 1), "no multiple of 32"),
    "scaling": (key("llama.rope.scaling.type", STRING, b"nonsense"), "rope.scaling.type"),
    "epsilon below 0": (
        key("llama.attention.layer_norm_rms_epsilon", F32, -1.0),
        "layer_norm_rms_epsilon",
    ),
    "epsilon no number": (
        key("llama.attention.layer_norm_rms_epsilon", F32, float("nan")),
        "layer_norm_rms_epsilon",
    ),
    "no vocabulary": (key("tokenizer.ggml.model", STRING, b"none"), "no vocabulary"),
    "bytes among words": (key("tokenizer.ggml.model", STRING, b"bert"), "has bytes"),
    "a token twice": (
        lambda made: made.set(
            "tokenizer.ggml.tokens",
            ARRAY,
            [*made.value("tokenizer.ggml.tokens")[:-1], b"<s>"],
            element=STRING,
        ),
        "twice",
    ),
    "a byte that cannot be written": (without_token(b"<0xE2>"), "byte 0xE2"),
    "a norm of whole numbers": (of_type("blk.0.attn_norm.weight", I32_TYPE), "attn_norm.weight"),
    "weights of whole numbers": (of_type("output.weight", I32_TYPE), "output.weight"),
    "kv heads": (
        both(
            key("llama.attention.head_count", U32, 1),
            key("llama.attention.head_count_kv", U32, 2),
        ),
        "head_count_kv",
    ),
}


@posix
@pytest.mark.parametrize("name", ABORTS)
def test_what_llama_cpp_would_abort_on(name: str, sound: Gguf, server: Server) -> None:
    """F9: in one line, by us."""
    change, said = ABORTS[name]
    found = server.ask(build(change(sound)))
    assert found.how == "refused", found
    assert said in found.said
    assert "damaged" in found.said


@posix
def test_heads_that_a_qwen_has_no_queries_for(server: Server, tmp_path: Path) -> None:
    """F9: llama.cpp holds a Qwen's queries against the width, not against the heads."""
    raw = make(tmp_path, "q.gguf", spec=SMALL, arch="qwen2").path.read_bytes()
    assert server.ask(raw) == Outcome("answered")
    found = server.ask(build(parse(raw).set("qwen2.attention.head_count", U32, 31)))
    assert found.how == "refused", found
    assert "attn_q.weight has 64 rows" in found.said


@posix
def test_a_sound_file_is_answered(sound: Gguf, server: Server) -> None:
    """Else all these would be refused for nothing."""
    assert server.ask(build(sound)) == Outcome("answered")
    harmless = sound.set("llama.logit_scale", F32, 2.0).set("general.url", STRING, b"here")
    assert server.ask(build(harmless)) == Outcome("answered")


@posix
def test_a_name_of_a_million_letters(sound: Gguf, server: Server) -> None:
    """llama.cpp logs it, and what looks through its log is done with it at once."""
    name = sound.set("general.name", STRING, b"x" * 1_000_000)
    assert server.ask(build(name)) == Outcome("answered")


@posix
def test_an_abort_shows_no_stack(tmp_path: Path) -> None:
    """F9: what nobody foresaw ends the process with llama.cpp's line, not with a debugger's."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import ctypes
from laserkv_gguf.llama import library
abort = library.ggml_base().ggml_abort
abort.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p]
abort(b"here.c", 7, b"on purpose")
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={k: v for k, v in environment().items() if k != "GGML_NO_BACKTRACE"},
        check=False,
    )
    assert result.returncode == -6
    assert result.stderr.strip() == "here.c:7: on purpose"


# ---- whatever else ------------------------------------------------------------------------------


def tried(sound: Gguf, server: Server, path: Path, seeds: list[str]) -> Counter[str]:
    """Counts what became of damaged files; fails with all that was neither answered nor refused."""
    counts, wrong = Counter[str](), []
    for seed in seeds:
        raw, said = damaged(sound, Random(seed))
        path.write_bytes(raw)
        reads(path)
        found = server.ask(raw)
        counts[found.how] += 1
        if not found.sound:
            wrong.append((seed, said, f"{found.how}: {found.said}"))
    assert not wrong, wrong
    return counts


@posix
def test_damaged_files(sound: Gguf, server: Server, path: Path) -> None:
    """230 of them: some are harmless and answered, the others are refused in one line."""
    counts = tried(sound, server, path, [f"attack {number}" for number in range(230)])
    assert counts["answered"] > 20
    assert counts["refused"] > 100


@posix
@pytest.mark.long
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_many_damaged_files(arch: Any, server: Server, tmp_path: Path) -> None:
    raw = make(tmp_path, "m.gguf", spec=SMALL, arch=arch).path.read_bytes()
    seeds = [f"{arch} {number}" for number in range(3000)]
    tried(parse(raw), server, tmp_path / "damaged.gguf", seeds)
