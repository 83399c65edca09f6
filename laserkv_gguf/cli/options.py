"""Flags that several commands share, told once. llama.cpp's own wherever it has one."""

from __future__ import annotations

import inspect
import logging
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Optional

from typer import Option

from laserkv_gguf.cli.placing import PlacementOptions
from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import Formatter

if TYPE_CHECKING:
    from laserkv_gguf.api import LaserKV
    from laserkv_gguf.llama.sampler import Sampling


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
            help="GGUF file, or a name of models.txt; without it the embedded SmolLM2-135M.",
        ),
    ] = None
    ctx_size: Annotated[
        int, Option("-c", "--ctx-size", help="Cells of the KV cache; 0: what the run needs.")
    ] = 0
    gpu_layers: Annotated[
        int, Option("-ngl", "--gpu-layers", help="Layers on the GPU; -1: all where there is one.")
    ] = -1
    flash_attn: Annotated[
        str, Option("-fa", "--flash-attn", help="on, off or auto (off on a CPU).")
    ] = "auto"
    cache_type_k: Annotated[
        str, Option("-ctk", "--cache-type-k", help="Type of cached keys: f16, q8_0, …")
    ] = "f16"
    cache_type_v: Annotated[
        str, Option("-ctv", "--cache-type-v", help="Type of cached values.")
    ] = "f16"
    batch_size: Annotated[
        int,
        Option("-b", "--batch-size", help="Most tokens of one decode; 0: at least a block."),
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
        int, Option("-t", "--threads", help="Threads for a token; 0: what is found fastest.")
    ] = 0
    threads_batch: Annotated[
        int, Option("-tb", "--threads-batch", help="For reading; 0: -t, or the physical cores.")
    ] = 0
    seed: Annotated[int, Option("-s", "--seed", help="Of sampling, hashing and `random`.")] = 0
    policy: Annotated[
        str, Option("--policy", help="How tokens are chosen: laser, exact, full, …")
    ] = "laser"
    policy_option: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("--policy-option", help="key=value for the policy; repeatable."),
    ] = None
    preset: Annotated[
        Optional[str],  # noqa: UP045
        Option("--preset", help="paper: as LASER-KV was published (alpha 0.75, no lookahead, …)."),
    ] = None
    ratio: Annotated[
        Optional[float],  # noqa: UP045
        Option(
            "--ratio",
            help="Fraction of the tokens to keep, above 0 to 1 (0.25; with -c the most that fits).",
        ),
    ] = None
    keep: Annotated[
        Optional[int],  # noqa: UP045
        Option("--keep", help="Tokens of a document to keep, such as 2000, instead of --ratio."),
    ] = None
    block_size: Annotated[
        int, Option("--block-size", help="Tokens read before the next eviction (S).")
    ] = 4096
    protection_divisor: Annotated[
        int,
        Option("--protection-divisor", help="Anchors and window get 1/n of a block's budget each."),
    ] = 4
    alpha: Annotated[
        Optional[float],  # noqa: UP045
        Option(
            "--alpha", help="Share of the pool chosen by exact attention (1; the rest is hashed)."
        ),
    ] = None
    lookahead: Annotated[
        Optional[int],  # noqa: UP045
        Option("--lookahead", help="Tokens drafted after the question to probe with (laser: 16)."),
    ] = None
    probe_tokens: Annotated[
        Optional[int],  # noqa: UP045
        Option("--probe-tokens", help="Last tokens of the question that probe; 0: all (laser: 8)."),
    ] = None
    positions: Annotated[
        str,
        Option("--positions", help="auto, original or compact (re-rotate keys to close gaps)."),
    ] = "auto"
    scoring: Annotated[
        str,
        Option("--scoring", help="host, or device (attention where the cache is: on the GPU)."),
    ] = "host"
    recall: Annotated[
        str,
        Option("--recall", help="ram or disk: park evicted tokens there, choose anew every turn."),
    ] = "off"
    recall_mode: Annotated[
        Optional[str],  # noqa: UP045
        Option("--recall-mode", help="replay (block by block) or shortlist (all at once, faster)."),
    ] = None
    recall_file: Annotated[
        Optional[str],  # noqa: UP045
        Option("--recall-file", help="Where --recall disk parks; else in your cache folder."),
    ] = None
    debug: Annotated[bool, Option("--debug", help="llama.cpp's log, and tracebacks.")] = False

    @property
    def known_ratio(self) -> float:
        """The ratio, for commands that do not derive it from --ctx-size."""
        from laserkv_gguf.budget import RATIO

        return RATIO if self.ratio is None else self.ratio

    def settings(self) -> dict[str, Any]:
        """What LaserKV takes as settings."""
        names = (
            "policy ratio keep block_size protection_divisor alpha lookahead probe_tokens "
            "positions scoring recall recall_mode recall_file"
        )
        from laserkv_gguf import policies
        from laserkv_gguf.policies.laser import PAPER, PAPER_OPTIONS

        if self.ratio is not None and self.keep is not None:
            raise UserError("--keep and --ratio both say how much to keep; give one of them")
        settings = {name: getattr(self, name) for name in names.split()}
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
            "batch_size": self.batch_size or max(2048, self.block_size),
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

    def refuse_recall(self, command: str, instead: str) -> None:
        """For commands that cannot recall.

        Raises:
            UserError: --recall was given.
        """
        if self.recall != "off":
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
        from laserkv_gguf.llama.context import ContextOptions

        settings = {**self.settings(), **changes}
        model = settings.pop("model", None) or models.find(self.model)
        context = ContextOptions(**self.context())
        return LaserKV(
            model,
            gpu_layers=self.gpu_layers if self.gpu_layers >= 0 else None,
            placement=self.placement(),
            ctx_size=self.ctx_size or None,
            context=context,
            seed=self.seed,
            **settings,
        )


@dataclass
class SamplingOptions:
    """How an answer is sampled."""

    predict: Annotated[
        int, Option("-n", "--predict", "--n-predict", help="Most tokens of an answer.")
    ] = 512
    temp: Annotated[float, Option("--temp", help="Temperature; 0: always the likeliest token.")] = (
        0.0
    )
    top_k: Annotated[int, Option("--top-k", help="Sample from the k likeliest; 0: all.")] = 40
    top_p: Annotated[float, Option("--top-p", help="Sample from this much probability.")] = 0.95
    min_p: Annotated[
        float, Option("--min-p", help="Drop tokens below this share of the likeliest.")
    ] = 0.05

    def sampling(self, seed: int) -> Sampling:
        from laserkv_gguf.llama.sampler import Sampling

        return Sampling(self.temp, self.top_k, self.top_p, self.min_p, seed)


def with_options(*groups: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the flags of option groups to a command, which gets one object of each group first."""

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
        for group in groups:
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
                        annotation=hints[item.name],
                    )
                )
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _fields(group: type[Any]) -> tuple[Field[Any], ...]:
    return fields(group) if is_dataclass(group) else ()


def log_to_stderr(debug: bool) -> None:
    """Warnings as one line each on stderr; with `debug` everything, llama.cpp's log included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(name)s: %(message)s" if debug else "warning: %(message)s"))
    logging.basicConfig(
        handlers=[handler], level=logging.DEBUG if debug else logging.WARNING, force=True
    )
    if debug:
        logging.getLogger("numba").setLevel(logging.WARNING)
