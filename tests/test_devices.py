"""What is tested on the CPU, on a device whose memory is not the host's: llama.cpp's RPC backend.

Whole files of tests run in a process whose models go to an RPC server on 127.0.0.1, with flash
attention (`--on-rpc`). What they hold results against is the same: NumPy, and llama.cpp's CPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rpc_device import ROOT, Server, needed, rpc_environment
from tiny import TinySpec, make

from laserkv_gguf import LaserKV
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.llama.placement import Placement
from laserkv_gguf.models.header import Header
from laserkv_gguf.planning import fits
from laserkv_gguf.planning.settings import Settings

pytestmark = pytest.mark.devices

SECONDS = 1200
PRECISE = ContextOptions(type_k="f32", type_v="f32", flash_attn="on", threads=1)
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 10


@pytest.mark.parametrize(
    ("file", "marked"),
    [
        ("test_gpu.py", "gpu"),
        ("test_device.py", "gpu or not gpu"),
        ("test_recall.py", "not gpu and not long"),
        ("test_saved.py", "not gpu and not long"),
        ("test_residents.py", "not gpu and not long"),  # conversations that are put aside
        ("test_talk.py", "not gpu and not long"),
    ],
)
def test_a_file_of_tests_on_the_device(file: str, marked: str) -> None:
    needed()
    # `chat` is a process of its own there, which is not on the device; and how the scorer's check
    # finds what is broken is tested with a CPU's tolerance
    own = ["-k", "not goes_on_with_a_chat and not falls_back_to_the_host"]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--on-rpc", "-m", marked, *own]
    done = subprocess.run(
        [sys.executable, *command, f"tests/{file}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=rpc_environment(),
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    """For all tests of this process: llama.cpp ends it when a server goes that it has met."""
    needed()
    with Server() as first, Server() as second:
        yield first.address, second.address


@pytest.mark.parametrize("policy", ["laser", "exact", "snapkv", "keydiff", "full"])
def test_device_and_cpu_answer_token_for_token(
    policy: str, servers: tuple[str, str], tmp_path: Path
) -> None:
    """In float32 and greedy; what is kept is the same as well, but for ties."""
    path = make(tmp_path, spec=TinySpec(layers=4, head_dim=64, ctx_train=2048)).path
    found = []
    for placement in (Placement(device=("none",)), Placement(rpc=(servers[0],))):
        with LaserKV(
            path, policy=policy, placement=placement, context=PRECISE, block_size=128
        ) as engine:
            engine.ignore_end = True
            conversation = engine.conversation(document=TEXT, max_tokens=12)
            conversation.read(question="why?")
            reply = conversation.ask("why?")
            for _ in reply:
                pass
            found.append((conversation.reading.kept, reply.reply.tokens))
    (kept, tokens), (there, said) = found
    assert len(set(kept.tolist()) ^ set(there.tolist())) <= 0.02 * len(kept)
    assert tokens == said


SHAPES = {
    "plain": TinySpec(layers=8, head_dim=64, ctx_train=8192, vocab=512),
    "wide": TinySpec(layers=8, heads=8, kv_heads=2, head_dim=64, n_ff=512, vocab=1024),
    "qwen": TinySpec("qwen2", layers=8, heads=6, head_dim=64, n_ff=768, vocab=2048, ftype="Q8_0"),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("cells", [1024, 8192])
def test_a_plan_says_what_each_device_gets(
    shape: str, devices: int, cells: int, servers: tuple[str, str], tmp_path: Path
) -> None:
    """Against what llama.cpp says it allocates: 2 % of the cache, 10 % of all."""
    path = make(tmp_path, spec=SHAPES[shape]).path
    header = Header(path)
    used = servers[:devices]
    shares = (2.0, 1.0)[:devices]
    placement = Placement(rpc=used, tensor_split=shares)
    cards = tuple(fits.Card(f"RPC{n}", 1 << 30) for n in range(devices))
    run = fits.Run(
        Settings(policy="full").make_policy(0),
        flash=True,
        ctx_size=cells,
        placement=placement,
    )
    memory = fits.Memory(devices << 30, True, "", cards)
    plan = fits.make(header, run, memory, tokens=cells // 2, ratio=1.0)
    with LaserKV(path, policy="full", placement=placement, ctx_size=cells) as engine:
        engine.ask("why?", document=TEXT[:200], max_tokens=2)
        assert engine.context is not None
        model, made = engine.model.buffers, engine.context.buffers
    for server, share in zip(used, plan.devices, strict=False):
        name = f"RPC0[{server}]"
        kv, compute = made[f"{name} KV"], made[f"{name} compute"]
        weights = model[f"{name} model"]
        assert share.kv_bytes == pytest.approx(kv, rel=0.02, abs=1 << 14)
        assert share.weights_bytes == pytest.approx(weights, rel=0.02, abs=1 << 14)
        assert share.bytes == pytest.approx(weights + kv + compute, rel=0.1), (share, compute)
