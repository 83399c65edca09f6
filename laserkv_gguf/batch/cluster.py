"""Groups of a batch answered by actors of a Ray cluster, an engine each.

All questions about one document are one task, so that a document is read where its questions are
answered. The driver is the process that the user started: it alone reads documents and the input,
and writes the output, so order, journal and going on are those of `run`. What an actor answered is
there when all of its group is: of one that dies nothing was written, and the group is answered
again, by another or by the one that Ray starts in its place (`dealing`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from laserkv_gguf import models
from laserkv_gguf.api import LaserKV
from laserkv_gguf.batch.dealing import Deal
from laserkv_gguf.batch.output import Stream
from laserkv_gguf.batch.questions import Input, Item
from laserkv_gguf.batch.run import Batch, Group
from laserkv_gguf.conversation.parallel import Spent
from laserkv_gguf.errors import Cancelled, LaserKVError, UserError, named_by_flags
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.shown import first_line

log = logging.getLogger(__name__)

LOCAL = "local"
_SECONDS = 5.0  # for a cluster to answer
_WAIT = 0.5  # seconds after which it is looked whether the run was cancelled

Lines = list[tuple[int, dict[str, Any]]]


class Answerer:
    """An engine that answers groups; what an actor is made of, and `ray.data`'s map as well.

    Args:
        engine: arguments of `LaserKV`; `model` is a path of the actor's machine, a name of
            models.txt, or None.
        batch: fields of `Batch` that say how questions are answered.
        flags: whether errors name the command line's flags.
    """

    def __init__(
        self, engine: Mapping[str, Any], batch: Mapping[str, Any], *, flags: bool = False
    ) -> None:
        given = dict(engine)
        model = models.find(given.pop("model"))
        self.engine = LaserKV(model, **given)
        self._batch = dict(batch)
        self._named = named_by_flags if flags else contextlib.nullcontext

    def ready(self) -> None:
        """Returns: the engine is there."""

    def answer(
        self, items: list[Item], text: str | None, answered: set[int]
    ) -> tuple[Lines, Spent]:
        """The lines of the questions about one document, by their places in `items`.

        Args:
            items: all questions about it.
            text: of the document; None for none.
            answered: places of those that have their line.
        """
        lines: Lines = []
        nowhere = Stream(io.BytesIO(), [])
        job = Batch(
            self.engine,
            Input(io.BytesIO(), items, ""),
            nowhere,
            lambda path: path,
            **self._batch,
        )
        group = Group(tuple(range(len(items))), frozenset(answered))
        with self._named():
            job.answer(group, lambda index, line: lines.append((index, line)), lambda: text)
        return lines, job.spent


def how(job: Batch) -> dict[str, Any]:
    """What an `Answerer` needs of a run."""
    names = ("sampling", "max_tokens", "system", "parallel", "read_once")
    return {name: getattr(job, name) for name in names}


class Cluster:
    """Actors of a Ray cluster that answer a batch. Use `with`.

    Args:
        job: the run; its engine is None.
        engine: arguments of `LaserKV`.
        address: of the cluster; "local" to start one on this machine that ends with this process.
        actors: how many; 0 for one a GPU, or one a node where there is none.

    Raises:
        UserError: Ray is not installed, no cluster is there, or it is of another version.
    """

    def __init__(self, job: Batch, engine: Mapping[str, Any], address: str, actors: int) -> None:
        self.job = job
        self._ray = ray = _connected(address)
        self._cancelled = threading.Event()
        sizes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        sizes = [size for size in sizes if size] or [1.0]  # a head may lend none
        cards = int(ray.cluster_resources().get("GPU", 0))
        count = actors or cards or len(sizes)
        # what no node has would be waited for without end; an engine a node must fit on each
        of_cores = min(sum(sizes) / count, max(sizes) if actors or cards else min(sizes))
        of_cores = float(int(of_cores)) if of_cores > 1 else of_cores
        options: dict[str, Any] = {"num_cpus": of_cores, "max_restarts": -1}
        if cards:
            options["num_gpus"] = 1 if cards >= count else cards / count
        else:
            options["scheduling_strategy"] = "SPREAD"
        context = engine["context"]
        if context.threads is None and not cards:
            context = replace(context, threads=max(1, int(of_cores)))
        make = ray.remote(**options)(Answerer)
        given = ray.put({**engine, "context": context}), ray.put(how(job))
        self._actors = [make.remote(*given, flags=True) for _ in range(count)]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()

    def cancel(self) -> None:
        """Ends the run; what was answered is kept."""
        self._cancelled.set()

    def run(self) -> None:
        """Answers what has not been answered yet.

        Raises:
            OutputError, Cancelled, KeyboardInterrupt, Stopped: as of `Batch.run`.
            LaserKVError: the cluster is gone.
        """
        job = self.job
        job.refuse()
        deal = Deal(self._ray, self._actors, job.groups())
        while deal.give(self._begun):
            for group, found in deal.results(_WAIT):
                self._finish(group, found)
            if self._cancelled.is_set():
                raise Cancelled("cancelled")

    def _begun(self, group: Group, actor: Any) -> Any:
        """The task of a group; None where its document cannot be read, which its lines say."""
        job = self.job
        try:
            text = job.document_of(group)
        except LaserKVError as error:
            job.failed(group, error)
            return None
        items = [job.questions.items[index] for index in group.indices]
        answered = {at for at, index in enumerate(group.indices) if index in group.answered}
        return actor.answer.remote(items, text, answered)

    def _finish(self, group: Group, found: Any) -> None:
        """Writes what came of a group."""
        job = self.job
        if isinstance(found, LaserKVError):
            job.failed(group, found)
            return
        job.documents += 1
        lines, spent = found
        for at, line in lines:
            job.add(group.indices[at], line)
        for name in ("reading", "readings", "answering", "tokens"):
            setattr(job.spent, name, getattr(job.spent, name) + getattr(spent, name))


def _connected(address: str) -> Any:
    """Ray, connected to a cluster.

    Raises:
        UserError: with the remedy in one line.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            "batch --ray needs Ray; install it with pip install 'laserkv-gguf[ray]'"
        ) from None
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    _check(address)
    try:
        if address == LOCAL:
            # on this machine alone: nobody else is to reach it
            ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        else:
            ray.init(address=address, **quiet)
    except RuntimeError as error:
        if "ersion mismatch" in str(error):
            raise UserError(
                f"the Ray cluster at {address} has another Python or Ray: "
                f"{' '.join(str(error).split())[:300]}; install the same ones here"
            ) from None
        raise UserError(f"Ray cannot start: {first_line(error)}; see --debug") from error
    except (ConnectionError, OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster at {address} ({first_line(error)}); start one with ray start --head, "
            "or give --ray without an address"
        ) from None
    return ray


