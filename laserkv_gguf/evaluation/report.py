"""Tables of results: terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from laserkv_gguf.evaluation.presets import Figures
from laserkv_gguf.evaluation.results import Row
from laserkv_gguf.evaluation.statistics import mcnemar, wilson
from laserkv_gguf.evaluation.tasks import GROUPS

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = "not known to us"
Head = list[str]
Rows = list[list[str]]


@dataclass(frozen=True)
class Line:
    """What one policy gave at one ratio and length of one task.

    Attributes:
        samples: that were run; `failed` of them could not be.
        score: mean, from 0 to 1; of `fidelity` the agreement.
        exact: samples whose score is 1, of those that were run.
        low, high: Wilson's 95 % interval of exact / (samples - failed).
        gold_logprob: mean log-probability (nats) of a token of the right answer; of `fidelity` of
            the full cache's own answer.
        kept: mean fraction of the tokens read that was kept.
        full_better, full_worse, full_p: samples only `full` got right, only this policy, and
            McNemar's exact test; `laser_…` the same with `laser` at the same ratio.
        divergence, perplexity: means of `fidelity`; None elsewhere.
        f1: mean, of tasks that have it.
        published: what a publication gives; None where we do not know it.
    """

    task: str
    length: int
    policy: str
    ratio: float
    samples: int
    failed: int
    score: float | None
    exact: int
    low: float
    high: float
    gold_logprob: float | None
    kept: float | None
    seconds: float | None
    full_better: int | None = None
    full_worse: int | None = None
    full_p: float | None = None
    laser_better: int | None = None
    laser_worse: int | None = None
    laser_p: float | None = None
    divergence: float | None = None
    perplexity: float | None = None
    published: float | None = None
    f1: float | None = None

    @property
    def run(self) -> int:
        return self.samples - self.failed

    @property
    def measures_fidelity(self) -> bool:
        return self.task == "fidelity"


def lines(rows: Iterable[Row], figures: Figures | None = None) -> list[Line]:
    """A line for every task, length, policy and ratio, in the order they were first met."""
    groups: dict[tuple[str, int, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["length"], row["policy"], row["ratio"]].append(row)
    order = {key[2]: index for index, key in reversed(list(enumerate(groups)))}
    tasks = {key[0]: index for index, key in reversed(list(enumerate(groups)))}
    keys = sorted(groups, key=lambda k: (tasks[k[0]], k[1], order[k[2]], -k[3]))
    return [_line(key, groups, figures or {}) for key in keys]


def _line(
    key: tuple[str, int, str, float],
    groups: dict[tuple[str, int, str, float], list[Row]],
    figures: Figures,
) -> Line:
    task, length, policy, ratio = key
    rows = groups[key]
    run = [row for row in rows if row["score"] is not None]
    exact = sum(row["score"] == 1 for row in run)
    low, high = wilson(exact, len(run))
    pairs: dict[str, float | int] = {}
    if task != "fidelity":
        for name in ("full", "laser"):
            other = next(
                (
                    group
                    for (t, n, p, r), group in groups.items()
                    if (t, n, p) == (task, length, name) and (name == "full" or r == ratio)
                ),
                None,
            )
            if other and policy != name:
                better, worse = paired(other, rows)
                pairs |= {
                    f"{name}_better": better,
                    f"{name}_worse": worse,
                    f"{name}_p": mcnemar(better, worse),
                }
    return Line(
        task,
        length,
        policy,
        ratio,
        len(rows),
        len(rows) - len(run),
        _mean(row["score"] for row in run),
        exact,
        low,
        high,
        _mean(row["gold_logprob"] for row in run),
        _mean(row["kept_tokens"] / row["read_tokens"] for row in run),
        _mean(row["seconds"] for row in run),
        divergence=_mean(row.get("divergence") for row in run),
        perplexity=_mean(row.get("perplexity") for row in run),
        published=figures.get((task, policy, length)),
        f1=_mean(row.get("f1") for row in run),
        **pairs,  # type: ignore[arg-type]
    )


def paired(first: Iterable[Row], second: Iterable[Row]) -> tuple[int, int]:
    """Samples that only the first got exactly right, and that only the second did."""
    scores = {row["sample"]: row["score"] for row in first if row["score"] is not None}
    only_first = only_second = 0
    for row in second:
        if row["score"] is None or row["sample"] not in scores:
            continue
        one, other = scores[row["sample"]] == 1, row["score"] == 1
        only_first += one and not other
        only_second += other and not one
    return only_first, only_second


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def as_csv(found: Sequence[Line]) -> str:
    """All columns, a line each."""
    text = io.StringIO()
    names = [field.name for field in fields(Line)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for line in found:
        writer.writerow(["" if (v := getattr(line, name)) is None else v for name in names])
    return text.getvalue()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _pair(better: int | None, worse: int | None, p: float | None) -> str:
    """Samples gained and lost against another policy, and how likely that is by chance."""
    return "" if p is None else f"+{worse} −{better} p={p:.2g}"


def tables(found: Sequence[Line], *, published: bool) -> list[tuple[Head, Rows]]:
    """Heads and rows of text: tasks with right answers, and `fidelity`."""
    has_f1 = any(line.f1 is not None for line in found)
    head = ["task", "tokens", "policy", "r", "kept", "n", "score", *(["F1"] if has_f1 else [])]
    head += ["exact", "95 %", "gold logp", "vs full", "vs laser", "s"]
    head += ["published"] if published else []
    answers, moved = [], []
    for line in found:
        begun = [line.task, f"{line.length:,}", line.policy, f"{line.ratio:g}"]
        begun += [
            _number(line.kept, ".1%"),
            f"{line.run}" + (f" ({line.failed} failed)" * bool(line.failed)),
        ]
        if line.measures_fidelity:
            numbers = [
                _number(line.divergence, ".4f"),
                _number(line.score, ".1%"),
                _number(line.perplexity, ".2f"),
                _number(line.gold_logprob, ".3f"),
            ]
            moved.append([*begun[1:], *numbers, _number(line.seconds, ".1f")])
            continue
        row = [
            *begun,
            _number(line.score, ".3f"),
            *([_number(line.f1, ".3f")] if has_f1 else []),
            f"{line.exact}/{line.run}",
            f"{line.low:.2f}–{line.high:.2f}" if line.run else "",
            _number(line.gold_logprob, ".3f"),
            _pair(line.full_better, line.full_worse, line.full_p),
            _pair(line.laser_better, line.laser_worse, line.laser_p),
            _number(line.seconds, ".1f"),
        ]
        if published:
            row.append(UNKNOWN if line.published is None else f"{line.published:.3f}")
        answers.append(row)
    made = [(head, answers)] if answers else []
    if moved:
        fidelity = ["tokens", "policy", "r", "kept", "n", "KL, nats", "top-1 agreement"]
        made.append(([*fidelity, "perplexity", "full's answer logp", "s"], moved))
    return made


LEGEND = (
    "score: mean from 0 to 1; exact: samples with score 1, and Wilson's 95 % interval of their "
    "share; gold logp: mean log-probability (nats) of a token of the right answer; vs: samples "
    "gained and lost against that policy, p of McNemar's exact test; s: seconds a sample, reading "
    "included (not where one reading served several ratios)."
)
FIDELITY = (
    "fidelity: mean KL divergence from the full cache and top-1 agreement with it over the tokens "
    "that follow the document, perplexity of those, and the mean log-probability of a token of the "
    "full cache's own answer to a fixed question."
)


F1 = (
    "F1: mean of precision and recall in words against the nearest right answer, as SQuAD counts "
    "it; there the score says whether the answer holds a right one."
)
OWN = (
    "compare the scores of {tasks} with each other only, not with those that RULER or a "
    "leaderboard publishes: kinds and counting are RULER's, but the wording, the chat template and "
    "the background are not, and here the length is the document's, there the prompt's with its "
    "answer."
)
PEERS_SAID = {
    "bm25": "bm25 reads no more than the passages that BM25 finds for the question, in full; their "
    "prompt has at most as many tokens as the others keep",
    "shift": "shift is llama.cpp's context shift in a context of r times the tokens, of which half "
    "to all are there at the end",
    "q4_0-full": "q4_0-full keeps all in a cache of type q4_0; its r is its bytes over the full "
    "cache's",
}


def legend(found: Sequence[Line]) -> list[str]:
    """What the columns of the tables mean."""
    said = [LEGEND] if any(not line.measures_fidelity for line in found) else []
    said += [F1] if any(line.f1 is not None for line in found) else []
    return said + ([FIDELITY] if any(line.measures_fidelity for line in found) else [])


def caveats(found: Sequence[Line]) -> list[str]:
    """What must stand beside the scores: what they can be compared with, and what peers do."""
    tasks, policies = ({getattr(line, name) for line in found} for name in ("task", "policy"))
    rulers = [name for name in GROUPS["ruler"] if name in tasks]
    said = [OWN.format(tasks=", ".join(rulers))] if rulers else []
    return said + [text for name, text in PEERS_SAID.items() if name in policies]


def published_table(figures: Figures, source: str) -> tuple[Head, Rows]:
    """All that was published: a row a length and policy, a column a task."""
    tasks = list(dict.fromkeys(task for task, _, _ in figures))
    cells = list(dict.fromkeys((length, policy) for _, policy, length in figures))
    rows = [
        [f"{length:,}", policy, *(_number(figures.get((t, policy, length)), ".2f") for t in tasks)]
        for length, policy in sorted(cells, key=lambda cell: cell[0])
    ]
    return [f"published: {source}; tokens", "policy", *tasks], rows


def as_markdown(
    found: Sequence[Line],
    *,
    title: str,
    notes: Sequence[str],
    published: bool,
    others: Sequence[tuple[Head, Rows]] = (),
) -> str:
    """The whole summary.

    Args:
        published: with a column of published figures.
        others: tables that are shown after those of the results.
    """
    parts = [f"# {title}", "", *(f"- {note}" for note in notes)]
    for head, rows in (*tables(found, published=published), *others):
        parts += ["", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        parts += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*parts, "", *legend(found)]) + "\n"


def as_tables(
    found: Sequence[Line], *, published: bool, others: Sequence[tuple[Head, Rows]] = ()
) -> list[Table]:
    """For a terminal."""
    from rich.table import Table

    made = []
    for head, rows in (*tables(found, published=published), *others):
        table = Table()
        left = ("task", "policy")
        for name in head:
            table.add_column(
                name, justify="left" if name in left else "right", no_wrap=name in left
            )
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made
