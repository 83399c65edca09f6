"""Flags that several commands share, defined once. llama.cpp's own wherever it has one."""

from __future__ import annotations

import copy
import inspect
import logging
import re
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Optional

from typer import Option

from laserkv_gguf.cli import config, streams, terminal
from laserkv_gguf.cli.help import CACHE, COMMON, DEVICES, SAMPLING, SELECTION, SPEED
from laserkv_gguf.cli.placing import PlacementOptions
from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import Formatter

if TYPE_CHECKING:
    from laserkv_gguf.api import LaserKV
    from laserkv_gguf.llama.sampler import Sampling


# the group of --help that a flag stands in
_GROUP = {
    "model": COMMON,
    "debug": COMMON,
    "seed": SAMPLING,
    "ctx_size": CACHE,
    "ratio": CACHE,
    "keep": CACHE,
    "block_size": CACHE,
    "cache_type_k": CACHE,
    "cache_type_v": CACHE,
    "positions": CACHE,
    "recall": CACHE,
    "recall_mode": CACHE,
    "recall_file": CACHE,
    "recall_limit": CACHE,
    "policy": SELECTION,
    "policy_option": SELECTION,
    "read_policy": SELECTION,
    "preset": SELECTION,
    "protection_divisor": SELECTION,
    "alpha": SELECTION,
    "lookahead": SELECTION,
    "probe_tokens": SELECTION,
    "gpu_layers": SPEED,
    "flash_attn": SPEED,
    "batch_size": SPEED,
    "ubatch_size": SPEED,
    "threads": SPEED,
    "threads_batch": SPEED,
    "lookup": SPEED,
    "scoring": SPEED,
}
_ONCE = ("list_devices", "debug")  # what no file and no variable asks for

_MOST_GIB = 4096  # no machine has as much: whoever writes more means another unit
_DIGITS = 16
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


# flags that a saved file may set, and what it calls them
_OF_FILES = {
    "cache_type_k": "type_k",
    "cache_type_v": "type_v",
    **{
        name: name
        for name in (
            "flash_attn",
            "policy",
            "ratio",
            "keep",
            "block_size",
            "protection_divisor",
            "alpha",
            "lookahead",
            "probe_tokens",
            "positions",
            "recall",
            "recall_mode",
        )
    },
}


