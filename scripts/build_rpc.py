"""Build llama.cpp's RPC backend for the llama-cpp-python that is installed, from its sources.

    python scripts/build_rpc.py [--sources FOLDER] [--to FOLDER]

Seconds, where `CMAKE_ARGS=-DGGML_RPC=on pip install …` compiles all of llama.cpp anew. Needs a C++
compiler, and pip for the sources unless they are given (the folder that llama-cpp-python's source
archive unpacks to). The library goes where laserkv_gguf looks for it, and is used by it alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import llama_cpp

from laserkv_gguf.llama import library, rpc

NAME = {"darwin": "libggml-rpc.dylib"}.get(sys.platform, "libggml-rpc.so")


def compiler() -> str:
    """A C++ compiler.

    Raises:
        SystemExit: there is none.
    """
    wanted = (os.environ.get("CXX", "").split() or [""])[0]
    for name in filter(None, (wanted, "c++", "g++", "clang++")):
        if found := shutil.which(name):
            return found
    raise SystemExit("error: no C++ compiler found; install g++ or clang, or set CXX")


def sources(folder: Path) -> Path:
    """llama.cpp's sources of the version that is installed, fetched by pip.

    Raises:
        SystemExit: pip cannot fetch them.
    """
    wanted = f"llama-cpp-python=={llama_cpp.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-binary", ":all:", wanted, "-d", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    archives = list(folder.glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(f"error: pip cannot fetch the sources of {wanted}: {said}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("llama_cpp_python-*") if path.is_dir())


def build(root: Path, to: Path) -> Path:
    """Compiles and links; the library is whole or not there.

    Raises:
        SystemExit: the compiler fails.
    """
    ggml = root / "vendor" / "llama.cpp" / "ggml"
    lib = library.library_folder()
    base = next(lib.glob("libggml-base.*"), None)
    if not (ggml / "src" / "ggml-rpc").is_dir() or base is None:
        raise SystemExit(f"error: {root} holds no sources of llama.cpp, or {lib} no libggml")
    to.mkdir(parents=True, exist_ok=True)
    beside = to / f".{os.getpid()}.{NAME}"
    command = [
        *(compiler(), "-O2", "-std=c++17", "-shared", "-fPIC"),
        *("-DGGML_SHARED", "-DGGML_BACKEND_SHARED", "-DGGML_BACKEND_BUILD", "-DGGML_BACKEND_DL"),
        *("-I", str(ggml / "include"), "-I", str(ggml / "src")),
        *(str(ggml / "src" / "ggml-rpc" / name) for name in ("ggml-rpc.cpp", "transport.cpp")),
        *("-L", str(lib), "-lggml-base", f"-Wl,-rpath,{lib}", "-lpthread", "-o", str(beside)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((x for x in done.stderr.splitlines() if "error" in x), "no reason given")
        raise SystemExit(f"error: the compiler fails: {said}")
    beside.replace(to / NAME)
    return to / NAME


def main() -> None:
    """Build, and say where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sources", type=Path, help="an unpacked source archive")
    parser.add_argument("--to", type=Path, default=rpc.folder(), help="where the library goes")
    options = parser.parse_args()
    compiler()
    with tempfile.TemporaryDirectory() as folder:
        root = options.sources or sources(Path(folder))
        print(build(root, options.to))


if __name__ == "__main__":
    main()
