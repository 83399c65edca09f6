"""Make the project's virtual environment, or mend it.

    python3 scripts/environment.py [--extra NAME ...] [--venv DIR] [--extra-index-url URL]

Needs nothing but Python 3.10 or newer. llama-cpp-python comes, in this order, from what is already
installed, from a wheel that pip built here before, from a ready-made wheel, or from a compile that
shows how far it is. With CMAKE_ARGS set it is always compiled, with those arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

OLDEST_PYTHON = (3, 10)
OLDEST_PIP = (22, 0)
PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = "laserkv_gguf"
VENV_VARIABLE = "LASERKV_GGUF_VENV"
LLAMA = "llama-cpp-python"
COMPILE_CORE_MINUTES = 14  # about 7 minutes on 2 cores
MARKER = "laserkv-gguf-started"
STAMP = "laserkv-gguf-ready.json"
LOG = "laserkv-gguf-setup.log"
WINDOWS = os.name == "nt"
UNREACHABLE = (
    "NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError"
    "|SSLError|Max retries exceeded|No route to host"
)

# What an environment can tell about itself: runs inside it.
PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
spec = importlib.util.find_spec("laserkv_gguf")
print(json.dumps({
    "python": "%d.%d" % sys.version_info[:2],
    "pip": version("pip") if importlib.util.find_spec("pip") else None,
    "llama": version("llama-cpp-python"),
    "package": spec.origin if spec else None,
}))
"""


class SetupError(Exception):
    """Something the user has to know: one line, and the exit code that goes with it."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Terminated(KeyboardInterrupt):
    """Asked to end by a signal that, unlike Ctrl-C, the processes started here did not get."""


# --- what the user sees ---------------------------------------------------------------------------


def say(text: str) -> None:
    """Write a line for the user; standard output stays free for answers."""
    print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds as 3:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """One line that moves in a terminal; a line every tenth of the way elsewhere."""

    BAR = 28

    def __init__(self, label: str) -> None:
        self.label = label
        self.started = time.monotonic()
        self.fraction: float | None = None
        self.note = ""
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = 0
        self._told = 0
        if not self._terminal:
            say(f"{label} ...")

    def update(self, fraction: float | None = None, note: str | None = None) -> None:
        """Take news; the bar never runs backwards."""
        if fraction is not None:
            self.fraction = max(self.fraction or 0.0, min(fraction, 1.0))
        if note is not None:
            self.note = note
        if self._terminal or self.fraction is None:
            return
        tenths = int(self.fraction * 10)
        if tenths > self._told:
            self._told = tenths
            say(f"{self.label}: {tenths * 10} % after {clock(time.monotonic() - self.started)}")

    def draw(self) -> None:
        """Redraw the line; called several times a second."""
        if not self._terminal:
            return
        elapsed = clock(time.monotonic() - self.started)
        if self.fraction is None:
            text = f"{self.label}  {elapsed}  {self.note}"
        else:
            full = int(self.fraction * self.BAR)
            bar = "#" * full + "-" * (self.BAR - full)
            text = f"{self.label}  [{bar}] {int(self.fraction * 100):3d} %  {elapsed}"
        text = text[: max(shutil.get_terminal_size().columns - 1, 20)]
        sys.stderr.write("\r" + text.ljust(self._drawn))
        sys.stderr.flush()
        self._drawn = len(text)

    def close(self, outcome: str) -> None:
        """End the line with how it went."""
        text = f"{self.label}: {outcome} after {clock(time.monotonic() - self.started)}"
        if self._terminal:
            # Wide enough to cover what the terminal itself wrote, such as ^C.
            sys.stderr.write("\r" + text.ljust(self._drawn + 2) + "\n")
            sys.stderr.flush()
        else:
            say(text)


# --- running pip ----------------------------------------------------------------------------------


def kill_tree(process: subprocess.Popen[str]) -> None:
    """End a command and everything it started: pip leaves its compilers running otherwise."""
    if process.poll() is not None:
        return
    if sys.platform == "win32":
        subprocess.run(
            ["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False
        )
    else:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
                break
    process.wait()


def run_logged(
    command: Sequence[str],
    log: Path,
    on_line: Callable[[str], None] | None = None,
    on_tick: Callable[[], None] | None = None,
    environ: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a command, everything it writes into the log; its exit code and its output."""
    lines: queue.Queue[str | None] = queue.Queue()
    output: list[str] = []
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environ,
            start_new_session=not WINDOWS,
        )

        def read() -> None:
            assert process.stdout is not None
            with contextlib.suppress(ValueError, OSError):
                for line in process.stdout:
                    lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                try:
                    line = lines.get(timeout=0.25)
                except queue.Empty:
                    if on_tick:
                        on_tick()
                    continue
                if line is None:
                    break
                file.write(line)
                output.append(line)
                if on_line:
                    on_line(line.rstrip())
            process.wait()
        finally:
            kill_tree(process)
    return process.returncode, "".join(output)


