"""The embedded model on real text: what the whole is for."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from laserkv_gguf import LaserKV, models
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.trial import extra_buffers_work

NEEDLE = "The special magic number mentioned in this book is 4817263."
QUESTION = "What is the special magic number mentioned in this book?"
BOOKS = Path(__file__).parent.parent.parent / "shared" / "data" / "books"


@pytest.fixture(scope="module")
def model() -> Model:
    try:
        path = models.find(None)
    except UserError:
        pytest.skip("the embedded model is not installed")
    return Model(path, extra_buffers=extra_buffers_work())


def hidden(text: str, at: float, needle: str = NEEDLE) -> str:
    """The needle between two paragraphs."""
    paragraphs = text.split("\n\n")
    paragraphs.insert(int(len(paragraphs) * at), needle)
    return "\n\n".join(paragraphs)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_needle_is_found_in_a_quarter_of_the_cache(model: Model, positions: str) -> None:
    """And not by chance: the floor, at the same size, does not find it."""
    story = (files("laserkv_gguf") / "data" / "sample.txt").read_text("utf-8")
    # a shorter number in a shorter text: of every block so small a share is kept
    document = hidden(story[:1600], 0.4, NEEDLE.replace("4817263", "4817"))
    found = {"streamingllm": False}
    for policy in ("laser", "streamingllm") if positions == "original" else ("laser",):
        with LaserKV(model, policy=policy, block_size=96, positions=positions) as engine:
            reply = engine.ask(QUESTION, document=document, max_tokens=16)
            assert reply.account.kept_fraction <= 0.26
            assert reply.account.blocks >= 4
            found[policy] = "4817" in reply.text
    assert found == {"laser": True, "streamingllm": False}


@pytest.mark.long
def test_a_novel_ten_times_the_trained_context(tmp_path: Path) -> None:
    """About 85,000 tokens through 8,192 positions, in memory that does not grow with them."""
    novel = BOOKS / "little-colonels-hero-pg15122.txt"
    if not novel.exists():
        pytest.skip("the novels are not at hand")
    book = tmp_path / "book.txt"
    book.write_text(hidden(novel.read_text("utf-8"), 0.45), "utf-8")
    command = [sys.executable, "-m", "laserkv_gguf", "ask", "--document", str(book)]
    command += ["--question", QUESTION, "--ratio", "0.06", "--block-size", "2048", "-n", "24"]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    reply = json.loads(result.stdout)
    account = reply["account"]
    assert "4817263" in reply["answer"]
    assert account["document_tokens"] > 80_000
    assert account["positions"] == "compact"
    assert account["ctx_cells"] <= 8192
    assert account["kept_tokens"] <= 0.06 * account["document_tokens"] + account["blocks"]
    assert account["kept_tokens"] == account["kept_per_block"][-1]
    assert account["kv_bytes"] * 10 < account["full_kv_bytes"]
