"""Tables to be run with one command: published ones, and one of our own."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laserkv_gguf import models
from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation.background import read_text
from laserkv_gguf.models.hub import digest
from laserkv_gguf.policies.laser import (
    PAPER,
    PAPER_OPTIONS,
    RESIDUALS,
    RULES,
    SHARES,
    SOFTMAX,
    VALUES,
)

if TYPE_CHECKING:
    from laserkv_gguf.evaluation.runner import Plan
    from laserkv_gguf.evaluation.samples import Source

Figures = Mapping[tuple[str, str, int], float]
"""(task, policy, length) -> accuracy from 0 to 1."""


@dataclass(frozen=True)
class Preset:
    """An experiment.

    Attributes:
        source: where it was published; "" for one of ours, which reproduces nothing.
        place: the table, as `data/published.csv` names it; "" where it has no figures of it.
        models: by length, the name in models.txt of what it was published with, or the nearest
            there is.
        settings: by policy, what differs from the policy's own defaults. A policy with options is
            written as in --policies: "laser alpha=0.5 lookahead=8".
        block_size, divisor: S and n, for all.
        claims: what the publication's abstract says of the results.
        notes: what is our choice, because we do not know theirs.
    """

    source: str
    place: str
    models: Mapping[int, str]
    tasks: tuple[str, ...]
    ratios: tuple[float, ...]
    policies: tuple[str, ...]
    samples: int = 100
    block_size: int = 4096
    divisor: int = 4
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.models)

    def model_names(self, lengths: Sequence[int]) -> list[str]:
        """The models of some lengths, each once."""
        return list(dict.fromkeys(self.models[n] for n in lengths if n in self.models))


def _without_alpha(settings: Mapping[str, Any]) -> dict[str, Any]:
    """For policies whose α is part of their name."""
    return {name: value for name, value in settings.items() if name != "alpha"}


ABLATIONS = (
    *(f"lookahead={tokens}" for tokens in (0, 8, 32)),
    "probe_tokens=0",
    *(f"pool={tokens}" for tokens in (1, 5, 7, 11, 21)),
    *(f"alpha=0.75 rule={rule}" for rule in RULES),
    *(f"alpha=0.75 residual={residual}" for residual in RESIDUALS[1:]),
    *(f"protection_divisor={n}" for n in (3, 8, 16)),
    "alpha=0.75 pool=7",
    "alpha=0.75 hash_bits=10 hash_tables=150",
    "alpha=0.75 pool=1 lookahead=0 probe_tokens=0 rule=analytic values=none softmax=candidates "
    "over=sum shares=equal",
    *(f"values={values}" for values in VALUES if values not in ("auto", "norm")),
    *(f"softmax={softmax}" for softmax in SOFTMAX if softmax != "all"),
    "over=sum",
    *(f"shares={shares}" for shares in SHARES if shares != "best"),
    *(f"even={even}" for even in (0.0, 0.5, 1.0)),
)
"""`laser` with one thing changed, or what the paper has."""

LLAMA, GRADIENT = "llama-3.1-8b-instruct", "llama-3-8b-instruct-gradient-1048k"

_PAPER: dict[str, Any] = {**PAPER, "policy_options": PAPER_OPTIONS}
_LASER: dict[str, Any] = {
    "source": "LASER-KV, arXiv 2602.02199",
    "tasks": tuple(f"babilong_qa{number}" for number in (1, 2, 3, 5, 6)),
    "ratios": (0.25,),
    "claims": (
        "earlier methods lose 15 to 30 % on BABILong",
        "LASER-KV is up to 10 % more accurate than they are at 128k",
    ),
    "notes": (
        "how answers were sampled is not described; here always the likeliest token",
        "laser is the paper's with alpha 0.75, exact and magicpig are its alpha 1 and 0",
    ),
}

PRESETS: dict[str, Preset] = {
    "paper-table1": Preset(
        place="table 1",
        models={16384: LLAMA},
        policies=(
            "full",
            "laser",
            "laser alpha=0.25",
            "laser alpha=0.5",
            "exact",
            "magicpig",
            "finch",
            "pyramidkv",
            "snapkv",
        ),
        settings={
            "laser": _PAPER,
            "laser alpha=0.25": _without_alpha(_PAPER),
            "laser alpha=0.5": _without_alpha(_PAPER),
            "exact": _PAPER,
            "magicpig": _PAPER,
            "finch": {"block_size": 1024},  # at this length only
        },
        **_LASER,
    ),
    "paper-table2": Preset(
        place="table 2",
        models={65536: LLAMA, 131072: GRADIENT},
        policies=("full", "laser", "finch", "pyramidkv", "snapkv"),
        settings={"laser": _PAPER},
        **_LASER,
    ),
    "lagkv-passkey": Preset(
        source="LagKV, arXiv 2504.04704",
        place="",
        models={16384: LLAMA},
        tasks=("passkey",),
        ratios=(0.5, 0.25, 0.125),
        policies=("full", "laser", "lagkv", "h2o"),
        claims=(
            "version 1: next to nothing is lost with half of the cache, a tenth with an eighth",
            "with a key of 64 digits LagKV is over 60 % (version 2: 50 %) better than H2O",
        ),
        notes=("the length, the samples and the quarter among the ratios are our choice",),
    ),
    "laser-ablations": Preset(  # what each step beyond the paper, and each setting, is worth
        source="",
        place="",
        models={2048: ""},
        tasks=("niah_single_2",),
        ratios=(0.25, 0.1),
        policies=("full", "laser", *(f"laser {changed}" for changed in ABLATIONS)),
        samples=20,
        block_size=512,
    ),
    "laser-hashing": Preset(  # whether hash collisions find what attention does not
        source="",
        place="",
        models={2048: "", 4096: ""},
        tasks=(
            "niah_single_1",
            "niah_multikey_1",
            "niah_multivalue",
            "vt",
            "passkey",
            "fidelity",
        ),
        ratios=(0.25, 0.1, 0.05),
        policies=(
            "full",
            "laser",
            "laser alpha=0.75",
            "laser alpha=0.75 rule=analytic hash_bits=1",
        ),
        samples=30,
        block_size=512,
    ),
}


def is_model(name: str, model: Path) -> bool:
    """Whether the file is that model of models.txt, by name, size and hash."""
    entry = models.entries().get(name)
    if entry is None or model.name not in (
        entry.file,
        f"{entry.source.replace('/', '_')}_{entry.file}",
    ):
        return False
    if entry.size is not None and model.stat().st_size != entry.size:
        return False
    return entry.sha256 is None or digest(model) == entry.sha256


def lengths_of(preset: Preset, model: Path) -> tuple[int, ...]:
    """The lengths that a model was published at; all of them for one that was not."""
    known = {name: is_model(name, model) for name in preset.model_names(preset.lengths)}
    return tuple(n for n, name in preset.models.items() if known[name]) or preset.lengths


def is_expected(preset: Preset, model: Path, lengths: Sequence[int]) -> bool:
    """Whether the file is the model that the preset was published with, at each of the lengths."""
    names = preset.model_names(lengths)
    return bool(names) and all(is_model(name, model) for name in names)


def label(preset: Preset, model: Path, plan: Plan, source: Source, changed: bool) -> list[str]:
    """Whether a run may be called a reproduction, and if not why; and what is known to compare.

    Args:
        changed: settings of policies are other than the preset's.
    """
    reasons = []
    if not is_expected(preset, model, plan.lengths):
        known = preset.model_names(plan.lengths) or preset.model_names(preset.lengths)
        reasons.append(f"the model is {model.name}, not {' and '.join(known)} of models.txt")
    names = [task.name for task in plan.tasks]
    for what, now, then in (
        ("tasks", names, preset.tasks),
        ("ratios", plan.ratios, preset.ratios),
    ):
        if list(now) != list(then):
            reasons.append(f"the {what} are others")
    if not set(plan.lengths) <= set(preset.lengths):  # a part of a table is one, too
        reasons.append("the lengths are others")
    if plan.samples != preset.samples:
        reasons.append(f"there are {plan.samples} samples, not {preset.samples}")
    missing = [name for name in preset.policies if name not in plan.settings]
    if missing:
        reasons.append(f"{', '.join(missing)} was not run")
    others = (plan.predict, plan.keep) != (None, None)
    if changed or others or plan.block_size != preset.block_size:
        reasons.append("settings were changed")
    if any(name.startswith("babilong") for name in names):
        if source.babi is not None:
            reasons.append("the samples are generated, not the published ones")
        if not all(name.removeprefix("babilong_") in source.prompts for name in names):
            reasons.append("the instructions are worded by us (--prompts takes the published ones)")
    elif "passkey" in names:
        reasons.append("the task is worded by us")
    said = [f"published: {preset.source}; {claim}" for claim in preset.claims]
    said += [f"{preset.source}: {note}" for note in preset.notes]
    table = f"{preset.source}, {preset.place}" if preset.place else preset.source
    if reasons:
        return [f"NOT a reproduction of {table}: {'; '.join(reasons)}", *said]
    return [f"reproduction of {table} with a quantised model, {model.name}", *said]


@cache
def _packaged() -> tuple[dict[str, str], ...]:
    """The rows of `data/published.csv`: a policy at a length, a column a task."""
    text = (files("laserkv_gguf") / "data" / "published.csv").read_text("utf-8")
    return tuple(csv.DictReader(io.StringIO(text)))


def published(preset: Preset) -> Figures:
    """The figures of the preset's table, as they were published; none where we have none.

    `laser` stands for the paper's own α there.
    """
    paper = f"laser alpha={PAPER['alpha']:g}"
    return {
        (task, "laser" if row["policy"] == paper else row["policy"], int(row["length"])): float(
            row[task]
        )
        for row in _packaged()
        if row["place"] == preset.place and preset.source.endswith(row["source"])
        for task in preset.tasks
    }


def read_published(path: Path) -> Figures:
    """Figures of a publication: a CSV with the columns task, policy, length, score (0 to 1).

    Raises:
        UserError: file and line of what is wrong.
    """
    figures = {}
    rows = csv.DictReader(io.StringIO(read_text(path)))
    wanted = ("task", "policy", "length", "score")
    if not set(wanted) <= set(rows.fieldnames or ()):
        raise UserError(f"{path} needs the columns {', '.join(wanted)} in its first line")
    for row in rows:
        try:
            score = float(row["score"])
            figures[row["task"], row["policy"], int(row["length"])] = score
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {rows.line_num}: length or score is no number") from None
        if not 0 <= score <= 1:
            raise UserError(f"{path}, line {rows.line_num}: a score is from 0 to 1, not {score:g}")
    return figures