def _check(address: str) -> None:
    """Refuses an address where nothing listens, for which Ray would wait for minutes.

    Raises:
        UserError: with the remedy in one line.
    """
    host, found, port = address.removeprefix("ray://").rpartition(":")
    if not (found and port.isdigit()):
        return  # "local", or "auto": Ray knows whether there is one
    try:
        socket.create_connection((host, int(port)), _SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster at {address} ({first_line(error)}); start one with ray start --head, "
            "or give --ray without an address"
        ) from None


class Documents:
    """Answers rows of a `ray.data` data set: a row holds a document and all of its questions.

        ray.data.from_items([{"document": text, "questions": ["Who is Jack's mother?"]}]).map(
            Documents,
            fn_constructor_kwargs={"model": "llama3.gguf", "ratio": 0.25},
            compute=ray.data.ActorPoolStrategy(size=2),
            num_gpus=1,
        )

    gives every row `answers` and `errors`, one for each question, of which one is empty. Rows of
    one question each would have every document read again and again.

    Args:
        model: a path of the actor's machine, a name of models.txt, or None for the embedded one.
        max_tokens, system, sampling, parallel, read_once: as of `Batch`.
        **engine: other arguments of `LaserKV`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        max_tokens: int = 512,
        system: str | None = None,
        sampling: Sampling | None = None,
        parallel: int = 4,
        read_once: bool = False,
        **engine: Any,
    ) -> None:
        batch = {
            "sampling": sampling or Sampling(temperature=0.0),
            "max_tokens": max_tokens,
            "system": system,
            "parallel": parallel,
            "read_once": read_once,
        }
        self._answerer = Answerer({"model": model, **engine}, batch)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        questions = [str(question) for question in row["questions"]]
        items = [Item(at + 1, at, question=question) for at, question in enumerate(questions)]
        lines, _ = self._answerer.answer(items, row["document"], set())
        by_place = dict(lines)
        return {
            **row,
            "answers": [by_place[at].get("answer", "") for at in range(len(items))],
            "errors": [by_place[at].get("error", "") for at in range(len(items))],
        }
