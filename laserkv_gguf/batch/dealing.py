"""Groups of a batch dealt to actors of a Ray cluster: who is there, who died, what is asked again.

An actor gets groups once it has said that it is there, and no more than it needs to stay busy. When
it dies, or its node is lost, what it had been given goes to whoever is there; Ray starts it again
where there is room for it, and it gets groups again when it says so. A cluster that has become
smaller for good answers all the same.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from laserkv_gguf.batch.run import Group
from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.shown import first_line

log = logging.getLogger(__name__)

_TRIES = 3  # more, of a group whose actors die: something in it may be what kills them
_AHEAD = 2  # groups given to an actor, so that it has the next one when it has done one


@dataclass(eq=False)
class _Place:
    """An actor; whether it is there; and its groups by their tasks, as they were given."""

    actor: Any
    there: bool = False
    tasks: dict[Any, Group] = field(default_factory=dict)


class Deal:
    """All groups of a run, and the actors that answer them.

    Args:
        ray: the module.
        actors: with `ready`, which is asked again however often they die, and whose other tasks
            are not.
        groups: to answer.
    """

    def __init__(self, ray: Any, actors: Iterable[Any], groups: Iterable[Group]) -> None:
        self._ray = ray
        self._waiting = deque(groups)
        self._places = [_Place(actor) for actor in actors]
        self._calls: dict[Any, _Place] = {}
        self._deaths: Counter[int] = Counter()  # by a group's first question
        for place in self._places:
            self._call(place)

    def give(self, begin: Callable[[Group, Any], Any]) -> bool:
        """Gives what waits to those that are there; returns whether anything is still to come.

        Args:
            begin: the task of a group that an actor is given; None where it needs none.
        """
        for busy in range(_AHEAD):
            for place in self._places:
                while self._waiting and place.there and len(place.tasks) <= busy:
                    group = self._waiting.popleft()
                    if (task := begin(group, place.actor)) is not None:
                        place.tasks[task] = group
        return bool(self._waiting) or any(place.tasks for place in self._places)

    def results(self, seconds: float) -> Iterator[tuple[Group, Any]]:
        """Groups with what came of their tasks: what an actor returned, or a LaserKVError.

        Args:
            seconds: to wait for one at most; without one nothing comes.
        """
        tasks = {task: place for place in self._places for task in place.tasks}
        done, _ = self._ray.wait([*self._calls, *tasks], timeout=seconds)
        for task in done:
            if task in self._calls:
                yield from self._answered(task)
                continue
            place = tasks[task]
            try:
                found = self._ray.get(task)
            except self._ray.exceptions.RayTaskError as error:  # raised in the actor
                cause = error.cause if isinstance(error.cause, LaserKVError) else error
                found = LaserKVError(first_line(cause))
            except self._ray.exceptions.RayActorError:
                yield from self._died(place)
                continue
            except self._ray.exceptions.RayError as error:  # what it returned went with a node
                yield from self._again(place.tasks.pop(task), f"Ray: {first_line(error)}")
                continue
            yield place.tasks.pop(task), found

    def _call(self, place: _Place) -> None:
        self._calls[place.actor.ready.options(max_task_retries=-1).remote()] = place

    def _answered(self, call: Any) -> Iterator[tuple[Group, Any]]:
        """An actor is there, or never will be: then its places are less, down to none."""
        place = self._calls.pop(call)
        try:
            self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            why = _why_dead(error)
            self._places.remove(place)
            if self._places:
                log.warning("one engine of the cluster is missing: %s", why)
            while self._waiting and not self._places:
                yield self._waiting.popleft(), LaserKVError(why)
        else:
            place.there = True

    def _died(self, place: _Place) -> Iterator[tuple[Group, Any]]:
        """Its groups are asked again, the first of which may be what it died of."""
        log.info("an actor died with %d groups, which are asked again", len(place.tasks))
        groups = [*place.tasks.values()]
        place.tasks.clear()
        place.there = False
        self._call(place)
        self._waiting.extendleft(reversed(groups[1:]))
        yield from self._again(
            groups[0], f"the process that answered died {_TRIES + 1} times; see the cluster's logs"
        )

    def _again(self, group: Group, why: str) -> Iterator[tuple[Group, Any]]:
        """A group waits again, unless it has done so often enough."""
        self._deaths[group.indices[0]] += 1
        if self._deaths[group.indices[0]] > _TRIES:
            yield group, LaserKVError(why)
        else:
            self._waiting.appendleft(group)


def _why_dead(error: BaseException) -> str:
    """What ended an actor: its own error while it was made, or what Ray says."""
    for line in reversed(str(error).splitlines()):
        name, found, text = line.strip().partition("Error: ")
        if found and name.startswith("laserkv_gguf.errors."):
            return text
    return f"an engine cannot start: {first_line(error)}; see the cluster's logs"
