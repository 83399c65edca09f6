"""`eval`: policies against each other on tasks whose right answers are known, and on fidelity."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from typer import Argument, Option

from laserkv_gguf.cli import terminal
from laserkv_gguf.cli.options import EngineOptions, tokens_of, with_options
from laserkv_gguf.errors import UserError

if TYPE_CHECKING:
    from laserkv_gguf.evaluation.presets import Preset
    from laserkv_gguf.evaluation.report import Line
    from laserkv_gguf.evaluation.results import Results
    from laserkv_gguf.evaluation.runner import Runner

Names = Optional[list[str]]  # noqa: UP045
_SETTINGS = ("lookahead", "probe_tokens", "protection_divisor")  # that a policy's name may bring


@dataclass
class EvalOptions(EngineOptions):
    """The shared flags; the block follows the length where none is given."""

    preset: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "--preset",
            help="A published table (paper-table1, paper-table2, lagkv-passkey), "
            "laser-ablations: laser with one thing changed, laser-hashing: with hash collisions, "
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


@with_options(EvalOptions, name="eval", hide=("lookup",))
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
            help="babilong, babilong_qa1 …, niah, niah_single_1 …, vt, cwe, fwe, qa_1, qa_2, "
            "ruler, squad, passkey, fidelity.",
            show_default=False,
        ),
    ] = None,
    policies: Annotated[
        Names,
        Option(
            "--policies",
            help="With commas, or repeated; all; else full and --policy. A policy with options is "
            '"laser alpha=0.5". Beside them what people use instead: bm25, shift, q4_0-full, peers '
            "for all three.",
        ),
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
    squad: Annotated[
        Optional[Path],  # noqa: UP045
        Option("--squad", help="SQuAD's or XQuAD's JSON, for squad and qa_1."),
    ] = None,
    hotpotqa: Annotated[
        Optional[Path],  # noqa: UP045
        Option("--hotpotqa", help="HotpotQA's JSON with distractors, for qa_2."),
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
    """Measure answers: which policy finds what, at which ratio and length."""
    from laserkv_gguf.evaluation import presets, report
    from laserkv_gguf.evaluation import tasks as known
    from laserkv_gguf.evaluation.background import Background, read_prompts
    from laserkv_gguf.evaluation.results import Results
    from laserkv_gguf.evaluation.runner import Plan, Runner
    from laserkv_gguf.evaluation.samples import Source

    if options.keep is not None and (options.ratio is not None or ratios):
        raise UserError("--keep and --ratio both say how much to keep; give one of them")
    preset = presets.PRESETS.get(options.preset or "")
    if preset:
        options = replace(options, preset=None, block_size=options.block_size or preset.block_size)
    elif not tasks:
        raise UserError(
            f"no task; name some of {', '.join([*known.GROUPS, 'vt', 'cwe', 'fwe'])}, squad, "
            f"passkey and fidelity, or use --preset {' or '.join(presets.PRESETS)}"
        )
    names, every = _policies(policies, options, preset)
    count = samples if samples is not None else preset.samples if preset else 10
    plan = Plan(
        known.find(tasks or (preset.tasks if preset else ())),
        _lengths(lengths) or (_published_at(preset, options) if preset else (4096,)),
        _ratios(ratios) or (preset.ratios if preset else (options.known_ratio,)),
        _positive("--samples", count),
        _settings(options, names, preset),
        options.block_size,
        None if predict is None else _positive("-n", predict),
        options.keep,
    )
    wording = read_prompts(prompts) if prompts else None
    known_figures = presets.published(preset) if preset else {}
    figures = {**known_figures, **(presets.read_published(published) if published else {})}
    text = Background.load(background)
    shared = replace(options, policy="full", policy_option=None, ratio=1.0, keep=None)
    with ExitStack() as opened:
        engine = opened.enter_context(shared.engine(block_size=plan.largest_block))
        source = Source(engine.model, options.seed, text, babi, wording, squad, hotpotqa)
        runner = Runner(engine, source, plan)
        opened.callback(runner.close)
        for note in runner.check(skip=every):
            terminal.note(note)
        command = shlex.join(["python", "-m", "laserkv_gguf", *sys.argv[1:]])
        with Results(out, runner.config(), command) as results:
            _run(runner, results)
        # a label is for its own rows; else all that the folder has
        rows = runner.among(results.rows) if preset else results.rows
        notes = runner.notes(runner.config() if preset else results.config)
        if preset and preset.source:
            changed = _settings(EvalOptions(block_size=preset.block_size), names, preset)
            notes += presets.label(
                preset, engine.model.path, plan, runner.source, changed != plan.settings
            )
    commands = [f"command: `{typed}`" for typed in results.config["commands"]]
    _report(
        report.lines(rows, figures),
        out,
        notes,
        commands,
        published=bool((preset and preset.source) or figures),
        others=[report.published_table(known_figures, preset.source)]
        if preset and known_figures
        else [],
    )


# what flags say


def _parts(given: Names) -> list[str]:
    return [part.strip() for text in given or [] for part in text.split(",") if part.strip()]


def _policies(given: Names, options: EvalOptions, preset: Preset | None) -> tuple[list[str], bool]:
    """The policies, `full` first because it needs most cells; and whether all were asked for."""
    from laserkv_gguf import policies
    from laserkv_gguf.evaluation.peers import PEERS

    names = _parts(given) or list(preset.policies if preset else ("full", options.policy))
    every = "all" in names
    if every:
        names = ["full", "laser", *policies.available(), *names]
    if "peers" in names:
        names = [*names, *PEERS]
    names = [" ".join(name.split()) for name in names]
    names = [name for name in dict.fromkeys(names) if name not in ("all", "peers")]
    for name in names:
        if name not in PEERS:
            policies.find(name.split()[0])
    return sorted(names, key=lambda name: name != "full"), every


def _settings(
    options: EvalOptions, names: Sequence[str], preset: Preset | None
) -> dict[str, dict[str, Any]]:
    """What each policy is configured with; a --policy-option is for those that have it.

    Raises:
        UserError: none of them has it.
    """
    from laserkv_gguf import policies
    from laserkv_gguf.evaluation.peers import PEERS

    # a peer reads with `full`, if it reads; a name may bring its policy's options, and settings
    kinds = {name: "full" if name in PEERS else name.split()[0] for name in names}
    given: dict[str, list[str]] = {name: [] for name in names}
    set_by_name: dict[str, dict[str, int]] = {name: {} for name in names}
    for name in names:
        for text in [] if name in PEERS else name.split()[1:]:
            flag, _, value = text.partition("=")
            if flag not in _SETTINGS:
                given[name].append(text)
            elif value.isdecimal():
                set_by_name[name][flag] = int(value)
            else:
                raise UserError(f"{name}: {flag} is {value!r}; give a number")
    for text in options.policy_option or []:
        refused = []
        for name in names:
            try:
                policies.parse(kinds[name], [text])
            except UserError as error:
                refused.append(error)
            else:
                given[name].insert(0, text)  # what stands in the name wins
        if len(refused) == len(names):
            raise refused[-1]
    made = {}
    for name in names:
        settings = replace(options, policy=kinds[name], policy_option=given[name]).settings()
        own = preset.settings.get(name, {}) if preset else {}
        for key in ("ratio", "keep", "block_size"):
            del settings[key]
        settings["policy_options"] = {**own.get("policy_options", {}), **settings["policy_options"]}
        made[name] = {**own, **{k: v for k, v in settings.items() if v is not None or k not in own}}
        made[name] |= set_by_name[name]
    return made


def _published_at(preset: Preset, options: EvalOptions) -> tuple[int, ...]:
    """The preset's lengths, or of a model that it was published with those of that model."""
    from laserkv_gguf import models
    from laserkv_gguf.evaluation import presets

    path = models.find(options.model)
    return presets.lengths_of(preset, path) if path.is_file() else preset.lengths


def _lengths(given: Names) -> list[int]:
    """`2048` or `16k`."""
    found = []
    for part in _parts(given):
        try:
            found.append(_positive("--lengths", tokens_of(part)))
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
    others: Sequence[tuple[list[str], list[list[str]]]] = (),
) -> None:
    """Tables on stdout; summary and plots beside the results."""
    from laserkv_gguf.evaluation import plots, report
    from laserkv_gguf.evaluation.results import write

    title = "Policies against each other"
    notes = [*notes, *report.caveats(found)]
    text = report.as_markdown(
        found, title=title, notes=[*notes, *commands], published=published, others=others
    )
    write(out / "summary.md", text)
    write(out / "summary.csv", report.as_csv(found))
    drawn = plots.draw(found, out)
    console = terminal.Console(width=None if sys.stdout.isatty() else 200)
    for table in report.as_tables(found, published=published, others=others):
        console.print(table)
    for note in notes:
        terminal.note(note)
    if not drawn:
        terminal.note("no plots: pip install 'laserkv-gguf[plot]', and run the same command again")
    terminal.note(f"results, summary{' and plots' if drawn else ''}: {out}")
