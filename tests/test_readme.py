"""Every example of README and of docs/, run as a reader would run it, only smaller.

What is found there and has no rule here fails: a new example needs one. Models are tiny and
random, so answers mean nothing; that there is one, and its form, is what counts. Commands that need
a network, a GPU or minutes are parsed by the program they are for. docs/measured.md is left out:
its commands are records of what was run, at the commits that stand there.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_pull
import typer
from tiny import TinySpec, make

pytest.importorskip("llama_cpp")

import laserkv_gguf
from laserkv_gguf import models, policies
from laserkv_gguf.cli import config
from laserkv_gguf.cli.app import app, filled, run
from laserkv_gguf.cli.commands import COMMANDS
from laserkv_gguf.cli.options import settable
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import trial

server = test_pull.server  # a hub on this machine

ROOT = Path(__file__).resolve().parents[1]
# what is measured is a record, and selection.md is made by a command with its figures
RECORDS = ("measured.md", "selection.md")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.name not in RECORDS
}
README = "\n\n".join(PAGES.values())
STORY = "laserkv_gguf/data/sample.txt"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPEC = TinySpec(layers=1, heads=2, kv_heads=1, n_ff=64, ctx_train=1 << 17, chat_template=CHATML)
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
EXTRAS = set(
    re.findall(
        r"^(\w+) = \[",
        PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0],
        re.MULTILINE,
    )
)
TEXT = (ROOT / STORY).read_text("utf-8")[:3000]

# ---- what they show ----------------------------------------------------------------------------


FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in FENCED if language == "python"]
PLAIN = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
PLAIN = re.sub(r"^::: .*\n(?:    .*\n)*", "", PLAIN, flags=re.MULTILINE)  # docstrings go there
INDENTED = [
    re.sub("^    ", "", found[0], flags=re.MULTILINE)
    for found in re.finditer(r"(?:^    .*\n)(?:^(?:    .*)?\n(?=    ))*(?:^    .*\n)*", PLAIN, re.M)
]
# spans of code that are commands: of ours with arguments, or of a shell
SPANS = [
    " ".join(span.split())
    for span in re.findall(r"`([^`]+)`", PLAIN)
    if re.match(
        r"(laserkv-gguf|ask|chat|bench|batch|eval|plan|pull|doctor|python3?|pip|\.)\s\S|scripts/"
        r"|[A-Z_]+=\S+\s",
        span,
    )
]


def commands(block: str) -> list[str]:
    """One string a command: lines that go on are joined, a document in a shell stays with it."""
    found, lines = [], iter(block.splitlines())
    for line in lines:
        command = line
        if ending := re.search(r"<<'?(\w+)'?$", line):
            for more in lines:
                command += "\n" + more
                if more == ending[1]:
                    break
        while command.endswith("\\"):
            command = command[:-1].rstrip() + " " + next(lines).strip()
        if command.strip():
            found.append(command)
    return found


def name_of(example: str) -> str:
    return re.sub(r"\W+", " ", example.removeprefix("laserkv-gguf "))[:50].strip()


def test_the_examples_are_found() -> None:
    """All of README's code is in one of the lists; its heading lines say how many there are."""
    assert len(INDENTED) >= 13
    assert len(PYTHON) >= 3
    assert {language for language, _ in FENCED} == {"python", "toml"}
    shown = sum(line.startswith("    ") for line in PLAIN.splitlines())
    assert sum(len(block.splitlines()) for block in INDENTED) == shown
    for word in ("ask", "chat", "bench", "batch", "eval", "plan", "pull", "doctor", "serve"):
        assert any(f"laserkv-gguf {word}" in block for block in INDENTED), word


# ---- where they run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("readme"), spec=SPEC).path


