"""How a model is loaded: llama.cpp's flags by its names, held against NumPy, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_cli import Files, _logging_as_it_was, files, refusal  # noqa: F401
from tiny import Tiny, TinySpec, forward, make, random_tokens

from laserkv_gguf import LaserKV
from laserkv_gguf.cli.app import run
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.placement import Placement, Rope, assigned
from laserkv_gguf.llama.sequence import MAIN

SPEC = TinySpec(ctx_train=256)
PRECISE = ContextOptions(
    batch_size=128, ubatch_size=32, type_k="f32", type_v="f32", flash_attn="off", threads=1
)
CLOSE = 2e-3  # of logits of size 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(tmp_path_factory.mktemp("placed"), spec=SPEC)


def logits(path: Path, tokens: np.ndarray, placement: Placement | None = None) -> np.ndarray:
    with (
        Model(path, placement=placement, extra_buffers=False) as model,
        Context(model, 256, PRECISE) as context,
    ):
        context.decode(tokens, 0, MAIN, outputs=1)
        return context.logits()


# ---- which layer goes where --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu_layers", "shares", "where"),
    [
        (5, [1, 1], [0, 0, 0, 1, 1]),  # the output layer is the fifth
        (99, [3, 1], [0, 0, 0, 0, 1]),
        (3, [1, 1], [None, None, 0, 0, 1]),
        (5, [0, 1], [1] * 5),
        (5, [7], [0] * 5),
        (0, [1, 1], [None] * 5),
        (5, [], [None] * 5),
    ],
)
def test_layers_go_to_devices_by_their_shares(
    gpu_layers: int, shares: list[float], where: list[int | None]
) -> None:
    assert assigned(4, gpu_layers, shares) == where


# ---- what is loaded is computed with -----------------------------------------------------------


@pytest.mark.parametrize(
    "placement",
    [Placement(mmap=False), Placement(mlock=True), Placement(kv_offload=False, device=("none",))],
    ids=["--no-mmap", "--mlock", "--device none"],
)
def test_how_the_file_is_read_changes_nothing(placement: Placement, tiny: Tiny) -> None:
    tokens = random_tokens(60, SPEC).astype(np.int32)
    truth = forward(tiny.weights, SPEC, tokens).logits[-1]
    assert np.abs(logits(tiny.path, tokens, placement) - truth).max() < CLOSE


def test_another_base_of_positions(tiny: Tiny) -> None:
    tokens = random_tokens(60, SPEC).astype(np.int32)
    other = replace(SPEC, rope_base=50_000.0)
    truth = forward(tiny.weights, other, tokens).logits[-1]
    asked = Placement(rope=Rope(rope_freq_base=50_000.0))
    assert np.abs(logits(tiny.path, tokens, asked) - truth).max() < CLOSE
    assert np.abs(logits(tiny.path, tokens) - truth).max() > 20 * CLOSE


def test_scaled_positions(tiny: Tiny) -> None:
    """A scale of 0.25 is a position divided by four, and so four times as many can be taken."""
    tokens = random_tokens(60, SPEC).astype(np.int32)
    halves = np.arange(60) / 4
    truth = forward(tiny.weights, SPEC, tokens, positions=halves).logits[-1]
    asked = Placement(rope=Rope(rope_scaling="linear", rope_freq_scale=0.25))
    assert np.abs(logits(tiny.path, tokens, asked) - truth).max() < CLOSE
    with Model(tiny.path, placement=asked) as model:
        assert model.trained_context == 4 * SPEC.ctx_train
    plain = Placement(rope=Rope(rope_scaling="none", rope_freq_scale=0.25))
    truth = forward(tiny.weights, SPEC, tokens).logits[-1]
    assert np.abs(logits(tiny.path, tokens, plain) - truth).max() < CLOSE


def test_a_long_document_stays_at_its_positions_where_they_are_scaled(tiny: Tiny) -> None:
    """Beyond the trained context positions are moved together, unless the model takes as many."""
    text = "the quick brown fox jumps over " * 12  # 372 tokens, trained for 256
    for rope, compact in ((Rope(), True), (Rope("yarn", None, 0.25, 256), False)):
        with LaserKV(
            tiny.path, block_size=64, ratio=0.14, recall="off", placement=Placement(rope=rope)
        ) as engine:
            conversation = engine.conversation(document=text, max_tokens=4)
            conversation.read(question="why?")
            positions = conversation.reading.next_position
            assert (positions < 256) == compact


# ---- LoRA --------------------------------------------------------------------------------------


def write_adapter(path: Path, tiny: Tiny, *, arch: str = "llama", rank: int = 4) -> Tiny:
    """An adapter of the queries and of an output matrix; returns the model merged with it."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    alpha = 8.0
    writer.add_float32("adapter.lora.alpha", alpha)
    weights = dict(tiny.weights)
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.2.attn_v.weight"):
        outputs, inputs = weights[name].shape
        a = rng.normal(0, 0.1, (rank, inputs)).astype(np.float32)
        b = rng.normal(0, 0.1, (outputs, rank)).astype(np.float32)
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
        weights[name] = weights[name] + alpha / rank * (b @ a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tiny._replace(weights=weights)


@pytest.fixture(scope="module")
def adapter(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiny]:
    path = tmp_path_factory.mktemp("lora") / "adapter.gguf"
    return path, write_adapter(path, tiny)


def test_an_adapter_is_added_to_the_weights(tiny: Tiny, adapter: tuple[Path, Tiny]) -> None:
    """As NumPy computes it with the merged weights; also in what is captured to choose by."""
    path, merged = adapter
    tokens = random_tokens(60, SPEC).astype(np.int32)
    truth = forward(merged.weights, SPEC, tokens)
    with (
        Model(tiny.path, placement=Placement(lora=(str(path),)), extra_buffers=False) as model,
        Context(model, 256, PRECISE) as context,
    ):
        queries = context.probe.new("queries", len(tokens))
        with context.probe.armed(queries=(queries, 0)):
            context.decode(tokens, 0, MAIN, outputs=1)
        assert np.abs(context.logits() - truth.logits[-1]).max() < CLOSE
        assert np.abs(queries - truth.queries).max() < CLOSE
    assert np.abs(logits(tiny.path, tokens) - truth.logits[-1]).max() > 20 * CLOSE


def test_a_saved_document_wants_its_adapter_back(
    tiny: Tiny, adapter: tuple[Path, Tiny], tmp_path: Path
) -> None:
    saved = tmp_path / "saved.kv"
    with LaserKV(tiny.path, block_size=64, placement=Placement(lora=(str(adapter[0]),))) as engine:
        conversation = engine.conversation(document="the quick brown fox " * 8, max_tokens=4)
        conversation.read()
        engine.save(conversation, saved)
        engine.load(saved)
    with LaserKV(tiny.path, block_size=64) as engine, pytest.raises(UserError, match="lora"):
        engine.load(saved)


@pytest.mark.parametrize("other", ["architecture", "shape", "layers", "model"])
def test_adapters_of_other_models_are_refused(other: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    specs = {
        "architecture": SPEC,
        "shape": replace(SPEC, heads=2, kv_heads=1),
        "layers": replace(SPEC, layers=4),
    }
    if other == "model":
        make(tmp_path, "other.gguf", spec=SPEC)
    else:
        base = make(tmp_path, "base.gguf", spec=specs[other])
        if other == "layers":
            names = {n.replace("blk.2", "blk.3"): w for n, w in base.weights.items()}
            base = base._replace(weights=names)
            write_adapter_of(path, base, "blk.3.attn_q.weight")
        else:
            write_adapter(path, base, arch="qwen2" if other == "architecture" else "llama")
    said = "is a model, not an adapter" if other == "model" else "was made for another model"
    with pytest.raises(UserError, match=said):
        Model(tiny.path, placement=Placement(lora=(str(path),)))


def write_adapter_of(path: Path, tiny: Tiny, name: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    outputs, inputs = tiny.weights[name].shape
    writer.add_tensor(f"{name}.lora_a", np.zeros((2, inputs), np.float32))
    writer.add_tensor(f"{name}.lora_b", np.zeros((outputs, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--split-mode tensor", "--split-mode tensor is unknown here; use none, layer, row"),
        ("--tensor-split 3,x", "give each device's share, such as 3,1"),
        ("--tensor-split 0,0", "give each device's share, such as 3,1"),
        ("--tensor-split 1,-1", "give each device's share, such as 3,1"),
        ("--tensor-split nan,1", "give each device's share, such as 3,1"),
        ("--n-cpu-moe -1", "give a number of layers"),
        ("--numa everywhere", "use distribute, isolate, numactl"),
        ("--device Nowhere7", "there is no device Nowhere7; --list-devices shows"),
        ("--device none,CUDA0", "--device none stands alone"),
        ("--device A,A", "names a device twice"),
        ("--override-tensor exps", "write PATTERN=BUFFER"),
        ("--override-tensor [=CPU", "is no regular expression"),
        ("--override-tensor exps=Moon", "there is only CPU"),
        ("--rope-scaling magic", "use none, linear, yarn"),
        ("--rope-freq-scale 4", "such as 0.25"),
        ("--rope-freq-base 0", "such as 1000000"),
        ("--yarn-orig-ctx 0", "give a number of tokens"),
        ("--yarn-beta-fast -1", "give a number of 0 or more"),
        ("--lora nowhere.gguf", "no adapter at nowhere.gguf"),
    ],
)
def test_flags_are_refused_in_one_line(
    flags: str,
    said: str,
    files: Files,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["ask", "-m", str(files.model), "-p", "why?", *flags.split(" ")]
    assert said in refusal(capsys, asked)


def test_devices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", "--list-devices"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Available devices:\n  ")
    assert err == ""


def test_an_override_that_meets_nothing_is_told(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Placement(override_tensor=("no_such_tensor=CPU",), n_cpu_moe=2)
    Model(tiny.path, placement=asked).close()
    assert "no tensor of the model has such a name" in caplog.text
    assert "this model has no experts" in caplog.text
