"""Samples, scores and statistics of the evaluation: without a model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, entropy

from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation import tasks, words
from laserkv_gguf.evaluation.background import Background, read_prompts
from laserkv_gguf.evaluation.lengths import interspersed
from laserkv_gguf.evaluation.samples import Sample, Source, Tokens
from laserkv_gguf.evaluation.statistics import mcnemar, wilson
from laserkv_gguf.evaluation.tasks import babi, babilong, niah
from laserkv_gguf.evaluation.tasks.fidelity import agreement, divergence, mean_of

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


class Pieces:
    """A tokenizer that merges as byte-pair ones do: what stands at a seam decides the count.

    Blanks go with the word after them, a full stop with the blank after it where one follows.
    """

    pattern = re.compile(r"\. |\n\n|\.\n| ?[A-Za-z]{1,4}|\d{1,3}|\s|.", re.DOTALL)

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.pieces: list[str] = []

    def tokenize(self, text: str) -> Tokens:
        found = self.pattern.findall(text)
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return np.array([self.ids[piece] for piece in found], np.int32)

    def text(self, tokens: Tokens) -> str:
        return "".join(self.pieces[token] for token in tokens)


class Characters(Pieces):
    pattern = re.compile(r".", re.DOTALL)


def prose(sentences: int, seed: int = 0) -> str:
    """Sentences of letters, no two alike."""
    random = Random(f"prose/{seed}")
    made = []
    for _ in range(sentences):
        parts = [
            "".join(random.choice(string.ascii_lowercase) for _ in range(random.randrange(2, 9)))
            for _ in range(random.randrange(8, 20))
        ]
        made.append(" ".join(parts).capitalize() + random.choice([".", "!", "?", '."']))
    return "\n\n".join(" ".join(made[i : i + 7]) for i in range(0, len(made), 7))


BABI = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Sandra moved to the garden.
6 Where is Daniel? \thallway\t4
1 Sandra went to the office.
2 Where is Sandra? \toffice\t1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("babi")
    for kind in babilong.LABELS:
        (path / f"{kind}_some-name_test.txt").write_text(BABI)
    return path


def questions(path: Path) -> tuple[Path, Path]:
    """Files as SQuAD and HotpotQA have them, of made paragraphs."""
    texts = prose(400, 3).split("\n\n")
    squad = {
        "data": [
            {
                "title": f"Article {number}",
                "paragraphs": [
                    {
                        "context": text,
                        "qas": [
                            {
                                "id": f"{number}-{index}",
                                "question": f"What is {number}-{index}?",
                                "answers": [{"text": text[:9].strip(), "answer_start": 0}],
                            }
                        ],
                    }
                    for index, text in enumerate(texts[number : number + 4])
                ],
            }
            for number in range(0, 56, 4)
        ]
    }
    hotpot = [
        {
            "_id": str(number),
            "question": f"Who is {number}?",
            "answer": texts[number].split()[0],
            "supporting_facts": [[f"T{number}", 0], [f"T{number + 1}", 1]],
            "context": [
                [f"T{n}", [part + "." for part in texts[n].split(".") if part]]
                for n in range(number, number + 10)
            ],
        }
        for number in range(40)
    ]
    names = path / "squad.json", path / "hotpot.json"
    for name, data in zip(names, (squad, hotpot), strict=True):
        name.write_text(json.dumps(data))
    return names


def made_source(folder: Path, seed: int = 5) -> Source:
    return Source(Pieces(), seed, Background("prose", prose(400)), folder, None, *questions(folder))


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return made_source(folder)


# ---- samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1200, 1537])
@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_documents_have_exactly_the_tokens(name: str, tokens: int, source: Source) -> None:
    """And their text is what tokenises to them, as a user's would."""
    for number in (0, 7):
        sample = tasks.TASKS[name].sample(source, tokens, number)
        assert len(sample.tokens) == tokens
        assert source.tokenizer.tokenize(sample.document).tolist() == sample.tokens.tolist()


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_samples_are_the_same_again_and_differ_from_each_other(name: str, folder: Path) -> None:
    def made(seed: int) -> list[Sample]:
        fresh = made_source(folder, seed)
        return [tasks.TASKS[name].sample(fresh, 1200, number) for number in (3, 0, 1)]

    one, other = made(5), made(5)
    assert one == other
    assert len({sample.document for sample in one}) == 3
    assert made(6)[0].document != one[0].document


