"""The rules of CONTRIBUTING: imports run down, and what is private stays in its file."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "laserkv_gguf"
# other libraries' own: what Python and Numba offer under no other name, and what is barred to
# templates
FOREIGN = {"_exit", "_cache", "_load_index", "_Namespace__attrs", "_is_owned"}


def test_imports_run_down_and_meet_in_no_circle() -> None:
    """As pyproject.toml has it; imports for type checking count.

    In a process of its own: import-linter switches off the loggers that are there before it.
    """
    code = "from importlinter.cli import lint_imports; exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _names(target: ast.expr) -> Iterator[str]:
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Attribute):
        yield target.attr
    elif isinstance(target, ast.Tuple | ast.List):
        for one in target.elts:
            yield from _names(one)


def _defined(tree: ast.AST) -> set[str]:
    """All names that a file gives to something."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                found.update(_names(target))
        elif isinstance(node, ast.AnnAssign):
            found.update(_names(node.target))
    return found


def _foreign(text: str) -> list[str]:
    """Private names that a file uses and does not define, and those that it imports."""
    tree = ast.parse(text)
    own, found = _defined(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and node.attr not in own | FOREIGN:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("laserkv_gguf"):
            found += [
                f"line {node.lineno}: import {alias.name}"
                for alias in node.names
                if alias.name.startswith("_") and not _is_module(node.module or "", alias.name)
            ]
    return found


def _is_module(module: str, name: str) -> bool:
    return (ROOT / module.replace(".", "/") / f"{name}.py").exists()


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_private_names_stay_in_their_file(path: Path) -> None:
    assert _foreign(path.read_text("utf-8")) == []


def test_the_rule_finds_what_it_forbids() -> None:
    assert _foreign("engine._context.close()") == ["line 1: engine._context"]
    assert _foreign("from laserkv_gguf.llama.rows import _heads") == ["line 1: import _heads"]
    assert _foreign("class A:\n def f(self):\n  self._a = 1\n  return self._a") == []


DOCUMENTED = re.findall(
    r"(?m)^::: (\S+)", "\n".join(path.read_text("utf-8") for path in ROOT.glob("docs/*.md"))
)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_the_docs_list_says_what_it_is(name: str) -> None:
    """Classes, functions and methods have a docstring; a dataclass names its fields in its own."""
    found = pydoc.locate(name)
    assert inspect.getdoc(found)
    if not inspect.isclass(found):
        return
    for key, member in vars(found).items():
        called = getattr(member, "fget", getattr(member, "__func__", member))
        if inspect.isfunction(called) and not key.startswith("_"):
            assert inspect.getdoc(getattr(found, key)), key
    if dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            assert re.search(rf"\b{field.name}\b", found.__doc__ or ""), field.name
