"""The benchmark: statistics against formulas, its order, its contract, and what it measures.

Nothing here asserts how long anything took.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import Tiny, TinySpec, forward, make, random_tokens

from laserkv_gguf import policies
from laserkv_gguf.benchmark import child, processes, report, tuning
from laserkv_gguf.benchmark.job import of_length
from laserkv_gguf.benchmark.plan import MEASURED, Benchmark, Plan, compare, growth, turns
from laserkv_gguf.benchmark.processes import Processes
from laserkv_gguf.benchmark.statistics import GROWING, exponent, ratio, ratios, spread
from laserkv_gguf.budget import Budget
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama import devices
from laserkv_gguf.llama.bare import Bare, BareSettings
from laserkv_gguf.llama.capture import CaptureError, Probe
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.timings import STEPS, Timings, step

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL = TinySpec(layers=2, heads=2, kv_heads=1, n_ff=64, ctx_train=4096, chat_template=CHATML)
TEXT = "The quick brown fox jumps over the lazy dog. " * 40
# Of the tiny models' vocabulary a printable ASCII text has as many tokens as characters.
BEFORE = 1 + len("<|im_start|>user\n")  # BOS, and what ChatML puts in front
QUESTION = "why?"
AFTER = len("\n\n" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n")
PRECISE = {"type_k": "f32", "type_v": "f32", "threads": 1}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tiny, Model]]:
    one = make(tmp_path_factory.mktemp("benchmark"), spec=SMALL)
    with Model(one.path) as model:
        yield one, model


def plan(model: Path, **changes: Any) -> Plan:
    settings = {"policy": "laser", "ratio": 0.25, "block_size": 128, "lookahead": 4}
    given = {
        "model": str(model),
        "text": TEXT,
        "question": QUESTION,
        "lengths": (300,),
        "configurations": (settings,),
        "predict": 4,
        "repeats": 1,
        "warmup": 0,
        "context": {"threads": 1, "batch_size": 512},
        "tune": False,
        "generation": 0,
    }
    return Plan(**{**given, **changes})


# ---- statistics --------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=9))
def test_spread(values: list[float]) -> None:
    found = spread(values)
    low, first, middle, third, high = np.percentile(values, [0, 25, 50, 75, 100])
    truth = {"median": middle, "q1": first, "q3": third, "min": low, "max": high}
    assert found == pytest.approx(truth)


@given(
    st.floats(-2, 3),
    st.floats(1e-6, 1e6),
    st.lists(st.integers(1, 1 << 20), min_size=2, max_size=6, unique=True),
)
def test_exponent_of_a_power_law(k: float, scale: float, lengths: list[int]) -> None:
    assert exponent(lengths, [scale * n**k for n in lengths]) == pytest.approx(k, abs=1e-6)


def test_exponent_is_least_squares_in_logarithms() -> None:
    lengths, values = [1, 10, 100], [1.0, 100.0, 100.0]  # slope of (0, 0), (1, 2), (2, 2)
    assert exponent(lengths, values) == pytest.approx(1.0)
    assert exponent([10, 20, 40], [5, None, 10]) == pytest.approx(0.5)


@pytest.mark.parametrize("values", [[1.0], [1.0, None], [0.0, 1.0], [None, None]])
def test_no_exponent_of_one_point(values: list[float | None]) -> None:
    assert exponent([10, 20][: len(values)], values) is None
    assert exponent([10, 10], [1.0, 2.0]) is None


def test_ratios() -> None:
    full = {"first_token_seconds": 6.0, "kv_bytes": 100, "decode_tokens_per_second": 10.0}
    mine = {"first_token_seconds": 2.0, "kv_bytes": 50, "decode_tokens_per_second": 20.0}
    found = ratios(full, {**mine, "peak_rss_bytes": 5})
    assert found == {
        "first_token_seconds": 3.0,
        "decode_tokens_per_second": 0.5,
        "kv_bytes": 2.0,
        "peak_rss_bytes": None,  # measured on one side only
    }
    assert ratio(None, 1.0) is ratio(1.0, None) is ratio(1.0, 0.0) is None


def row(length: int, policy: str, *seconds: float, **more: Any) -> dict[str, Any]:
    """A row of runs that took so long."""
    name = "first_token_seconds"
    middle = float(np.median(seconds))
    runs = [{name: s} for s in seconds]
    ratio = 1.0 if policy == "full" else 0.25
    row = {"length": length, "policy": policy, "ratio": ratio, "document_tokens": length}
    return {**row, name: middle, "runs": runs, **more}


def test_rows_are_compared_with_the_full_cache_of_their_length() -> None:
    rows = [
        row(100, "full", 4.0, 8.0, 6.0),
        row(100, "laser", 2.0, 2.0, 4.0),
        row(200, "full", 90.0, 90.0, 90.0),
        row(200, "laser", 10.0, 20.0, 30.0),
    ]
    compare(rows)
    assert [r["ratios"]["first_token_seconds"] for r in rows] == [1, 3, 1, 4.5]
    # of the pairs 4/2, 8/2, 6/4 and 90/10, 90/20, 90/30
    spreads = [r["ratio_spread"]["first_token_seconds"] for r in rows]
    assert (spreads[1]["min"], spreads[1]["median"], spreads[1]["max"]) == (1.5, 2, 4)
    assert (spreads[3]["min"], spreads[3]["median"], spreads[3]["max"]) == (3, 4.5, 9)


def test_growth_of_every_policy() -> None:
    rows = [row(n, p, (n / 100) ** k) for n in (100, 400) for p, k in (("full", 2), ("laser", 1))]
    found = {entry["policy"]: entry for entry in growth(rows)}
    assert found["full"]["first_token_seconds"] == pytest.approx(2)
    assert found["laser"]["first_token_seconds"] == pytest.approx(1)
    assert found["laser"]["kv_bytes"] is None
    assert growth(rows[:2]) == []


# ---- the order, the search ---------------------------------------------------------------------


def test_turns_alternate_length_by_length() -> None:
    assert list(turns((10, 20), 1, 2)) == [
        (10, 0, 0), (10, 1, 0), (10, 0, 1), (10, 1, 1),
        (20, 0, 0), (20, 1, 0), (20, 0, 1), (20, 1, 1),
    ]  # fmt: skip
    assert [number for _, number, _ in turns((5,), 2, 2)] == [0, 1, 2, 0, 1, 2]


def test_search_keeps_what_is_faster() -> None:
    times = {(False, 512): 10.0, (True, 512): 8.0, (True, 1024): 9.0, (True, 2048): 4.0}

    def cost(settings: dict[str, Any]) -> dict[str, float]:
        return {"seconds": times[settings["flash"], settings["ub"]]}

    axes = [("flash", (False, True)), ("ub", (512, 1024, 2048))]
    best, tried = tuning.search({"flash": False, "ub": 512}, axes, cost)
    assert best == {"flash": True, "ub": 2048}
    assert [(t["flash"], t["ub"], t["seconds"]) for t in tried] == [
        (*settings, seconds) for settings, seconds in times.items()
    ]


def test_search_takes_no_noise_and_nothing_that_fails() -> None:
    costs = {1: {"seconds": 10.0}, 2: {"seconds": 9.9}, 3: None}
    best, tried = tuning.search({"t": 1}, [("t", (1, 2, 3))], lambda s: costs[s["t"]])
    assert best == {"t": 1}
    assert [t["seconds"] for t in tried] == [10.0, 9.9, None]


def test_settings_that_read_fastest_need_not_generate_fastest() -> None:
    tried = [
        {"flash": True, "ub": 512, "decode_tokens_per_second": 10.0},
        {"flash": False, "ub": 512, "decode_tokens_per_second": 30.0},
        {"flash": False, "ub": 1024, "decode_tokens_per_second": 29.0},
        {"flash": False, "ub": 2048, "seconds": None},  # did not fit
    ]
    read = {"flash": True, "ub": 512}
    assert tuning.fastest_token(read, tried) == tried[1]
    assert tuning.fastest_token({"flash": False, "ub": 512}, tried) is None
    assert tuning.fastest_token(read, tried[:1]) is None
    assert tuning.fastest_token(read, []) is None
    # one per cent is noise
    tried[1]["decode_tokens_per_second"] = tried[2]["decode_tokens_per_second"] = 10.1
    assert tuning.fastest_token(read, tried) is None


# ---- timings -----------------------------------------------------------------------------------


def test_a_step_inside_another_is_charged_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timings = Timings()
    for _ in range(2):
        with timings.spent("score"):
            now[0] += 1
            with step("select"):
                now[0] += 10
            now[0] += 100
        now[0] += 1000  # between the steps
        with timings.spent("evict"):
            now[0] += 10000
        timings.end_block()
    with step("select"):  # no read is under way
        now[0] += 1e6
    assert (timings.score, timings.select, timings.evict) == (202, 20, 20000)
    one = {**dict.fromkeys(STEPS, 0.0), "score": 101, "select": 10, "evict": 10000}
    assert timings.blocks == [one, one]


# ---- llama.cpp alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("flash", [False, True])
def test_bare_generates_what_numpy_says(loaded: tuple[Tiny, Model], flash: bool) -> None:
    one, model = loaded
    tokens = random_tokens(50, one.spec).tolist()
    settings = BareSettings(flash_attn=flash, batch_size=16, ubatch_size=8, **PRECISE)
    with Bare(model, 256, settings) as bare:
        bare.read(np.array(tokens))
        made = bare.generate(6)
        bare.rewind(50)
        bare.read(np.array([made.tokens[0]]))
        again = bare.generate(5)
    for token in made.tokens:
        assert token == forward(one.weights, one.spec, tokens).logits[-1].argmax()
        tokens.append(token)
    assert again.tokens == made.tokens[1:]
    assert made.last > made.first


def test_a_depth_is_made_of_copies(loaded: tuple[Tiny, Model]) -> None:
    """Every copy is attended to, each with the positions of what was read; against NumPy."""
    one, model = loaded
    tokens, later = random_tokens(20, one.spec), 77
    with Bare(model, 256, BareSettings(**PRECISE), spare=True) as bare:
        bare.read(tokens)
        assert bare.deepen(20, 119) == 100
        bare.read(np.array([later]))
        found = last_logits(bare)
        bare.rewind(20)
        assert bare.deepen(100, 140) == 140
        bare.read(np.array([later]))
        deeper = last_logits(bare)
    for copies, seen in ((5, found), (7, deeper)):
        ids = [*np.tile(tokens, copies), later]
        visible = np.kron(np.eye(copies, dtype=bool), np.tri(20, dtype=bool))
        visible = np.pad(visible, (0, 1))
        visible[-1] = True
        places = [*np.tile(np.arange(20), copies), 20]
        logits = forward(one.weights, one.spec, ids, places, visible).logits
        assert np.abs(seen - logits[-1]).max() < 1e-3
    assert np.abs(found - deeper).max() > 0.01  # and it matters how many they are


def last_logits(bare: Bare) -> NDArray[np.float32]:
    pointer = L.llama_get_logits_ith(bare.handle, -1)
    return np.ctypeslib.as_array(pointer, (SMALL.vocab,)).copy()


def test_bare_refuses_what_does_not_fit(loaded: tuple[Tiny, Model]) -> None:
    with pytest.raises(UserError, match="no memory for a full KV cache of 2000000000 cells"):
        Bare(loaded[1], 2_000_000_000, BareSettings(threads=1))


def test_an_idle_probe_changes_nothing(loaded: tuple[Tiny, Model]) -> None:
    one, model = loaded
    tokens = random_tokens(40, one.spec)
    probe = Probe(model.layers, model.heads, model.kv_heads, model.head_dim)
    settings = BareSettings(**PRECISE)
    with Bare(model, 256, settings, probe=probe) as watched, Bare(model, 256, settings) as alone:
        watched.read(tokens)
        alone.read(tokens)
        assert watched.generate(8).tokens == alone.generate(8).tokens
        # one has the callback, the other has not
        keys = probe.new("keys", 1)
        with probe.armed(keys=(keys, 0)):
            watched.read(tokens[:1])
        with pytest.raises(CaptureError), probe.armed(keys=(keys, 0)):
            alone.read(tokens[:1])


@pytest.mark.parametrize("cells", [200, 600])
def test_buffers_as_llama_cpp_reports_them(loaded: tuple[Tiny, Model], cells: int) -> None:
    one, model = loaded
    row = 2 * one.spec.layers * one.spec.kv_heads * one.spec.head_dim * 2  # K and V in f16
    size = math.ceil(cells / 256) * 256 * row
    with (
        Bare(model, cells, BareSettings(threads=1)) as bare,
        Context(model, cells, ContextOptions(threads=1)) as context,
    ):
        for made in (bare, context):
            assert made.kv_bytes == size
            # told in MiB with two decimals
            assert made.buffers["CPU KV"] == pytest.approx(size, abs=0.006 * 2**20)
            assert {name.split()[1] for name in made.buffers} == {"KV", "compute", "output"}
    assert sum(model.buffers.values()) > 0
    assert model.offloaded_layers == 0


# ---- measured ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(loaded: tuple[Tiny, Model], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two lengths, two runs of each."""
    given = plan(loaded[0].path, lengths=(300, 600), repeats=2, generation=2)
    said: list[str] = []
    found = Benchmark(given, Processes(), said.append).run()
    found["said"] = [line for line in said if "run" in line]
    return found


