"""`eval`: policies against each other on tasks whose right answers are known, and on fidelity."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from typer import Argument, Option

from laserkv_gguf.cli import terminal
from laserkv_gguf.cli.options import EngineOptions, with_options
from laserkv_gguf.errors import UserError

if TYPE_CHECKING:
    from laserkv_gguf.evaluation.presets import Preset
    from laserkv_gguf.evaluation.report import Line
    from laserkv_gguf.evaluation.results import Results
    from laserkv_gguf.evaluation.runner import Runner

Names = Optional[list[str]]  # noqa: UP045


@dataclass
class EvalOptions(EngineOptions):
    """The shared flags; the block follows the length where none is given."""

    preset: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "--preset",
            help="A published table (paper-table1, paper-table2, lagkv-passkey), "
            "or paper: laser as it was published.",
        ),
    ] = None
    block_size: Annotated[
        int,
        Option(
            "--block-size",
            help="Tokens read before the next eviction (S); 0: 4096, or a quarter of the length.",
        ),
    ] = 0


@with_options(EvalOptions)
def evaluate(
    options: EvalOptions,
    out: Annotated[
        Path,
        Option("-o", "--out", help="Folder for results, summary and plots; a stopped run goes on."),
    ],
    tasks: Annotated[
        Names,
        Argument(
            metavar="TASK…",
            help="babilong, babilong_qa1 …, niah, niah_single_1 …, vt, cwe, fwe, ruler, passkey, "
            "fidelity.",
            show_default=False,
        ),
    ] = None,
    policies: Annotated[
        Names, Option("--policies", help="With commas, or repeated; all; else full and --policy.")
    ] = None,
    ratios: Annotated[Names, Option("--ratios", help="Several instead of --ratio.")] = None,
    lengths: Annotated[
        Names, Option("--lengths", help="Tokens of the documents, such as 2048,16k (4096).")
    ] = None,
    samples: Annotated[
        Optional[int],  # noqa: UP045
        Option("--samples", help="Of each task and length (10)."),
    ] = None,
    predict: Annotated[
        Optional[int],  # noqa: UP045
        Option("-n", "--predict", help="Most tokens of an answer; else what the task has."),
    ] = None,
    background: Annotated[
        Optional[Path],  # noqa: UP045
        Option("--background", help="Text file, or folder of *.txt, to hide things in."),
    ] = None,
    babi: Annotated[
        Optional[Path],  # noqa: UP045
        Option("--babi", help="bAbI's folder of task files: make BABILong of any length."),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        Option("--prompts", help="BABILong's instructions as JSON, instead of ours."),
    ] = None,
    published: Annotated[
        Optional[Path],  # noqa: UP045
        Option("--published", help="CSV (task,policy,length,score) to set beside the results."),
    ] = None,
) -> None:
    """Measure policies against each other: BABILong, needles, passkey, RULER, fidelity."""
    from laserkv_gguf.evaluation import presets, report
    from laserkv_gguf.evaluation import tasks as known
    from laserkv_gguf.evaluation.background import Background, read_prompts
    from laserkv_gguf.evaluation.results import Results
    from laserkv_gguf.evaluation.runner import Plan, Runner
    from laserkv_gguf.evaluation.samples import Source

    options.refuse_recall("eval", "ask with it")
    preset = presets.PRESETS.get(options.preset or "")
    if preset:
        options = replace(options, preset=None, block_size=options.block_size or preset.block_size)
    elif not tasks:
        raise UserError(
            f"no task; name some of {', '.join([*known.GROUPS, 'vt', 'cwe', 'fwe'])}, passkey and "
            f"fidelity, or use --preset {' or '.join(presets.PRESETS)}"
        )
    names, every = _policies(policies, options, preset)
    count = samples if samples is not None else preset.samples if preset else 10
    plan = Plan(
        known.find(tasks or (preset.tasks if preset else ())),
        _lengths(lengths) or (preset.lengths if preset else (4096,)),
        _ratios(ratios) or (preset.ratios if preset else (options.known_ratio,)),
        _positive("--samples", count),
        _settings(options, names, preset),
        options.block_size,
        None if predict is None else _positive("-n", predict),
    )
    wording = read_prompts(prompts) if prompts else None
    figures = presets.read_published(published) if published else None
    text = Background.load(background)
    shared = replace(options, policy="full", policy_option=None, ratio=1.0)
    with shared.engine(block_size=plan.largest_block) as engine:
        runner = Runner(engine, Source(engine.model, options.seed, text, babi, wording), plan)
        for note in runner.check(skip=every):
            terminal.note(note)
        command = shlex.join(["python", "-m", "laserkv_gguf", *sys.argv[1:]])
        with Results(out, runner.config(), command) as results:
            _run(runner, results)
        # a label is for its own rows; else all that the folder has
        rows = runner.among(results.rows) if preset else results.rows
        notes = runner.notes(runner.config() if preset else results.config)
        if preset:
            changed = _settings(EvalOptions(block_size=preset.block_size), names, preset)
            notes += presets.label(
                preset, engine.model.path, plan, runner.source, changed != plan.settings
            )
    commands = [f"command: `{typed}`" for typed in results.config["commands"]]
    _report(report.lines(rows, figures), out, notes, commands, published=bool(preset or figures))


# what flags say


def _parts(given: Names) -> list[str]:
    return [part.strip() for text in given or [] for part in text.split(",") if part.strip()]


def _policies(given: Names, options: EvalOptions, preset: Preset | None) -> tuple[list[str], bool]:
    """The policies, `full` first because it needs most cells; and whether all were asked for."""
    from laserkv_gguf import policies

    names = _parts(given) or list(preset.policies if preset else ("full", options.policy))
    every = "all" in names
    if every:
        names = ["full", "laser", *policies.available(), *names]
    names = [name for name in dict.fromkeys(names) if name != "all"]
    for name in names:
        policies.find(name)
    return sorted(names, key=lambda name: name != "full"), every


def _settings(
    options: EvalOptions, names: Sequence[str], preset: Preset | None
) -> dict[str, dict[str, Any]]:
    """What each policy is configured with; a --policy-option is for those that have it.

    Raises:
        UserError: none of them has it.
    """
    from laserkv_gguf import policies

    given: dict[str, list[str]] = {name: [] for name in names}
    for text in options.policy_option or []:
        refused = []
        for name in names:
            try:
                policies.parse(name, [text])
            except UserError as error:
                refused.append(error)
            else:
                given[name].append(text)
        if len(refused) == len(names):
            raise refused[-1]
    made = {}
    for name in names:
        settings = replace(options, policy=name, policy_option=given[name]).settings()
        own = preset.settings.get(name, {}) if preset else {}
        for key in ("ratio", "block_size"):
            del settings[key]
        settings["policy_options"] = {**own.get("policy_options", {}), **settings["policy_options"]}
        made[name] = {**own, **{k: v for k, v in settings.items() if v is not None or k not in own}}
    return made


def _lengths(given: Names) -> list[int]:
    """`2048` or `16k`."""
    found = []
    for part in _parts(given):
        number, scale = (part[:-1], 1024) if part[-1] in "kK" else (part, 1)
        try:
            found.append(_positive("--lengths", int(number) * scale))
        except ValueError:
            raise UserError(f"--lengths {part}: give numbers such as 2048 or 16k") from None
    return sorted(set(found))


def _ratios(given: Names) -> list[float]:
    from laserkv_gguf.budget import MIN_DIVISOR, check_settings

    try:
        found = [float(part) for part in _parts(given)]
    except ValueError:
        raise UserError("--ratios: give fractions such as 0.5,0.25,0.1") from None
    for ratio in found:
        check_settings(ratio, 1, MIN_DIVISOR)
    return sorted(set(found), reverse=True)


def _positive(flag: str, number: int) -> int:
    if number < 1:
        raise UserError(f"{flag} {number}: give at least 1")
    return number


# what people see


def _run(runner: Runner, results: Results) -> None:
    """Runs, with a bar that shows what is done and how many answers were right."""
    from laserkv_gguf.evaluation.bar import Bar

    there = runner.among(results.rows)
    if there:
        terminal.note(f"going on: {len(there)} of {runner.total} are in {results.folder}")
    bar = Bar(runner.total, there)
    try:
        with bar.shown(terminal.console):
            runner.run(results, bar.update)
    except KeyboardInterrupt:
        terminal.note(
            f"stopped with {bar.done} of {runner.total} in {results.folder}; "
            "the same command goes on"
        )
        raise


def _report(
    found: Sequence[Line],
    out: Path,
    notes: Sequence[str],
    commands: Sequence[str],
    *,
    published: bool,
) -> None:
    """Tables on stdout; summary and plots beside the results."""
    from laserkv_gguf.evaluation import plots, report
    from laserkv_gguf.evaluation.results import write

    title = "Policies against each other"
    text = report.as_markdown(found, title=title, notes=[*notes, *commands], published=published)
    write(out / "summary.md", text)
    write(out / "summary.csv", report.as_csv(found))
    drawn = plots.draw(found, out)
    console = terminal.Console(width=None if sys.stdout.isatty() else 200)
    for table in report.as_tables(found, published=published):
        console.print(table)
    for note in notes:
        terminal.note(note)
    if not drawn:
        terminal.note("no plots: pip install 'laserkv-gguf[plot]', and run the same command again")
    terminal.note(f"results, summary{' and plots' if drawn else ''}: {out}")
