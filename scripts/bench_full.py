"""The whole table of the README: every length, every model, and the Markdown of it.

    python scripts/bench_full.py --model Q4_0.gguf --model Q8_0.gguf --out results/full
        [--lengths 4096,8192,16384,32768] [options of bench]

Runs `bench` for one model after the other into DIR/NAME (its JSON, Markdown, plots and every run as
it comes) and writes DIR/table.md. The same command goes on where it was stopped: what was measured
is not measured again, unless the code, the model or the settings have changed since.

Positions stay original unless `--positions` is among the options: then a model that was trained to
fewer tokens is as fast as one trained to all of them, and says nothing that means anything.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from laserkv_gguf import models
from laserkv_gguf.benchmark import report

PROJECT = Path(__file__).resolve().parents[1]
DEFAULTS = {
    "--lengths": "4096,8192,16384,32768",
    "--block-size": "1024",
    "--positions": "original",
}


def options(given: list[str]) -> list[str]:
    """Options for `bench`: those given, and the defaults of those that are not."""
    named = {item.split("=", 1)[0] for item in given}
    added = [
        part for flag, value in DEFAULTS.items() if flag not in named for part in (flag, value)
    ]
    return [*added, "--probe-cost", *given]


def measure(model: str | None, folder: Path, given: list[str]) -> dict[str, Any] | None:
    """Runs `bench` for one model; None where it failed, after it said why."""
    chosen = [] if model is None else ["--model", model]
    command = [sys.executable, "-m", "laserkv_gguf", "bench", *chosen, "--out", str(folder), *given]
    print(f"== {shlex.join(command[2:])}", file=sys.stderr, flush=True)
    code = subprocess.run(command, check=False, cwd=PROJECT, stdout=sys.stderr).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        return None
    result: dict[str, Any] = json.loads((folder / "bench.json").read_text("utf-8"))
    return result


def main() -> int:
    """Measures all models and writes the table of those that could be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="GGUF file or name; repeatable")
    parser.add_argument("--out", type=Path, default=Path("results/full"))
    own, rest = parser.parse_known_args()
    given = options(rest)
    results, failed = [], False
    for model in own.model or [None]:
        path = models.find(model)
        result = measure(str(path.resolve()), own.out.resolve() / path.stem, given)
        if result is None:
            failed = True
            continue
        results.append(result)
    if results:
        shown = [f"--model {Path(model).name}" for model in own.model or []]
        command = " ".join(["python scripts/bench_full.py", *shown, shlex.join(rest)]).strip()
        text = report.summary(results, command)
        own.out.mkdir(parents=True, exist_ok=True)
        report.replace(own.out / "table.md", text)
        print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
