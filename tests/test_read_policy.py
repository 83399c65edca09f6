"""What chooses while no question is known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make

from laserkv_gguf import LaserKV, policies
from laserkv_gguf.conversation.parallel import Question, answer
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.capture import CaptureError, Probe
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.planning.fits import Run
from laserkv_gguf.planning.settings import RECALL_POLICY, Settings

DOCUMENT = "A story that is long enough for a few blocks, told by nobody to nobody. " * 6
CONTEXT = ContextOptions(128, 64, threads=1)


def read_policy(**given: Any) -> tuple[policies.Policy, policies.Policy]:
    settings = Settings(**{"recall": "off", **given})
    settings.check()
    policy = settings.make_policy(3)
    return policy, settings.make_read_policy(policy, 3)


def test_what_reads_where_nobody_says() -> None:
    """The policy itself; before recall one that needs no question."""
    for name in policies.available():
        if name != "infllm":
            policy, reads = read_policy(policy=name)
            assert reads is policy
    for name in ("laser", "snapkv"):
        assert read_policy(policy=name, recall="ram")[1].name == RECALL_POLICY
    policy, reads = read_policy(policy="infllm", recall="ram")  # notes what it will look up
    assert reads is policy


def test_what_reads_where_somebody_says() -> None:
    policy, reads = read_policy(read_policy="same")
    assert reads is policy
    for recall in ("off", "ram"):
        reads = read_policy(read_policy="kvzip values=norm chunk=99", recall=recall)[1]
        assert reads == policies.make("kvzip", values="norm", chunk=99)
    assert read_policy(read_policy="random")[1] == policies.make("random", seed=3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "unknown"),
        ("kvzap", "did you mean kvzip"),
        ("kvzip chunk", "not key=value"),
        ("kvzip values=length", "values is 'length'; give none, norm, output"),
        ("full", "cannot choose block by block"),
        ("infllm", "cannot choose block by block"),
    ],
)
def test_what_cannot_read(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        read_policy(read_policy=name)
    assert "\n" not in str(raised.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make(tmp_path, ctx_train=2048).path


def seen_by(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Who chooses, from now on."""
    seen: list[str] = []
    for name in names:
        kind = policies.find(name)

        def select(self: Any, *given: Any, choose: Any = kind.select) -> Any:
            seen.append(self.name)
            return choose(self, *given)

        monkeypatch.setattr(kind, "select", select)
        monkeypatch.setattr(kind, "warm_up", lambda self: None)
    return seen


def test_a_question_is_never_read_for_by_another(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_by(monkeypatch, "laser", "random")
    settings: dict[str, Any] = {"block_size": 64, "ratio": 0.4, "read_policy": "random"}
    with LaserKV(path, context=CONTEXT, recall="off", **settings) as engine:
        engine.ask("why?", document=DOCUMENT, max_tokens=1)
        assert set(seen) == {"laser"}
        seen.clear()
        talk = engine.conversation(document=DOCUMENT, max_tokens=2)
        kept = talk.read().kept
        assert set(seen) == {"random"}
        assert len(kept) == talk.reading.budget.kept
        seen.clear()
        talk.add("more", DOCUMENT[::-1])
        assert set(seen) == {"random"}
        stream = talk.ask("why?")
        assert "".join(stream) == stream.reply.text
        seen.clear()
        replies: list[Any] = []
        asked = [Question("why?", max_tokens=2), Question("where?", max_tokens=2)]
        answer(engine, asked, lambda _, reply: replies.append(reply), document=DOCUMENT)
        assert set(seen) == {"laser"}
        seen.clear()
        answer(
            engine, asked, lambda _, reply: replies.append(reply), document=DOCUMENT, read_once=True
        )
        assert set(seen) == {"random"}
        assert all(len(reply.tokens) for reply in replies)


def test_what_is_read_is_what_the_policy_would_keep(path: Path) -> None:
    """With a budget of the same form; `laser` and `kvzip` share what is kept alike."""
    kept = []
    for settings in (
        {"policy": "kvzip", "policy_options": {"shares": "equal", "chunk": 30}},
        {"policy": "laser", "read_policy": "kvzip shares=equal chunk=30"},
    ):
        if settings["policy"] == "laser":
            settings["policy_options"] = {"shares": "equal"}
        with LaserKV(path, context=CONTEXT, block_size=64, ratio=0.4, **settings) as engine:
            kept.append(engine.conversation(document=DOCUMENT).read().kept)
    assert np.array_equal(*kept)


@pytest.mark.parametrize("read_policy", ["expected", "kvzip values=norm"])
def test_a_model_that_shows_no_values(
    read_policy: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, which says how to go on; and so it goes on."""
    monkeypatch.setattr(Probe, "armed", without_values(Probe.armed))
    settings: dict[str, Any] = {"block_size": 64, "ratio": 0.4}
    with LaserKV(path, context=CONTEXT, read_policy=read_policy, **settings) as engine:
        with pytest.raises(UserError, match="shows none of a llama model") as raised:
            engine.conversation(document=DOCUMENT).read()
        assert "\n" not in str(raised.value)
        remedy = re.search(r'read_policy="([^"]+)"', str(raised.value))
        assert remedy is not None
    with LaserKV(path, context=CONTEXT, read_policy=remedy[1], **settings) as engine:
        assert len(engine.conversation(document=DOCUMENT).read().kept) > 1


def without_values(armed: Any) -> Any:
    """The probe where no value is ever seen."""

    @contextmanager
    def run(self: Probe, **wanted: Any) -> Iterator[None]:
        with armed(self, **wanted):
            yield
        if wanted.get("value_norms") is not None:
            raise CaptureError("layer 0 showed 0 rows", "value_norms")

    return run


@pytest.mark.parametrize("recall", ["off", "ram"])
def test_its_cells_are_planned(recall: str, path: Path) -> None:
    settings: dict[str, Any] = {
        "block_size": 64,
        "ratio": 0.4,
        "read_policy": "kvzip",
        "recall": recall,
    }
    with LaserKV(path, context=CONTEXT, **settings) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=1)
        tokens, _, _ = talk.to_read()
        planned = engine.plan(len(tokens), 0, 1, question_known=False)
        budget = planned.budget
        most = max(block.kept_before + block.tokens for block in budget.blocks)
        repeated = min(2048, budget.block_size) + engine.demand.repeat_prompt
        assert engine.demand.repeat_prompt > 8
        assert planned.cells >= most + repeated
        known = engine.plan(len(tokens), 8, 8).cells
        assert known >= most + 8
        # a cell less than that for a repetition is refused
        assert recall == "ram" or planned.cells == most + repeated


def test_a_plan_counts_a_repetition() -> None:
    """Before anything is loaded; without one only the question is counted."""
    policy = policies.make("laser")
    budget = policy.budget(20_000, 4096, 0.25, 4)
    cells = {
        name: Run(policy, read_policy=read_policy(read_policy=name)[1]).run_cells(budget)
        for name in ("same", "expected", "kvzip", "kvzip chunk=100")
    }
    most = max(block.kept_before + block.tokens for block in budget.blocks)
    assert cells["same"] == cells["expected"] < cells["kvzip"]
    assert cells["kvzip"] == most + 2048 + Run(policy).repeat_prompt
    assert cells["kvzip chunk=100"] == cells["same"]
