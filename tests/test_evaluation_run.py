"""Running an evaluation: what the engine gives it, what it writes, and what stops it."""

from __future__ import annotations

import csv
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from scipy.special import log_softmax
from tiny import BOS, FIRST_BYTE, TinySpec, forward, make, token_of, visibility

pytest.importorskip("llama_cpp")

from laserkv_gguf import policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.cli import eval as evaluate
from laserkv_gguf.cli.app import run
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.framing import Framing
from laserkv_gguf.errors import Cancelled, LaserKVError, UserError
from laserkv_gguf.evaluation import plots, presets, report, results, tasks
from laserkv_gguf.evaluation.background import Background
from laserkv_gguf.evaluation.bar import Bar
from laserkv_gguf.evaluation.results import Results, difference
from laserkv_gguf.evaluation.runner import Plan, Runner
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.files import journal
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.reading.reader import Reader

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPEC = TinySpec(layers=2, ctx_train=4096, chat_template=TEMPLATE)
OPTIONS = ContextOptions(
    batch_size=256, ubatch_size=64, type_k="f32", type_v="f32", flash_attn="off", threads=1,
    outputs=8,
)  # fmt: skip
DOCUMENT = " ".join(f"{word}{number}" for number in range(8) for word in ("tin", "copper", "ore"))
SETTINGS: dict[str, Any] = {"block_size": 64, "ratio": 0.4, "lookahead": 3}
ONE_SHOT = ("sage", "snapkv", "pyramidkv")


