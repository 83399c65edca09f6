"""Runs samples under policies and ratios; results come as they are made."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

from laserkv_gguf.api import LaserKV
from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import Cancelled, Closed, LaserKVError, UserError
from laserkv_gguf.evaluation import measure
from laserkv_gguf.evaluation.peers import PEERS, Case, Peer
from laserkv_gguf.evaluation.results import Results, Row
from laserkv_gguf.evaluation.samples import Sample, Source
from laserkv_gguf.evaluation.tasks import Task
from laserkv_gguf.evaluation.tasks.fidelity import Fidelity
from laserkv_gguf.models.identity import identity

_SPEED_ONLY = ("threads", "threads_batch", "batch_size", "outputs")  # of the context's options
Cell = tuple[str, str, int, float]
BLOCK, BLOCKS = 4096, 4  # where no block size is given: S, and the least number of blocks


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        settings: by policy, what the engine is configured with; may hold a block size of its own,
            and the policy's name where it stands there under another one, such as with options.
            A peer (`peers.PEERS`) stands among the policies.
        block_size: of the others; 0 for 4096, or a quarter of the length where that is shorter.
        predict: most tokens of an answer; None for what each task has.
        keep: tokens to keep, instead of ratios.
    """

    tasks: Sequence[Task]
    lengths: Sequence[int]
    ratios: Sequence[float]
    samples: int
    settings: Mapping[str, Mapping[str, Any]]
    block_size: int = 0
    predict: int | None = None
    keep: int | None = None

    def ratios_at(self, length: int) -> Sequence[float]:
        """What is run for documents of that length; of `keep` its share of the document."""
        return self.ratios if self.keep is None else (round(min(self.keep / length, 1), 4),)

    def block(self, policy: str, length: int) -> int:
        own = self.settings.get(policy, {}).get("block_size", 0) or self.block_size
        return int(own) or min(BLOCK, max(1, length // BLOCKS))

    @property
    def largest_block(self) -> int:
        return max(self.block(policy, n) for policy in self.settings for n in self.lengths)


@dataclass
class Runner:
    """Samples one after the other, each under all policies and ratios.

    Args:
        engine: its context serves all policies.
        results: rows that are there already are not run again.
    """

    engine: LaserKV
    source: Source
    plan: Plan
    # of each policy, at each length
    ratios: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    # (policy, task, length, ratio) that are not run, and why
    left_out: dict[Cell, str] = field(default_factory=dict)
    _peers: dict[str, Peer] = field(default_factory=dict)

    def close(self) -> None:
        """Frees what peers made for themselves."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    # before anything runs

    def check(self, *, skip: bool = False) -> list[str]:
        """Refuses what cannot run, before anything does.

        Args:
            skip: leave policies out that cannot run instead.

        Returns:
            What is left out and why, a line each: policies, and what peers cannot do of the rest.

        Raises:
            UserError: no data, background too short, a policy that refuses, too few cells.
        """
        samples = [
            (task, length, self._sample(task, length, number))
            for task in self.plan.tasks
            for length in self.plan.lengths
            for number in sorted({self.plan.samples - 1, 0}, reverse=True)
        ]
        notes = []
        with _said_once():
            for policy in self.plan.settings:
                try:
                    self.ratios[policy] = {n: self._distinct(policy, n) for n in self.plan.lengths}
                    if policy in PEERS:
                        notes += self._check_peer(policy, samples)
                        continue
                    for task, length, sample in samples:
                        self._check(policy, task, length, sample)
                except _NothingEvicted:
                    raise
                except UserError as error:
                    if not skip:
                        raise
                    self._drop(policy)
                    notes.append(f"{policy} is left out: {error}")
        if not self.ratios:
            raise UserError(f"no policy is left to run: {notes[-1]}")
        return notes

    def _sample(self, task: Task, length: int, number: int) -> Sample:
        return task.sample(self.source, length, number)

    def _distinct(self, policy: str, length: int) -> list[float]:
        """The ratios, or the one that all come to where a policy does not ask for it."""
        wanted = self.plan.ratios_at(length)
        if policy in PEERS:
            return self._peer(policy).ratios(self.engine, wanted)
        budgets: dict[Budget, float] = {}
        for ratio in wanted:
            self._configure(policy, ratio, length)
            budget = self.engine.budget(10**6)
            budgets.setdefault(budget, budget.ratio if budget.keeps_all else ratio)
        return list(budgets.values())

    def _check(self, policy: str, task: Task, length: int, sample: Sample) -> None:
        for ratio in self.ratios[policy][length]:
            self._configure(policy, ratio, length, task)
            talk = measure.conversation(self.engine, task, sample, self._predict(task))
            try:
                budget = talk.check(self._asked(task, sample))
            except UserError as error:
                raise UserError(f"{policy} at {length} tokens: {error}") from error
            if budget.keeps_all and budget.ratio < 1:
                raise _NothingEvicted(
                    f"{task.name} of {length} tokens is one block of {budget.block_size}, of which "
                    f"nothing is evicted; use --block-size {max(1, length // BLOCKS)}"
                )

    # peers

    def _peer(self, name: str) -> Peer:
        if name not in self._peers:
            self._peers[name] = PEERS[name]()
        return self._peers[name]

    def _case(self, name: str, task: Task, length: int, sample: Sample, ratio: float) -> Case:
        self._configure(name, ratio, length, task)
        return Case(self.engine, task, sample, self._predict(task), ratio, self.plan.keep)

    def _check_peer(self, name: str, samples: Iterable[tuple[Task, int, Sample]]) -> list[str]:
        """Finds out what a peer cannot do.

        Raises:
            UserError: it can do nothing of what is asked for.
        """
        found: dict[Cell, str] = {}
        cells = set()
        for task, length, sample in samples:
            for ratio in self.ratios[name][length]:
                cell = (name, task.name, length, ratio)
                cells.add(cell)
                try:
                    self._peer(name).check(self._case(name, task, length, sample, ratio))
                except UserError as error:
                    found.setdefault(cell, str(error))
        if len(found) == len(cells):
            raise UserError(next(iter(found.values())))
        self.left_out.update(found)
        return [not_run(cell, said) for cell, said in found.items()]

    def _drop(self, policy: str) -> None:
        self.ratios.pop(policy, None)
        if policy in self._peers:
            self._peers.pop(policy).close()

    # what is run

    def config(self) -> dict[str, Any]:
        """All that decides the results; a stopped run only goes on with the same."""
        plan, source, model = self.plan, self.source, self.engine.model
        babi = None if source.babi is None else _digest(sorted(source.babi.glob("qa*.txt")))
        options = asdict(self.engine.options)
        for name in _SPEED_ONLY:
            del options[name]
        return {
            "model": {"name": model.name, **asdict(identity(model.path))},
            "tasks": [task.name for task in plan.tasks],
            "lengths": list(plan.lengths),
            "samples": plan.samples,
            "seed": source.seed,
            "policies": {
                name: {**plan.settings[name], "ratios": sorted(set(chain(*r.values())))[::-1]}
                for name, r in self.ratios.items()
            },
            "block_size": plan.block_size,
            "predict": plan.predict,
            **({} if plan.keep is None else {"keep": plan.keep}),
            "background": source.background.digest,
            "babi": babi,
            **_files(squad=source.squad, hotpotqa=source.hotpotqa),
            "prompts": dict(source.prompts),
            "context": {**options, "cells": self.engine.ctx_size},
            **model.placement.changes(),
        }

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """What was run, for the head of a summary.

        Args:
            config: of all results that are shown.
        """
        model = self.engine.model
        blocks = [f"{self.plan.block('', n):,} at {n:,} tokens" for n in config["lengths"]]
        return [
            f"date: {date.today().isoformat()}",
            f"model: {model.name} ({model.description}), {model.path.name}",
            f"samples: {config['samples']} a task and length, seed {self.source.seed}; "
            f"background: {self.source.background.name}",
            f"block size: {', '.join(blocks)}",
            *self._said_of_recall(),
            *(f"not run: {not_run(cell, said)}" for cell, said in self.left_out.items()),
        ]

    def _said_of_recall(self) -> list[str]:
        given = {str(one.get("recall", "off")) for one in self.plan.settings.values()}
        given -= {"off", "auto"}
        return [
            f"recall: {where}; documents are read before their question is known, and recalled for "
            "it before it is asked (fidelity asks nothing: it is read without recall)"
            for where in sorted(given)
        ]

    # running

    @property
    def total(self) -> int:
        """Rows there will be."""
        cells = sum(len(ratios) for lengths in self.ratios.values() for ratios in lengths.values())
        return (cells * len(self.plan.tasks) - len(self.left_out)) * self.plan.samples

    def among(self, rows: Iterable[Row]) -> list[Row]:
        """Those of some rows that this run asks for."""
        names = {task.name for task in self.plan.tasks}
        return [
            row
            for row in rows
            if row["task"] in names
            and row["length"] in self.plan.lengths
            and row["sample"] < self.plan.samples
            and row["ratio"] in self.ratios.get(row["policy"], {}).get(row["length"], ())
            and (row["policy"], row["task"], row["length"], row["ratio"]) not in self.left_out
        ]

    def run(self, results: Results, on_row: Callable[[Row], None] | None = None) -> None:
        """Runs what `results` does not hold yet.

        Raises:
            Cancelled, KeyboardInterrupt: rows so far are written.
            LaserKVError: a row cannot be written. What goes wrong with a sample is its row instead.
        """
        with _said_once():
            for task in self.plan.tasks:
                for length in self.plan.lengths:
                    for number in range(self.plan.samples):
                        for row in self._rows(task, length, number, results):
                            results.add(row)
                            if on_row:
                                on_row(row)

    def _rows(self, task: Task, length: int, number: int, results: Results) -> Iterator[Row]:
        """The rows of one sample that are missing."""
        begun = {"task": task.name, "length": length, "sample": number}
        wanted = {
            policy: [
                r
                for r in ratios[length]
                if (task.name, length, number, policy, r) not in results.done
                and (policy, task.name, length, r) not in self.left_out
            ]
            for policy, ratios in self.ratios.items()
        }
        if not any(wanted.values()):
            return
        sample = full = reads = None
        spent = 0.0
        failed: LaserKVError | None = None
        try:
            sample = self._sample(task, length, number)
            if isinstance(task, Fidelity):
                started = time.perf_counter()
                reads = self._read(task, length, sample, "full", 1.0)
                spent = time.perf_counter() - started
                full = measure.reference(sample, reads, self._predict(task))
        except (Cancelled, Closed):
            raise
        except LaserKVError as error:
            failed = error
        for policy, ratios in wanted.items():
            # what `full` is to be compared with has just been read by it
            talk, reads = (reads if policy == "full" else None), None
            known = talk is not None
            for ratio in ratios:
                started = time.perf_counter() - (spent if known else 0)
                try:
                    if sample is None or failed:
                        raise failed or LaserKVError("no sample")
                    if not (talk and (known or talk.choose_again(ratio))):
                        talk = self._read(task, length, sample, policy, ratio, len(ratios) > 1)
                    found = (
                        measure.compared(sample, talk, full)
                        if full
                        else measure.answered(task, sample, talk, self._predict(task))
                    )
                    if policy in PEERS:  # what it did not read is not kept either
                        case = self._case(policy, task, length, sample, ratio)
                        found["read_tokens"] = len(case.sequence)
                except (Cancelled, Closed):
                    raise
                except LaserKVError as error:
                    found, talk = _failure(sample, error), None
                seconds = round(time.perf_counter() - started, 3)
                yield {**begun, "policy": policy, "ratio": ratio, **found, "seconds": seconds}

    def _read(
        self,
        task: Task,
        length: int,
        sample: Sample,
        policy: str,
        ratio: float,
        again: bool = False,
    ) -> Conversation:
        """Reads the document; `again`: for other ratios too, where the policy can."""
        if policy in PEERS:
            return self._peer(policy).read(self._case(policy, task, length, sample, ratio))
        self._configure(policy, ratio, length, task)
        talk = measure.conversation(self.engine, task, sample, self._predict(task))
        talk.read(question=self._asked(task, sample), keep_all_cells=again)
        return talk

    def _asked(self, task: Task, sample: Sample) -> str | None:
        """What the document is read for; with recall the question comes later."""
        recalls = self.engine.demand.recall != "off" and self.engine.policy.name != "full"
        return None if recalls else measure.question(task, sample)

    def _configure(self, policy: str, ratio: float, length: int, task: Task | None = None) -> None:
        settings = dict(self.plan.settings.get(policy, {}))
        settings.update(ratio=ratio, block_size=self.plan.block(policy, length))
        if policy in PEERS:
            settings.update(policy="full", ratio=1.0, keep=None, recall="off")
        else:
            settings.setdefault("policy", policy)
            if settings.get("recall", "auto") in ("off", "auto"):
                settings["read_policy"] = "same"  # what is named is measured
            settings["keep"] = self.plan.keep
        if isinstance(task, Fidelity):
            settings["recall"] = "off"
        self.engine.configure(**settings)

    def _predict(self, task: Task) -> int:
        return self.plan.predict or task.max_tokens


def not_run(cell: Cell, why: str) -> str:
    """A cell of the table that stays empty, in words."""
    policy, task, length, ratio = cell
    return f"{policy} on {task} of {length:,} tokens at r = {ratio:g}: {why}"


class _NothingEvicted(UserError):
    """Every policy would keep everything: there is nothing to compare."""


def _failure(sample: Sample | None, error: LaserKVError) -> Row:
    """The row of a sample that could not be run."""
    return {
        "document_tokens": len(sample.tokens) if sample else None,
        "kept_tokens": None,
        "gold": list(sample.golds) if sample else None,
        "prediction": None,
        "score": None,
        "gold_logprob": None,
        "error": str(error),
    }


@contextmanager
def _said_once() -> Iterator[None]:
    """Says each warning of the session once, not with every sample."""
    log, said = logging.getLogger("laserkv_gguf.engine.engine"), set[str]()

    def first(record: logging.LogRecord) -> bool:
        new = record.msg not in said
        said.add(record.msg)
        return new

    log.addFilter(first)
    try:
        yield
    finally:
        log.removeFilter(first)


def _files(**paths: Path | None) -> dict[str, str]:
    """Of the files that were named, a digest of each."""
    return {name: _digest([path]) for name, path in paths.items() if path is not None}


def _digest(paths: Sequence[Path]) -> str:
    """Of the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
