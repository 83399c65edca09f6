"""How policies are found, configured and checked."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import make

from laserkv_gguf import LaserKV, policies
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.policies import Candidates, Needs, Policy
from laserkv_gguf.policies.laser import PAPER_OPTIONS

ROOT = Path(__file__).parent.parent
DOCUMENT = "A story that is long enough for a few blocks, told by nobody to nobody. " * 6


class Longest(Policy):
    name = "longest"

    def select(self, candidates: Candidates, budget: int) -> np.ndarray:
        return np.arange(budget)


def test_every_file_is_a_policy_that_says_where_it_comes_from() -> None:
    files = {path.stem for path in (ROOT / "laserkv_gguf" / "policies").glob("[a-z]*.py")} - {
        "base"
    }
    names = set(policies.available())
    assert files <= names
    assert names - files == {"exact", "magicpig"}  # the two ends of laser
    for name, kind in policies.available().items():
        assert kind.__doc__
        assert name in ("full", "random") or re.search(r"2\d{3}\.\d{5}", kind.__doc__), name


def test_the_docs_list_every_policy() -> None:
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "policies.md").read_text("utf-8"), re.M)
    assert set(policies.available()) <= set(table)


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="longest", load=lambda: Longest)
    monkeypatch.setattr(policies, "entry_points", lambda group: [point])
    assert policies.find("longest") is Longest
    with pytest.raises(UserError, match="longest"):
        policies.find("longst")
    wrong = SimpleNamespace(name="wrong", load=lambda: int)
    monkeypatch.setattr(policies, "entry_points", lambda group: [wrong])
    with pytest.raises(UserError, match="not a subclass"):
        policies.find("wrong")


@pytest.mark.parametrize(
    ("name", "said"),
    [("lasr", "laser"), ("snapvk", "snapkv"), ("no.such:Thing", "no"), ("json:Nothing", "Nothing")],
)
def test_unknown(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        policies.find(name)


def test_options() -> None:
    assert policies.parse("laser", ["alpha=0.5", "hash-tables=4"]) == {
        "alpha": 0.5,
        "hash_tables": 4,
    }
    for wrong, said in (("alpa=1", "alpha"), ("alpha", "key=value"), ("pool=x", "give a int")):
        with pytest.raises(UserError, match=said):
            policies.parse("laser", [wrong])
    with pytest.raises(UserError, match="no option"):
        policies.parse("exact", ["alpha=0.5"])  # its alpha is what it is


def test_laser_asks_for_what_its_parts_use() -> None:
    for name in ("laser", "exact"):
        needs = policies.make(name).needs
        assert (needs.attention, needs.collisions, needs.keys) == (True, False, False)
    assert policies.make("laser", alpha=0.75).needs == policies.find("laser").needs
    plain = policies.make("laser", **PAPER_OPTIONS).needs
    assert (plain.value_norms, plain.outside, plain.holds_all) == ("none", False, False)
    for made in (policies.make("magicpig"), policies.make("laser", alpha=0.0)):
        assert (made.needs.attention, made.needs.collisions) == (False, True)
        assert made.needs.host_keys
    # made anew from one that did not
    assert replace(policies.make("laser"), alpha=0.5).needs.collisions
    assert policies.make("laser", alpha=0.5, residual="leverage").needs.keys


@pytest.mark.parametrize("name", sorted(policies.available()))
@pytest.mark.parametrize("asked", [True, False], ids=["asked", "unasked"])
def test_every_policy_answers_at_its_budget(name: str, asked: bool, tmp_path: Path) -> None:
    """Through the whole engine: kept is what the budget says, and the cache holds just that."""
    options = ContextOptions(128, 64, threads=1)
    settings = {"recall": "ram"} if policies.find(name).needs.recall else {}
    settings |= {"policy": name, "block_size": 64, "ratio": 0.4}
    with LaserKV(make(tmp_path).path, context=options, **settings) as e:
        talk = e.conversation(document=DOCUMENT, max_tokens=4)
        reading = talk.read(question="why?" if asked else None)
        if policies.find(name).flexible:
            assert reading.budget.anchors + reading.budget.window <= len(reading.kept)
            assert len(reading.kept) <= reading.budget.kept
        else:
            assert len(reading.kept) == reading.budget.kept
        assert np.isfinite(talk.log_likelihood("why?", "not"))
        stream = talk.ask("why?")
        assert "".join(stream) == stream.reply.text
        assert stream.reply.account.kept_tokens == len(reading.kept)


def test_needs_decide_what_is_seen(tmp_path: Path) -> None:
    """Float16 unless precise, and nothing that was not asked for."""
    seen: list[Candidates] = []

    class Looker(Longest):
        needs = Needs(keys=True, values=True, block_queries=True)

        def warm_up(self) -> None:
            pass

        def select(self, candidates: Candidates, budget: int) -> np.ndarray:
            seen.append(candidates)
            return super().select(candidates, budget)

    options = ContextOptions(128, 64, threads=1)
    with LaserKV(make(tmp_path).path, block_size=64, ratio=0.4, context=options) as engine:
        engine.policy = Looker()
        engine.ask("why?", document=DOCUMENT, max_tokens=1)
    for candidates in seen:
        assert candidates.queries is None
        for array in (candidates.keys, candidates.values, candidates.block_queries):
            assert array is not None
            assert array.dtype == np.float16
            assert not array.flags.writeable
        start, end = candidates.block
        assert candidates.block_queries.shape[1] == end - start
        assert candidates.keys.shape[1] == candidates.count


def test_log_likelihood_is_the_model_s_own(tmp_path: Path) -> None:
    """Against the chance of greedy tokens: no other continuation of that length is likelier."""
    options = ContextOptions(128, 64, threads=1)
    with LaserKV(make(tmp_path).path, policy="full", block_size=64, context=options) as engine:
        talk = engine.conversation(document="short", max_tokens=8)
        talk.read()
        used = talk.cells_used
        likely = talk.log_likelihood("why?", "e")
        assert talk.cells_used == used
        letters = [talk.log_likelihood("why?", letter) for letter in "abcdefghij"]
        assert likely == letters[4]
        assert sum(np.exp(letters)) < 1
        with pytest.raises(UserError, match="empty"):
            talk.log_likelihood("why?", "")