def show_tail(output: str, count: int = 30) -> None:
    """Show the end of what a failed command wrote."""
    for line in output.rstrip().splitlines()[-count:]:
        say("  | " + line)


def why_pip_failed(output: str) -> str | None:
    """The usual causes, with their remedy; None for the others."""
    if re.search(UNREACHABLE, output):
        return "the package registry cannot be reached; check the network or pip's settings"
    if "No space left on device" in output:
        return "the disk is full; make room and run this again"
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing:
        return (
            f"pip's index has no {missing[1]} for this Python and machine, or cannot be reached; "
            "check the network, pip's settings and the Python version"
        )
    return None


# --- the folder -----------------------------------------------------------------------------------


def venv_python(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "Scripts" / "python.exe" if WINDOWS else folder / "bin" / "python"


def cannot_write(folder: Path, error: OSError) -> SetupError:
    """Say that a folder is of no use, and how to name another."""
    return SetupError(
        f"cannot write to {folder} ({error.strerror}); name another folder with {VENV_VARIABLE}", 2
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One set-up of a folder at a time; the lock goes with the process that holds it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / (folder.name + ".lock")).open("a+b")
    except OSError as error:
        raise cannot_write(folder.parent, error) from error
    with lock as file:

        def take() -> bool:
            try:
                if sys.platform == "win32":
                    import msvcrt

                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return False
            except OSError:
                return True  # a file system without locks: go on without one
            return True

        if not take():
            say(f"another set-up of {folder} is running; waiting for it")
            while not take():
                time.sleep(1)
        yield


def probe(folder: Path) -> dict[str, object] | None:
    """What the environment says of itself, or None if its Python does not run."""
    try:
        result = subprocess.run(
            [str(venv_python(folder)), "-I", "-c", PROBE],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        state = json.loads(result.stdout)
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def make_folder(folder: Path) -> dict[str, object]:
    """An environment with a pip in it, made anew where what is there is broken and ours."""
    ours = (folder / MARKER).exists()
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        if not (folder / "pyvenv.cfg").exists():
            raise SetupError(
                f"{folder} is not a virtual environment; name another folder with {VENV_VARIABLE}",
                2,
            )
    elif folder.exists() and not folder.is_dir():
        raise SetupError(f"{folder} is not a folder; name another with {VENV_VARIABLE}", 2)

    state = probe(folder)
    if state is not None and state["pip"] is None:
        subprocess.run(
            [str(venv_python(folder)), "-I", "-m", "ensurepip", "--upgrade"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        state = probe(folder)
    if state is not None and state["pip"] is not None:
        version = numbers(str(state["python"]))
        if version >= OLDEST_PYTHON:
            return state

    if folder.is_dir() and any(folder.iterdir()):
        if not ours:
            raise SetupError(
                f"{folder} has no working Python {dotted(OLDEST_PYTHON)} or newer with pip; "
                f"delete it, or name another folder with {VENV_VARIABLE}",
                2,
            )
        shutil.rmtree(folder)
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise SetupError(
            "this Python cannot make virtual environments; install its venv package "
            "(on Debian and Ubuntu: apt install python3-venv) and run this again",
            2,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
    except OSError as error:
        raise cannot_write(folder, error) from error
    command = [sys.executable, "-m", "venv", str(folder)]
    code, output = run_logged(command, folder / LOG)
    state = probe(folder)
    if code or state is None or state["pip"] is None:
        last = (output.strip().splitlines() or ["no reason given"])[-1]
        raise SetupError(f"cannot make a virtual environment in {folder}: {last}")
    return state


def dotted(version: Sequence[int]) -> str:
    """(3, 10) as 3.10."""
    return ".".join(map(str, version))


def numbers(version: str) -> tuple[int, ...]:
    """The numbers a version begins with: 0.3.36 as (0, 3, 36)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


# --- llama-cpp-python -----------------------------------------------------------------------------


def llama_requirement() -> str:
    """The requirement as pyproject.toml states it: one place for the version range."""
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'"({re.escape(LLAMA)}[^"]*)"', text)
    return found[1] if found else LLAMA


def in_range(version: str, requirement: str) -> bool:
    """Whether a version meets a requirement made of >=, <, <=, > and == clauses."""
    have = numbers(version)
    for operator, wanted in re.findall(r"(>=|<=|==|!=|<|>)\s*([\d.]+)", requirement):
        want = numbers(wanted)
        size = max(len(have), len(want))
        left, right = have + (0,) * (size - len(have)), want + (0,) * (size - len(want))
        holds = {
            ">=": left >= right,
            "<=": left <= right,
            "==": left == right,
            "!=": left != right,
            "<": left < right,
            ">": left > right,
        }
        if not holds[operator]:
            return False
    return True


def cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(len(os.sched_getaffinity(0)), 1)
    return os.cpu_count() or 1


def need_compiler() -> None:
    """Stop before the compile where no C++ compiler works."""
    remedy = {
        "win32": "install the Build Tools for Visual Studio with 'Desktop development with C++'",
        "darwin": "run: xcode-select --install",
    }.get(sys.platform, "install one (Debian: apt install g++; Fedora: dnf install gcc-c++)")
    error = SetupError(
        f"{LLAMA} has to be compiled here and no working C++ compiler was found; {remedy}", 2
    )
    if WINDOWS:
        folder = Path(os.environ.get("PROGRAMFILES(X86)", r"C:\Program Files (x86)"))
        vswhere = folder / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
        tools = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
        if os.environ.get("CXX") or shutil.which("cl"):
            return
        if vswhere.exists():
            query = [str(vswhere), "-products", "*", "-requires", tools]
            query += ["-property", "installationPath"]
            found = subprocess.run(query, capture_output=True, text=True, check=False)
            if found.stdout.strip():
                return
        raise error
    if sys.platform == "darwin":
        # /usr/bin/c++ exists without the tools too, and opens a dialogue when called.
        selected = subprocess.run(["xcode-select", "-p"], capture_output=True, check=False)
        if selected.returncode and not os.environ.get("CXX"):
            raise error
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    program = "#include <vector>\nint main() { return std::vector<int>().size(); }\n"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "try.cpp"
        source.write_text(program, encoding="utf-8")
        for candidate in candidates:
            if not candidate or shutil.which(candidate[0]) is None:
                continue
            command = [*candidate, str(source), "-o", str(Path(scratch) / "try")]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return
    raise error


class Installer:
    """Installs into one environment, through its own pip."""

    def __init__(self, folder: Path, extra_index_urls: Sequence[str]) -> None:
        self.python = str(venv_python(folder))
        self.log = folder / LOG
        self.indexes = [item for url in extra_index_urls for item in ("--extra-index-url", url)]
        self.requirement = llama_requirement()
        # PIP_USER and the like make sense outside a virtual environment only.
        dropped = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONHOME", "PYTHONPATH"}
        self.environ = {k: v for k, v in os.environ.items() if k not in dropped}
        self.environ.update(PYTHONUTF8="1", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")

    def pip(
        self, *arguments: str, progress: Progress | None = None, compiling: bool = False
    ) -> tuple[int, str]:
        """Run pip; its lines move the progress line."""
        most = 0

        def on_line(line: str) -> None:
            nonlocal most
            if progress is None:
                return
            counted = re.match(r"\s*\[\s*(\d+)/(\d+)\]", line)
            percent = re.match(r"\s*\[\s*(\d+)%\]", line)
            collected = re.match(r"\s*Collecting ([\w.-]+)", line)
            if compiling and counted and int(counted[2]) >= max(most, 1):
                most = int(counted[2])
                progress.update(fraction=int(counted[1]) / most)
            elif compiling and percent:
                progress.update(fraction=int(percent[1]) / 100)
            elif collected:
                progress.update(note=collected[1])
            elif line.startswith("Installing collected"):
                progress.update(note="unpacking")
            progress.draw()

        return run_logged(
            [self.python, "-I", "-m", "pip", *arguments],
            self.log,
            on_line,
            progress.draw if progress else None,
            self.environ,
        )

    def load_llama(self) -> tuple[int, str]:
        """Try to import llama_cpp: a wheel made for another machine installs and does not load."""
        command = [self.python, "-I", "-c", "import llama_cpp"]
        return run_logged(command, self.log, environ=self.environ)

    def cached_wheels(self) -> list[str]:
        """Wheels of llama-cpp-python in range that pip built here before, the newest first.

        `pip install --only-binary` refuses them, and a plain `pip install` uses them only for the
        very Python that built them; the file itself serves every Python.
        """
        code, output = self.pip("cache", "list", LLAMA.replace("-", "_"), "--format", "abspath")
        found = []
        for line in output.splitlines() if code == 0 else []:
            name = re.fullmatch(r"llama_cpp_python-([^-]+)-.+\.whl", Path(line.strip()).name)
            if name and in_range(name[1], self.requirement):
                found.append((numbers(name[1]), line.strip()))
        return [path for _, path in sorted(found, reverse=True)]

    def try_wheels(self) -> tuple[bool, bool]:
        """Install without compiling: whether that worked, and whether a broken wheel was met."""
        cached = [(path,) for path in self.cached_wheels()]
        ready = ("--only-binary", LLAMA, *self.indexes, self.requirement)
        broken = False
        unreachable = None
        for arguments in [ready, *cached] if self.indexes else [*cached, ready]:
            progress = Progress(f"looking for a ready-made {LLAMA}") if arguments is ready else None
            code, output = self.pip("install", *arguments, progress=progress)
            loads = code == 0 and self.load_llama()[0] == 0
            if progress:
                progress.close("found" if loads else "none that works" if code == 0 else "none")
            if loads:
                return True, broken
            if code == 0:
                broken = True
                self.pip("uninstall", "--yes", LLAMA)
            elif arguments is ready and re.search(UNREACHABLE, output):
                unreachable = why_pip_failed(output)
        if unreachable:
            raise SetupError(unreachable)
        return False, broken

    def compile_llama(self, again: bool, skip_wheels: bool) -> None:
        """Compile, telling before what it takes and meanwhile how far it is."""
        need_compiler()
        self.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(cores()))
        minutes = max(round(COMPILE_CORE_MINUTES / cores()), 1)
        if self.environ.get("CMAKE_ARGS"):
            reason = f"compiling {LLAMA} with CMAKE_ARGS={self.environ['CMAKE_ARGS']}"
        else:
            reason = f"no ready-made {LLAMA} for this machine: compiling it, this once"
        plural = "" if cores() == 1 else "s"
        say(
            f"{reason}; about {minutes} min on {cores()} core{plural} (longer with a GPU backend)"
            f", log in {self.log}"
        )
        arguments = ["install", "--verbose", *self.indexes, self.requirement]
        if skip_wheels:
            # Neither a ready-made wheel nor one that pip built with other arguments will do.
            arguments += ["--no-binary", LLAMA, "--no-cache-dir"]
        if again:
            arguments += ["--force-reinstall", "--no-deps"]
        progress = Progress("compiling")
        try:
            code, output = self.pip(*arguments, progress=progress, compiling=True)
        except BaseException:
            progress.close("stopped")
            raise
        if code:
            progress.close("failed")
            show_tail(output)
            reason = why_pip_failed(output) or "the compiler's own words are above"
            raise SetupError(f"{LLAMA} could not be compiled: {reason}; all of it in {self.log}")
        code, output = self.load_llama()
        if code:
            progress.close("failed")
            show_tail(output)
            raise SetupError(f"{LLAMA} was compiled but does not load; all of it in {self.log}")
        progress.close("done")

    def llama(self, present: str | None, cmake_args_before: str | None) -> None:
        """llama-cpp-python in range, by the cheapest way that works."""
        cmake_args = self.environ.get("CMAKE_ARGS", "")
        usable = present is not None and in_range(present, self.requirement)
        wanted_build = not cmake_args or cmake_args == cmake_args_before
        if usable and wanted_build and self.load_llama()[0] == 0:
            return
        if cmake_args:
            self.compile_llama(again=present is not None, skip_wheels=True)
            return
        if usable:
            self.pip("uninstall", "--yes", LLAMA)  # it does not load
            present = None
        done, broken = self.try_wheels()
        if not done:
            self.compile_llama(again=present is not None, skip_wheels=broken or usable)

    def project(self, extras: Sequence[str]) -> None:
        """The project itself, editable, and what it depends on."""
        target = str(PROJECT) + (f"[{','.join(extras)}]" if extras else "")
        progress = Progress("installing what the project needs")
        try:
            code, output = self.pip("install", "--editable", target, progress=progress)
        except BaseException:
            progress.close("stopped")
            raise
        if code:
            progress.close("failed")
            show_tail(output)
            reason = why_pip_failed(output) or "pip's own words are above"
            raise SetupError(f"the project could not be installed: {reason}; log in {self.log}")
        progress.close("done")


# --- all of it ------------------------------------------------------------------------------------


def read_stamp(folder: Path) -> dict[str, object]:
    """What the last complete set-up left; empty if there was none."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def compile_kernels(folder: Path) -> None:
    """Let Numba compile now, which takes some seconds, and not in the first answer.

    Numba compiles at first use where this fails, so nothing is lost but the seconds.
    """
    say("compiling the scoring kernels ...")
    command = [str(venv_python(folder)), "-m", f"{PACKAGE}.kernels"]
    subprocess.run(command, cwd=PROJECT, check=False, stdout=subprocess.DEVNULL)


def prepare(
    extras: Sequence[str] = (), folder: Path | None = None, extra_index_urls: Sequence[str] = ()
) -> Path:
    """Make the environment with these extras, and give its Python. Quick when nothing is to do."""
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"Python {dotted(OLDEST_PYTHON)} or newer is needed, this is "
            f"{dotted(sys.version_info[:2])}; run this with a newer one",
            2,
        )
    if folder is None:
        folder = Path(os.environ.get(VENV_VARIABLE) or PROJECT / ".venv")
    folder = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 - keeps links as they are
    fingerprint = hashlib.sha256((PROJECT / "pyproject.toml").read_bytes()).hexdigest()
    cmake_args = os.environ.get("CMAKE_ARGS", "")

    with locked(folder):
        stamp = read_stamp(folder)
        stamped_extras = [str(extra) for extra in stamp.get("extras") or []]  # type: ignore[attr-defined]
        state = probe(folder) if stamp else None
        package = PROJECT / PACKAGE / "__init__.py"
        if (
            state is not None
            and stamp.get("pyproject") == fingerprint
            and set(extras) <= set(stamped_extras)
            and cmake_args in ("", stamp.get("cmake_args"))
            and stamp.get("llama") == state["llama"]
            and state["package"] is not None
            and Path(str(state["package"])) == package
        ):
            return venv_python(folder)

        if not stamp:
            say(f"setting up {folder}")
        state = make_folder(folder)
        (folder / STAMP).unlink(missing_ok=True)
        installer = Installer(folder, extra_index_urls)
        if numbers(str(state["pip"])) < OLDEST_PIP:
            installer.pip("install", "--upgrade", "pip")
        present = state["llama"]
        before = stamp.get("cmake_args")
        installer.llama(
            str(present) if present is not None else None,
            str(before) if before is not None else None,
        )
        wanted = sorted({*extras, *stamped_extras})
        installer.project(wanted)
        state = probe(folder)
        if state is None:
            raise SetupError(f"{folder} was set up but its Python does not run; delete it")
        compile_kernels(folder)
        stamp = {
            "pyproject": fingerprint,
            "extras": wanted,
            "cmake_args": cmake_args or before or "",
            "llama": state["llama"],
        }
        unfinished = folder / (STAMP + ".part")
        unfinished.write_text(json.dumps(stamp), encoding="utf-8")
        unfinished.replace(folder / STAMP)
    return venv_python(folder)


def call(main: Callable[[], int]) -> int:
    """Run a script's main: errors as one line on stderr, an interruption as 130."""

    def stop(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        return main()
    except SetupError as error:
        say(f"error: {error}")
        return error.code
    except OSError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where this one stopped")
        return 130


def main() -> int:
    """Set up by hand: another folder, other extras, another index."""
    parser = argparse.ArgumentParser(description="Make the project's virtual environment.")
    parser.add_argument("--extra", action="append", default=[], help="model, pdf, plot or test")
    parser.add_argument(
        "--venv", type=Path, help=f"the folder; .venv or what {VENV_VARIABLE} names if not given"
    )
    parser.add_argument(
        "--extra-index-url", action="append", default=[], help=f"where else wheels of {LLAMA} lie"
    )
    options = parser.parse_args()
    python = prepare(options.extra, options.venv, options.extra_index_url)
    say(f"ready: {python}")
    return 0


if __name__ == "__main__":
    sys.exit(call(main))
