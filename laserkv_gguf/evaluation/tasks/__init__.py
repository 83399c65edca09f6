"""All tasks by name, and groups of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation.tasks.babilong import BABILONG
from laserkv_gguf.evaluation.tasks.base import Task
from laserkv_gguf.evaluation.tasks.cwe import Cwe
from laserkv_gguf.evaluation.tasks.fidelity import Fidelity
from laserkv_gguf.evaluation.tasks.fwe import Fwe
from laserkv_gguf.evaluation.tasks.niah import NIAH
from laserkv_gguf.evaluation.tasks.passkey import Passkey
from laserkv_gguf.evaluation.tasks.qa import QA
from laserkv_gguf.evaluation.tasks.vt import VariableTracking

__all__ = ["GROUPS", "TASKS", "Task", "find"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (*BABILONG, *NIAH, VariableTracking(), Cwe(), Fwe(), *QA, Passkey(), Fidelity())
}
_NIAH = tuple(task.name for task in NIAH)
GROUPS: dict[str, tuple[str, ...]] = {
    "babilong": tuple(task.name for task in BABILONG),
    "niah": _NIAH,
    "ruler": (*_NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2"),
}


def find(names: Iterable[str]) -> list[Task]:
    """The tasks of names and groups, each once, in the order given.

    Raises:
        UserError: an unknown name; near ones are named.
    """
    found: dict[str, Task] = {}
    for name in names:
        for one in GROUPS.get(name, (name,)):
            if one not in TASKS:
                known = [*GROUPS, *TASKS]
                near = difflib.get_close_matches(one, known, n=3, cutoff=0.5) or known
                raise UserError(f"task {one} is unknown; use {', '.join(near)}")
            found[one] = TASKS[one]
    return list(found.values())