@dataclass
class EngineOptions(PlacementOptions):
    """Model, context and compression."""

    model: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "-m",
            "--model",
            help="GGUF file, or a name that `pull` lists. Without it SmolLM2-135M, which is for "
            "trying the program: give a larger one for answers.",
        ),
    ] = None
    ctx_size: Annotated[
        int,
        Option("-c", "--ctx-size", help="Size of the KV cache in cells (tokens); 0: as needed."),
    ] = 0
    gpu_layers: Annotated[
        int,
        Option("-ngl", "--gpu-layers", help="Layers on the GPU; -1: all, where there is a GPU."),
    ] = -1
    flash_attn: Annotated[
        str, Option("-fa", "--flash-attn", help="Flash attention: on, off or auto (off on a CPU).")
    ] = "auto"
    cache_type_k: Annotated[
        str, Option("-ctk", "--cache-type-k", help="Type of the keys in the cache: f16, q8_0, …")
    ] = "f16"
    cache_type_v: Annotated[
        str, Option("-ctv", "--cache-type-v", help="Type of the values in the cache.")
    ] = "f16"
    batch_size: Annotated[
        int,
        Option(
            "-b",
            "--batch-size",
            help="Most tokens given to llama.cpp at once; 0: at least a block.",
        ),
    ] = 0
    ubatch_size: Annotated[
        int,
        Option(
            "-ub",
            "--ubatch-size",
            help="Tokens computed at a time; 0: 512, or 128 on a CPU without flash attention.",
        ),
    ] = 0
    threads: Annotated[
        int, Option("-t", "--threads", help="Threads for the answer; 0: what is found fastest.")
    ] = 0
    threads_batch: Annotated[
        int, Option("-tb", "--threads-batch", help="Threads for reading; 0: as -t, or all cores.")
    ] = 0
    lookup: Annotated[
        int,
        Option(
            "--lookup",
            help="Tokens of an answer guessed at a time by copying from the document, for answers"
            " that quote; 0: none.",
        ),
    ] = 0
    seed: Annotated[int, Option("-s", "--seed", help="The same seed gives the same answer.")] = 0
    policy: Annotated[
        str,
        Option(
            "--policy",
            help="How tokens are chosen: laser, snapkv, full (keeps all), … or module:Class.",
        ),
    ] = "laser"
    policy_option: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("--policy-option", help="An option of the policy, key=value; repeatable."),
    ] = None
    preset: Annotated[
        Optional[str],  # noqa: UP045
        Option("--preset", help="paper: LASER-KV as it was published."),
    ] = None
    ratio: Annotated[
        Optional[float],  # noqa: UP045
        Option(
            "--ratio",
            help="Part of the document to keep, above 0 to 1 (0.25; with -c as much as fits).",
        ),
    ] = None
    keep: Annotated[
        Optional[int],  # noqa: UP045
        Option("--keep", help="Tokens of the document to keep, such as 2000, instead of --ratio."),
    ] = None
    block_size: Annotated[
        Optional[int],  # noqa: UP045
        Option(
            "--block-size",
            help="Tokens read before the next eviction (4096; with -c at most half of its cells).",
        ),
    ] = None
    protection_divisor: Annotated[
        int,
        Option(
            "--protection-divisor", help="Anchors and window each get 1/n of what a block keeps."
        ),
    ] = 4
    alpha: Annotated[
        Optional[float],  # noqa: UP045
        Option(
            "--alpha",
            help="Share of the pool that exact attention chooses (1); hashing chooses the rest.",
        ),
    ] = None
    lookahead: Annotated[
        Optional[int],  # noqa: UP045
        Option("--lookahead", help="Drafts: tokens of the answer guessed to ask with (laser: 16)."),
    ] = None
    probe_tokens: Annotated[
        Optional[int],  # noqa: UP045
        Option(
            "--probe-tokens", help="The question's last tokens that ask; 0: all of it (laser: 8)."
        ),
    ] = None
    positions: Annotated[
        str,
        Option(
            "--positions",
            help="original: tokens keep their positions; compact: gaps are closed, for documents "
            "longer than the model was trained for; auto: compact where it must.",
        ),
    ] = "auto"
    scoring: Annotated[
        str,
        Option(
            "--scoring",
            help="Where scores are computed: auto (where the cache is, if that is a GPU), host or "
            "device.",
        ),
    ] = "auto"
    recall: Annotated[
        str,
        Option(
            "--recall",
            help="Where evicted tokens wait for questions that need them: ram, disk, off, or auto "
            "(in chat, as there is room).",
        ),
    ] = "auto"
    recall_limit: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "--recall-limit",
            help="Most memory for tokens that wait, such as 4GiB (a quarter of what is free).",
        ),
    ] = None
    recall_mode: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "--recall-mode",
            help="How they are chosen: replay (block by block) or shortlist (faster).",
        ),
    ] = None
    read_policy: Annotated[
        str,
        Option(
            "--read-policy",
            help="Chooses while no question is known: auto, same (as --policy), or keydiff, "
            '"kvzip values=norm", …',
        ),
    ] = "auto"
    recall_file: Annotated[
        Optional[str],  # noqa: UP045
        Option("--recall-file", help="File for those on disk; else one in your cache folder."),
    ] = None
    debug: Annotated[
        bool, Option("--debug", help="Show llama.cpp's log, and where errors come from.")
    ] = False

    @property
    def known_ratio(self) -> float:
        """The ratio, for commands that do not derive it from --ctx-size."""
        from laserkv_gguf.budget import RATIO

        return RATIO if self.ratio is None else self.ratio

    @property
    def known_block(self) -> int:
        """The block that was given, or the one that suits the cells."""
        from laserkv_gguf.planning.settings import block_for

        return block_for(self.ctx_size or None) if self.block_size is None else self.block_size

    def settings(self) -> dict[str, Any]:
        """What LaserKV takes as settings."""
        names = (
            "policy ratio keep block_size protection_divisor alpha lookahead probe_tokens "
            "positions scoring recall recall_mode recall_file read_policy"
        )
        from laserkv_gguf import policies
        from laserkv_gguf.policies.laser import PAPER, PAPER_OPTIONS

        if self.ratio is not None and self.keep is not None:
            raise UserError("--keep and --ratio both say how much to keep; give one of them")
        settings = {name: getattr(self, name) for name in names.split()}
        settings["block_size"] = self.known_block
        if self.recall_limit is not None:
            settings["recall_limit"] = parse_size("--recall-limit", self.recall_limit, least=0)
        settings["policy_options"] = policies.parse(self.policy, self.policy_option or [])
        if self.preset is not None:
            if self.preset != "paper":
                raise UserError(f"--preset {self.preset} is unknown; use paper")
            for name, value in PAPER.items():
                if settings[name] is None:  # a flag that was given wins
                    settings[name] = value
            settings["policy_options"] = {**PAPER_OPTIONS, **settings["policy_options"]}
        return settings

    def context(self) -> dict[str, Any]:
        """Fields of ContextOptions."""
        return {
            "batch_size": self.batch_size or max(2048, self.known_block),
            "ubatch_size": self.ubatch_size or None,
            "type_k": self.cache_type_k,
            "type_v": self.cache_type_v,
            "flash_attn": self.flash_attn,
            "threads": self.threads or None,
            "threads_batch": self.threads_batch or None,
        }

    def take_over(self, saved: Mapping[str, Any]) -> None:
        """Where a flag was left at its default, what a saved document was read with.

        Only the flags of `_OF_FILES`: where a model lies, what is written where and what the
        machine does is the user's to say.

        Args:
            saved: the settings and the types of the cache that a file names.
        """
        defaults = {item.name: item.default for item in fields(self)}
        chosen = (self.keep, saved.get("keep")) != (None, None)
        for flag, name in _OF_FILES.items():
            # only one of the two says how much is kept
            if (flag == "ratio" and chosen) or (flag == "keep" and self.ratio is not None):
                continue
            value = saved.get(name)
            if value is not None and getattr(self, flag) == defaults[flag]:
                setattr(self, flag, value)
        fixed = ("pool", "hash_bits", "hash_tables")  # settings from Python, options here
        options = {
            **{name: saved.get(name) for name in fixed},
            **(saved.get("policy_options") or {}),
        }
        if self.policy == saved.get("policy") and self.policy_option is None:
            self.policy_option = [
                f"{key}={value}" for key, value in options.items() if value is not None
            ]

    def say_embedded(self) -> None:
        """Says on a terminal that a document is asked with a model that is too small for it."""
        if self.model is None:
            terminal.progress(
                "the embedded SmolLM2-135M answers: it is for trying the program. "
                "laserkv-gguf pull lists models for answers, -m takes one"
            )

    def refuse_recall(self, command: str, instead: str) -> None:
        """For commands that cannot recall.

        Raises:
            UserError: --recall was given.
        """
        if self.recall not in ("off", "auto"):
            raise UserError(f"{command} cannot recall yet: leave --recall out, or {instead}")

    def refuse_keep(self, command: str) -> None:
        """For commands that go by ratios.

        Raises:
            UserError: --keep was given.
        """
        if self.keep is not None:
            raise UserError(f"{command} goes by ratios: give --ratio instead of --keep")

    def engine(self, **changes: Any) -> LaserKV:
        """Makes the engine.

        Args:
            **changes: settings, or a loaded `model`, other than the flags say.

        Raises:
            UserError: unusable flags or model.
        """
        log_to_stderr(self.debug)
        from laserkv_gguf import models
        from laserkv_gguf.api import LaserKV

        given = {**self.arguments(), **changes}
        model = given.pop("model") or models.find(self.model)
        return LaserKV(models.find(model) if isinstance(model, str) else model, **given)

    def arguments(self) -> dict[str, Any]:
        """Arguments of LaserKV, with `model` as --model has it: a name, a path, or None."""
        from laserkv_gguf.llama.context import ContextOptions

        return {
            "model": self.model,
            "gpu_layers": self.gpu_layers if self.gpu_layers >= 0 else None,
            "placement": self.placement(),
            "ctx_size": self.ctx_size or None,
            "context": ContextOptions(**self.context()),
            "seed": self.seed,
            "lookup": self.lookup,
            **self.settings(),
        }


