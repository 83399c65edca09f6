"""Published tables, to be run with one command and set beside what was measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laserkv_gguf import models
from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation.background import read_text
from laserkv_gguf.hub import digest
from laserkv_gguf.policies.laser import PAPER, PAPER_OPTIONS

if TYPE_CHECKING:
    from laserkv_gguf.evaluation.runner import Plan
    from laserkv_gguf.evaluation.samples import Source

Figures = Mapping[tuple[str, str, int], float]
"""(task, policy, length) -> accuracy from 0 to 1."""


@dataclass(frozen=True)
class Preset:
    """A published experiment.

    Attributes:
        source: where it was published.
        models: names of models.txt that it was published with, or the nearest there is.
        settings: by policy, what differs from the policy's own defaults.
        block_size, divisor: S and n, for all.
        claims: what the publication's abstract says of the results. Figures of its tables are not
            known to us; --published takes them.
        notes: what is our choice, because we do not know theirs.
    """

    source: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    ratios: tuple[float, ...]
    policies: tuple[str, ...]
    samples: int = 100
    block_size: int = 4096
    divisor: int = 4
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


_PAPER: dict[str, Any] = {**PAPER, "policy_options": PAPER_OPTIONS}
_LASER: dict[str, Any] = {
    "source": "LASER-KV, arXiv 2602.02199",
    "models": ("llama-3.1-8b-instruct", "llama-3-8b-instruct-gradient-1048k"),
    "tasks": tuple(f"babilong_qa{number}" for number in (1, 2, 3, 5, 6)),
    "ratios": (0.25,),
    "policies": ("full", "laser", "exact", "magicpig", "finch"),
    "settings": {
        "laser": _PAPER,
        "exact": _PAPER,
        "magicpig": _PAPER,
        "finch": {"block_size": 1024},
    },
    "claims": (
        "earlier methods lose 15 to 30 % on BABILong",
        "LASER-KV is up to 10 % more accurate than they are at 128k",
    ),
    "notes": ("which further baselines the table has is not known to us; --policies adds any",),
}

PRESETS: dict[str, Preset] = {
    "paper-table1": Preset(lengths=(16384,), **_LASER),
    "paper-table2": Preset(lengths=(65536, 131072), **_LASER),
    "lagkv-passkey": Preset(
        source="LagKV, arXiv 2504.04704",
        models=("llama-3.1-8b-instruct",),
        tasks=("passkey",),
        lengths=(16384,),
        ratios=(0.5, 0.25, 0.125),
        policies=("full", "laser", "lagkv", "h2o"),
        claims=(
            "version 1: next to nothing is lost with half of the cache, a tenth with an eighth",
            "with a key of 64 digits LagKV is over 60 % (version 2: 50 %) better than H2O",
        ),
        notes=("the length, the samples and the quarter among the ratios are our choice",),
    ),
}


def is_expected(preset: Preset, model: Path) -> bool:
    """Whether the file is one of the models the preset expects, by name, size and hash."""
    known = models.entries()
    for name in preset.models:
        entry = known.get(name)
        if entry is None or model.name not in (
            entry.file,
            f"{entry.source.replace('/', '_')}_{entry.file}",
        ):
            continue
        if entry.size is not None and model.stat().st_size != entry.size:
            continue
        if entry.sha256 is None or digest(model) == entry.sha256:
            return True
    return False


def label(preset: Preset, model: Path, plan: Plan, source: Source, changed: bool) -> list[str]:
    """Whether a run may be called a reproduction, and if not why; and what is known to compare.

    Args:
        changed: settings of policies are other than the preset's.
    """
    reasons = []
    if not is_expected(preset, model):
        reasons.append(f"the model is {model.name}, not {' or '.join(preset.models)} of models.txt")
    names = [task.name for task in plan.tasks]
    for what, now, then in (
        ("tasks", names, preset.tasks),
        ("lengths", plan.lengths, preset.lengths),
        ("ratios", plan.ratios, preset.ratios),
    ):
        if list(now) != list(then):
            reasons.append(f"the {what} are others")
    if plan.samples != preset.samples:
        reasons.append(f"there are {plan.samples} samples, not {preset.samples}")
    missing = [name for name in preset.policies if name not in plan.settings]
    if missing:
        reasons.append(f"{', '.join(missing)} was not run")
    if changed or plan.block_size != preset.block_size or plan.predict is not None:
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
    if reasons:
        return [f"NOT a reproduction of {preset.source}: {'; '.join(reasons)}", *said]
    return [f"reproduction of {preset.source} with a quantised model, {model.name}", *said]


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