def test_rows(result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert [(r["length"], r["policy"], r["ratio"]) for r in rows] == [
        (n, *p) for n in (300, 600) for p in (("full", 1.0), ("laser", 0.25))
    ]
    cell = 2 * SMALL.layers * SMALL.kv_heads * SMALL.head_dim * 2
    for one in rows:
        tokens = one["length"] + BEFORE
        full = one["policy"] == "full"
        budget = policies.make("laser").budget(tokens, 128, one["ratio"], 4)
        assert one["document_tokens"] == tokens
        assert one["kept_tokens"] == (tokens if full else budget.kept)
        assert one["generated_tokens"] == 4
        assert one["prompt_tokens"] == AFTER
        cells = tokens + AFTER + 4 if full else budget.cells(AFTER, 4, AFTER + 4)
        assert one["kv_bytes"] == math.ceil(cells / 256) * 256 * cell
        reported = sum(size for name, size in one["buffers"].items() if name.endswith("KV"))
        assert reported == pytest.approx(one["kv_bytes"], abs=0.006 * 2**20)
        assert one["context_bytes"] == sum(one["buffers"].values()) > reported
        assert one["device_memory_bytes"] is None or one["device_memory_bytes"] >= 0
        assert one["peak_rss_bytes"] > 10 << 20
        assert 0 < one["prefill_seconds"] < one["first_token_seconds"]
        assert (one["overhead_share"] == 0) == full
        assert len(one["runs"]) == 2


def test_rows_hold_medians_and_spread(result: dict[str, Any]) -> None:
    for one in result["rows"]:
        for name in MEASURED:
            values = [run[name] for run in one["runs"] if run.get(name) is not None]
            if not values:
                assert one[name] is None
                continue
            assert one[name] == pytest.approx(np.median(values))
            assert one["spread"][name]["min"] == min(values)
            assert one["spread"][name]["max"] == max(values)
        for key in ("first_token_seconds", "decode_seconds_per_token", "kv_bytes"):
            base = next(r for r in result["rows"] if r["length"] == one["length"])
            assert one["ratios"][key] == pytest.approx(base[key] / one[key])
    assert result["ratios"] == result["rows"][-1]["ratios"]


def test_blocks_add_up(result: dict[str, Any]) -> None:
    """Every block of every run shows its steps; together they are the run's."""
    for one in result["rows"]:
        if one["policy"] == "full":
            assert "block_seconds" not in one
            continue
        for run in one["runs"]:
            blocks = run["block_seconds"]
            assert len(blocks) == len(Budget(one["document_tokens"], 128, one["ratio"]).blocks)
            for name in STEPS:
                total = sum(block[name] for block in blocks)
                assert total == pytest.approx(run[f"{name}_seconds"])
            spent = sum(run[f"{name}_seconds"] for name in STEPS)
            assert 0 < spent <= run["prefill_seconds"]
            more = spent - run["decode_seconds"]
            assert run["overhead_share"] == pytest.approx(more / run["prefill_seconds"])


def test_it_was_measured_in_turn(result: dict[str, Any]) -> None:
    assert result["said"] == [
        f"{n} tokens, {policy}, run {turn} of 2"
        for n in (300, 600)
        for turn in (1, 2)
        for policy in ("full", "laser")
    ]


def test_generation_beside_a_bare_loop(result: dict[str, Any]) -> None:
    """Once for each length, of the first policy; the loop says what the engine says."""
    assert len(result["generation"]) == 2
    for entry, one in zip(result["generation"], result["rows"][1::2], strict=True):
        assert entry["same_tokens"]
        assert entry["kept_tokens"] == one["kept_tokens"]
        times = entry["seconds_per_token"]
        assert set(times) == {"engine", "loop", "packed"}
        for name in ("loop", "packed"):
            more = times["engine"]["median"] / times[name]["median"] - 1
            assert entry["overhead"][name] == pytest.approx(more)


def test_growth_in_the_result(result: dict[str, Any]) -> None:
    assert [(g["policy"], g["ratio"]) for g in result["growth"]] == [
        ("full", 1.0), ("laser", 0.25)
    ]  # fmt: skip
    full = result["growth"][0]
    small, large = result["rows"][0], result["rows"][2]
    slope = math.log(large["kv_bytes"] / small["kv_bytes"]) / math.log(
        large["document_tokens"] / small["document_tokens"]
    )
    assert full["kv_bytes"] == pytest.approx(slope)
    assert set(GROWING) <= set(full)


def test_nothing_of_this_machine_but_what_it_is(result: dict[str, Any], loaded: Any) -> None:
    """No paths, no names of hosts or users."""
    said = json.dumps(result)
    assert str(loaded[0].path.parent) not in said
    assert result["settings"]["model"] == loaded[0].path.name
    assert os.uname().nodename not in said if hasattr(os, "uname") else True
    assert TEXT not in said
    assert result["machine"]["processors"] >= 1


def test_markdown_and_plot(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(result, tmp_path / "it.md", tmp_path / "out")
    text = (tmp_path / "it.md").read_text("utf-8")
    assert text == (tmp_path / "out" / "bench.md").read_text("utf-8")
    assert json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))["rows"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "bench.json", "bench.md", "bench.png", "bench.svg"
    }  # fmt: skip
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for one in result["rows"]:
        if one["policy"] != "full":
            found = one["ratios"]
            cells = f"| {one['document_tokens']:,} | {one['policy']} {one['ratio']:g} "
            cells += f"| {found['first_token_seconds']:.2f} "
            assert cells in tables[0]
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "laser 0.25" in (tmp_path / "out" / "bench.svg").read_text("utf-8")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"laserkv-gguf\[plot\]") as caught:
        report.check(tmp_path)
    assert "\n" not in str(caught.value)
    report.check(None)