@dataclass
class SamplingOptions:
    """How an answer is sampled."""

    predict: Annotated[
        int, Option("-n", "--predict", "--n-predict", help="Most tokens of an answer.")
    ] = 512
    temp: Annotated[float, Option("--temp", help="Temperature; 0: always the likeliest token.")] = (
        0.0
    )
    top_k: Annotated[
        int, Option("--top-k", help="Choose among the k likeliest tokens; 0: all.")
    ] = 40
    top_p: Annotated[
        float, Option("--top-p", help="Choose among tokens that have this probability together.")
    ] = 0.95
    min_p: Annotated[
        float, Option("--min-p", help="Leave out tokens below this share of the likeliest.")
    ] = 0.05

    def sampling(self, seed: int) -> Sampling:
        from laserkv_gguf.llama.sampler import Sampling

        return Sampling(self.temp, self.top_k, self.top_p, self.min_p, seed)


def parse_size(flag: str, text: str, *, least: int = 1) -> int:
    """Bytes: 8GiB, 8G and 8 are 8 * 2^30, 8GB is 8 * 10^9.

    Args:
        flag: what it was given with, for errors.

    Raises:
        UserError: not a size of at least `least`, or a number that cannot be of GiB.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(I?B?)\s*", text.upper())
    size = -1
    if found and len(found[1]) < _DIGITS:
        number, unit = float(found[1]), found[2]
        if not unit and not found[3]:
            if number >= _MOST_GIB:
                raise UserError(f"{flag} {text}: a number alone is GiB; write 8, or 8000MB")
            unit = "G"
        base = 1000 if unit and found[3] == "B" else 1024
        size = int(number * base ** _UNITS[unit])
    if size < least:
        raise UserError(f"{flag} {text:.40}: give a size such as 8GiB, 8G or 6000MB")
    return size


_SETTABLE: dict[str, dict[str, type]] = {}


def settable() -> dict[str, dict[str, type]]:
    """The flags of each command that files and the environment may set, with their types."""
    return {name: dict(flags) for name, flags in _SETTABLE.items()}


def _described(hint: Any, field: str, panel: str, hidden: bool) -> Any:
    """A flag with its group of --help and its environment variable."""
    kind, info = typing.get_args(hint)[:2]
    info = copy.copy(info)
    info.rich_help_panel = panel
    if field not in _ONCE:
        info.envvar, info.show_envvar = config.variable(field), False
    info.hidden = info.hidden or hidden
    return Annotated[kind, info]


def _plain_type(hint: Any) -> type:
    """The type of a flag's value: of Optional[list[str]] list, of Optional[int] int."""
    kind = typing.get_args(hint)[0]
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    if typing.get_origin(kind) is typing.Union and parts:
        kind = parts[0]
    origin: type = typing.get_origin(kind) or kind
    return origin


