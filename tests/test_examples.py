"""What stands in examples/, run as it stands, with a tiny model."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served
from test_documents import pdf
from tiny import TinySpec, make

pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TEXT = "The rain in Spain stays mainly in the plain, and the boats stay in. " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = TinySpec(layers=1, heads=2, kv_heads=1, n_ff=64, ctx_train=1 << 16)
    return make(tmp_path_factory.mktemp("examples"), spec=spec).path


def run(*words: str | Path, path: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    here = os.pathsep.join(filter(None, (path, str(ROOT))))
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": here, **more},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_a_night_over_a_folder(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    papers, questions = tmp_path / "papers", tmp_path / "questions.txt"
    (papers / "more").mkdir(parents=True)
    (papers / "one.pdf").write_bytes(pdf(TEXT[:60], TEXT[60:120]))
    (papers / "more" / "two.txt").write_text(TEXT)
    (papers / "broken.pdf").write_bytes(b"%PDF-1.4\n")
    (papers / "left out.png").write_bytes(b"x")
    questions.write_text("Where?\n\nWhy?\n")
    given = [EXAMPLES / "night.py", papers, questions, "-m", model, "-n", "4", "-t", "1"]
    done = run(*given)
    assert done.returncode == 1, done.stderr  # the broken one, and nothing else
    rows = list(csv.DictReader((tmp_path / "papers.csv").open(encoding="utf-8")))
    assert [row["question"] for row in rows] == ["Where?", "Why?"] * 3
    assert [bool(row["error"]) for row in rows] == [True, True] + [False] * 4
    pages = tmp_path / "papers-pages"
    assert sorted(page.name for page in pages.iterdir()) == [f"{n:04d}.html" for n in (3, 4, 5, 6)]
    before = (tmp_path / "papers.csv").read_text()
    assert run(*given).returncode == 1  # nothing is left to do
    assert (tmp_path / "papers.csv").read_text() == before


def test_a_policy_as_a_package(model: Path, tmp_path: Path) -> None:
    """As pip installs it: the package, and metadata with the entry points of its pyproject."""
    text = (EXAMPLES / "policy" / "pyproject.toml").read_text("utf-8")
    group = text.partition('[project.entry-points."laserkv_gguf.policies"]')[2]
    line = group.strip().splitlines()[0]
    place = tmp_path / "laserkv_keynorm-0.1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: laserkv-keynorm\nVersion: 0.1.0\n"
    )
    (place / "entry_points.txt").write_text(
        f"[laserkv_gguf.policies]\n{line.replace(chr(34), '')}\n"
    )
    path = os.pathsep.join((str(tmp_path), str(EXAMPLES / "policy")))
    (tmp_path / "book.txt").write_text(TEXT)
    words = ["-m", "laserkv_gguf", "ask", "-m", model, "-d", tmp_path / "book.txt", "-q", "Where?"]
    words += ["-n", "4", "--block-size", "128", "--policy", "keynorm"]
    words += ["--policy-option", "skip=1"]
    done = run(*words, "--report", tmp_path / "kept.html", path=path)
    assert done.returncode == 0, done.stderr
    assert "keynorm" in (tmp_path / "kept.html").read_text("utf-8")


@pytest.mark.long
def test_a_policy_that_pip_installs(tmp_path: Path) -> None:
    done = run("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, EXAMPLES / "policy")
    assert done.returncode == 0, done.stderr
    names = "from laserkv_gguf import policies; print(policies.find('keynorm').__name__)"
    assert run("-c", names, path=str(tmp_path)).stdout == "KeyNorm\n"


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("fastapi")
    found = Served(model, "--cache-dir", str(tmp_path_factory.mktemp("cache")))
    yield found
    found.end()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("langchain_client.py", "langchain_openai"),
        ("llamaindex_client.py", "llama_index.llms.openai_like"),
    ],
)
def test_clients(served: Served, tmp_path: Path, name: str, needed: str) -> None:
    """With `pip install langchain-openai llama-index-llms-openai-like`."""
    try:
        importlib.util.find_spec(needed) or pytest.skip(f"{needed} is not installed")
    except ModuleNotFoundError:
        pytest.skip(f"{needed} is not installed")
    (tmp_path / "book.txt").write_text(TEXT)
    words = [EXAMPLES / "server" / name, tmp_path / "book.txt", "Where?", "Why?"]
    done = run(*words, LASERKV_SERVER=served.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
