"""The command line: what it prints where, its exit codes, and how it refuses what cannot work."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from tiny import TinySpec, Variant, make, write_variant

pytest.importorskip("llama_cpp")

from laserkv_gguf.cli.app import run
from laserkv_gguf.llama import devices

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL = TinySpec(layers=1, heads=2, kv_heads=1, n_ff=64, ctx_train=4096, chat_template=CHATML)
# A cell of this one takes 8 KiB (16 in f32): 2e9 cells are more than any machine has.
WIDE = TinySpec(layers=8, heads=4, kv_heads=4, head_dim=64, n_ff=32, chat_template=CHATML)
SENTENCE = "The quick brown fox jumps over the lazy dog. "
TEXT = SENTENCE * 40

# Of the tiny models' vocabulary a printable ASCII text has as many tokens as characters.
BEFORE = 1 + len("<|im_start|>user\n")  # BOS, and what ChatML puts in front


AFTER = "<|im_end|>\n<|im_start|>assistant\n"


def prompt_tokens(question: str) -> int:
    return len("\n\n" + question + AFTER)


Inside = Callable[..., subprocess.CompletedProcess[str]]


class Files(NamedTuple):
    folder: Path
    model: Path
    short: Path
    """trained to 512 tokens"""
    book: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("cli")
    model = make(folder, "small.gguf", spec=SMALL).path
    short = make(folder, "short.gguf", spec=SMALL, ctx_train=512).path
    book = folder / "book.txt"
    book.write_text(TEXT)
    (folder / "folder").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\t \n")
    (folder / "latin.txt").write_bytes("na\u00efve".encode("latin1"))
    (folder / "binary.dat").write_bytes(b"\x7fELF\0\1\2")
    for kind in get_args(Variant):
        write_variant(folder / f"{kind}.gguf", kind)
    return Files(folder, model, short, book)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The command line takes over the root logger, and holds on to the stderr of its test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def fill(arguments: str, files: Files) -> list[str]:
    """Arguments by blanks; {model} and the like become paths."""
    paths = {**files._asdict(), "ask": f"ask -m {files.model} -t 1 -n 4 -q hi"}
    return [part.format(**paths) for part in arguments.replace("{ask}", paths["ask"]).split()]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **changes}


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"env": environment(), "timeout": 600, **options}
    if "stdout" not in options:
        options["capture_output"] = True
    command = [sys.executable, "-m", "laserkv_gguf", *map(str, arguments)]
    return subprocess.run(command, text=True, encoding="utf-8", check=False, **options)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Inside]:
    """As `process`, but in this one: for what is said, not for how a process starts and ends."""
    terminated = signal.getsignal(signal.SIGTERM)

    def inside(*arguments: str, input: str) -> subprocess.CompletedProcess[str]:  # noqa: A002
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        capsys.readouterr()
        code = run(arguments)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    yield inside
    signal.signal(signal.SIGTERM, terminated)


# ---- what cannot work --------------------------------------------------------------------------

# arguments, and patterns the one line must match: what is wrong, and what to do about it
REFUSED = {
    # models
    "model missing": ("ask -m nowhere/no.gguf -q h", "no.gguf", "give the path|leave --model out"),
    "model is a folder": ("ask -m {folder}/folder -q h", "is a folder", "give the GGUF"),
    "model is garbage": ("ask -m {folder}/garbage.gguf -q h", "not a GGUF", "convert|download"),
    "model is a text": ("ask -m {book} -q h", "not a GGUF", "convert|download"),
    "model is empty": ("ask -m {folder}/empty.txt -q h", "not a GGUF", "convert|download"),
    "model name unknown": ("ask -m lama-3.2-1b -q h", "lama-3.2-1b", "llama-3.2-1b-instruct"),
    "mamba": ("ask -m {folder}/mamba.gguf -q h", "mamba", "recurrent.*state", "use a model"),
    "gemma2": ("ask -m {folder}/gemma2.gguf -q h", "gemma2", "sliding.window", "use a model"),
    "bert": ("ask -m {folder}/bert.gguf -q h", "bert", "embedding.*generate", "use a model"),
    "gpu layers": ("{ask} --gpu-layers 5", "--gpu-layers 5", "drop the flag|install a build"),
    # documents
    "document missing": ("{ask} -d no.txt", "no.txt"),
    "document is a folder": ("{ask} -d {folder}", "folder", "name the file"),
    "document empty": ("{ask} -d {folder}/empty.txt", r"empty\.txt is empty"),
    "document blank": ("{ask} -d {folder}/blank.txt", r"blank\.txt is empty"),
    "document not UTF-8": ("{ask} -d {folder}/latin.txt", "not UTF-8", "byte 2", "iconv"),
    "document binary": ("{ask} -d {folder}/binary.dat", "binary", "UTF-8 text, Markdown or PDF"),
    "second document missing": ("{ask} -d {book} -d no.txt", "no.txt"),
    "stdin twice": ("{ask} -d - -d -", "twice", "once"),
    "chat reads stdin": ("chat -m {model} -d -", "standard input", "a file"),
    "bench empty": ("bench -m {model} -d {folder}/empty.txt", "empty"),
    # questions and answers
    "no question": ("ask -m {model}", "no question", "--question"),
    "question too long": (
        "ask -m {model} -t 1 -n 4 --block-size 64 -d {folder}/book.txt -q " + "why?" * 40,
        f"question has {len('--' + 'why?' * 40 + AFTER)} tokens",  # and two line breaks
        "block of 64",
        "--block-size",
    ),
    "no answer": ("{ask} -n 0", "-n 0", "at least 1"),
    "negative answer": ("{ask} -n -5", "-n -5", "at least 1"),
    "bench no tokens": ("bench -m {model} --tokens 0", "--tokens", "at least 1"),
    "bench no answer": ("bench -m {model} -n 0", "-n", "at least 1"),
    "bench no number": ("bench -m {model} --tokens four", "--tokens four", "4096,8k"),
    "bench no runs": ("bench -m {model} --repeats 0", "--repeats", "at least 1"),
    "bench ratio": ("bench -m {model} --ratios 0.2,2", "--ratio is 2", "at most 1"),
    # settings
    "ratio 0": ("{ask} --ratio 0", "--ratio is 0", "above 0 and at most 1"),
    "bench ratio 0": ("bench -m {model} --ratio 0", "--ratio is 0", "above 0 and at most 1"),
    "eval ratio 0": (
        "eval niah_single_1 -m {model} --ratio 0 --lengths 600 --policies laser -o {folder}/out",
        "--ratio is 0",
        "above 0 and at most 1",
    ),
    "ratio -1": ("{ask} --ratio -1", "--ratio is -1", "above 0 and at most 1"),
    "ratio 1.5": ("{ask} --ratio 1.5", "--ratio is 1.5", "above 0 and at most 1"),
    "ratio nan": ("{ask} --ratio nan", "--ratio is nan", "above 0 and at most 1"),
    "ratio inf": ("{ask} --ratio inf", "--ratio is inf", "above 0 and at most 1"),
    "ratio no number": ("{ask} --ratio few", "--ratio", "number"),
    "divisor 2": ("{ask} --protection-divisor 2", "--protection-divisor is 2", "at least 3"),
    "block 0": ("{ask} --block-size 0", "--block-size is 0", "such as"),
    "block above batch": ("{ask} -b 512 --block-size 4096", "-b 4096", "--block-size 512"),
    "batch negative": ("{ask} -b -1", "-b|--block-size"),
    "ubatch": ("{ask} -ub -1", "-ub -1", "at least 1"),
    "threads negative": ("{ask} -t -1", "-t -1", "1 to 512"),
    "threads no number": ("{ask} -t all", "--threads", "integer"),
    "policy unknown": ("{ask} --policy lazer", "lazer is unknown", "laser"),
    "policy like nothing": ("{ask} --policy zzz", "zzz is unknown", "laser.*streamingllm"),
    "policy no class": ("{ask} --policy os:path", "os:path", "Policy"),
    "policy no module": ("{ask} --policy no.such:Thing", "no.such:Thing"),
    "alpha 2": ("{ask} --alpha 2", "--alpha is 2", "from 0 to 1"),
    "alpha nan": ("{ask} --alpha nan", "--alpha is nan", "from 0 to 1"),
    "pool even": ("{ask} --policy-option pool=4", "pool is 4", "odd"),
    "pool 0": ("{ask} --policy-option pool=0", "pool is 0", "odd"),
    "hash bits": ("{ask} --policy-option hash_bits=0", "hash_bits is 0", "1 to 16"),
    "hash tables": ("{ask} --policy-option hash_tables=0", "hash_tables is 0", "at least 1"),
    "threads of a batch": ("{ask} -tb 1000", "-tb 1000", "1 to 512"),
    "threads too many": ("{ask} -t 100000", "-t 100000", "1 to 512"),
    "lookahead too long": ("{ask} --lookahead 100000", "--lookahead is", "0 to a block"),
    "lookahead": ("{ask} --lookahead -1", "--lookahead is -1", "0 to a block"),
    "probe tokens": ("{ask} --probe-tokens -1", "--probe-tokens is -1", "or 0"),
    "positions": ("{ask} --positions tight", "tight", "auto, original, compact"),
    "scoring": ("{ask} --scoring gpu", "gpu", "auto, host, device"),
    "type of keys": ("{ask} -ctk nonsense", "nonsense", "f16.*q8_0"),
    "type of values": ("{ask} -ctv nonsense", "nonsense", "f16.*q8_0"),
    "values need -fa": ("{ask} -ctv q8_0 -fa off", "flash attention", "-fa on.*-ctv f16"),
    "flash attention": ("{ask} -fa maybe", "-fa maybe", "on, off or auto"),
    "cells negative": ("{ask} -c -5", "--ctx-size -5", r"--ctx-size \d+"),
    # flags and commands
    "unknown flag": ("{ask} --polcy laser", "--polcy", "--policy"),
    "unknown flag of chat": ("chat --documnet x", "--documnet", "--document"),
    "flag without value": ("ask -q", "-q|--question"),
    "a question twice": ("{ask} stray", "question", "twice"),
    "unknown command": ("aks -q h", "aks"),
}


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Runs what must be refused; checks the form and returns the line."""
    capsys.readouterr()
    code = run(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert code == 2, err
    return err


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(
    name: str, files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "gpu layers" and devices.can_offload():
        pytest.skip("this build has a GPU")
    monkeypatch.chdir(files.folder)  # so that no name is met by accident
    arguments, *patterns = REFUSED[name]
    line = refusal(capsys, fill(arguments, files))
    for pattern in patterns:
        assert re.search(pattern, line), f"{pattern!r} is not in {line!r}"


def test_a_truncated_model(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, ["ask", "-m", str(files.folder / "truncated.gguf"), "-q", "h"])
    assert re.search(r"truncated\.gguf is truncated or damaged.*download it again", line)


def test_blank_question(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--question" in refusal(capsys, ["ask", "-m", str(files.model), "-q", " \n"])


def test_a_model_nobody_downloaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    line = refusal(capsys, ["ask", "-m", "llama-3.2-1b-instruct", "-q", "h"])
    assert "download Llama-3.2-1B-Instruct-Q4_K_M.gguf of bartowski/" in line


def test_a_model_named_by_a_novel(capsys: pytest.CaptureFixture[str]) -> None:
    refusal(capsys, ["ask", "-m", "x" * 5000, "-q", "h"])


def test_a_document_named_by_a_novel(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    refusal(capsys, [*fill("{ask}", files), "-d", "x" * 5000])


def test_a_negative_seed_works_or_is_refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fill("{ask} -d {book} --block-size 512 -s -1", files)) in (0, 2)


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    out, err = capsys.readouterr()
    assert not err.startswith("error: Usage")
    assert len((out + err).splitlines()) > 5


# ---- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", ["{ask}", "{ask} -d {book} --block-size 512", "{ask} -d {book} --policy full"]
)
def test_the_ctx_size_that_is_named_works(
    arguments: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    given = fill(arguments, files)
    line = refusal(capsys, [*given, "-c", "20"])
    assert "--ctx-size 20 is too small" in line
    named = re.search(r"use --ctx-size (\d+)", line)
    assert named is not None
    refusal(capsys, [*given, "-c", str(int(named[1]) - 1)])
    assert run([*given, "-c", named[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["account"]["ctx_cells"] == int(named[1])


@pytest.mark.parametrize("arguments", ["--ratio 0.9", "--ratio 0.5 --lookahead 0"])
def test_the_ratio_that_is_named_works(
    arguments: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compacted, what is kept must stay within the positions the model was trained for."""
    base = "ask -m {short} -t 1 -n 4 -q hi -d {book} --block-size 256 --positions compact "
    line = refusal(capsys, fill(base + arguments, files))
    assert "more than the 512 this model was trained for" in line
    named = re.search(r"use --ratio ([\d.]+)", line)
    assert named is not None
    largest = float(named[1])
    assert 0 < largest < 1
    refusal(capsys, fill(f"{base}{arguments} --ratio {largest + 0.001:.3f}", files))
    assert run(fill(f"{base}{arguments} --ratio {largest} --json", files)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["account"]["positions"] == "compact"
    assert err == ""


def test_the_ratio_named_for_another_budget_works(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """streamingllm has a budget of its own."""
    base = (
        "ask -m {short} -t 1 -n 4 -q hi -d {book} --block-size 256 --positions compact "
        "--policy streamingllm --ratio "
    )
    line = refusal(capsys, fill(base + "0.9", files))
    named = re.search(r"use --ratio ([\d.]+)", line)
    assert named is not None
    assert run(fill(base + named[1], files)) == 0


def test_a_block_that_leaves_no_ratio_asks_for_a_smaller_one(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "ask -m {short} -t 1 -n 4 -q hi -d {book} --positions compact --block-size 512"
    assert "use a smaller --block-size" in refusal(capsys, fill(base, files))


def test_beyond_the_trained_context_compacts_by_itself(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "ask -m {short} -t 1 -n 4 -q hi -d {book} --block-size 256 --ratio 0.05 --json"
    assert run(fill(base, files)) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["account"]["positions"], err) == ("compact", "")
    assert run(fill(base + " --positions original", files)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["account"]["positions"] == "original"
    assert re.fullmatch(r"warning: .* 512 .*expect nonsense\n", err)


@pytest.mark.parametrize("command", ["ask -q hi -n 4", "bench --tokens 100 -n 2"])
def test_memory(
    command: str, files: Files, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if any(device.kind == "gpu" for device in devices.listed()):
        pytest.skip("the GPU's own memory is asked for")
    model = make(tmp_path, spec=WIDE).path
    given = f"{command} -m {model} -t 1 -ctk f32 -ctv f32 -c 2000000000".split()
    line = refusal(capsys, given)
    cells = math.ceil(2e9 / 256) * 256
    size = cells * WIDE.layers * 2 * WIDE.kv_heads * WIDE.head_dim * 4
    assert f"{size} bytes" in line
    assert "--ctx-size" in line


# ---- failing otherwise -------------------------------------------------------------------------


def test_debug_shows_the_traceback(files: Files) -> None:
    """Also for llama.cpp's refusals, whose log is shown too."""
    result = process("ask", "-m", files.folder / "truncated.gguf", "-q", "h", "--debug")
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback (most recent call last)" in result.stderr
    assert "UserError" in result.stderr
    assert "llama.cpp: " in result.stderr


def test_refused_in_a_process(files: Files) -> None:
    result = process("ask", "-m", files.folder / "mamba.gguf", "-q", "h")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: .*mamba.*\n", result.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["text", "json"])
def test_a_closed_pipe_is_no_error(files: Files, extra: list[str]) -> None:
    """As in `… | head -c 1`."""
    arguments = [*fill("{ask}", files), "-n", "3000", "--positions", "original", *extra]
    child = subprocess.Popen(
        [sys.executable, "-m", "laserkv_gguf", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert child.stdout is not None
    assert len(child.stdout.read(1)) == 1
    child.stdout.close()
    assert child.stderr is not None
    said = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait(600) in (0, 1)
    assert "Traceback" not in said
    assert "Exception" not in said
    assert "error" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error(files: Files) -> None:
    """It stops an answer half-way, whose cells must not be touched once they are freed."""
    with Path("/dev/full").open("w") as full:
        result = process(*fill("{ask}", files), stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*No space left.*\n", result.stderr)


WORDS = {
    "a document without -d": ("ask {book} why?", "is a file; give documents with -d"),
    "a document alone": ("ask {book}", "is a file; give documents with -d"),
    "a document before -q": ("ask {book} -q why?", "is a file; give documents with -d"),
    "no quotes": ("ask who is Jack", "the question is several words; put it in quotes"),
    "twice": ("ask why? -q how?", "stands there twice"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_that_are_no_question(case: str, files: Files, here: Inside) -> None:
    command, said = WORDS[case]
    result = here(*fill(f"{command} -m {{model}}", files), input="")
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


ACCOUNT = re.compile(r"^(saw .*|cache .*) tok/s\ncut at ", re.MULTILINE)


def test_a_terminal_without_unicode(files: Files) -> None:
    result = process(*fill("{ask}", files), "-n", "40", env=environment(PYTHONIOENCODING="ascii"))
    assert result.returncode == 0
    assert ACCOUNT.search(result.stderr)
    assert result.stdout


def test_a_damaged_pdf_is_refused_in_one_line(files: Files, tmp_path: Path) -> None:
    """In a process: pytest would keep what pypdf logs from stderr."""
    pytest.importorskip("pypdf")
    (tmp_path / "cut.pdf").write_bytes(
        b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer\n"
    )
    result = process(*fill("{ask}", files), "-d", tmp_path / "cut.pdf")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: .*cut\.pdf is a PDF that cannot be read.*\n", result.stderr)


# ---- ask ---------------------------------------------------------------------------------------

KEYS = """
policy document_tokens kept_tokens kept_fraction blocks budget anchors window long_term ctx_cells
kv_bytes full_kv_bytes prefill_seconds probe_seconds score_seconds evict_seconds
first_token_seconds generated_tokens decode_tokens_per_second seed
"""


def asked(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    """The one object of `ask --json`."""
    assert run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith("reading ") for line in err.splitlines())  # on a busy machine
    assert out.count("\n") == 1
    answer: dict[str, Any] = json.loads(out)
    assert set(answer) == {"answer", "finish_reason", "account"}
    assert set(KEYS.split()) <= set(answer["account"])
    return answer


@pytest.mark.parametrize("policy", ["laser", "exact", "magicpig", "random", "full", "streamingllm"])
@pytest.mark.parametrize("types", ["f16", "q8_0"])
def test_json_adds_up(
    policy: str, types: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    block, ratio, question, predict = 512, 0.25, "hi", 12
    answer = asked(
        capsys,
        fill(
            f"{{ask}} -d {{book}} --block-size {block} --ratio {ratio} --policy {policy} "
            f"-n {predict} -s 7 -ctk {types} -ctv {types}",
            files,
        ),
    )
    account = answer["account"]
    assert account["policy"] == policy
    assert account["seed"] == 7
    tokens = BEFORE + len(TEXT)
    prompt = prompt_tokens(question)
    assert account["document_tokens"] == tokens
    assert account["blocks"] == math.ceil(tokens / block)
    # equation (1), and its partition
    ratio = 1 if policy == "full" else ratio
    if policy in ("laser", "exact"):  # one pool beside the first and the last tokens
        total = int(ratio * tokens)
        found = [account[name] for name in ("budget", "anchors", "window", "long_term")]
        assert found == [total, 4, 32, total - 36]
    elif policy != "streamingllm":
        budget = int(2 * ratio * block * tokens / (block + tokens))
        assert account["budget"] == budget
        assert account["anchors"] == account["window"] == budget // 4
        assert account["anchors"] + account["window"] + account["long_term"] == budget
    kept = account["kept_tokens"]
    assert kept == pytest.approx(ratio * tokens, abs=1.5 * account["blocks"] + 1)
    assert account["kept_fraction"] == pytest.approx(kept / tokens)
    # cells: before each block what is kept, the block and the probe; at the end question and answer
    per_block = account["kept_per_block"]
    assert per_block[-1] == kept
    lengths = [min(block, tokens - start) for start in range(0, tokens, block)]
    probe = prompt + 96 if policy in ("laser", "exact", "magicpig") else 0
    peak = max(
        before + read + (probe if after < before + read else 0)
        for before, read, after in zip([0, *per_block], lengths, per_block, strict=False)
    )
    assert account["ctx_cells"] == max(peak, kept + prompt + predict)
    row = SMALL.kv_heads * SMALL.head_dim
    cell = SMALL.layers * 2 * (row * 2 if types == "f16" else row // 32 * 34)
    assert account["kv_bytes"] == math.ceil(account["ctx_cells"] / 256) * 256 * cell
    assert account["full_kv_bytes"] == (tokens + prompt + predict - 1) * cell
    # times
    spent = ("decode_seconds", "probe_seconds", "score_seconds", "evict_seconds")
    assert sum(account[key] for key in spent) <= account["prefill_seconds"]
    assert account["prefill_seconds"] <= account["first_token_seconds"]
    assert all(account[key] >= 0 for key in spent)
    # the tiny models never end by themselves
    assert answer["finish_reason"] == "length"
    assert account["generated_tokens"] == predict
    assert account["decode_tokens_per_second"] > 0


def test_no_document(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    account = asked(capsys, fill("{ask}", files))["account"]
    assert account["document_tokens"] == account["kept_tokens"] == BEFORE
    assert account["kept_fraction"] == 1


def test_stdout_is_the_answer_and_nothing_else(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    given = fill("{ask} -d {book} --block-size 512 -n 30", files)
    answer = asked(capsys, given)["answer"]
    assert run(given) == 0
    out, err = capsys.readouterr()
    assert out == answer + "\n"
    assert ACCOUNT.search(err)


def test_in_a_pipe(files: Files) -> None:
    """A process of its own, the document from standard input."""
    given = fill("{ask} -d - --block-size 512", files)
    result = process(*given, "--json", input=TEXT)
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert answer["account"]["document_tokens"] == BEFORE + len(TEXT)
    result = process(*given, input=TEXT)
    assert result.returncode == 0
    assert ACCOUNT.search(result.stderr)
    assert result.stdout == answer["answer"] + "\n"


def test_documents_are_joined(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, fill("{ask} -d {book} -d {book}", files))
    assert answer["account"]["document_tokens"] == BEFORE + 2 * len(TEXT) + len("\n\n")


def test_one_seed_one_answer(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    given = fill("{ask} -d {book} --block-size 512 -n 24 --temp 2 --top-k 0 --min-p 0", files)
    first, again, other = (
        asked(capsys, [*given, "-s", seed])["answer"] for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_a_system_prompt_is_read(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    account = asked(capsys, [*fill("{ask}", files), "-sys", "Be brief."])["account"]
    longer = len("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert account["document_tokens"] == BEFORE + longer


# ---- chat from a pipe --------------------------------------------------------------------------


def test_chat_from_a_pipe(files: Files) -> None:
    given = fill("chat -m {model} -t 1 -n 6 -d {book} --block-size 512", files)
    result = process(*given, input="hello\nand then?\n/reset\nhello\n/quit\nnever\n")
    assert result.returncode == 0
    first, second, again, end = result.stdout.split("\n")
    assert (again, end) == (first, "")  # forgotten turns leave nothing behind
    assert second
    lines = result.stderr.splitlines()
    assert sum("first token" in line for line in lines) == 3
    assert not any("Traceback" in line for line in lines)
    for answer in (first, second):
        assert answer not in lines


def test_chat_with_a_first_question(files: Files, here: Inside) -> None:
    given = fill("{model} -t 1 -n 6 -d {book} --block-size 512 -q hi", files)
    result = here("chat", "-m", *given, input="")
    alone = here("ask", "-m", *given, input="")
    assert (result.returncode, alone.returncode) == (0, 0)
    assert result.stdout == alone.stdout


def test_a_full_chat_says_what_to_do(files: Files, here: Inside) -> None:
    given = fill("chat -m {model} -t 1 -n 100 -c 150 --policy full", files)
    result = here(*given, input="one\ntwo\n/reset\none\n")
    assert result.returncode == 0
    assert re.search(r"error: .*150 cells.*/reset.*--ctx-size", result.stderr)
    first, again, end = result.stdout.split("\n")
    assert (again, end) == (first, "")


def test_a_question_that_cannot_be_read_for_does_not_end_the_chat(
    files: Files, here: Inside
) -> None:
    given = fill("chat -m {model} -t 1 -n 6 -d {book} --block-size 128", files)
    result = here(*given, input=f"/read {'why? ' * 50}\nhello\n")
    assert result.returncode == 0
    assert re.search("error: the question has .* block of 128", result.stderr)
    assert len(result.stdout) > 1


# ---- help and bench ----------------------------------------------------------------------------

ENGINE = """
-m --model -c --ctx-size -ngl --gpu-layers -fa --flash-attn -ctk --cache-type-k
-ctv --cache-type-v -b --batch-size -ub --ubatch-size -t --threads -tb --threads-batch -s --seed
--policy --ratio --block-size --protection-divisor --alpha --lookahead
--positions --scoring --debug --document --question -n --predict
"""
SAMPLING = "--temp --top-k --top-p --min-p"
BATCH = "--input --output --parallel --read-once --fail-fast --quiet"
FLAGS = {
    "ask": f"{ENGINE} {SAMPLING} --json",
    "chat": f"{ENGINE} {SAMPLING}",
    "batch": f"{ENGINE.replace('--question', '')} {SAMPLING} {BATCH} --json",
    "bench": f"{ENGINE} --tokens --lengths --policies --ratios --repeats --warmup --tune --no-tune "
    "--generation --probe-cost --json --markdown --out",
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_lists_the_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    listed = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", out))
    assert set(FLAGS[command].split()) <= listed
    for line in out.splitlines():
        assert len(line) <= 100


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for command in FLAGS:
        assert re.search(rf"^  {command}\s", out, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["--version"], ["aks"]])
def test_help_is_quick(arguments: list[str]) -> None:
    """What takes seconds to import is imported by what needs it."""
    script = (
        "import sys; from laserkv_gguf.cli.app import run; "
        f"run({arguments!r}); print('imported', *sorted(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment()
    )
    imported = result.stdout.splitlines()[-1].split()
    assert imported[0] == "imported"
    assert "laserkv_gguf.cli.ask" in imported
    assert not {"numba", "llama_cpp", "numpy", "gguf", "jinja2"} & set(imported)


def test_help_of_the_module() -> None:
    result = process("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage:")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from laserkv_gguf import __version__

    assert run(["--version"]) == 0
    assert capsys.readouterr() == (f"{__version__}\n", "")


RATIOS = """
first_token_seconds prefill_seconds decode_tokens_per_second kv_bytes peak_rss_bytes
"""
ROW = f"policy document_tokens overhead_share {RATIOS}"
QUICK = " --repeats 1 --no-tune"


def test_bench_json(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    given = "bench -m {model} -t 1 -n 5 --tokens 1500 --block-size 512 -d {book} --json"
    assert run(fill(given + QUICK, files)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert {"rows", "ratios"} <= set(result)
    full, laser = result["rows"]
    assert (full["policy"], laser["policy"]) == ("full", "laser")
    for row in (full, laser):
        assert set(ROW.split()) <= set(row)
        assert row["document_tokens"] == BEFORE + 1500
        assert row["generated_tokens"] == 5
        assert 0 <= row["overhead_share"] < 1
    assert full["overhead_share"] == 0 < laser["overhead_share"]
    assert full["kept_fraction"] == 1
    assert laser["kv_bytes"] < full["kv_bytes"]
    for key, ratio in result["ratios"].items():
        gain = full[key] / laser[key]
        # of speeds more is better: every ratio above 1 is a gain
        assert ratio == pytest.approx(gain), key
    assert set(RATIOS.split()) <= set(result["ratios"])


def test_bench_table(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    given = "bench -m {model} -t 1 -n 3 --tokens 600 --block-size 256 --policy random"
    assert run(fill(given + QUICK, files)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("full", "random", "tokens read", "KV cache", "gain"):
        assert word in out


def test_bench_of_full_alone(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    given = "bench -m {model} -t 1 -n 3 --tokens 50 --policy full --json"
    assert run(fill(given + QUICK, files)) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in result["rows"]] == ["full"]
    assert result["ratios"]["kv_bytes"] == 1