def with_options(
    *groups: type[Any], name: str = "", hide: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the flags of option groups to a command, which gets one object of each group first.

    Args:
        name: of the command, where its function has another.
        hide: flags that do nothing there, which --help leaves out.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            made = [
                group(**{f.name: values.pop(f.name) for f in fields(group)}) for group in groups
            ]
            for one in made:
                code = one.instead() if isinstance(one, PlacementOptions) else None
                if code is not None:
                    return code
            return command(*made, **values)

        own = inspect.signature(command, eval_str=True).parameters
        parameters = list(own.values())[len(groups) :]
        flags = _SETTABLE.setdefault(name or command.__name__, {})
        for group in groups:
            panel = DEVICES if issubclass(group, PlacementOptions) else SAMPLING
            hints = typing.get_type_hints(group, include_extras=True)
            inherited = {item.name for base in group.__bases__ for item in _fields(base)}
            for item in sorted(fields(group), key=lambda item: item.name in inherited):
                parameters.append(
                    inspect.Parameter(
                        item.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=inspect.Parameter.empty
                        if item.default is MISSING
                        else item.default,
                        annotation=_described(
                            hints[item.name],
                            item.name,
                            _GROUP.get(item.name, panel),
                            item.name in hide,
                        ),
                    )
                )
                if item.name not in _ONCE:
                    flags[item.name] = _plain_type(hints[item.name])
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _fields(group: type[Any]) -> tuple[Field[Any], ...]:
    return fields(group) if is_dataclass(group) else ()


def tokens_of(text: str) -> int:
    """A number of tokens as people write it: 2048, 16k (1,024 each), 100000.

    Raises:
        ValueError: it is none.
    """
    said = text.strip().lower()
    return int(said[:-1]) * 1024 if said.endswith("k") else int(said)


class _Complaining(logging.Handler):
    """Log records on stderr, when it is free for them."""

    def emit(self, record: logging.LogRecord) -> None:
        streams.complain(self.format(record))


def log_to_stderr(debug: bool) -> None:
    """Warnings as one line each on stderr; with `debug` everything, llama.cpp's log included."""
    handler = _Complaining()
    handler.setFormatter(Formatter("%(name)s: %(message)s" if debug else "warning: %(message)s"))
    logging.basicConfig(
        handlers=[handler], level=logging.DEBUG if debug else logging.WARNING, force=True
    )
    if debug:
        logging.getLogger("numba").setLevel(logging.WARNING)
