"""`doctor`: what this machine and build can do."""

from __future__ import annotations

import json
from typing import Annotated, Optional

from typer import Option

from laserkv_gguf.cli import streams, terminal
from laserkv_gguf.cli.options import log_to_stderr

MARKS = {"good": "green", "degraded": "yellow", "bad": "red"}


def doctor(
    model: Annotated[
        Optional[str],  # noqa: UP045
        Option("-m", "--model", help="GGUF file or name to try things on; else the embedded one."),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one object: findings.")] = False,
    debug: Annotated[bool, Option("--debug", help="llama.cpp's log, and tracebacks.")] = False,
) -> int:
    """Check versions, build, devices, caches and what llama.cpp is relied upon for.

    Exit code 1 where anything is bad.
    """
    log_to_stderr(debug)
    from rich.text import Text

    from laserkv_gguf.doctor import BAD, examine

    console, findings = terminal.Console(highlight=False), []
    for finding in examine(model, debug=debug):
        findings.append(finding)
        if as_json:
            continue
        line = Text(f"{finding.state:<9}", style=MARKS[finding.state])
        line.append(f"{finding.name}: {finding.said}", style="default")
        if finding.advice:
            line.append(f"\n          {finding.advice}", style="dim")
        console.print(line, soft_wrap=True)
    if as_json:
        said = {"findings": [finding.as_dict() for finding in findings]}
        streams.say(json.dumps(said), end="\n")
    return int(any(finding.state == BAD for finding in findings))
