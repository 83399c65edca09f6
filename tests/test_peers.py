"""What people use instead: what each peer keeps, against another way to the same."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax
from test_evaluation_run import OPTIONS, SETTINGS, SPEC, Loaded, arguments, chars, results_in
from tiny import BOS, forward

from laserkv_gguf.api import LaserKV
from laserkv_gguf.cli.app import run
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.evaluation import report, tasks
from laserkv_gguf.evaluation.background import Background
from laserkv_gguf.evaluation.peers import PEERS, Case, bm25
from laserkv_gguf.evaluation.peers.quantised import Quantised
from laserkv_gguf.evaluation.peers.shift import Shift
from laserkv_gguf.evaluation.results import Results
from laserkv_gguf.evaluation.runner import Plan, Runner
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.llama.context import Context

FACTS = {
    "copper": "Ann keeps her copper in the cellar.",
    "silver": "Bob keeps his silver under the stairs.",
    "amber": "Eve keeps her amber in a jar.",
}
FILLER = "Nothing else was said that day. It rained on and on. Nobody came by."


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("peers"), SPEC)
    yield one
    one.model.close()


@pytest.fixture(scope="module")
def engine(loaded: Loaded) -> Iterator[LaserKV]:
    with loaded.engine(policy="full") as one:
        yield one


def sample_of(loaded: Loaded, text: str, question: str = "Where is the silver?") -> Sample:
    tokens = loaded.model.tokenize(text)
    return Sample("squad", 0, text, tokens, question, ("x",), " x", "It is", "Read. ", " End.")


def case_of(engine: LaserKV, sample: Sample, ratio: float = 0.25, task: str = "squad") -> Case:
    engine.configure(**{**SETTINGS, "policy": "full", "ratio": 1.0})
    return Case(engine, tasks.TASKS[task], sample, 4, ratio)


def document() -> str:
    parts = [FILLER, FACTS["amber"], FILLER, FACTS["silver"], FILLER, FACTS["copper"], FILLER]
    return "\n\n".join(parts)


# ---- bm25 --------------------------------------------------------------------------------------


def prompt_of(case: Case) -> str:
    return bm25.Bm25()._prompt(case)[0]


def test_bm25_finds_the_paragraph_of_the_question(loaded: Loaded, engine: LaserKV) -> None:
    pytest.importorskip("bm25s")
    for name, fact in FACTS.items():
        sample = sample_of(loaded, document(), f"Where is the {name}?")
        assert prompt_of(case_of(engine, sample)) == fact


def test_bm25_keeps_the_order_of_the_document(loaded: Loaded, engine: LaserKV) -> None:
    pytest.importorskip("bm25s")
    sample = sample_of(loaded, document(), "Copper, or amber? Copper!")
    text = prompt_of(case_of(engine, sample, 0.35))
    assert text == f"{FACTS['amber']}\n\n{FACTS['copper']}"


def test_bm25_reads_no_more_than_policies_keep(loaded: Loaded, engine: LaserKV) -> None:
    """Template and instructions count; the question is asked as it is of every policy."""
    pytest.importorskip("bm25s")
    sample = sample_of(loaded, document())
    for ratio in (0.2, 0.25, 0.4, 0.7, 1.0):
        case = case_of(engine, sample, ratio)
        whole = 1 + len(f"[user]Read. {document()} End.")
        assert len(case.sequence) == whole
        assert case.tokens == int(ratio * whole)
        talk = bm25.Bm25().read(case)
        reading = talk.reading
        assert reading is not None
        assert len(reading.tokens) == len(reading.kept) <= case.tokens
        said = loaded.model.text(reading.tokens)
        assert said.startswith(("[user]Read. ", " [user]Read. "))
        assert said.endswith(" End.")
        assert FACTS["silver"] in said
        assert np.isfinite(talk.log_likelihood(sample.question, sample.answer))
    assert document() in said


def test_bm25_of_one_long_sentence_is_cut(loaded: Loaded, engine: LaserKV) -> None:
    pytest.importorskip("bm25s")
    sample = sample_of(loaded, "silver " + "and so on " * 80)
    case = case_of(engine, sample, 0.1)
    text = prompt_of(case)
    assert sample.document.startswith(text)
    assert len(bm25.Bm25().read(case).reading.kept) == case.tokens  # type: ignore[union-attr]


def test_bm25_with_nothing_to_retrieve(
    loaded: Loaded, engine: LaserKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bm25s")
    cases = {
        "no word of the question": case_of(engine, sample_of(loaded, document(), "Whither zinc?")),
        "no question is asked": case_of(engine, sample_of(loaded, document()), task="fidelity"),
        "the document is empty": case_of(engine, sample_of(loaded, "")),
        "the instructions alone": case_of(engine, sample_of(loaded, document()), 0.01),
    }
    for said, case in cases.items():
        with pytest.raises(UserError, match=f"^bm25 .*{said}[^\n]*$"):
            bm25.Bm25().check(case)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install 'laserkv-gguf\[peers\]'"):
        bm25.Bm25().check(case_of(engine, sample_of(loaded, document())))


def test_passages_are_all_of_the_text_and_no_longer_than_asked() -> None:
    text = "One two. Three four? Five!\nSix seven eight nine ten eleven.\n\n\nTwelve.\n \nEnd"

    def count(part: str) -> int:
        return len(part.split())

    found = bm25.passages(text, 4, count)
    parts = [text[start:end] for start, end in found]
    sentence = "Six seven eight nine ten eleven."
    assert parts == ["One two. Three four?", "Five!", sentence, "Twelve.", "End"]
    # neighbours are joined as they stand in the text, others by an empty line
    assert bm25.joined(text, found) == text
    assert bm25.joined(text, found[:2]) == "One two. Three four? Five!"
    assert bm25.joined(text, [found[0], found[3]]) == "One two. Three four?\n\nTwelve."


# ---- shift -------------------------------------------------------------------------------------


def shifted(count: int, cells: int, keep: int) -> list[int]:
    """llama.cpp's rule, token by token."""
    held: list[int] = []
    for token in range(count):
        if len(held) == cells:
            discard = (len(held) - keep) // 2
            del held[keep : keep + discard]
        held.append(token)
    return held


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8, 1.0])
def test_shift_keeps_what_llama_cpp_keeps(ratio: float, loaded: Loaded, engine: LaserKV) -> None:
    sample = sample_of(loaded, document())
    case = case_of(engine, sample, ratio)
    talk = Shift().read(case)
    reading = talk.reading
    assert reading is not None
    front = 1 + len("[user]Read. ")
    keep = min(front, case.tokens - 4)
    assert reading.kept.tolist() == shifted(len(case.sequence), case.tokens, keep)
    assert reading.next_position == len(reading.kept)
    assert case.tokens / 2 - 1 <= len(reading.kept) <= case.tokens
    assert reading.tokens.tolist() == case.sequence.tolist()