class Loaded:
    def __init__(self, directory: Path, spec: TinySpec) -> None:
        self.path, self.spec, self.weights = make(directory, spec=spec)
        self.model = Model(self.path, gpu_layers=0, extra_buffers=False)

    def engine(self, **settings: Any) -> LaserKV:
        return LaserKV(self.model, context=OPTIONS, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    one = Loaded(tmp_path_factory.mktemp("evaluation"), SPEC)
    yield one
    one.model.close()


@pytest.fixture(scope="module")
def engine(loaded: Loaded) -> Iterator[LaserKV]:
    with loaded.engine(policy="full") as one:
        yield one


def chars(text: str) -> list[int]:
    return [FIRST_BYTE + 10 if char == "\n" else token_of(char) for char in text]


def expected(
    loaded: Loaded, before: list[int], kept: NDArray[np.int64], after: list[int], rows: int
) -> NDArray[np.float64]:
    """Log-probabilities before the last `rows` tokens, by NumPy, with evicted tokens hidden."""
    evicted = {i: len(before) for i in range(len(before)) if i not in set(kept.tolist())}
    tokens = before + after
    visible = visibility(len(tokens), evicted)
    logits = forward(loaded.weights, loaded.spec, tokens, visible=visible).logits
    return np.asarray(log_softmax(logits[-rows - 1 : -1], axis=1))


# ---- what the session gives it -----------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 21])
@pytest.mark.parametrize("policy", ["full", "snapkv"])
def test_log_probabilities_are_the_forward_passes(
    policy: str, count: int, loaded: Loaded, engine: LaserKV
) -> None:
    """Raw text, also where more rows are wanted than a batch gives."""
    engine.configure(**{**SETTINGS, "policy": policy})
    talk = Conversation(
        engine, document=np.array(chars(DOCUMENT), np.int32), framing=Framing(plain=True)
    )
    reading = talk.read()
    after = chars("lead and silver, and zinc")[: count + 1]
    prompt, following = np.array(after[:1], np.int32), np.array(after[1:], np.int32)
    rows = talk.log_probabilities(prompt, following)
    truth = expected(loaded, [BOS, *chars(DOCUMENT)], reading.kept, after, count)
    assert rows.shape == (count, loaded.spec.vocab)
    assert np.abs(rows - truth).max() < 1e-3
    assert np.array_equal(rows, talk.log_probabilities(prompt, following))  # nothing stays


def test_answers_go_on_from_their_prefix(loaded: Loaded, engine: LaserKV) -> None:
    engine.configure(policy="full")
    talk = Conversation(
        engine, document=DOCUMENT, framing=Framing(answer_prefix="It is"), max_tokens=4
    )
    talk.read(question="What?")
    stream = talk.ask("What?")
    list(stream)
    tokens = [BOS, *chars(f"[user]{DOCUMENT}\n\nWhat?\n[assistant]It is")]
    for token in stream.reply.tokens:
        assert token == forward(loaded.weights, loaded.spec, tokens).logits[-1].argmax()
        tokens.append(token)


def test_documents_as_tokens(engine: LaserKV) -> None:
    engine.configure(**{**SETTINGS, "policy": "laser"})
    said = []
    for document in (DOCUMENT, np.array(chars(DOCUMENT), np.int32)):
        talk = Conversation(engine, document=document, max_tokens=6)
        talk.read(question="What?")
        stream = talk.ask("What?")
        said.append("".join(stream))
        assert stream.reply.account.document_tokens == 1 + len(f"[user]{DOCUMENT}")
    assert said[0] == said[1]


@pytest.mark.parametrize("asked", [None, "What is ore?"])
@pytest.mark.parametrize("policy", ONE_SHOT)
def test_choosing_again_is_reading_again(
    policy: str, asked: str | None, loaded: Loaded, engine: LaserKV
) -> None:
    """For every ratio, in any order, after answers; against fresh reads and the forward pass."""
    document = np.array(chars(DOCUMENT), np.int32)
    ratios = [0.3, 0.6, 1.0, 0.15, 0.3]
    fresh = {}
    for ratio in set(ratios):
        engine.configure(**{**SETTINGS, "policy": policy, "ratio": ratio})
        talk = Conversation(engine, document=document, max_tokens=5)
        fresh[ratio] = talk.read(question=asked).kept
    engine.configure(**{**SETTINGS, "policy": policy, "ratio": ratios[0]})
    talk = Conversation(engine, document=document, max_tokens=5)
    reading = talk.read(question=asked, keep_all_cells=True)
    prompt = np.array(chars("\n\nWhat is ore?\n[assistant]"), np.int32)
    for ratio in ratios:
        if ratio != ratios[0] or talk.turns:
            assert talk.choose_again(ratio)
        reading = talk.reading
        assert reading is not None
        assert np.array_equal(reading.kept, fresh[ratio])
        assert engine.settings.ratio == ratio
        following = np.array(chars("yes"), np.int32)
        rows = talk.log_probabilities(prompt, following)
        before = [BOS, *chars("[user]" + DOCUMENT)]
        after = [*prompt.tolist(), *chars("yes")]
        assert np.abs(rows - expected(loaded, before, reading.kept, after, 3)).max() < 1e-3
        stream = talk.ask("What is ore?")
        list(stream)
        assert stream.reply.account.kept_tokens == len(reading.kept)


def test_only_one_shot_policies_choose_again(engine: LaserKV) -> None:
    for settings in ({"policy": "laser"}, {"policy": "full"}, {"positions": "compact"}):
        engine.configure(**{**SETTINGS, "policy": "snapkv", "positions": "auto", **settings})
        talk = Conversation(engine, document=DOCUMENT, max_tokens=5)
        talk.read(question="What?", keep_all_cells=True)
        assert not talk.choose_again(0.2)
    engine.configure(positions="auto")
    talk.read(question="What?")
    assert not talk.choose_again(0.2)  # read without `whole`


def test_settings_that_cannot_be_used_leave_the_old_ones(engine: LaserKV) -> None:
    engine.configure(policy="laser", ratio=0.4)
    for changes in (
        {"ratio": 0.0},
        {"block_size": 4096},
        {"policy": "infllm", "recall": "off"},
        {"policy": "no"},
    ):
        with pytest.raises(UserError):
            engine.configure(**changes)
    assert (engine.settings.policy, engine.settings.ratio) == ("laser", 0.4)
    assert engine.policy.name == "laser"


# ---- the runner --------------------------------------------------------------------------------

RATIOS = (0.5, 0.25)


def plan_of(
    *names: str, policies: tuple[str, ...] = ("full", "laser", "snapkv"), samples: int = 2
) -> Plan:
    settings = {policy: {"lookahead": 2, "alpha": 1.0} for policy in policies}
    return Plan(tasks.find(names), (400,), RATIOS, samples, settings, 192, 6)


@pytest.fixture
def source(loaded: Loaded) -> Source:
    story = "Tom has tin. Ann has ore! Who has copper? Nobody can tell us that today. " * 30
    return Source(loaded.model, 1, Background("story", story))


def test_rows_are_what_fresh_engines_give(
    loaded: Loaded, engine: LaserKV, source: Source, tmp_path: Path
) -> None:
    """One context for all policies, one reading for several ratios: the same answers."""
    runner = Runner(engine, source, plan_of("niah_single_2"))
    assert runner.check() == []
    with Results(tmp_path, runner.config()) as found:
        runner.run(found)
    rows = results_in(tmp_path)
    assert [(row["sample"], row["policy"], row["ratio"]) for row in rows] == [
        (number, policy, ratio)
        for number in range(2)
        for policy, ratio in [("full", 1.0), *((p, r) for p in ("laser", "snapkv") for r in RATIOS)]
    ]
    for row in rows:
        sample = tasks.TASKS["niah_single_2"].sample(source, 400, row["sample"])
        assert row["document_tokens"] == len(loaded.model.tokenize(sample.document)) == 400
        settings = {"policy": row["policy"], "ratio": row["ratio"], "lookahead": 2, "alpha": 1.0}
        with loaded.engine(**settings, block_size=192) as fresh:
            talk = Conversation(
                fresh,
                document=sample.before + sample.document + sample.after,
                framing=Framing(answer_prefix=sample.prefix),
                max_tokens=12,
            )
            talk.read(question=sample.question)
            likelihood = talk.log_likelihood(sample.question, sample.answer)
            talk.max_tokens = 6
            stream = talk.ask(sample.question)
            assert row["prediction"] == "".join(stream)
            assert row["gold_logprob"] == pytest.approx(likelihood, abs=1e-5)
            assert row["kept_tokens"] == stream.reply.account.kept_tokens
            assert row["read_tokens"] == stream.reply.account.document_tokens


def test_no_document_is_read_more_often_than_it_must_be(
    engine: LaserKV, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    read = Reader.read

    def counted(self: Reader, *args: Any, **options: Any) -> Any:
        reads[self.policy.name] += 1
        return read(self, *args, **options)

    monkeypatch.setattr(Reader, "read", counted)
    runner = Runner(engine, source, plan_of("niah_single_1"))
    runner.check()
    assert not reads  # the check reads nothing
    with Results(tmp_path, runner.config()) as found:
        runner.run(found)
    assert reads == {"full": 2, "laser": 2 * len(RATIOS), "snapkv": 2}
    assert len(found.rows) == runner.total == 10
    # `fidelity` compares with the full cache, which is read once although it has a row too
    reads.clear()
    runner = Runner(engine, source, plan_of("fidelity"))
    runner.check()
    with Results(tmp_path / "fidelity", runner.config()) as found:
        runner.run(found)
    assert reads == {"full": 2, "laser": 2 * len(RATIOS), "snapkv": 2}


def test_fidelity_against_the_forward_pass(
    loaded: Loaded, engine: LaserKV, source: Source, tmp_path: Path
) -> None:
    runner = Runner(engine, source, plan_of("fidelity", policies=("full", "snapkv"), samples=1))
    runner.check()
    with Results(tmp_path, runner.config()) as found:
        runner.run(found)
    for row in found.rows:
        sample = tasks.TASKS["fidelity"].sample(source, 400, row["sample"])
        assert sample.following is not None
        document = [BOS, *sample.tokens.tolist()]
        following = sample.following.tolist()
        engine.configure(policy=row["policy"], ratio=row["ratio"], block_size=192)
        kept = Conversation(engine, document=sample.tokens, framing=Framing(plain=True)).read().kept
        full, other = (
            expected(loaded, document, which, following, 64)
            for which in (np.arange(len(document)), kept)
        )
        assert row["kept_tokens"] == len(kept)
        assert row["read_tokens"] == 401
        divergence = (np.exp(full) * (full - other)).sum(axis=1).mean()
        assert row["divergence"] == pytest.approx(divergence, abs=2e-4)
        assert row["agreement"] == pytest.approx(
            (full.argmax(1) == other.argmax(1)).mean(), abs=0.04
        )
        likely = other[np.arange(64), following[1:]].mean()
        assert np.log(row["perplexity"]) == pytest.approx(-likely, abs=1e-3)
        if row["policy"] == "full":
            assert (row["divergence"], row["agreement"]) == (0, 1)
        # the full cache's own greedy answer, and what the compressed one thinks of it
        answer = loaded.model.tokenize(row["gold"]).tolist()
        asked = loaded.model.tokenize(sample.question).tolist()
        likely = expected(loaded, document, kept, asked + answer, len(answer))
        mean = likely[np.arange(len(answer)), answer].mean()
        if "\ufffd" not in row["gold"]:
            assert row["gold_logprob"] == pytest.approx(mean, abs=1e-3)


def test_a_failed_sample_is_a_row_and_the_run_goes_on(
    engine: LaserKV, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = Conversation.read, []

    def sometimes(self: Conversation, **options: Any) -> Any:
        calls.append(self.engine.settings.policy)
        if calls.count("snapkv") == 2 and calls[-1] == "snapkv":
            raise LaserKVError("out of luck")
        return read(self, **options)

    monkeypatch.setattr(Conversation, "read", sometimes)
    runner = Runner(engine, source, plan_of("niah_single_1", policies=("full", "snapkv")))
    runner.check()
    with Results(tmp_path, runner.config()) as found:
        runner.run(found)
    failed = [row for row in found.rows if row["score"] is None]
    assert [(row["sample"], row["ratio"], row["error"]) for row in failed] == [
        (1, 0.5, "out of luck")  # at the other ratio it is read anew
    ]
    assert len(found.rows) == 6
    line = report.lines(found.rows)[1]
    assert (line.policy, line.samples, line.failed) == ("snapkv", 2, 1)


def test_cancelling_is_no_failure_of_a_sample(
    engine: LaserKV, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled(self: Conversation, **options: Any) -> Any:
        raise Cancelled("cancelled")

    runner = Runner(engine, source, plan_of("niah_single_1"))
    runner.check()
    monkeypatch.setattr(Conversation, "read", cancelled)
    with Results(tmp_path, runner.config()) as found, pytest.raises(Cancelled):
        runner.run(found)
    assert found.rows == []


def test_a_sample_that_cannot_be_made_is_a_row_for_each(
    engine: LaserKV, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(engine, source, plan_of("niah_single_1"))
    runner.check()
    task = type(tasks.TASKS["niah_single_1"])
    made = task.sample

    def sample(self: Any, source: Source, tokens: int, number: int) -> Sample:
        if number == 1:
            raise UserError("no such sample")
        return made(self, source, tokens, number)

    monkeypatch.setattr(task, "sample", sample)
    with Results(tmp_path, runner.config()) as found:
        runner.run(found)
    errors = [row.get("error") for row in found.rows]
    assert errors == [None] * 5 + ["no such sample"] * 5


# ---- results on disk ---------------------------------------------------------------------------


def results_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def row_of(sample: int, policy: str = "full", score: float | None = 1.0, **more: Any) -> Any:
    row = {"task": "vt", "length": 512, "sample": sample, "policy": policy, "ratio": 0.5}
    row |= {"score": score, "gold_logprob": -0.5, "kept_tokens": 128, "read_tokens": 512}
    return {**row, "seconds": 1.0, **more}


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    with Results(tmp_path, {"a": 1}) as found:
        found.add(row_of(0))
        found.add(row_of(1))
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    for cut in (1, 2, 30):
        path.write_bytes(whole[:-cut])
        with Results(tmp_path, {"a": 1}) as found:
            assert [row["sample"] for row in found.rows] == [0]
            found.add(row_of(1))
        assert path.read_bytes() == whole


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    with Results(tmp_path, {}) as found:
        found.add(row_of(0))
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"results\.jsonl, line 1 is broken"):
        Results(tmp_path, {})


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Results(tmp_path, {}) as found:
        found.add(row_of(0))
        with monkeypatch.context() as patched:
            patched.setattr(journal, "append", no_room)
            with pytest.raises(LaserKVError, match=r"results\.jsonl: No space left on device"):
                found.add(row_of(1))
    assert [row["sample"] for row in results_in(tmp_path)] == [0]


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


CONFIG: dict[str, Any] = {
    "model": {"file": "a.gguf", "bytes": 5},
    "tasks": ["vt"],
    "lengths": [800],
    "samples": 3,
    "policies": {"full": {"alpha": 1, "ratios": [1.0]}, "laser": {"alpha": 1, "ratios": [0.5]}},
}


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    Results(tmp_path, CONFIG).close()
    Results(tmp_path, CONFIG).close()
    laser = {"laser": {"alpha": 0.5, "ratios": [0.5]}}
    other = {**CONFIG, "model": {"file": "b.gguf", "bytes": 5}, "policies": laser}
    said = (
        r'model\.file: "a\.gguf" there, "b\.gguf" now; '
        r"policies\.laser\.alpha: 1 there, 0\.5 now\); use"
    )
    with pytest.raises(UserError, match=said):
        Results(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text()) == {**CONFIG, "commands": []}
    assert difference(CONFIG, CONFIG) == []
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="no configuration of ours"):
        Results(tmp_path, CONFIG)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json beside it; use another --out"):
        Results(tmp_path, CONFIG)


def test_a_folder_grows_with_what_is_asked_for(tmp_path: Path) -> None:
    Results(tmp_path, CONFIG, "first").close()
    now = {
        **CONFIG,
        "tasks": ["cwe", "vt"],
        "lengths": [400],
        "samples": 2,
        "policies": {"laser": {"alpha": 1, "ratios": [0.25]}, "sage": {"alpha": 2, "ratios": [1]}},
    }
    with Results(tmp_path, now, "second") as found:
        both = {
            **CONFIG,
            "tasks": ["vt", "cwe"],
            "lengths": [400, 800],
            "samples": 3,
            "policies": {
                "full": {"alpha": 1, "ratios": [1.0]},
                "laser": {"alpha": 1, "ratios": [0.5, 0.25]},
                "sage": {"alpha": 2, "ratios": [1]},
            },
            "commands": ["first", "second"],
        }
        assert found.config == both
    assert json.loads((tmp_path / "config.json").read_text()) == both
    with Results(tmp_path, CONFIG, "first") as found:
        assert found.config == both
    # a policy that came later is held to its settings too
    now["policies"]["sage"]["alpha"] = 3
    with pytest.raises(UserError, match=r"policies\.sage\.alpha: 2 there, 3 now\)"):
        Results(tmp_path, now)


# ---- the report --------------------------------------------------------------------------------


def test_report_counts_pairs_and_means() -> None:
    scores = {"full": [1, 1, 1, 0, 1, None], "laser": [1, 0, 0, 1, 0.5, 1], "random": [0] * 6}
    rows = [
        row_of(n, policy, score, ratio=1.0 if policy == "full" else 0.25)
        for policy, given in scores.items()
        for n, score in enumerate(given)
    ]
    full, laser, floor = report.lines(rows, {("vt", "laser", 512): 0.75})
    assert (full.samples, full.failed, full.exact, full.score) == (6, 1, 4, 0.8)
    assert (laser.exact, laser.score) == (3, pytest.approx(3.5 / 6))
    # only full: samples 1, 2, 4; only laser: 3; sample 5 was not run with full
    assert (laser.full_better, laser.full_worse) == (3, 1)
    assert laser.full_p == pytest.approx(2 * 5 / 16)
    assert (floor.laser_better, floor.laser_worse, floor.laser_p) == (3, 0, pytest.approx(0.25))
    assert laser.laser_p is full.full_p is None
    assert laser.published == 0.75
    assert floor.kept == 0.25
    text = report.as_markdown([full, laser, floor], title="T", notes=["n"], published=True)
    assert "| vt | 512 | laser | 0.25 | 25.0% | 6 | 0.583 | 3/6 | 0.19–0.81 |" in text
    assert text.count("not known to us") == 2
    found = list(csv.DictReader(report.as_csv([full, laser, floor]).splitlines()))
    assert [row["policy"] for row in found] == ["full", "laser", "random"]
    assert float(found[1]["full_p"]) == pytest.approx(0.625)
    assert found[0]["full_p"] == ""


def test_plots_show_every_policy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row_of(n, policy, float(n % 2), ratio=ratio, length=length, task=task, agreement=0.5)
        for n in range(4)
        for policy, ratio in (("full", 1.0), ("laser", 0.25), ("random", 0.25), ("laser", 0.5))
        for length in (512, 1024)
        for task in ("vt", "fidelity")
    ]
    made = plots.draw(report.lines(rows), tmp_path)
    assert sorted(path.name for path in made) == sorted(path.name for path in tmp_path.iterdir())
    assert [path.suffix for path in made] == [".png", ".svg"] * 4
    for path in made:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") if path.suffix == ".png" else b">random</text>" in data
    assert plots.draw([], tmp_path) == []


@pytest.mark.parametrize("likelihood", [False, True])
def test_no_point_of_a_plot_hides_another_or_is_left_out(likelihood: bool) -> None:
    pytest.importorskip("matplotlib")
    names = ("full", *(f"p{i}" for i in range(20)))
    rows = [row_of(n, name, float(n % 2), ratio=0.25) for n in range(4) for name in names]
    found = report.lines(rows)
    figure = plots.panels({"all": found}, "kept", lambda line: line.kept, likelihood=likelihood)
    figure.canvas.draw()
    (axis,) = figure.axes
    inside = axis.get_window_extent()
    points = [
        tuple(line.get_transform().transform(line.get_xydata())[0])
        for line in axis.lines
        if line.get_marker() in plots.MARKS
    ]
    assert len(points) == len(names)
    assert len({(round(x, 2), round(y, 2)) for x, y in points}) == len(names)
    assert all(inside.contains(x, y) for x, y in points)
    looks = {(line.get_color(), line.get_marker()) for line in axis.lines}
    assert len(looks) >= len(names)


def test_the_bar_knows_what_is_right_so_far() -> None:
    bar = Bar(9, [row_of(0), row_of(1, score=0.0), row_of(0, "laser", 0.25), row_of(1, score=None)])
    assert bar.done == 4
    assert bar.note == "full 0.50 laser 0.25 · 1 failed"


def test_the_bar_on_a_terminal() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=100)
    bar = Bar(4, [row_of(0)])
    with bar.shown(console):
        bar.update(row_of(1, score=0.0))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2/4" in text
    assert "full 0.50" in text


# ---- presets -----------------------------------------------------------------------------------


def test_presets_are_what_was_published() -> None:
    first, second = presets.PRESETS["paper-table1"], presets.PRESETS["paper-table2"]
    assert (first.lengths, second.lengths) == ((16 * 1024,), (64 * 1024, 128 * 1024))
    for preset in (first, second):
        assert preset.tasks == tuple(f"babilong_qa{n}" for n in (1, 2, 3, 5, 6))
        assert (preset.ratios, preset.block_size, preset.divisor) == ((0.25,), 4096, 4)
        assert preset.samples == 100
        assert preset.settings["laser"]["lookahead"] == 0
    # FINCH's shorter chunks are those of 16k alone
    assert first.settings["finch"] == {"block_size": 1024}
    assert "finch" not in second.settings
    from laserkv_gguf import models

    for preset in presets.PRESETS.values():
        named = {name for name in preset.models.values() if preset.source}
        assert named <= set(models.entries())
        tasks.find(preset.tasks)


@pytest.mark.parametrize("name", ["laser-ablations", "laser-hashing"])
def test_ablations_change_one_thing_each(name: str) -> None:
    """Every one can be configured, alone, and is no reproduction of anything."""
    preset = presets.PRESETS[name]
    options = evaluate.EvalOptions(block_size=512)
    made = evaluate._settings(options, preset.policies, preset)
    plain = made["laser"]
    for one in preset.policies[2:]:
        settings = {**made[one]}
        assert settings != plain
        changed = dict(text.split("=") for text in one.split()[1:])
        for flag in ("lookahead", "probe_tokens", "protection_divisor"):
            if flag in changed:
                assert str(settings[flag]) == changed.pop(flag)
        assert {k: str(v) for k, v in settings["policy_options"].items()} == changed
        policies.make(settings["policy"], **settings["policy_options"])
    with pytest.raises(UserError, match="lookahead is 'few'; give a number"):
        evaluate._settings(options, ["laser lookahead=few"], None)


def test_a_run_with_another_model_is_no_reproduction(tmp_path: Path, source: Source) -> None:
    preset = presets.PRESETS["paper-table2"]
    prompts = {f"qa{n}": {"instruction": "", "examples": "", "post_prompt": ""} for n in range(11)}
    whole = Source(source.tokenizer, 0, source.background, None, prompts)
    settings: dict[str, Any] = {name: {} for name in preset.policies}
    plan = Plan(tasks.find(preset.tasks), (131072,), preset.ratios, 100, settings, 4096)
    model = tmp_path / "Llama-3-8B-Instruct-Gradient-1048k-Q4_K_M.gguf"  # no hash is known of it
    model.write_bytes(b"GGUF")
    assert presets.label(preset, model, plan, whole, False)[0].startswith(
        "reproduction of LASER-KV"
    )
    # the table's other length was another model's
    for lengths in ((65536,), (65536, 131072)):
        mixed = Plan(plan.tasks, lengths, plan.ratios, 100, settings, 4096)
        said = presets.label(preset, model, mixed, whole, False)[0]
        assert re.search(r"NOT a .*model is .*, not llama-3.1-8b-instruct", said)
    assert presets.lengths_of(preset, model) == (131072,)
    other = tmp_path / "tiny.gguf"
    other.write_bytes(b"GGUF")
    assert presets.lengths_of(preset, other) == preset.lengths
    fake = tmp_path / "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"  # another size than models.txt has
    fake.write_bytes(b"GGUF")
    for path in (other, fake):
        said = presets.label(preset, path, plan, whole, False)[0]
        assert said.startswith(
            f"NOT a reproduction of LASER-KV, arXiv 2602.02199, table 2: the model is {path.name}"
        )
    for name, changed in (
        ("samples", Plan(plan.tasks, plan.lengths, plan.ratios, 50, settings, 4096)),
        ("ratios", Plan(plan.tasks, plan.lengths, (0.5,), 100, settings, 4096)),
        ("settings", Plan(plan.tasks, plan.lengths, plan.ratios, 100, settings, 1024)),
    ):
        assert re.search(f"NOT a .*{name}", presets.label(preset, model, changed, whole, False)[0])
    generated = Source(source.tokenizer, 0, source.background, tmp_path)
    said = presets.label(preset, model, plan, generated, True)[0]
    for reason in ("settings were changed", "generated", "worded by us"):
        assert reason in said


def test_published_figures(tmp_path: Path) -> None:
    path = tmp_path / "paper.csv"
    path.write_text("task,policy,length,score\nbabilong_qa1,laser,16384,0.5\n")
    assert presets.read_published(path) == {("babilong_qa1", "laser", 16384): 0.5}
    for text, said in (
        ("task,score\n", "needs the columns task, policy, length, score"),
        ("task,policy,length,score\nvt,laser,long,0.5\n", "line 2: length or score is no number"),
        ("task,policy,length,score\nvt,laser,512,50\n", "line 2: a score is from 0 to 1, not 50"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            presets.read_published(path)


# ---- the command -------------------------------------------------------------------------------


def arguments(loaded: Loaded, out: Path, *more: str) -> list[str]:
    given = ["eval", "-m", str(loaded.path), "-t", "1", "-n", "4", "--out", str(out)]
    return [*given, *(more or ("niah_single_1", "--lengths", "800", "--samples", "2"))]


def test_the_command_writes_everything(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = "niah_single_1 fidelity --lengths 700,800 --samples 1 --ratios 0.25"
    given = arguments(loaded, out, *more.split(), "--policies", "laser,full", "--policies", "sage")
    assert run(given) == 0
    said = capsys.readouterr()
    names = {path.name for path in out.iterdir()}
    assert {"results.jsonl", "config.json", "summary.md", "summary.csv"} <= names
    assert not [name for name in names if name.endswith(".part")]
    rows = results_in(out)
    assert len(rows) == 2 * 2 * 3
    fields = "task sample policy ratio document_tokens kept_tokens gold prediction score"
    for row in rows:
        assert set(f"{fields} gold_logprob seconds".split()) <= set(row)
        assert row["document_tokens"] == row["length"]
    assert "niah_single_1" in said.out
    assert "top-1 agreement" in said.out
    assert "command: `python -m laserkv_gguf" in (out / "summary.md").read_text()
    assert len((out / "summary.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    before = (out / "results.jsonl").read_bytes()
    assert run(given) == 0  # nothing is left to do
    assert (out / "results.jsonl").read_bytes() == before
    assert "going on: 12 of 12" in capsys.readouterr().err
    assert run([*given, "--seed", "1"]) == 2
    assert re.search(r"error: .*seed: 0 there, 1 now", capsys.readouterr().err)


def test_a_folder_that_has_more(
    loaded: Loaded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs add up: each does what is missing of its own, and the summary has everything."""
    first = "niah_single_1 --lengths 700 --samples 1 --ratios 0.25 --policies full,laser"
    second = "niah_single_1 vt --lengths 700 --samples 2 --ratios 0.5,0.25 --policies snapkv,laser"
    out = tmp_path / "out"
    assert run(arguments(loaded, out, *first.split())) == 0
    before = (out / "results.jsonl").read_text()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["laserkv_gguf", "eval", "more"])
    assert run(arguments(loaded, out, *second.split())) == 0
    assert "going on: 1 of 16 are in" in capsys.readouterr().err
    assert (out / "results.jsonl").read_text().startswith(before)
    rows = results_in(out)
    assert len(rows) == 2 + 15
    summary = (out / "summary.md").read_text()
    assert summary.count("command: `python -m laserkv_gguf") == 2
    assert "command: `python -m laserkv_gguf eval more`" in summary
    assert "samples: 2 a task and length" in summary
    assert len((out / "summary.csv").read_text().splitlines()) == 1 + 1 + 8
    # the same as in folders of their own
    alone = tmp_path / "alone"
    assert run(arguments(loaded, alone, *second.split())) == 0
    by_key = {results.key_of(row): row for row in rows}
    for row in results_in(alone):
        both = by_key[results.key_of(row)]
        assert {**row, "seconds": None} == {**both, "seconds": None}


def test_all_leaves_out_what_cannot_run(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "niah_single_1 --lengths 800 --samples 1 --policies all --recall off"
    assert run(arguments(loaded, tmp_path / "out", *more.split())) == 0
    assert re.search("^infllm is left out: .*recall", capsys.readouterr().err, re.MULTILINE)
    found = {row["policy"] for row in results_in(tmp_path / "out")}
    from laserkv_gguf import policies

    assert found == set(policies.available()) - {"infllm"}


REFUSED = {
    "no task": ("", "no task; name some of"),
    "unknown task": ("nia", "task nia is unknown; use .*niah"),
    "unknown policy": ("vt --policies lasr", "lasr is unknown; did you mean laser"),
    "refusing policy": (
        "vt --policies full,infllm --lengths 800 --recall off",
        "infllm needs recall",
    ),
    "option of none": ("vt --policy-option nothing=1", "no option 'nothing'"),
    "ratios": ("vt --ratios 0.5,2", "--ratio is 2"),
    "ratios no number": ("vt --ratios half", "--ratios: give fractions"),
    "lengths": ("vt --lengths 2x", "--lengths 2x: give numbers such as 2048 or 16k"),
    "samples": ("vt --samples 0", "--samples 0: give at least 1"),
    "predict": ("vt -n 0", "-n 0: give at least 1"),
    "one block": ("vt --lengths 512 --block-size 4096", "one block of 4096.*--block-size 128"),
    "one block, all": ("vt --lengths 512 --block-size 4096 --policies all", "one block of 4096"),
    "cells": (
        "vt --lengths 900 --ctx-size 500",
        "full at 900 tokens: .*--ctx-size 500 is too small",
    ),
    "trained": (
        "vt --lengths 8k --policies sage --positions compact",
        "sage at 8192 tokens: .*positions, more than the 4096",
    ),
    "background short": (
        "niah_single_2 --lengths 64k",
        "packaged story is too short.*--background",
    ),
    "background missing": ("niah_single_2 --background no.txt", "cannot read no.txt"),
    "no folder of tasks": ("babilong_qa1 --babi nowhere", "--babi nowhere is no folder"),
    "no tasks in it": ("babilong_qa1 --babi {folder}", r"has no qa1_\*\.txt"),
    "no published text": ("babilong_qa1 --lengths 5000", "no texts of 5000 tokens"),
    "preset": ("vt --preset papr", "--preset papr is unknown"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_before_anything_runs(
    name: str, loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, said = REFUSED[name]
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out"
    command = [*arguments(loaded, out, "-b", "4096"), *given.format(folder=tmp_path).split()]
    assert run(command) == 2
    captured = capsys.readouterr()
    assert re.search(f"^error: .*{said}", captured.err, re.MULTILINE)
    assert captured.err.count("\n") == 1
    assert not (out / "results.jsonl").exists()


def test_a_disk_that_is_full_while_running(
    loaded: Loaded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, exit code 1; what is there is valid, and the same command goes on from it."""
    add = Results.add

    def full(self: Results, row: Any) -> None:
        if len(self.rows) == 2:
            patched.setattr(journal, "append", no_room)
        add(self, row)

    with monkeypatch.context() as patched:
        patched.setattr(results.Results, "add", full)
        assert run(arguments(loaded, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert re.match(r"error: cannot write .*results\.jsonl: No space left on device;", said)
    assert said.count("\n") == 1
    assert len(results_in(tmp_path / "out")) == 2
    assert run(arguments(loaded, tmp_path / "out")) == 0
    assert len(results_in(tmp_path / "out")) == 4


def test_interrupted(
    loaded: Loaded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, calls = Conversation.read, []

    def interrupted(self: Conversation, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Conversation, "read", interrupted)
        assert run(arguments(loaded, tmp_path)) == 130
    assert "stopped with 2 of 4" in capsys.readouterr().err
    assert [row["sample"] for row in results_in(tmp_path)] == [0, 0]


def test_killed_again_and_again(loaded: Loaded, tmp_path: Path) -> None:
    """No sample is lost or run twice, and every row is what an uninterrupted run gives."""
    given = "niah_single_1 fidelity --lengths 700 --samples 2 --ratios 0.25"
    more = [*given.split(), "--policies", "full,laser,snapkv"]
    assert run(arguments(loaded, tmp_path / "whole", *more)) == 0
    out, kills = tmp_path / "killed", 0
    path, draw = out / "results.jsonl", random.Random(4)
    command = [sys.executable, "-m", "laserkv_gguf", *arguments(loaded, out, *more)]
    while kills < 2:
        there = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and not (path.exists() and path.stat().st_size > there):
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
        kills += 1
        if kills == 1:  # as if the machine had gone down in the middle of a line
            path.write_bytes(path.read_bytes()[:-17])
    assert kills == 2
    assert run(arguments(loaded, out, *more)) == 0

    def without_time(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in results_in(folder)]

    def key(row: dict[str, Any]) -> str:
        return str(results.key_of(row))

    assert sorted(without_time(out), key=key) == sorted(without_time(tmp_path / "whole"), key=key)
    config = [
        json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "whole")
    ]
    assert len(config[0].pop("commands")) == 2  # as a process, and from here
    assert len(config[1].pop("commands")) == 1
    assert config[0] == config[1]
