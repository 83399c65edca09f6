"""What this machine and build can do: finds out before the user does.

All that loads native code runs in a child process, line by line: where it dies, the parent says
at what.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from laserkv_gguf import models
from laserkv_gguf.errors import UserError
from laserkv_gguf.machine import free_ram

GOOD, DEGRADED, BAD = "good", "degraded", "bad"
REQUIRED = {
    "llama-cpp-python": (0, 3, 36),
    "numpy": (1, 26),
    "numba": (0, 59),
    "gguf": (0, 17),
}
"""Oldest releases this is made for, as pyproject.toml has them."""
_SECONDS = 600
_LITTLE = 2 << 30
ALIKE = 0.98  # 0.998 and more on SmolLM2, whose quantised activations make much of a rounding


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: "good"; "degraded": works, with a consequence; "bad": does not.
        advice: the consequence or the remedy, empty where all is good.
    """

    name: str
    state: str
    said: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(model: str | None = None, *, debug: bool = False) -> Iterator[Finding]:
    """All findings, one after the other as they are found.

    Args:
        model: as for `models.find`.
        debug: let the child's stderr (llama.cpp's log) through.
    """
    yield from _versions()
    yield _ram()
    yield _terminal()
    place, finding = _model(model)
    yield _models()
    if finding:
        yield finding
    yield from _in_a_child(place, debug)


# without native code


def _versions() -> Iterator[Finding]:
    yield Finding("Python", GOOD, platform.python_version())
    from laserkv_gguf.version import VERSION

    yield Finding("laserkv-gguf", GOOD, VERSION)
    for name, least in REQUIRED.items():
        wanted = ".".join(map(str, least))
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, BAD, "not installed", f"pip install '{name}>={wanted}'")
            continue
        if _numbers(found) < least:
            yield Finding(name, BAD, f"{found} is too old", f"pip install '{name}>={wanted}'")
        elif name == "llama-cpp-python" and _numbers(found) >= (0, 4):
            yield Finding(
                name,
                DEGRADED,
                f"{found} is newer than what this was tried with",
                "its graph and state format may differ; the lines below try both",
            )
        else:
            yield Finding(name, GOOD, found)
    try:
        yield Finding("huggingface_hub", GOOD, metadata.version("huggingface_hub"))
    except metadata.PackageNotFoundError:
        yield Finding(
            "huggingface_hub",
            DEGRADED,
            "not installed",
            "pull cannot download; pip install huggingface_hub",
        )


def _numbers(version: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def _ram() -> Finding:
    free = free_ram()
    if free is None:
        return Finding("free RAM", GOOD, "this system does not say")
    said = f"{free / 2**30:.1f} GiB"
    if free < _LITTLE:
        return Finding("free RAM", DEGRADED, said, "only small models fit; see plan")
    return Finding("free RAM", GOOD, said)


def _terminal() -> Finding:
    from rich.console import Console

    encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
    if not encoding.startswith("utf"):
        return Finding(
            "terminal",
            DEGRADED,
            f"writes {encoding}",
            "characters outside it are shown as ?; set PYTHONUTF8=1 or a UTF-8 locale",
        )
    console = Console()
    if not sys.stdout.isatty():
        return Finding("terminal", GOOD, "none: plain output, no progress bars")
    colour = console.color_system
    said = f"{console.width} columns, {colour or 'no'} colours, UTF-8"
    if console.width < 60:
        return Finding("terminal", DEGRADED, said, "tables are cut; make it 60 columns or wider")
    if colour is None:
        return Finding(
            "terminal", DEGRADED, said, "nothing is dimmed or bright; check TERM and NO_COLOR"
        )
    return Finding("terminal", GOOD, said)


def _models() -> Finding:
    here = [name for name, entry in models.entries().items() if models.present(entry)]
    folders = [str(folder) for folder in models.caches() if folder.is_dir()]
    said = f"{', '.join(here) or 'none of models.txt'}; caches: {', '.join(folders) or 'none yet'}"
    return Finding("models here", GOOD, said)


def _model(name: str | None) -> tuple[Path | None, Finding | None]:
    try:
        return models.find(name), None
    except UserError as error:
        said, _, remedy = str(error).partition("; ")
        return None, Finding("model", BAD, f"{said}, so nothing can be tried on one", remedy)


# with native code, in a child


def _in_a_child(model: Path | None, debug: bool) -> Iterator[Finding]:
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", __name__, *([str(model)] if model else [])]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=None if debug else subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path},
    )
    assert child.stdout is not None
    timer = threading.Timer(_SECONDS, child.kill)
    timer.start()
    about = "llama.cpp"
    try:
        for line in child.stdout:
            try:
                said = json.loads(line)
            except ValueError:  # a library's own words
                continue
            if "about" in said:
                about = said["about"]
            else:
                yield Finding(**said)
        code = child.wait()
    finally:
        timer.cancel()
        if child.poll() is None:
            child.kill()
            child.wait()
    if code:
        yield Finding(
            about,
            BAD,
            f"the process that tried it died ({_why(code)})",
            "run doctor --debug, and reinstall llama-cpp-python built for this machine: "
            "pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python",
        )