def test_shift_goes_on_as_llama_cpp_does(loaded: Loaded, engine: LaserKV) -> None:
    """The same cells, filled one token after the other with llama.cpp's own calls."""
    import llama_cpp as L

    sample = sample_of(loaded, document())
    case = case_of(engine, sample, 0.3)
    talk = Shift().read(case)
    prompt, following = np.array(chars("Where"), np.int32), np.array(chars(" is it"), np.int32)
    rows = talk.log_probabilities(prompt, following)
    keep, held = min(1 + len("[user]Read. "), case.tokens - 4), 0
    context = Context(loaded.model, case.tokens + 64, OPTIONS)
    try:
        for token in case.sequence:
            if held == case.tokens:
                discard = (held - keep) // 2
                L.llama_memory_seq_rm(context.memory, 0, keep, keep + discard)
                L.llama_memory_seq_add(context.memory, 0, keep + discard, held, -discard)
                held -= discard
            context.decode(np.array([token], np.int32), held, 0)
            held += 1
        expected = []
        for token in (*prompt, *following[:-1]):
            context.decode(np.array([token], np.int32), held, 0, outputs=1)
            expected.append(log_softmax(context.logits(-1).astype(np.float64)))
            held += 1
    finally:
        context.close()
    assert np.abs(rows - np.array(expected[len(prompt) - 1 :])).max() < 1e-3
    # and a turn can be asked behind it
    stream = talk.ask(sample.question)
    list(stream)
    assert stream.reply.account.kept_tokens == len(talk.reading.kept)  # type: ignore[union-attr]