@dataclass
class Reader:
    """Somebody who types an example in a folder with a book and a model."""

    folder: Path
    model: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    fixtures: pytest.FixtureRequest

    def type(self, words: Sequence[str]) -> tuple[str, str]:
        """What a command of ours prints, after it has ended well."""
        self.capsys.readouterr()
        code = run(words)
        out, err = self.capsys.readouterr()
        assert code == 0, err
        assert "error" not in err
        assert "Traceback" not in err
        return out, err

    def script(self, name: str) -> ModuleType:
        """A file of scripts/, without its main."""
        self.monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        spec = importlib.util.spec_from_file_location(f"readme_{name}", ROOT / "scripts" / name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        self.monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module


@pytest.fixture
def reader(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> Iterator[Reader]:
    """The embedded model is a tiny one here, and the story its beginning."""
    for name in ("model.gguf", "FILE.gguf"):
        shutil.copy(model, tmp_path / name)
    for name in ("book.txt", "jack-sheppard.txt", STORY):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(TEXT, "utf-8")
    find = models.find
    monkeypatch.setattr(
        models, "find", lambda name, **more: model if name is None else find(name, **more)
    )
    monkeypatch.chdir(tmp_path)
    root, terminated = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = list(root.handlers), root.level
    yield Reader(tmp_path, model, monkeypatch, capsys, request)
    root.handlers[:] = handlers
    root.setLevel(level)
    signal.signal(signal.SIGTERM, terminated)


# ---- how each is run ---------------------------------------------------------------------------

SMALLER = {"ask": 8, "bench": 8, "eval": 2}
SIZES = ("--tokens", "--block-size", "--lengths")


def smaller(words: Sequence[str]) -> list[str]:
    """The same command, with sizes divided."""
    by, made = SMALLER[words[0]], list(words)
    for place, flag in enumerate(words[:-1]):
        if flag in SIZES:
            sizes = words[place + 1].split(",")
            made[place + 1] = ",".join(str(int(size) // by) for size in sizes)
    return made


SHORT = {"--input": "-i", "--output": "-o", "--model": "-m"}


def value(words: Sequence[str], flag: str) -> str:
    flag = flag if flag in words else SHORT[flag]
    return words[words.index(flag) + 1]


def has(words: Sequence[str], flag: str) -> bool:
    return flag in words or SHORT.get(flag) in words


def there(reader: Reader, words: Sequence[str]) -> None:
    """A model of models.txt has been pulled, as the example before this one says."""
    if has(words, "--model") and value(words, "--model") in models.entries():
        listed(reader)
        run(["pull", value(words, "--model")])


def ask(reader: Reader, words: Sequence[str]) -> None:
    there(reader, words)
    out, err = reader.type([*smaller(words), "-t", "1", "-n", "8"])
    if "--json" in words:
        reply = json.loads(out)
        assert set(reply) == {"answer", "finish_reason", "account"}
        assert reply["answer"]
        account = reply["account"]
        assert 0 < account["kept_tokens"] <= account["document_tokens"]
        if "--scoring" in words:
            assert account["scoring"] == value(words, "--scoring")
        policy = value(words, "--policy") if "--policy" in words else "laser"
        assert account["policy"] == policy.split(":")[0]
    else:
        assert out.strip()
        assert out.endswith("\n")
    assert all(re.match("looked again |saw |cache |cut at ", line) for line in err.splitlines())
    for flag in ("--save", "--report"):
        if flag in words:
            assert (reader.folder / value(words, flag)).stat().st_size > 1000


def chat(reader: Reader, words: Sequence[str]) -> None:
    """Two questions, then /quit; what is not an answer goes to stderr."""
    there(reader, words)
    typed = io.StringIO("Who is Jack?\nAnd his mother?\n/quit\n")
    reader.monkeypatch.setattr(sys, "stdin", typed)
    out, err = reader.type([*words, "-t", "1", "-n", "8"])
    assert len(out.splitlines()) == 2
    assert err.count("first token") == 2
    assert typed.read() == ""


def bench(reader: Reader, words: Sequence[str]) -> None:
    few = ["-t", "1", "-n", "3", "--repeats", "1", "--no-tune"]
    out, _ = reader.type([*smaller(words), *few])
    for word in ("full", "laser", "first token", "KV"):
        assert word in out
    if "--out" in words:
        folder = reader.folder / value(words, "--out")
        result = json.loads((folder / "bench.json").read_text("utf-8"))
        lengths = value(words, "--tokens").split(",")
        assert len(result["rows"]) == 2 * len(lengths)
        assert (folder / "bench.md").read_text("utf-8").startswith("#")


def evaluate(reader: Reader, words: Sequence[str]) -> None:
    samples = words.index("--samples") + 1
    few = [*words[:samples], "1", *words[samples + 1 :], "-t", "1"]
    reader.type(smaller(few))
    folder = reader.folder / value(words, "--out")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    tasks = words[1 : words.index("--policies")]
    full, *compressed = value(words, "--policies").split(",")
    ratios = value(words, "--ratios").split(",")
    assert len(rows) == len(tasks) * (1 + len(compressed) * len(ratios))
    assert {row["policy"] for row in rows} == {full, *compressed}
    for name in ("summary.md", "summary.csv"):
        assert (folder / name).stat().st_size > 100


def batch(reader: Reader, words: Sequence[str]) -> None:
    there(reader, words)
    out, err = reader.type([*words, "-t", "1", *([] if "--predict" in words else ["-n", "8"])])
    assert out == ""
    given, answers = (
        [json.loads(line) for line in Path(value(words, flag)).read_text("utf-8").splitlines()]
        for flag in ("--input", "--output")
    )
    assert [line["id"] for line in answers] == [line["id"] for line in given]
    assert all(line["answer"] and line["account"] for line in answers)
    assert [("score" in line) for line in answers] == [("expected" in line) for line in given]
    if wanted := sum("expected" in line for line in given):
        assert f"of {wanted} " in err


def plan(reader: Reader, words: Sequence[str]) -> None:
    there(reader, words)
    out, _ = reader.type(words)
    for word in ("cells", "KV cache", "weights", "ratio"):
        assert word in out
    wide = f"{int(value(words, '--tokens')):,}"
    assert wide in out


def listed(reader: Reader) -> None:
    """From here on the hub is on this machine and has one file for every name of models.txt."""
    if "server" in reader.fixtures.fixturenames:
        return
    content, entries = reader.model.read_bytes(), models.entries()
    hub = reader.fixtures.getfixturevalue("server")
    hub.content, hub.etag = content, hashlib.sha256(content).hexdigest()
    file = f"{test_pull.REPO} {test_pull.FILE} {len(content)} {hub.etag} mit 2048"
    models._list_file().write_text("".join(f"{name} {file}\n" for name in entries))
    trial.extra_buffers_work()  # the hub's cache is another: its one warning is not the command's


def pull(reader: Reader, words: Sequence[str]) -> None:
    if len(words) == 1:
        out, err = reader.type(words)
        assert all(name in out for name in models.entries())
        assert "pull NAME" in err
        return
    assert words[1] in models.entries()
    listed(reader)
    out, _ = reader.type(words)
    assert Path(out.strip()).read_bytes() == reader.model.read_bytes()


def doctor(reader: Reader, words: Sequence[str]) -> None:
    out, _ = reader.type([*words, "-m", str(reader.model)])
    states = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert set(states) <= {"good", "degraded"}
    assert len(states) > 10


def serve(reader: Reader, words: Sequence[str]) -> None:
    """Its tests are tests/test_server.py; here it is only understood."""
    assert parsed(words)["port"]


OURS: dict[str, Callable[[Reader, Sequence[str]], None]] = {
    "ask": ask,
    "chat": chat,
    "bench": bench,
    "eval": evaluate,
    "batch": batch,
    "plan": plan,
    "pull": pull,
    "doctor": doctor,
    "serve": serve,
}


def demo(reader: Reader, words: Sequence[str]) -> None:
    """All but the environment: this one is taken, and the tiny model."""
    script, given = reader.script("demo.py"), []

    def prepare(extras: Sequence[str]) -> Path:
        assert set(extras) <= EXTRAS
        return Path(sys.executable)

    def start(command: list[str]) -> Any:
        assert command[:3] == [sys.executable, "-m", "laserkv_gguf"]
        given.append(command[3:])
        return argparse.Namespace(wait=lambda: run([*given[-1], "-t", "1"]))

    reader.monkeypatch.setattr(script.environment, "prepare", prepare)
    reader.monkeypatch.setattr(script, "DOCUMENT", reader.folder / STORY)
    reader.monkeypatch.setattr(script.subprocess, "Popen", start)
    reader.monkeypatch.setattr(sys, "argv", words[1:])
    reader.capsys.readouterr()
    assert script.main() == 0
    out, err = reader.capsys.readouterr()
    assert out.strip()
    assert err.startswith("$ ")
    assert len(given) == 1
    for word in words[2:]:
        assert word in given[0]


def checks(reader: Reader, _words: Sequence[str]) -> None:
    """What scripts/test.py would run: tools that are there, and these tests."""
    script, given = reader.script("test.py"), []

    def record(command: list[str], **_: Any) -> Any:
        given.append(command)
        return argparse.Namespace(returncode=0)

    reader.monkeypatch.setattr(script.environment, "prepare", lambda extras: sys.executable)
    reader.monkeypatch.setattr(script.subprocess, "run", record)
    reader.monkeypatch.setattr(sys, "argv", ["test.py"])
    assert script.main() == 0
    assert [command[:2] for command in given] == [[sys.executable, "-m"]] * 4
    assert [command[2] for command in given] == ["ruff", "ruff", "mypy", "pytest"]
    assert all(importlib.util.find_spec(command[2]) for command in given)


def shell(_reader: Reader, text: str) -> None:
    subprocess.run(["sh", "-e", "-c", text], check=True)


def container(words: Sequence[str]) -> None:
    """What is built is there, what is run is a command line of ours."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    for part in words:
        if part.startswith("DEVICE="):
            assert f"AS build-{part[7:]}\n" in text
    if words[1] == "run":
        at = next(n for n, part in enumerate(words) if part.startswith("laserkv-gguf"))
        begins = json.loads(next(x for x in text.splitlines() if x.startswith("ENTRY"))[11:])
        assert parsed([*begins[1:], *words[at + 1 :]])["port"] == 8080


def run_command(reader: Reader, text: str) -> None:
    """By the rule for its first words."""
    if text.startswith(("cat > ", "echo ")):
        shell(reader, text)
        return
    words = shlex.split(text)
    while set_here := re.fullmatch(r"(LASERKV_[A-Z_]+)=(.*)", words[0]):
        reader.monkeypatch.setenv(set_here[1], set_here[2])
        words = words[1:]
    if words[0] == "laserkv-gguf" and ({"--rpc", "--ray", "rpc-server"} & set(words)):
        parsed(filled(words[1:]))  # these need other machines; tests/test_rpc.py, test_ray.py
    elif words[0] == "docker":
        container(words)
    elif words[0] == "laserkv-gguf" and words[1] in OURS:
        OURS[words[1]](reader, words[1:])
    elif words == [".", ".venv/bin/activate"]:
        assert '".venv"' in (ROOT / "scripts" / "environment.py").read_text("utf-8")
    elif words[:2] == ["python3", "scripts/demo.py"]:
        demo(reader, words)
    elif words == ["python3", "scripts/test.py"]:
        checks(reader, words)
    else:
        pytest.fail(f"a page shows a command that no rule here runs: {text}")


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.parametrize("block", INDENTED, ids=name_of)
def test_commands(block: str, reader: Reader) -> None:
    """One after the other in one folder, for a later one may need what an earlier one wrote."""
    for command in commands(block):
        run_command(reader, command)


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_the_batch_as_it_stands(tmp_path: Path) -> None:
    """In an empty folder, with the embedded model and nothing changed."""
    try:
        models.find(None)
    except UserError:
        pytest.skip("the embedded model is not installed")
    script = next(block for block in INDENTED if "laserkv-gguf batch --input" in block)
    (tmp_path / "laserkv-gguf").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m laserkv_gguf "$@"\n'
    )
    (tmp_path / "laserkv-gguf").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers = (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()
    asked = (tmp_path / "questions.jsonl").read_text("utf-8").splitlines()
    assert len(answers) == len(asked)
    assert all(json.loads(line)["answer"].strip() for line in answers)


# ---- Python ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", PYTHON, ids=name_of)
def test_python(source: str, reader: Reader) -> None:
    """As a file in the folder one is in; a policy is then asked with, by the flag README names."""
    names: dict[str, Any] = {"__name__": "example"}
    kinds = re.findall(r"^class (\w+)\(Policy\)", source, re.MULTILINE)
    if kinds:
        flag = re.search(
            r"`(\w+\.py)`[^`]*$", README[: README.index(source)].removesuffix("```python\n")
        )
        assert flag is not None
        file = Path(flag[1])
        file.write_text(source, "utf-8")
        reader.monkeypatch.delitem(sys.modules, file.stem, raising=False)
        policy = f"{file.stem}:{kinds[0]}"
        assert f"`--policy {policy}`" in README
        given = ["ask", "-d", "book.txt", "-q", "why?", "--block-size", "1024", "--policy", policy]
        ask(reader, [*given, "--json"])
        assert policies.find(policy).__name__ == kinds[0]
        reader.monkeypatch.delitem(sys.modules, file.stem)
        return
    if "ray.data" in source:  # tests/test_ray.py runs it
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        assert "Documents" in names
        return
    if "127.0.0.1:8080" in source:
        pytest.importorskip("fastapi")
        pytest.importorskip("openai")
        with_server(reader, source)
        return
    exec(compile(source, "README.md", "exec"), names)
    try:
        printed = reader.capsys.readouterr().out
        assert printed.count("\n") >= source.count("print(")
        assert printed.strip()
        if later := re.search(r"# and later: (.+)$", source, re.MULTILINE):
            del names["talk"]
            exec(later[1], names)
            assert "".join(names["talk"].ask("Who?"))
        if "reply" in names:
            assert 0.2 < names["reply"].account.kept_fraction < 0.35
    finally:
        names["engine"].close()


def with_server(reader: Reader, source: str) -> None:
    """What a client does, asked of a server of the tiny model."""
    from serving import Served

    served = Served(reader.model, "--cache-dir", str(reader.folder / "cache"))
    try:
        exec(compile(source.replace("http://127.0.0.1:8080", served.url), "page", "exec"), {})
        assert reader.capsys.readouterr().out.count("\n") >= 2
    finally:
        served.end()


@pytest.mark.parametrize("text", [text for language, text in FENCED if language == "toml"])
def test_settings_are_understood(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "laserkv.toml").write_text(text)
    monkeypatch.setenv("LASERKV_CONFIG", str(tmp_path / "laserkv.toml"))
    found = config.load(settable())
    assert found["chat"]["temp"] == 0.7
    assert found["batch"]["ratio"] == 0.1
    assert found["ask"]["ratio"] == 0.25


# ---- in the text -------------------------------------------------------------------------------


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """What our command line makes of arguments, without running anything."""
    group: Any = typer.main.get_command(app)
    context = group.commands[words[0]].make_context(words[0], list(words[1:]))
    params: dict[str, Any] = context.params
    return params


class Parsed(Exception):
    pass


def parse_for(reader: Reader, words: Sequence[str]) -> None:
    """Up to where a script has understood its arguments."""
    script, given = reader.script(Path(words[0]).name), []

    def measure(model: str, folder: Path, more: Sequence[str]) -> None:
        given.append(parsed(["bench", "--model", model, "--out", str(folder), *more]))

    if words[0].endswith("bench_full.py"):  # what it does not know itself is for `bench`
        reader.monkeypatch.setattr(sys, "argv", list(words))
        reader.monkeypatch.setattr(script, "measure", measure)
        assert script.main() == 1
        assert len(given) == words.count("--model")
        return
    understood(reader, script, words)


def understood(reader: Reader, program: ModuleType, words: Sequence[str]) -> None:
    """Up to where a program has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Parsed(parse(parser))

    reader.monkeypatch.setattr(sys, "argv", list(words))
    reader.monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed):
        program.main()


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.parametrize("span", sorted(set(SPANS)), ids=name_of)
def test_commands_in_the_text(span: str, reader: Reader) -> None:
    words = shlex.split(span)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    match words:
        case ["python", "-m", "laserkv_gguf.kernels"]:
            subprocess.run([sys.executable, *words[1:], "attention"], check=True, cwd=ROOT)
        case ["python", "-m", "laserkv_gguf"]:
            assert run(["--version"]) == 0
        case ["python3", "scripts/demo.py", *_]:
            demo(reader, words)
        case ["python", "-m", name, *more] if name.startswith("laserkv_gguf.evaluation."):
            understood(reader, importlib.import_module(name), ["", *more])
        case ["laserkv-gguf", "rpc-server"]:
            assert parsed(words[1:])["port"]
        case ["laserkv-gguf", "--install-completion"]:
            assert "--install-completion" in root_flags()
        case ["laserkv-gguf", command, *more] if command in OURS:
            assert parsed([command, *more])
        case ["python", script, *_] if (ROOT / script).is_file():
            parse_for(reader, words[1:])
        case [script] if script.endswith(".py"):
            assert (ROOT / script).is_file()
        case [script, *more] if script.endswith(".sh"):
            assert os.access(ROOT / script, os.X_OK)
            subprocess.run(["bash", "-n", ROOT / script], check=True)
            if more and not shutil.which("nvidia-smi"):
                done = subprocess.run(
                    [ROOT / script, *more], capture_output=True, text=True, check=False
                )
                assert (done.returncode, done.stdout) == (2, "")
                assert re.fullmatch("error: no nvidia-smi.*\n", done.stderr)
        case ["pip", "install", what]:
            wanted = re.fullmatch(r"(?:\.|laserkv-gguf)\[([\w,]+)\]", what)
            assert wanted is not None
            assert set(wanted[1].split(",")) <= EXTRAS
        case [".", place]:
            environment = reader.script("environment.py")
            reader.monkeypatch.delenv(environment.VENV_VARIABLE, raising=False)
            assert place == ".venv/bin/activate"
            assert '".venv"' in (ROOT / "scripts" / "environment.py").read_text("utf-8")
        case [command, *_] if command in OURS:
            assert parsed(words)
        case _:
            pytest.fail(f"a page names a command that no rule here runs: {span}")


def root_flags() -> set[str]:
    group: Any = typer.main.get_command(app)
    return {flag for param in group.params for flag in param.opts}


def test_every_flag_is_one_of_ours() -> None:
    group: Any = typer.main.get_command(app)
    known = {
        flag
        for command in group.commands.values()
        for param in command.params
        for flag in (*param.opts, *param.secondary_opts)
    }
    known |= root_flags() | {"--version"}
    programs = [*(ROOT / "scripts").iterdir(), *(ROOT / "laserkv_gguf/evaluation").glob("*.py")]
    scripts = "".join(path.read_text("utf-8") for path in programs if path.is_file())
    for span in re.findall(r"`([^`]+)`", PLAIN):
        for flag in re.findall(r"(?:^| )(-[a-z]{1,3}|--[a-z][\w-]+)(?=[ =]|$)", span):
            assert flag in known or f'"{flag}"' in scripts, flag


def test_every_command_of_chat_is_there() -> None:
    others = ("docs/server.md", "docs/machines.md")  # paths of addresses, and of folders
    text = "".join(text for page, text in PAGES.items() if page not in others)
    for name in re.findall(r"`(/\w+)(?![\w/.])[^`]*`", text):
        assert name in COMMANDS, name


# ---- links, length -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", *(p.name for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(name: str) -> None:
    """Files and headings; what is elsewhere on the net is not asked for."""
    path = ROOT / name if name == "README.md" else ROOT / "docs" / name
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        assert (path.parent / file).exists(), target
        if heading:
            text = (path.parent / file).read_text("utf-8").lower()
            assert re.search(rf"^#+ {heading.replace('-', '.')}", text, re.MULTILINE), target


def test_readme_is_read_in_two_minutes() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 160
    assert sum("![" in line for line in lines) == 1
    assert max(map(len, lines)) <= 200


@pytest.mark.docs
def test_the_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    for name in ("index.html", "python.html", "measured.html"):
        page = (tmp_path / name).read_text("utf-8")
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://", page)


def test_this_is_the_code_that_is_tested() -> None:
    assert Path(laserkv_gguf.__file__).is_relative_to(ROOT)