def _why(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit {code}"


def _tell(out: IO[str], what: dict[str, Any]) -> None:
    print(json.dumps(what), file=out, flush=True)


def child(model: str | None, out: IO[str]) -> None:
    """The child's part: says what it is about to try, and then what it found."""
    steps: list[tuple[str, Callable[[], Finding]]] = [
        ("build", _build),
        ("devices", _devices),
        ("fast CPU kernels", _fast_kernels),
        ("kernels' compile cache", _kernels),
    ]
    for name, step in steps:
        _tell(out, {"about": name})
        _tell(out, _tried(name, step).as_dict())
    if model is None:
        return
    _tell(out, {"about": "model"})
    loaded: list[Any] = []
    _tell(out, _tried("model", lambda: _load(model, loaded)).as_dict())
    for name, check in (("flash attention", _flash), ("state rows", _rows)) if loaded else ():
        _tell(out, {"about": name})
        _tell(out, _tried(name, lambda check=check: check(loaded[0])).as_dict())  # type: ignore[misc]


def _tried(name: str, step: Callable[[], Finding]) -> Finding:
    try:
        return step()
    except Exception as error:
        said, _, remedy = str(error).partition("; ")
        return Finding(name, BAD, said or type(error).__name__, remedy or "see doctor --debug")


def _build() -> Finding:
    from laserkv_gguf.llama import checks

    info = " ".join(checks.system_info().split())
    if platform.machine().lower() in ("x86_64", "amd64") and "AVX2 = 1" not in info:
        return Finding(
            "build",
            DEGRADED,
            info,
            "compiled without AVX2: reading takes several times as long; "
            "reinstall llama-cpp-python compiled on this machine",
        )
    return Finding("build", GOOD, info)


def _devices() -> Finding:
    from laserkv_gguf.llama import devices

    said = ", ".join(
        f"{device.description} ({device.free / 2**30:.1f} of {device.total / 2**30:.1f} GiB free)"
        for device in devices.listed()
    )
    if not devices.can_offload() and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        return Finding(
            "devices",
            DEGRADED,
            said,
            "there is an NVIDIA card that this build leaves idle; install one for it: "
            "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall llama-cpp-python",
        )
    return Finding("devices", GOOD, said)


def _fast_kernels() -> Finding:
    from laserkv_gguf.llama import trial

    if trial.extra_buffers_work():
        return Finding("fast CPU kernels", GOOD, "a decode in a child process ended well")
    return Finding(
        "fast CPU kernels",
        DEGRADED,
        "a decode in a child process crashed or could not be tried",
        "they are not used: reading may take up to a third longer",
    )


def _kernels() -> Finding:
    from laserkv_gguf.kernels import cache

    folder, writable, warm = cache.state()
    name = "kernels' compile cache"
    if not folder or not (writable or warm):
        return Finding(
            name,
            DEGRADED,
            f"{folder or 'no place'} cannot be written",
            "every start compiles anew, about 12 s; set NUMBA_CACHE_DIR to a folder of yours",
        )
    if not warm:
        return Finding(
            name,
            DEGRADED,
            f"{folder} does not have all of them",
            "the first answer takes about 12 s longer; or run python -m laserkv_gguf.kernels now",
        )
    return Finding(name, GOOD, folder)


def _load(path: str, loaded: list[Any]) -> Finding:
    from laserkv_gguf.llama import trial
    from laserkv_gguf.llama.model import Model

    model = Model(path, extra_buffers=trial.extra_buffers_work())
    loaded.append(model)
    offloaded = "on the GPU" if model.gpu_layers else "on the CPU"
    return Finding("model", GOOD, f"{model.name} ({model.description}), {offloaded}")


def _flash(model: Any) -> Finding:
    from laserkv_gguf.llama import checks

    alike = checks.flash_attention(model)
    if not alike > ALIKE:
        return Finding(
            "flash attention",
            DEGRADED,
            f"its logits are not those without it (correlation {alike:.2f})",
            "use -fa off, and so no quantised -ctv",
        )
    if not model.gpu_layers:
        return Finding("flash attention", GOOD, "works; off on a CPU unless -fa on or -ctv q8_0")
    return Finding("flash attention", GOOD, "works, and is on")


def _rows(model: Any) -> Finding:
    from laserkv_gguf.llama import checks

    apart = checks.state_round_trip(model)
    if apart == 0:
        return Finding("state rows", GOOD, "saved, freed and put back: the same logits")
    return Finding(
        "state rows",
        BAD,
        f"saved, freed and put back: logits differ by {apart:.2g}",
        "this llama.cpp keeps its state otherwise; install llama-cpp-python 0.3.36",
    )


if __name__ == "__main__":
    child(sys.argv[1] if len(sys.argv) > 1 else None, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # whether native code ends orderly was not asked
