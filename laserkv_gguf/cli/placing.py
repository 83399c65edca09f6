"""Flags that place a model on devices and machines: llama.cpp's, by its names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Optional

from typer import Option

from laserkv_gguf.errors import UserError

if TYPE_CHECKING:
    from laserkv_gguf.llama.placement import Placement

_PANEL = "Devices and machines"


@dataclass
class PlacementOptions:
    """Where layers, weights and cache go, how positions are scaled, and adapters."""

    device: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "-dev",
            "--device",
            help="Devices to use, with commas between them; none: the CPU alone.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    list_devices: Annotated[
        bool,
        Option(
            "--list-devices",
            help="Print the devices that llama.cpp finds, and end.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    split_mode: Annotated[
        str,
        Option(
            "-sm",
            "--split-mode",
            help="layer: over all devices; none: on --main-gpu; row: matrices by rows (CUDA).",
            rich_help_panel=_PANEL,
        ),
    ] = "layer"
    tensor_split: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "-ts",
            "--tensor-split",
            help="Each device's share of the layers, such as 3,1; else by free memory.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    main_gpu: Annotated[
        int,
        Option(
            "-mg",
            "--main-gpu",
            help="The device of --split-mode none, counted from 0.",
            rich_help_panel=_PANEL,
        ),
    ] = 0
    override_tensor: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option(
            "-ot",
            "--override-tensor",
            help="PATTERN=DEVICE: tensors with such names go there; repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    n_cpu_moe: Annotated[
        int,
        Option(
            "-ncmoe",
            "--n-cpu-moe",
            help="Leave the experts of the first N layers in RAM.",
            rich_help_panel=_PANEL,
        ),
    ] = 0
    no_kv_offload: Annotated[
        bool,
        Option(
            "-nkvo",
            "--no-kv-offload",
            help="Leave the KV cache in RAM.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    mlock: Annotated[
        bool,
        Option("--mlock", help="Keep the weights from being swapped out.", rich_help_panel=_PANEL),
    ] = False
    no_mmap: Annotated[
        bool,
        Option("--no-mmap", help="Read the file instead of mapping it.", rich_help_panel=_PANEL),
    ] = False
    numa: Annotated[
        Optional[str],  # noqa: UP045
        Option("--numa", help="distribute, isolate or numactl.", rich_help_panel=_PANEL),
    ] = None
    lora: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option(
            "--lora", help="LoRA adapter in GGUF, added to the weights.", rich_help_panel=_PANEL
        ),
    ] = None
    rpc: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "--rpc",
            help="RPC servers, HOST:PORT with commas between them, to place layers on (see "
            "rpc-server); only in a network of your own.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    rope_scaling: Annotated[
        Optional[str],  # noqa: UP045
        Option(
            "--rope-scaling",
            help="none, linear or yarn; else as the model says.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    rope_freq_base: Annotated[
        Optional[float],  # noqa: UP045
        Option("--rope-freq-base", help="Base of RoPE's frequencies.", rich_help_panel=_PANEL),
    ] = None
    rope_freq_scale: Annotated[
        Optional[float],  # noqa: UP045
        Option(
            "--rope-freq-scale",
            help="Scale of RoPE's frequencies: 0.25 takes four times the positions.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    yarn_orig_ctx: Annotated[
        Optional[int],  # noqa: UP045
        Option(
            "--yarn-orig-ctx",
            help="Positions the model was trained for before YaRN.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    yarn_ext_factor: Annotated[
        Optional[float],  # noqa: UP045
        Option("--yarn-ext-factor", help="YaRN's extrapolation mix.", rich_help_panel=_PANEL),
    ] = None
    yarn_attn_factor: Annotated[
        Optional[float],  # noqa: UP045
        Option("--yarn-attn-factor", help="YaRN's attention magnitude.", rich_help_panel=_PANEL),
    ] = None
    yarn_beta_slow: Annotated[
        Optional[float],  # noqa: UP045
        Option("--yarn-beta-slow", help="YaRN's high correction dim.", rich_help_panel=_PANEL),
    ] = None
    yarn_beta_fast: Annotated[
        Optional[float],  # noqa: UP045
        Option("--yarn-beta-fast", help="YaRN's low correction dim.", rich_help_panel=_PANEL),
    ] = None

    def instead(self) -> int | None:
        """Does what takes the place of the command, and returns its exit code; None for nothing.

        Raises:
            LaserKVError: as of `supervised.run`.
        """
        if self.rpc:
            from laserkv_gguf.cli import supervised

            if not supervised.is_child():
                return supervised.run(self.placement().rpc)
            supervised.prepare()
        if self.list_devices:
            from laserkv_gguf.cli import streams
            from laserkv_gguf.llama import devices, rpc

            rpc.add(self.placement().rpc)
            streams.say(devices.table(), end="\n")
            return 0
        return None

    def placement(self) -> Placement:
        """The flags, checked as far as no device is needed.

        Raises:
            UserError: with the remedy in one line.
        """
        from laserkv_gguf.llama.placement import Placement, Rope

        placement = Placement(
            device=_parts(self.device),
            split_mode=self.split_mode,
            tensor_split=_shares(self.tensor_split),
            main_gpu=self.main_gpu,
            override_tensor=_all_parts(self.override_tensor),
            n_cpu_moe=self.n_cpu_moe,
            kv_offload=not self.no_kv_offload,
            mlock=self.mlock,
            mmap=not self.no_mmap,
            numa=self.numa,
            lora=_all_parts(self.lora),
            rpc=_parts(self.rpc),
            rope=Rope(**{item.name: getattr(self, item.name) for item in fields(Rope)}),
        )
        placement.check()
        return placement


def _parts(given: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (given or "").split(",") if part.strip())


def _all_parts(given: list[str] | None) -> tuple[str, ...]:
    return tuple(part for one in given or () for part in _parts(one))


def _shares(given: str | None) -> tuple[float, ...]:
    try:
        return tuple(map(float, _parts((given or "").replace("/", ","))))
    except ValueError:
        raise UserError(f"--tensor-split {given}: give each device's share, such as 3,1") from None