def here(job: dict[str, Any]) -> dict[str, Any]:
    """A job in this process, where its own is not what matters."""
    found: dict[str, Any] = json.loads(json.dumps(child.measured(job)))
    return found


def test_a_full_cache_that_does_not_fit_is_a_row(
    loaded: tuple[Tiny, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was compressed is measured all the same."""

    def no_room(job: dict[str, Any]) -> dict[str, Any]:
        if job["kind"] == "full":
            raise LaserKVError("no memory")
        return here(job)

    monkeypatch.setattr(processes, "run", no_room)
    found = Benchmark(plan(loaded[0].path), Processes()).run()
    full, laser = found["rows"]
    assert full["error"] == "no memory"
    assert full["first_token_seconds"] is full["kv_bytes"] is None
    assert laser["first_token_seconds"] > 0
    assert laser["ratios"]["first_token_seconds"] is None
    assert any("no memory" in note for note in found["notes"])
    assert "no memory" in report.markdown(found)


def test_the_search_is_what_the_full_cache_is_run_with(
    loaded: tuple[Tiny, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, jobs = processes.run, []

    def watched(job: dict[str, Any]) -> dict[str, Any]:
        jobs.append(job)
        if job["kind"] == "search" and job["axes"]:
            for entry in (found := run(job))["tried"]:
                entry["seconds"] = 1.0 if entry["flash_attn"] else 2.0
                entry["decode_tokens_per_second"] = 1e8 if entry["flash_attn"] else 2e8
            found["best"] = {**job["start"], "flash_attn": True}
            return found
        return run(job)

    monkeypatch.setattr(processes, "run", watched)
    found = Benchmark(plan(loaded[0].path, tune=True, configurations=()), Processes()).run()
    base = found["baselines"][0]
    assert base["settings"]["flash_attn"]
    tried = {(t["flash_attn"], t["extra_buffers"]) for t in base["tried"]}
    assert {(False, True), (True, True)} <= tried or {(False, False), (True, False)} <= tried
    full = next(job for job in jobs if job["kind"] == "full")
    assert full["bare"] == base["settings"]
    assert full["extra_buffers"] == base["extra_buffers"]
    # whose tokens are measured with the settings that generate fastest, at the same depth
    token = next(job for job in jobs if job["kind"] == "token")
    assert not token["bare"]["flash_attn"]
    row = found["rows"][0]
    assert token["length"] == row["document_tokens"] + row["prompt_tokens"]
    (run_,) = row["runs"]
    assert 0 < run_["fastest_decode_seconds_per_token"] != run_["decode_seconds_per_token"] > 0
    assert row["ratios"]["fastest_decode_seconds_per_token"] == 1
    lines = report.markdown(found).splitlines()
    assert any("| off |" in line and line.endswith("| tokens |") for line in lines)


def test_beyond_the_trained_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "run", here)
    model = make(tmp_path, spec=SMALL, ctx_train=256).path
    settings = {"policy": "laser", "ratio": 0.1, "block_size": 64, "lookahead": 0}
    several = (settings, {**settings, "policy": "random", "ratio": 0.2})
    found = Benchmark(plan(model, lengths=(400,), configurations=several), Processes()).run()
    full, *compressed = found["rows"]
    assert [(r["policy"], r["ratio"], r["positions"]) for r in compressed] == [
        ("laser", 0.1, "compact"), ("random", 0.2, "compact")
    ]  # fmt: skip
    assert full["kept_tokens"] == full["document_tokens"]
    assert any("256 tokens this model was trained for" in note for note in found["notes"])


# ---- processes ---------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was(
    loaded: tuple[Tiny, Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    def counted(job: dict[str, Any]) -> dict[str, Any]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(job["kind"])
        return {"number": len(calls)}

    monkeypatch.setattr(processes, "run", counted)
    store = tmp_path / "deep" / "runs.jsonl"
    jobs = [{"kind": "full", "model": str(loaded[0].path), "repeat": n} for n in range(3)]

    def results() -> list[dict[str, Any]]:
        runner = Processes(store)
        return [runner.run(job) for job in jobs]

    with pytest.raises(KeyboardInterrupt):
        results()
    with store.open("a", encoding="utf-8") as file:
        file.write('{"key": "cut o')  # killed while it wrote
    monkeypatch.setattr(processes, "run", lambda job: {"number": 10})
    assert results() == [{"number": 1}, {"number": 2}, {"number": 10}]
    monkeypatch.setattr(processes, "_code", lambda: "other code")
    assert results() == [{"number": 10}] * 3


def test_errors_of_a_process(loaded: tuple[Tiny, Model], tmp_path: Path) -> None:
    job = {"kind": "full", "model": str(tmp_path / "no.gguf"), "debug": False}
    with pytest.raises(LaserKVError, match="KeyError"):
        processes.run(job)
    job |= {"gpu_layers": None, "placement": {}, "extra_buffers": False, "bare": {}}
    with pytest.raises(UserError, match=r"no model at .*no\.gguf"):
        processes.run(job)


def test_a_killed_process(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    real = subprocess.run
    monkeypatch.setattr(
        processes.subprocess, "run", lambda _, **more: real([sys.executable, "-c", script], **more)
    )
    with pytest.raises(LaserKVError, match=r"was killed.*memory runs out"):
        processes.run({"kind": "full"})


def test_the_full_cache_is_measured_without_numba(loaded: tuple[Tiny, Model]) -> None:
    """Its memory is llama.cpp's and Python's, not ours."""
    script = (
        "import sys; from laserkv_gguf.benchmark import child; import json;"
        "child.measured(json.loads(sys.argv[1]));"
        "print(*sorted(m for m in sys.modules if m in ('numba', 'laserkv_gguf.reading.reader')"
        "), 'end')"
    )
    job = {
        "kind": "full",
        "model": str(loaded[0].path),
        "gpu_layers": None,
        "placement": {},
        "extra_buffers": False,
        "text": TEXT,
        "length": 100,
        "question": QUESTION,
        "predict": 2,
        "warmup": 1,
        "bare": {"threads": 1},
    }
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(job)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "end\n"


@pytest.mark.parametrize("tokens", [1, 10, len(TEXT), 3 * len(TEXT)])
def test_texts_of_a_length(loaded: tuple[Tiny, Model], tokens: int) -> None:
    text = of_length(loaded[1], TEXT, tokens)
    assert len(text) == tokens
    assert f"{TEXT}\n\n{TEXT}\n\n{TEXT}\n\n{TEXT}".startswith(text)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks into /proc")
def test_ctrl_c_leaves_no_process(loaded: tuple[Tiny, Model], tmp_path: Path) -> None:
    """The command ends with 130, without a word, and so does what it started."""
    command = [sys.executable, "-m", "laserkv_gguf", "bench", "-m", str(loaded[0].path), "-t", "1"]
    command += ["--tokens", "3000", "--repeats", "200", "--no-tune", "--out", str(tmp_path / "out")]
    mark = f"BENCHMARK_TEST={tmp_path}"
    started = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "BENCHMARK_TEST": str(tmp_path)},
        start_new_session=True,
    )
    store = tmp_path / "out" / report.RUNS
    for _ in range(6000):
        if store.exists() and store.read_text().count("\n") >= 2 and len(marked(mark)) == 2:
            break
        time.sleep(0.1)
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=600)
    assert started.returncode == 130
    assert err == ""
    assert marked(mark) == []
    assert all(json.loads(line)["result"] for line in store.read_text().splitlines())


def marked(mark: str) -> list[str]:
    """Processes with this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


# ---- the scripts -------------------------------------------------------------------------------


def test_bench_full_writes_one_table(
    result: dict[str, Any],
    loaded: tuple[Tiny, Model],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of the models that could be measured; what is not for `bench` to know stays away from it."""
    spec = importlib.util.spec_from_file_location("bench_full", ROOT / "scripts" / "bench_full.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    given: list[tuple[str, Path, list[str]]] = []

    def measure(model: str, folder: Path, options: list[str]) -> dict[str, Any] | None:
        given.append((model, folder, options))
        return result if len(given) == 1 else None

    monkeypatch.setattr(script, "measure", measure)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    path = loaded[0].path
    command = ["bench_full.py", "--model", str(path), "--block-size", "256", "--model", str(other)]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out"), "-n", "8"])
    assert script.main() == 1  # the second failed
    (first, folder, options), (second, _, _) = given
    assert (Path(first), Path(second)) == (path, other)
    assert folder == tmp_path / "out" / path.stem
    assert options.count("--block-size") == options.count("--lengths") == 1
    assert options[-4:] == ["--block-size", "256", "-n", "8"]
    table = (tmp_path / "out" / "table.md").read_text("utf-8")
    assert str(path.parent) not in table
    assert f"--model {path.name}" in table
    for row in result["rows"]:
        if row["policy"] == "laser":
            gain = row["ratios"]["first_token_seconds"]
            assert f"| {row['document_tokens']:,} | laser 0.25 | {gain:.2f} |" in table


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("backend", "switch"),
    [("", "-DGGML_CUDA=on"), ("vulkan", "-DGGML_VULKAN=on"), ("rocm", "-DGGML_HIP=on")],
)
def test_gpu_check_asserts_that_the_gpu_is_used(backend: str, switch: str, tmp_path: Path) -> None:
    """With a driver and a compiler, but a llama.cpp that sees no GPU, it fails and says so."""
    if devices.can_offload():
        pytest.skip("there is a GPU")
    tools = tmp_path / "bin"
    tools.mkdir()
    fakes = {
        "nvidia-smi": "echo 'GPU 0: none'",
        **dict.fromkeys(("nvcc", "glslc", "vulkaninfo", "hipcc", "rocminfo"), "echo none"),
        # instead of setting up an environment: this one
        "python3": f'mkdir -p "$LASERKV_GGUF_VENV/bin"\n'
        f'printf \'#!/bin/sh\\nexec {sys.executable} "$@"\\n\' > "$LASERKV_GGUF_VENV/bin/python"\n'
        f'chmod +x "$LASERKV_GGUF_VENV/bin/python"; echo "$CMAKE_ARGS"',
    }
    for name, body in fakes.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    script, out = ROOT / "scripts" / "gpu_check.sh", tmp_path / "out"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", script, "--out", out, *(["--backend", backend] if backend else [])],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    report = (out / "report.md").read_text("utf-8")
    assert "## build: ok" in report
    assert switch in report
    assert f"# GPU check, {backend or 'cuda'}, " in report
    assert "## offload: FAILED" in report
    assert "llama.cpp sees no GPU" in report
    assert "## bench" not in report


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nonsense"], "unknown option --nonsense"),
        (["--out"], "--out needs a value"),
        (["--backend", "metal"], "unknown backend metal; use cuda, vulkan or rocm"),
        ([], "no "),
    ],
)
def test_gpu_check_refuses_in_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    tools = tmp_path / "bin"  # what it needs before it looks for a driver, and no driver
    tools.mkdir()
    for name in ("dirname", "sed"):
        (tools / name).symlink_to(shutil.which(name) or name)
    script = ROOT / "scripts" / "gpu_check.sh"
    done = subprocess.run(
        [shutil.which("bash") or "bash", script, *arguments],
        capture_output=True,
        text=True,
        env={"PATH": str(tools)},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
