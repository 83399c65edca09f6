"""Misuse from Python: what is wrong is said in the words of who calls, before a model is loaded."""

from __future__ import annotations

import logging
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinySpec, make

from laserkv_gguf.arguments import by_arguments
from laserkv_gguf.errors import UserError, named_by_flags
from laserkv_gguf.planning.settings import Keywords, Settings

pytest.importorskip("llama_cpp")

from laserkv_gguf import LaserKV


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = TinySpec(layers=2, heads=2, kv_heads=1, n_ff=64, ctx_train=1024)
    return make(tmp_path_factory.mktemp("arguments"), spec=spec).path


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("lower --ctx-size, --ratio or --block-size", "lower ctx_size, ratio or block_size"),
        ("use --ctx-size 4352, a lower --ratio", "use ctx_size=4352, a lower ratio"),
        ("use -ctk q8_0 -ctv q8_0", 'use ContextOptions(type_k="q8_0", type_v="q8_0")'),
        ("use -b 4096, or -t 2", "use ContextOptions(batch_size=4096), or threads=2"),
        ("--main-gpu -3: there are 2", "Placement(main_gpu=-3): there are 2"),
        ("add --recall ram, or --recall disk", 'add recall="ram", or recall="disk"'),
        ("--recall tape is unknown", "recall tape is unknown"),
        ("-n 0: give at least 1", "max_tokens=0: give at least 1"),
        ("--policy-option hash-bits=x: no", 'policy_options={"hash_bits": "x"}: no'),
        (
            "-ctk f16 -ctv f16 -fa off lora",
            'ContextOptions(type_k="f16", type_v="f16", flash_attn="off") lora',
        ),
        ("use /reset, or see /docs", "use reset(), or see documents"),
        ("there is a document /add/drop.txt", "there is a document /add/drop.txt"),
        ("see --help, or --list-devices", "see --help, or --list-devices"),
        ("CMAKE_ARGS=-DGGML_RPC=on pip install --no-binary x", None),
        ("built for --ratios and a -twofold- sign", None),
    ],
)
def test_flags_are_arguments_in_python(flags: str, arguments: str | None) -> None:
    assert by_arguments(flags) == (flags if arguments is None else arguments)


def test_an_error_speaks_to_who_reads_it() -> None:
    error = UserError("--ratio is 2; give at most 1")
    assert str(error) == "ratio is 2; give at most 1"
    with named_by_flags():
        assert str(error) == "--ratio is 2; give at most 1"
    assert str(error) == "ratio is 2; give at most 1"
    assert error.with_flags == "--ratio is 2; give at most 1"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratoi": 0.2}, "there is no setting ratoi; did you mean ratio?"),
        ({"zzz": 0.2}, r"no setting zzz; help\(LaserKV\) lists them"),
        ({"ratio": "0.2"}, "ratio is '0.2', of type str; give a number"),
        ({"ratio": True}, "ratio is True, of type bool; give a number"),
        ({"block_size": 64.0}, "block_size is 64.0, of type float; give a whole number"),
        ({"policy": 3}, "policy is 3, of type int; give a text"),
        ({"policy_options": [1]}, "policy_options is .1., of type list; give a dict"),
        ({"ctx_size": "4096"}, "ctx_size is '4096', of type str; give a whole number or None"),
        ({"threads": 0}, "threads=0: give 1 to"),
        ({"context": {"threads": 1}}, "context is .*of type dict; give ContextOptions or None"),
        ({"ratio": 7}, "ratio is 7; give"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(
    model: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        LaserKV(model, **given)


def test_numbers_of_numpy_are_numbers(model: Path) -> None:
    with LaserKV(model, ratio=np.float32(0.5), block_size=np.int64(64), threads=1) as engine:
        assert engine.options.threads == 1
        with pytest.raises(UserError, match="no setting block; did you mean"):
            engine.configure(block=3)  # type: ignore[call-arg]
        with pytest.raises(UserError, match="alpha is 'x'"):
            engine.configure(alpha="x")  # type: ignore[typeddict-item,arg-type]


def test_a_path_is_no_document(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("Call me Ishmael.")
    with LaserKV(model, block_size=64) as engine:
        with pytest.raises(UserError, match=r"document is a path.*give Path\('.*'\)\.read_text"):
            engine.ask("Who?", document=book)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"document is bytes; give a text"):
            engine.ask("Who?", document=b"x")  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"book is a path"):
            engine.conversation(documents={"book": book})  # type: ignore[dict-item]
        with pytest.raises(UserError, match=r"question is None, of type NoneType; give a text"):
            engine.ask(None, document="x")  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"max_tokens is '9'"):
            engine.ask("Who?", max_tokens="9")  # type: ignore[arg-type]
        with caplog.at_level(logging.WARNING):
            engine.ask("Who?", document="nowhere/book.txt", max_tokens=1)
            assert "not the file" not in caplog.text
            engine.ask("Who?", document=str(book), max_tokens=1)
        assert caplog.text.count("not the file of that name") == 1


def test_keywords_are_the_settings() -> None:
    """Type checkers see `Keywords`, and the program has `Settings`."""
    keywords, settings = typing.get_type_hints(Keywords), typing.get_type_hints(Settings)
    assert list(keywords) != []
    assert {one.name for one in fields(Settings)} == set(keywords)
    for name in ("ratio", "block_size"):  # None where something else decides
        assert keywords.pop(name) == settings.pop(name) | None
    assert keywords == settings


@pytest.mark.long
def test_a_type_checker_refuses_a_slip(tmp_path: Path) -> None:
    slip = tmp_path / "slip.py"
    slip.write_text(
        "from laserkv_gguf import LaserKV\n"
        'LaserKV("x", ratio=0.2, threads=2)\n'
        'LaserKV("x", ratoi=0.2)\n'
        'LaserKV("x", ratio="0.2")\n'
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(slip)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert 'slip.py:3: error: Unexpected keyword argument "ratoi"' in done.stdout
    assert 'slip.py:4: error: Argument "ratio"' in done.stdout
    assert "Found 2 errors" in done.stdout