DIGEST = """
import hashlib, sys
sys.path.insert(0, "tests")
from test_evaluation import Path, made_source, tasks
source = made_source(Path(sys.argv[1]))
for task in tasks.TASKS.values():
    print(task.name, hashlib.sha256(repr(task.sample(source, 1200, 3)).encode()).hexdigest())
"""


def test_samples_are_the_same_in_every_process(folder: Path) -> None:
    """Whatever Python's hashes are."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."}
    command = [sys.executable, "-c", DIGEST, str(folder)]
    root = Path(__file__).parent.parent
    there = subprocess.check_output(command, text=True, env=environment, cwd=root)
    source = made_source(folder)
    assert there.splitlines() == [
        f"{name} {hashlib.sha256(repr(task.sample(source, 1200, 3)).encode()).hexdigest()}"
        for name, task in tasks.TASKS.items()
    ]


def facts_of(sample: Sample) -> list[str]:
    return re.findall(r"(?:Mary|John|Daniel|Sandra) [^.]*\.", sample.document)


def test_babilong_has_all_facts_once_and_in_order(source: Source, folder: Path) -> None:
    """The published construction: facts in order between the sentences of the background."""
    told = babi.stories(folder, "qa1")
    places = []
    for number in range(30):
        sample = tasks.TASKS["babilong_qa1"].sample(source, 700, number)
        story = next(one for one in told if f"Question: {one.question}" == sample.question)
        assert facts_of(sample) == list(story.facts)
        assert sample.golds == (story.answer,)
        # without the facts, what is left is a run of the background, its last sentence cut
        left = sample.document
        for fact in story.facts:
            places.append(sample.document.index(fact) / len(sample.document))
            left = left.replace(fact, "", 1)
        left = re.sub(r"(?: \.)+$", "", " ".join(left.split()))
        assert left in " ".join(source.background.sentences)
    assert min(places) < 0.1  # they are spread over all of the text
    assert max(places) > 0.9
    assert 0.3 < np.mean(places) < 0.7


@pytest.mark.parametrize("kind", list(babilong.LABELS))
def test_babilong_from_the_whole_data(kind: str) -> None:
    """bAbI's own files among a novel."""
    if not SHARED.exists():
        pytest.skip("the data is not at hand")
    source = Source(Pieces(), 0, Background.load(SHARED / "books"), SHARED / "babi")
    source._counts["background"] = np.array([len(s) // 4 for s in source.background.sentences])
    told = babi.stories(SHARED / "babi", kind)
    labels = {label for story in told for label in story.answer.lower().split(",")}
    assert labels <= babilong.LABELS[kind]
    sample = tasks.TASKS[f"babilong_{kind}"].sample(source, 2000, 1)
    story = next(
        one
        for one in told
        if one.question == sample.question.removeprefix("Question: ")
        and all(fact in sample.document for fact in one.facts)
        and tuple(one.answer.split(",")) == sample.golds
    )
    assert len(sample.tokens) == 2000
    where = -1
    for fact in story.facts:
        where = sample.document.index(fact, where + 1)


@pytest.mark.parametrize("task", niah.NIAH, ids=lambda task: task.name)
def test_needles_are_hidden_once_each(task: niah.Needles, source: Source) -> None:
    for number in range(6):
        sample = task.sample(source, 1200, number)
        found = re.findall(r"special magic \w+ for (\S+) is (\S+)\.", sample.document)
        assert len(sample.golds) == task.values * task.queries
        for gold in sample.golds:
            assert [value for _, value in found].count(gold) == 1
            key = next(key for key, value in found if value == gold)
            assert key in sample.question
            assert key in sample.prefix
        if task.haystack != "needles":
            assert len(found) == task.keys * task.values
        assert task.score(sample, sample.answer) == 1


def test_variables_are_tracked_through_the_chain(source: Source) -> None:
    sample = tasks.TASKS["vt"].sample(source, 900, 2)
    values: dict[str, str] = {}
    for name, what in re.findall(r"VAR (\w+) = (VAR \w+|\d+)", sample.document):
        values[name] = what if what.isdigit() else values[what.removeprefix("VAR ")]
    assert set(values) == set(sample.golds)
    assert len(values) == 5
    assert len(set(values.values())) == 1
    assert values.popitem()[1] in sample.question


def test_common_words_are_the_commonest(source: Source) -> None:
    for tokens in (1200, 9000):
        sample = tasks.TASKS["cwe"].sample(source, tokens, 0)
        listed = re.findall(r"(\d+)\. ([a-z-]+)", sample.document)
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, _ in counts.most_common(10)} == set(sample.golds)
        assert counts.most_common(10)[9][1] > counts.most_common(11)[10][1]
        often = 6 if tokens < 4096 else 30
        assert [count for _, count in counts.most_common(10)] == [often] * 10
    assert counts.most_common(1)[0][1] == 30
    assert counts.most_common(11)[10][1] == 3


def test_frequent_words_follow_their_law(source: Source) -> None:
    sample = tasks.TASKS["fwe"].sample(source, 5000, 0)
    counts = Counter(sample.document.split())
    assert counts.most_common(1)[0][0] == "..."
    assert [word for word, _ in counts.most_common(4)[1:]] == list(sample.golds)
    total = sum(counts.values())
    for k, (_, count) in enumerate(counts.most_common(4), 1):
        assert count / total == pytest.approx(6 / (np.pi * k) ** 2, rel=0.1)


def test_the_continuation_follows_the_document(source: Source) -> None:
    sample = tasks.TASKS["fidelity"].sample(source, 500, 0)
    assert sample.following is not None
    assert len(sample.following) == 65
    text = sample.document + source.tokenizer.text(sample.following)
    assert text in " ".join(source.background.sentences)


@given(st.integers(150, 700), st.integers(0, 10**6), st.sampled_from([Pieces, Characters]))
def test_any_length_can_be_made(tokens: int, seed: int, kind: type[Pieces]) -> None:
    source = Source(kind(), 0, Background("", ""))
    sentences = [f"This is number {n} of them." for n in range(300)]
    hidden = ["A first secret.", "A second, longer secret.", "A third."]
    text, ids = interspersed(source, sentences, hidden, Random(seed), tokens)
    assert len(source.tokenizer.tokenize(text)) == len(ids) == tokens
    assert [text.count(one) for one in hidden] == [1, 1, 1]
    assert sorted(hidden, key=text.index) == hidden


def test_words_are_distinct() -> None:
    assert len({*words.ADJECTIVES, *words.NOUNS}) == len(words.ADJECTIVES) + len(words.NOUNS)


# ---- what cannot be made -----------------------------------------------------------------------


def test_background_too_short() -> None:
    source = Source(Pieces(), 0, Background("little.txt", prose(20)))
    for name in ("niah_single_2", "fidelity"):
        with pytest.raises(UserError, match=r"little\.txt is too short for .*--background"):
            tasks.TASKS[name].sample(source, 5000, 0)


def test_no_room_for_what_must_be_hidden(source: Source, folder: Path) -> None:
    with pytest.raises(UserError, match=r"no room .* larger --lengths"):
        tasks.TASKS["passkey"].sample(source, 20, 0)
    with pytest.raises(UserError, match=r"at least \d+ tokens.*larger --lengths"):
        tasks.TASKS["cwe"].sample(source, 100, 0)
    with pytest.raises(UserError, match=r"no story .* fits 10 tokens"):
        tasks.TASKS["babilong_qa1"].sample(source, 10, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 Mary moved.\nMary stayed.\n", "line 2: not a bAbI line"),
        ("1 Mary moved.\n3 Where is Mary?\tattic\t1\n", "line 2: number 3 follows 1"),
        ("1 Mary moved.\n2 Where is Mary?\t\t1\n", "line 2: a question without an answer"),
        ("1 Where is Mary?\tattic\t1\n", "line 1: a question .* without facts"),
        ("1 Mary moved.\n", "no question"),
        (b"1 na\xefve\n", "not UTF-8"),
    ],
)
def test_broken_task_files(text: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "qa1_x_test.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=rf"qa1_x_test\.txt.*{said}"):
        babi.stories(tmp_path, "qa1")


def test_folders_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        babi.stories(tmp_path / "missing", "qa1")
    with pytest.raises(UserError, match=r"no qa1_\*\.txt"):
        babi.stories(tmp_path, "qa1")
    with pytest.raises(UserError, match=r"no \*\.txt"):
        Background.load(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*missing\.txt: No such file"):
        Background.load(tmp_path / "missing.txt")


def test_unknown_tasks() -> None:
    with pytest.raises(UserError, match="task niah_singel_1 is unknown; use niah_single_1"):
        tasks.find(["niah_singel_1"])
    assert [task.name for task in tasks.find(["vt", "babilong", "vt"])][:2] == [
        "vt",
        "babilong_qa1",
    ]
    assert len(tasks.find(["ruler"])) == 13


def test_gutenberg_licence_is_no_background(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        'Licence.\n*** START OF THE BOOK ***\nMr. Fox said: "Go!" He went.\n\nThe end.\n'
        "*** END OF THE BOOK ***\nMore licence."
    )
    assert Background.load(tmp_path).sentences == ['Mr. Fox said: "Go!"', "He went.", "The end."]


# ---- the published BABILong --------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    babilong._rows.cache_clear()
    repository = tmp_path / "datasets--RMT-team--babilong"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    data = repository / "snapshots" / ("0" * 40) / "data" / "qa1"
    data.mkdir(parents=True)
    row = {"input": "Fog. Mary went to the attic. ", "question": "Where is Mary? "}
    (data / "4k.json").write_text(json.dumps([{**row, "target": "garden"}] * 2))
    (data / "8k.json").write_text("\n".join([json.dumps({**row, "target": "office"})] * 2))
    (data / "16k.json").write_text('[{"input": ')
    (data / "32k.json").write_text('[{"input": "a"}]')
    return data


def test_published_samples_from_the_cache(hub: Path) -> None:
    source = Source(Pieces(), 0, Background("", ""))
    task = tasks.TASKS["babilong_qa1"]
    sample = task.sample(source, 4096, 1)
    assert sample.document == "Fog. Mary went to the attic."
    assert sample.question == "Question: Where is Mary?"
    assert sample.golds == ("garden",)
    assert sample.answer == "The most recent location of Mary is garden."
    assert task.sample(source, 8192, 0).golds == ("office",)


@pytest.mark.parametrize(
    ("tokens", "number", "said"),
    [
        (4096, 2, "has 2 samples of qa1; use --samples 2"),
        (5000, 0, "no texts of 5000 tokens; use --lengths"),
        (65536, 0, "cannot fetch data/qa1/64k.json .*--babi"),
        (16384, 0, r"16k\.json is broken: .*delete"),
        (32768, 0, r"32k\.json is broken: no rows of input, question, target"),
    ],
)
def test_published_samples_that_are_not_there(
    hub: Path, tokens: int, number: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        babilong.published("qa1", tokens, number)


def test_other_instructions(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    given = {"instruction": "Do it.", "examples": "So.", "post_prompt": "Now."}
    path.write_text(json.dumps({"qa1": given}))
    source = Source(Pieces(), 0, Background("", prose(100)), folder, read_prompts(path))
    sample = tasks.TASKS["babilong_qa1"].sample(source, 300, 0)
    assert sample.before == "Do it.\n\nSo.\n\nNow.\n\n<context>\n"
    path.write_text(json.dumps({"qa1": {"instruction": "Do it."}}))
    with pytest.raises(UserError, match="qa1 needs the texts examples, instruction, post_prompt"):
        read_prompts(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_prompts(path)


# ---- scores: answers written by hand, and what they are worth ----------------------------------

BABILONG_ANSWERS = [
    ("qa1", "Where is Mary?", "bathroom", "The most recent location of Mary is bathroom.", True),
    ("qa1", "Where is Mary?", "bathroom", "Bathroom", True),
    ("qa1", "Where is Mary?", "bathroom", "bathroom. Then she went to the garden.", True),
    ("qa1", "Where is Mary?", "bathroom", "bathroom <example> office", True),
    ("qa1", "Where is Mary?", "bathroom", "garden. No, the bathroom.", False),
    ("qa1", "Where is Mary?", "bathroom", "the bathroom or the garden", False),
    ("qa1", "Where is Mary?", "bathroom", "the garden", False),
    ("qa1", "Where is Mary?", "bathroom", "", False),
    ("qa1", "Where is Mary?", "bathroom", "I do not know where Mary is.", False),
    ("qa3", "Where was the milk before the office?", "garden",
     "Before the office the milk was in the garden.", True),
    ("qa3", "Where was the milk before the office?", "garden", "In the office.", False),
    ("qa4", "What is the kitchen east of?", "garden", "The kitchen is east of the garden", True),
    ("qa5", "What did Fred give to Jeff?", "milk", "Fred gave the milk to Jeff", True),
    ("qa5", "Who gave the milk to Jeff?", "Fred", "Fred", True),
    ("qa5", "Who gave the milk to Jeff?", "Fred", "Bill or Fred", False),
    ("qa6", "Is John in the garden?", "no", "No", True),
    ("qa6", "Is John in the garden?", "no", "yes", False),
    ("qa6", "Is John in the garden?", "yes", "yes and no", False),
    # as published: "none" holds "one", which makes two labels
    ("qa7", "How many objects is Mary carrying?", "none", "None", False),
    ("qa7", "How many objects is Mary carrying?", "one", "none", False),
    ("qa7", "How many objects is Mary carrying?", "one", "one", True),
    ("qa8", "What is Mary carrying?", "nothing", "nothing", True),
    ("qa8", "What is Mary carrying?", "apple,milk", "milk, apple", True),
    ("qa8", "What is Mary carrying?", "apple,milk", "apple", False),
    ("qa8", "What is Mary carrying?", "apple", "apple,milk", False),
    ("qa10", "Is Fred in the park?", "maybe", "Maybe", True),
    ("qa10", "Is Fred in the park?", "maybe", "yes or maybe", False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "question", "gold", "said", "right"), BABILONG_ANSWERS)
def test_babilong_answers(kind: str, question: str, gold: str, said: str, right: bool) -> None:
    assert babilong.is_right(kind, tuple(gold.split(",")), f"Question: {question}", said) is right


def sample_of(*golds: str) -> Sample:
    return Sample("", 0, "", np.zeros(0, np.int32), "", golds, "")


@pytest.mark.parametrize(
    ("golds", "said", "score"),
    [
        (("123", "456"), "123 and 456", 1.0),
        (("123", "456"), "They are 1234567", 1.0),  # contains both, which is RULER's rule
        (("123", "456"), "only 456", 0.5),
        (("123", "456"), "none", 0.0),
        (("ABCDE",), "abcde", 1.0),
        (("one", "two", "three", "four"), "Two, THREE", 0.5),
    ],
)
def test_string_match(golds: tuple[str, ...], said: str, score: float) -> None:
    for name in ("niah_multivalue", "vt", "cwe", "fwe"):
        assert tasks.TASKS[name].score(sample_of(*golds), said) == score


KEY = "0123456789" * 6 + "0123"


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (KEY, 1.0),
        (f"The key is {KEY}.", 1.0),
        (f"{KEY[:32]} {KEY[32:]}", 1.0),
        (KEY[:16], 0.25),
        (KEY[:16] + "9" + KEY[17:], 0.25),
        (KEY[:-1], 63 / 64),
        (KEY + "4", 63 / 64),  # another key
        ("9" + KEY, 0.0),
        ("I do not know", 0.0),
        ("", 0.0),
    ],
)
def test_passkey_answers(said: str, score: float) -> None:
    assert tasks.TASKS["passkey"].score(sample_of(KEY), said) == score


def test_distance_of_predictions() -> None:
    random = np.random.default_rng(0)
    first, second = (random.dirichlet(np.ones(50), 9) for _ in range(2))
    logs = [np.log(rows).astype(np.float32) for rows in (first, second)]
    expected = np.mean([entropy(p, q) for p, q in zip(first, second, strict=True)])
    assert divergence(logs[0], logs[1]) == pytest.approx(expected, rel=1e-5)
    assert divergence(logs[0], logs[0]) == 0
    assert agreement(logs[0], logs[0]) == 1
    swapped = logs[0].copy()
    swapped[:3] = np.roll(swapped[:3], 1, axis=1)
    assert agreement(logs[0], swapped) == pytest.approx(6 / 9)
    tokens = np.arange(9, dtype=np.int32)
    assert mean_of(logs[0], tokens) == pytest.approx(np.log(first[tokens, tokens]).mean(), rel=1e-5)


# ---- statistics --------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 60))
def test_wilson_and_mcnemar_are_scipys(first: int, second: int) -> None:
    low, high = wilson(first, first + second)
    if first + second:
        test = binomtest(first, first + second, 0.5)
        assert mcnemar(first, second) == pytest.approx(test.pvalue)
        expected = test.proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    else:
        assert mcnemar(0, 0) == 1
        assert (low, high) == (0, 1)
