"""Does this build's fastest CPU path work on this processor? A crash must not be the user's.

llama.cpp keeps some weights in extra layouts (repacked, AMX). On some virtual machines the AMX
kernels die with SIGSEGV at the first decode. That takes the whole process, so it is tried in a
child process, once for each build and processor, with a tiny model that has a layer of every type
these layouts exist for, and the answer is remembered.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import platformdirs

from laserkv_gguf.llama import library

log = logging.getLogger(__name__)

_TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
# SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV; on Windows illegal instruction and access violation
_CRASHES = (-4, -6, -7, -10, -8, -11, 0xC000001D, 0xC0000005)
_WIDTH, _VOCAB, _BATCH, _SECONDS = 256, 64, 40, 120


def memory_file() -> Path:
    """Where the answers are remembered."""
    return Path(platformdirs.user_cache_dir("laserkv-gguf")) / "trials.json"


def extra_buffers_work(*, again: bool = False) -> bool:
    """Whether `use_extra_bufts` can be used here.

    Tried in a child process unless remembered (or `again`). A crash is told once, when found.
    """
    remembered = _recall()
    build = library.build_identity()
    if not again and build in remembered:
        return remembered[build]
    code = _try_in_child()
    if code is None:
        return False
    works = code == 0
    if not works and code not in _CRASHES:
        log.warning("the trial of the fast CPU kernels was stopped (exit %s): going without", code)
        return False
    if not works:
        log.warning(
            "llama.cpp's fastest CPU kernels crash on this processor, which a trial has found "
            "(exit %s); they are left out, and reading may be up to a third slower",
            code,
        )
    _remember({**_recall(), build: works})
    return works


def _try_in_child() -> int | None:
    """The child's exit code; None where the trial itself could not be run."""
    command = [sys.executable, "-m", __name__]
    try:
        result = subprocess.run(
            command, capture_output=True, timeout=_SECONDS, check=False, env=_child_environment()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("cannot try the fast CPU kernels (%s): running without them", error)
        return None
    if result.returncode == 1:  # a Python error, not a crash
        lines = result.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
        log.warning("cannot try the fast CPU kernels (%s): running without them", lines[-1])
        return None
    return result.returncode


def _child_environment() -> dict[str, str]:
    """The child must find this very package, however the parent found it."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([package, path] if path else [package])}


def _recall() -> dict[str, bool]:
    try:
        known = json.loads(memory_file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): bool(v) for k, v in known.items()} if isinstance(known, dict) else {}


def _remember(known: dict[str, bool]) -> None:
    """Written beside and renamed; a cache that cannot be written only costs the next trial."""
    path = memory_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(known), "utf-8")
        beside.replace(path)
    except OSError as error:
        log.info("cannot remember the trial in %s: %s", path, error)


def write_model(path: Path) -> None:
    """A one-head Llama with a layer of every type, all weights zero."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(len(_TYPES))
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCAB)
    writer.add_tokenizer_model("none")
    writer.add_tensor("token_embd.weight", np.ones((_VOCAB, _WIDTH), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(_WIDTH, np.float32))
    for layer, name in enumerate(_TYPES):
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        zeros = np.zeros((_WIDTH, _WIDTH // block * size), np.uint8)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(_WIDTH, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", zeros, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode_once(path: Path) -> None:
    """Decodes a batch and a single token with the extra layouts on, on the CPU."""
    import llama_cpp as L

    library.start()
    params = L.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = 0, True
    model = L.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise RuntimeError("llama.cpp does not load the trial model")
    options = L.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 256, 64, 64
    context = L.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError("llama.cpp makes no context for the trial model")
    for tokens in (np.arange(_BATCH, dtype=np.int32), np.zeros(1, np.int32)):
        pointer = tokens.ctypes.data_as(L.llama_token_p)
        if L.llama_decode(context, L.llama_batch_get_one(pointer, len(tokens))):
            raise RuntimeError("llama.cpp does not decode the trial model")
    L.llama_synchronize(context)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.gguf"
        write_model(file)
        decode_once(file)
    # no orderly end: what is loaded goes with the process, and only the decode was asked about
    sys.stdout.flush()
    os._exit(0)
