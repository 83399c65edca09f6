"""Groups of a batch and actors that come, die and stay away, without a cluster."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from laserkv_gguf.batch.dealing import Deal
from laserkv_gguf.batch.run import Group
from laserkv_gguf.errors import LaserKVError


class RayError(Exception):
    """As Ray's: of every kind below."""


class RayTaskError(RayError):
    cause: Exception | None = None


class RayActorError(RayError):
    pass


class Actor:
    """Answers a group at a time, as it stands in its queue; dies of some."""

    def __init__(self, ray: Ray, dies_of: int | None = None, fails: str = "") -> None:
        self.ray, self.dies_of, self.fails = ray, dies_of, fails
        self.queue: deque[str] = deque()
        self.deaths, self.asked = 0, list[int]()
        self.ready = SimpleNamespace(options=self._options)

    def _options(self, *, max_task_retries: int) -> Any:
        assert max_task_retries == -1
        return SimpleNamespace(remote=lambda: self.ray.task(self, "ready"))

    def begin(self, group: Group) -> str:
        task = self.ray.task(self, group.indices[0])
        self.queue.append(task)
        return task


class Ray:
    """What `Deal` uses of Ray: tasks end when they are waited for, the first ones first."""

    exceptions = SimpleNamespace(
        RayError=RayError, RayTaskError=RayTaskError, RayActorError=RayActorError
    )

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[Actor, Any]] = {}
        self.lost: set[int] = set()

    def task(self, actor: Actor, what: Any) -> str:
        name = f"task {len(self.tasks)}"
        self.tasks[name] = actor, what
        return name

    def wait(self, tasks: list[str], timeout: float) -> tuple[list[str], list[str]]:
        assert tasks, "there is nothing to wait for"
        for task in tasks:
            actor, what = self.tasks[task]
            if what == "ready" or actor.queue[0] == task:
                return [task], [other for other in tasks if other != task]
        raise AssertionError("what is waited for is not what runs")

    def get(self, task: str) -> Any:
        actor, what = self.tasks[task]
        if what == "ready":
            if actor.fails:
                raise RayActorError(f"Traceback\n  laserkv_gguf.errors.UserError: {actor.fails}")
            return None
        assert actor.queue.popleft() == task
        actor.asked.append(what)
        if what == actor.dies_of:
            actor.queue.clear()
            actor.deaths += 1
            raise RayActorError("unavailable")
        if what in self.lost:
            self.lost.discard(what)
            raise RayError("the object is lost")
        return what


def run(ray: Ray, actors: list[Actor], count: int) -> dict[int, Any]:
    """What came of so many groups, each of which must have one result."""
    results: dict[int, Any] = {}
    deal = Deal(ray, actors, [Group((number,)) for number in range(count)])
    while deal.give(lambda group, actor: actor.begin(group)):
        for group, found in deal.results(1.0):
            assert group.indices[0] not in results
            results[group.indices[0]] = found
    assert sorted(results) == list(range(count))
    return results


def test_every_group_is_answered_once() -> None:
    ray = Ray()
    actors = [Actor(ray) for _ in range(3)]
    assert run(ray, actors, 20) == {number: number for number in range(20)}
    assert sorted(group for actor in actors for group in actor.asked) == list(range(20))


def test_a_group_that_kills_is_given_up_and_its_neighbours_are_not() -> None:
    """Of two groups that an actor has, the first is to blame."""
    ray = Ray()
    actors = [Actor(ray, dies_of=4), Actor(ray, dies_of=4)]
    results = run(ray, actors, 12)
    assert isinstance(results[4], LaserKVError)
    assert "died 4 times" in str(results[4])
    assert sum(actor.deaths for actor in actors) == 4
    assert {number: found for number, found in results.items() if number != 4} == {
        number: number for number in range(12) if number != 4
    }


def test_what_went_with_a_node_is_asked_again() -> None:
    ray = Ray()
    ray.lost = {0, 5}
    actor = Actor(ray)
    assert run(ray, [actor], 8) == {number: number for number in range(8)}
    assert actor.asked.count(5) == 2


def test_an_engine_that_cannot_start_leaves_the_rest_to_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray = Ray()
    there = Actor(ray)
    assert len(run(ray, [Actor(ray, fails="no such model"), there], 6)) == 6
    assert sorted(there.asked) == list(range(6))
    assert caplog.messages == ["one engine of the cluster is missing: no such model"]
    ray = Ray()
    results = run(ray, [Actor(ray, fails="no such model") for _ in range(2)], 3)
    assert {str(found) for found in results.values()} == {"no such model"}


def test_documents_that_cannot_be_read_need_no_actor() -> None:
    ray = Ray()
    deal = Deal(ray, [Actor(ray)], [Group((0,)), Group((1,))])
    assert deal.give(lambda *_: None)  # nobody is there yet
    assert list(deal.results(1.0)) == []
    assert not deal.give(lambda *_: None)
