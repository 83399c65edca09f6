"""Flags from a file and from the environment, completion, and what --help looks like."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import typer

from laserkv_gguf.cli import config
from laserkv_gguf.cli.app import app, run
from laserkv_gguf.cli.help import EXAMPLES, GROUPS
from laserkv_gguf.cli.options import EngineOptions, SamplingOptions, settable, tokens_of

ROOT = Path(__file__).resolve().parents[1]
GROUP: Any = typer.main.get_command(app)


def made(command: str, *words: str) -> dict[str, Any]:
    """What a command would be run with."""
    defaults = config.load(settable()).get(command, {})
    context = GROUP.commands[command].make_context(command, list(words), default_map=defaults)
    params: dict[str, Any] = context.params
    return params


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "laserkv.toml"
    monkeypatch.setenv("LASERKV_CONFIG", str(path))
    return path


def test_a_flag_wins_over_the_environment_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('ratio = 0.5\nthreads = 3\n[chat]\ntemp = 1\n"top-k" = 7\n')
    assert made("ask", "-q", "x")["ratio"] == 0.5
    monkeypatch.setenv("LASERKV_RATIO", "0.4")
    assert made("ask", "-q", "x")["ratio"] == 0.4
    assert made("ask", "-q", "x", "--ratio", "0.3")["ratio"] == 0.3
    assert made("ask", "-q", "x")["threads"] == 3
    assert made("bench")["threads"] == 3
    assert (made("chat")["temp"], made("chat")["top_k"]) == (1.0, 7)
    assert made("ask", "-q", "x")["temp"] == 0.0
    monkeypatch.setenv("LASERKV_POLICY_OPTION", "values=norm over=max")
    assert list(made("ask")["policy_option"]) == ["values=norm", "over=max"]


def test_a_command_of_its_own_name_is_set_too(file: Path) -> None:
    file.write_text("[eval]\nseed = 5\n")
    assert made("eval", "fidelity", "-o", "x")["seed"] == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rato = 0.5", r"rato cannot be set; did you mean ratio\?"),
        ("[chta]\ntemp = 1", r"\[chta\] is no command; did you mean chat\?"),
        ("[bench]\ntemp = 1", "temp cannot be set"),
        ('threads = "many"', "threads must be a whole number"),
        ("ratio = true", "ratio must be a number"),
        ("model = 3", "model must be a text in quotes"),
        ("policy_option = [1]", "policy_option must be a list of texts"),
        ("debug = true", "debug cannot be set"),
        ("ratio = = 1", "is no TOML"),
        ('"\\u001b[2J" = 1', "cannot be set"),
        ("[ask]\nratio = [0.1]", "ratio must be a number"),
    ],
)
def test_what_is_wrong_in_it_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file.write_text(text)
    assert run(["doctor"]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert "laserkv.toml" in error
    assert run(["ask", "--help"]) == 0  # help helps all the same


def test_a_file_that_is_named_must_be_there(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["doctor"]) == 2
    assert "which is no file; unset it" in capsys.readouterr().err
    monkeypatch.setenv("LASERKV_CONFIG", "")
    assert config.place() is None


def test_the_folder_one_stands_in_sets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maker would choose a policy, and with it what is run."""
    monkeypatch.delenv("LASERKV_CONFIG")
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: own)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laserkv.toml").write_text('policy = "evil:X"')
    assert made("ask")["policy"] == "laser"
    (own / "laserkv.toml").write_text('policy = "snapkv"')
    assert made("ask")["policy"] == "snapkv"


def test_every_flag_that_is_shared_has_a_variable_and_a_type() -> None:
    for group in (EngineOptions, SamplingOptions):
        for field in group.__dataclass_fields__:
            if field not in ("debug", "list_devices"):
                assert settable()["ask"][field] in (int, float, str, bool, list), field
    names = {param.name: param.envvar for param in GROUP.commands["ask"].params}
    assert names["ctx_size"] == "LASERKV_CTX_SIZE"
    assert names["debug"] is None


# ---- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "…\n" not in shown.partition("\n\n")[2].partition("\n\n")[0]
    assert "Examples:" in shown
    for example in EXAMPLES[name]:
        assert example in shown
        words = __import__("shlex").split(example)
        assert words[:2] == ["laserkv-gguf", name]
        assert GROUP.commands[name].make_context(name, words[2:])
    assert max(map(len, shown.splitlines())) <= 100


def test_groups_stand_in_llama_cpps_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", "--help"]) == 0
    shown = capsys.readouterr().out
    found = [re.search(f"^{name}[:]", shown, re.MULTILINE) for name in GROUPS]
    places = [one.start() for one in found if one]
    assert len(places) == len(GROUPS)
    assert places == sorted(places)
    for word in ("cell", "block", "anchors", "window", "pool", "draft", "probe"):
        assert re.search(rf"^  {word} +\S", shown, re.MULTILINE), word
    assert run(["bench", "--help"]) == 0
    assert "--recall" not in capsys.readouterr().out


def test_the_program_says_all_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in GROUP.commands.items():
        first = " ".join(command.help.partition("\n")[0].split())
        assert first in " ".join(shown.split()), name


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_a_shell_completes() -> None:
    """As bash asks for it, through the program."""

    def completed(words: str, number: int) -> list[str]:
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(number)}
        done = subprocess.run(
            [sys.executable, "-m", "laserkv_gguf"],
            cwd=ROOT,
            env={**os.environ, **asked, "_LASERKV_GGUF_COMPLETE": "complete_bash"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        return done.stdout.split()

    assert completed("laserkv-gguf b", 1) == ["batch", "bench"]
    assert completed("laserkv-gguf ask --block", 2) == ["--block-size"]


@pytest.mark.parametrize(
    ("text", "tokens"), [("2048", 2048), ("16k", 16384), (" 100K ", 102400), ("0", 0)]
)
def test_tokens_are_counted_as_people_write_them(text: str, tokens: int) -> None:
    assert tokens_of(text) == tokens
    assert made("plan", "--tokens", text)["tokens"] == tokens


def test_what_is_no_number_of_tokens_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["plan", "--tokens", "many"], ["bench", "--tokens", "4k,x"]):
        assert run(words) == 2
        error = capsys.readouterr().err
        assert "give a number" in error or "give numbers" in error
        assert error.count("\n") == 1