def test_shift_without_a_shift_is_the_full_cache(loaded: Loaded, engine: LaserKV) -> None:
    sample = sample_of(loaded, document())
    talk = Shift().read(case_of(engine, sample, 1.0))
    after = chars("\n\nWhat\n[assistant]ore")
    rows = talk.log_probabilities(np.array(after[:-3], np.int32), np.array(after[-3:], np.int32))
    tokens = [BOS, *chars(f"[user]Read. {document()} End."), *after]
    truth = log_softmax(forward(loaded.weights, loaded.spec, tokens).logits[-4:-1], axis=1)
    assert np.abs(rows - truth).max() < 1e-3


def test_shift_that_is_stopped_leaves_nothing(
    loaded: Loaded, engine: LaserKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sample_of(loaded, document())
    decode, calls = Context.decode, []

    def stops(self: Context, *given: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        decode(self, *given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Context, "decode", stops)
        with pytest.raises(KeyboardInterrupt):
            Shift().read(case_of(engine, sample, 0.3))
    assert not engine.residents.inside
    engine.configure(policy="laser", ratio=0.4)
    assert engine.ask("What?", document=document(), max_tokens=3).finish_reason


def test_shift_in_next_to_nothing(loaded: Loaded, engine: LaserKV) -> None:
    with pytest.raises(UserError, match=r"at least 8 tokens, not \d; use a larger ratio"):
        Shift().check(case_of(engine, sample_of(loaded, document()), 0.015))


# ---- q4_0-full ---------------------------------------------------------------------------------


def test_a_q4_0_cache_stands_at_its_bytes(loaded: Loaded) -> None:
    from dataclasses import replace

    # 18 bytes for 32 numbers, where f16 takes 64 and f32 128
    for kind, share in (("f16", 18 / 64), ("f32", 18 / 128)):
        options = replace(OPTIONS, type_k=kind, type_v=kind)
        with LaserKV(loaded.model, context=options, policy="full", block_size=64) as engine:
            assert Quantised().ratios(engine, [0.5, 0.1]) == [round(share, 4)]


def test_a_q4_0_cache_holds_all(loaded: Loaded, engine: LaserKV) -> None:
    sample = sample_of(loaded, document())
    peer = Quantised()
    try:
        case = case_of(engine, sample)
        peer.check(case)
        talk = peer.read(case)
        assert len(talk.reading.kept) == len(case.sequence)  # type: ignore[union-attr]
        options = talk.engine.options
        assert (options.type_k, options.type_v) == ("q4_0", "q4_0")
        assert engine.options.type_k == "f32"
        mine = talk.log_likelihood(sample.question, sample.answer)
    finally:
        peer.close()
    with LaserKV(loaded.model, context=options, policy="full", block_size=64) as fresh:
        other = Case(fresh, tasks.TASKS["squad"], sample, 4, 1.0).conversation()
        other.read(question=sample.question)
        assert other.log_likelihood(sample.question, sample.answer) == pytest.approx(mine)
    whole = case_of(engine, sample).conversation()
    whole.read(question=sample.question)
    exact = whole.log_likelihood(sample.question, sample.answer)
    assert 0 < abs(mine - exact) < 1  # four bits are not the same, but near


# ---- beside policies ---------------------------------------------------------------------------

STORY = "Tom has tin. Ann has ore! Who has copper? Nobody can tell us that today. " * 30


def test_peers_are_rows_beside_the_policies(
    loaded: Loaded, engine: LaserKV, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s")
    settings = {name: {} for name in ("full", "laser", *PEERS)}
    source = Source(loaded.model, 1, Background("story", STORY))
    plan = Plan(tasks.find(["niah_single_2", "fidelity"]), (600,), (0.5, 0.4), 2, settings, 192, 4)
    runner = Runner(engine, source, plan)
    notes = runner.check()
    # fidelity asks nothing, so that nothing can be retrieved for it
    assert len(notes) == 2
    assert all(re.match(r"bm25 on fidelity of 600 tokens at r = 0\.[54]: ", note) for note in notes)
    with Results(tmp_path, runner.config()) as found:
        runner.run(found)
    rows = results_in(tmp_path)
    assert len(rows) == runner.total == 2 * (2 * (1 + 2 + 2 + 1) + 2)
    assert not [row for row in rows if row.get("error")]
    size = {task: {row["read_tokens"] for row in rows if row["task"] == task and row["sample"] == 0}
            for task in ("niah_single_2", "fidelity")}  # fmt: skip
    assert all(len(sizes) == 1 for sizes in size.values())  # all are shares of the same
    for row in rows:
        if row["policy"] in ("bm25", "shift"):
            assert row["kept_tokens"] <= row["ratio"] * row["read_tokens"]
        if row["policy"] == "q4_0-full":
            assert row["kept_tokens"] == row["read_tokens"]
            assert row["ratio"] == round(18 / 128, 4)
    assert sum("not run: bm25 on fidelity" in note for note in runner.notes(found.config)) == 2
    said = " ".join(report.caveats(report.lines(rows)))
    assert all(name in said for name in PEERS)
    runner.close()
    # nothing is left to do, and what is there is what was asked for
    again = Runner(engine, source, plan)
    again.check()
    with Results(tmp_path, again.config()) as found:
        assert len(again.among(found.rows)) == again.total
        again.run(found, on_row=lambda row: pytest.fail("ran again"))
    again.close()


def test_a_peer_that_can_do_nothing_is_refused_in_one_line(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(loaded, tmp_path, "fidelity", "--lengths", "800")
    assert run([*given, "--policies", "full,bm25"]) == 2
    said = capsys.readouterr().err
    assert said == "error: bm25 has nothing to look for: no question is asked of this document\n"
    assert not (tmp_path / "results.jsonl").exists()


def test_peers_on_the_command_line(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bm25s")
    more = "niah_single_1 cwe --lengths 1100 --samples 1 --ratios 0.4 --policies laser,peers"
    assert run([*arguments(loaded, tmp_path, *more.split()), "--policy-option", "pool=3"]) == 0
    said = capsys.readouterr()
    rows = results_in(tmp_path)
    assert {row["policy"] for row in rows} == {"laser", *PEERS}
    assert "Building index" not in said.err  # bm25s talks where anybody listens
    assert "bm25 on cwe of 1,100 tokens at r = 0.4: bm25 has no" in said.err
    summary = (tmp_path / "summary.md").read_text()
    assert "not run: bm25 on cwe" in summary
    assert "llama.cpp's context shift" in summary
    config = json.loads((tmp_path / "config.json").read_text())["policies"]
    assert config["laser"]["policy_options"] == {"pool": 3}
    assert config["bm25"]["policy_options"] == {}


def test_what_goes_wrong_in_a_peer_is_its_row(
    loaded: Loaded, engine: LaserKV, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Shift, case: Case) -> None:
        raise LaserKVError("no more cells")

    source = Source(loaded.model, 1, Background("story", STORY))
    plan = Plan(
        tasks.find(["passkey"]), (400,), (0.5,), 1, {"full": {}, "shift": {}}, 128, 4
    )  # fmt: skip
    runner = Runner(engine, source, plan)
    runner.check()
    monkeypatch.setattr(Shift, "read", breaks)
    with Results(tmp_path, runner.config()) as found:
        runner.run(found)
    rows = {row["policy"]: row for row in results_in(tmp_path)}
    assert rows["shift"]["error"] == "no more cells"
    assert rows["full"]["score"] is not None


def test_plots_show_a_peer_of_one_size_beside_every_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where its bytes are, not at the fraction of its tokens."""
    pytest.importorskip("matplotlib")
    from laserkv_gguf.evaluation import plots

    row = {"task": "vt", "length": 2048, "sample": 0, "score": 1.0, "gold_logprob": -1.0,
           "kept_tokens": 4, "read_tokens": 4, "seconds": 1.0}  # fmt: skip
    rows = [
        {**row, "policy": policy, "ratio": ratio, "kept_tokens": kept}
        for policy, ratio, kept in (
            ("full", 1.0, 4),
            ("laser", 0.5, 2),
            ("laser", 0.25, 1),
            ("q4_0-full", 0.2812, 4),
        )
    ]
    seen: dict[str, Any] = {}
    panels = plots.panels

    def noted(rows: Any, label: str, x: Any, *, likelihood: bool) -> Any:
        seen[label] = {title: {(i.policy, x(i)) for i in lines} for title, lines in rows.items()}
        return panels(rows, label, x, likelihood=likelihood)

    monkeypatch.setattr(plots, "panels", noted)
    assert plots.draw(report.lines(rows), tmp_path)
    assert set(seen["tokens of the document"]) == {"r = 0.5", "r = 0.25"}
    for lines in seen["tokens of the document"].values():
        assert {policy for policy, _ in lines} == {"full", "laser", "q4_0-full"}
    (places,) = seen["kept fraction"].values()
    assert places == {("full", 1.0), ("laser", 0.5), ("laser", 0.25), ("q4_0-full", 0.2812)}
