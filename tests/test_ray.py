"""`batch --ray` on actors of this machine: killed at random, nothing is lost and nothing twice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rpc_device import ROOT, rpc_environment
from tiny import TinySpec, make

pytestmark = pytest.mark.ray
SECONDS = 900.0
QUESTIONS, DOCUMENTS, ACTORS = 200, 40, 4
TEXT = "The quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray")
    make(path, "model.gguf", spec=TinySpec(ctx_train=2048))
    (path / "one.txt").write_text(TEXT)
    with (path / "questions.jsonl").open("w") as file:
        for number in range(QUESTIONS):
            line: dict[str, Any] = {"id": number, "question": f"What is {number}?"}
            if number % 7 == 0:
                line["document_path"] = "one.txt"
            else:
                line["document"] = f"{TEXT} {number % DOCUMENTS}"
            if number == 13:
                line = {"id": number}  # cannot be asked, here as there
            file.write(json.dumps(line) + "\n")
    return path


def command(folder: Path, out: str, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "laserkv_gguf", "batch", "-m", str(folder / "model.gguf")),
        *("-i", str(folder / "questions.jsonl"), "-o", str(folder / out), "-n", "8"),
        # one at a time, each read for itself: what shares a batch with others, and rows that come
        # back after another question, may be rounded otherwise
        *("--block-size", "64", "-t", "1", "--parallel", "1", "--recall", "off", *flags),
    ]


def started(arguments: list[str]) -> subprocess.Popen[str]:
    """In a session of its own, which can be killed as a whole."""
    return subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**rpc_environment(), "RAY_DISABLE_IMPORT_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[bytes]:
    """The file of a run without Ray, which all others are held against."""
    process = started(command(folder, "alone.jsonl"))
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, err  # of the question that cannot be asked
    return written(folder / "alone.jsonl")


def written(path: Path) -> list[bytes]:
    """Lines without the seconds that answers took, and speeds made of them."""
    number = r"(?:[\d.e+-]+|null)"
    timed = re.compile(rf'"(\w*(?:seconds|per_second|overhead_share)\w*)": {number}'.encode())
    return [timed.sub(rb'"\1": 0', line) for line in path.read_bytes().splitlines()]


def actors_of(pid: int) -> list[int]:
    """Processes of actors that descend from a process."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_bytes()
        except OSError:
            continue

    def descends(one: int) -> bool:
        while one in parents:
            if one == pid:
                return True
            one = parents[one]
        return False

    return [one for one, name in names.items() if b"ray::Answerer" in name and descends(one)]


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def test_actors_and_the_driver_are_killed(folder: Path, alone: list[bytes]) -> None:
    """The driver twice, actors at random in between; then the file is the one of a run alone."""
    out, chance = folder / "killed.jsonl", random.Random(7)
    flags = ("--ray", "--ray-actors", str(ACTORS))

    for goal in (50, 110):
        process = started(command(folder, out.name, *flags))
        assert process.stderr
        with process, process.stderr:
            before = done(out)
            until(lambda before=before: done(out) > before, process)  # type: ignore[misc]
            killed = 0
            while done(out) < goal:
                there = actors_of(process.pid)
                if there and killed < 3:
                    os.kill(chance.choice(there), signal.SIGKILL)
                    killed += 1
                at = done(out)
                until(lambda at=at, goal=goal: done(out) >= min(at + 8, goal), process)  # type: ignore[misc]
            process.kill()
    process = started(command(folder, out.name, *flags))
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, err
    found = written(out)
    assert len(found) == QUESTIONS
    assert found == alone


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of two nodes of this machine, one core each, that no other machine reaches."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # there it is for 127.0.0.1
    from ray.cluster_utils import Cluster

    own = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=own)
    try:
        cluster.add_node(**own)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def test_a_node_is_lost(folder: Path, alone: list[bytes], nodes: Any) -> None:
    """In the middle, for good: there is no room for its actor elsewhere, so the other does all.

    Its actor is halted first, so that it certainly has questions that it never answers.
    """
    out = folder / "lost.jsonl"
    process = started(command(folder, out.name, "--ray", nodes.address))
    (lost,) = nodes.worker_nodes
    raylet = lost.all_processes["raylet"][0].process.pid
    assert process.stderr
    with process.stderr:
        until(lambda: bool(actors_of(raylet)) and done(out) >= 60, process)
        (actor,) = actors_of(raylet)
        os.kill(actor, signal.SIGSTOP)
        at = done(out)
        until(lambda: done(out) >= at + 20, process)  # by the other
        nodes.remove_node(lost, allow_graceful=False)
        os.kill(actor, signal.SIGKILL)
        err = process.stderr.read()
    assert process.wait(SECONDS) == 1, err
    assert written(out) == alone


def done(out: Path) -> int:
    """Questions that are answered, also those whose lines wait for their turn."""
    lines = out.read_bytes().count(b"\n") if out.exists() else 0
    record = out.with_name(out.name + ".run")
    return lines + (record.read_bytes().count(b'{"index"') if record.exists() else 0)


def test_more_actors_answer_sooner(folder: Path, alone: list[bytes]) -> None:
    """One actor and two, in one run: the times are printed, that all agree is tested."""
    took = {}
    for count in (1, 2):
        begun = time.monotonic()
        process = started(
            command(folder, f"{count}.jsonl", "--ray", "--ray-actors", str(count), "--json")
        )
        _, err = process.communicate(timeout=SECONDS)
        took[count] = time.monotonic() - begun
        assert process.returncode == 1, err
        assert written(folder / f"{count}.jsonl") == alone
    print(f"\none actor {took[1]:.1f} s, two {took[2]:.1f} s")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ray", "127.0.0.1:1"), "no Ray cluster at 127.0.0.1:1"),
        (("--ray-actors", "2"), "give a number of engines, with --ray"),
        (("--ray", "--rpc", "127.0.0.1:1"), "--ray goes without --report, --rpc"),
    ],
)
def test_what_cannot_be(flags: tuple[str, ...], said: str, folder: Path) -> None:
    process = started(command(folder, "never.jsonl", *flags))
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, err
    assert said in err
    assert len(err.splitlines()) == 1, err


@pytest.fixture
def local() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield ray
    ray.shutdown()


def test_a_data_set_is_answered(local: Any, folder: Path) -> None:
    """The form for those who have a data set: a row a document, with all of its questions."""
    import ray.data

    from laserkv_gguf.batch.cluster import Documents

    rows = [
        {"document": f"{TEXT} {number}", "questions": ["What?", "And who?"], "id": number}
        for number in range(4)
    ]
    answered = ray.data.from_items(rows).map(
        Documents,
        fn_constructor_kwargs={
            "model": str(folder / "model.gguf"),
            "max_tokens": 6,
            "block_size": 64,
            "parallel": 1,
            "recall": "off",  # as `ask` does by itself
        },
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )
    found = sorted(answered.take_all(), key=lambda row: row["id"])
    from laserkv_gguf import LaserKV

    with LaserKV(folder / "model.gguf", block_size=64) as engine:
        for row in found:
            for question, answer in zip(row["questions"], row["answers"], strict=True):
                reply = engine.ask(question, document=row["document"], max_tokens=6)
                assert answer == reply.text
