"""How many threads a token gets, against what a loop over all numbers would find; and which."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make, random_tokens

pytest.importorskip("llama_cpp")

import llama_cpp as L

from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import MAIN
from laserkv_gguf.llama.threads import TokenThreads
from laserkv_gguf.llama.worker import Worker


def run(pace: TokenThreads, cost: dict[int, float], tokens: int = 60) -> list[int]:
    """The numbers used for so many tokens that take what `cost` says for each number."""
    used = []
    for _ in range(tokens):
        used.append(pace.count)
        pace.took(cost[pace.count])
    return used


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        ({8: 1.0, 4: 1.5, 2: 2.0, 1: 3.0}, 8),  # a large model
        ({8: 3.0, 4: 2.0, 2: 1.0, 1: 1.5}, 2),
        ({8: 4.0, 4: 3.0, 2: 2.0, 1: 1.0}, 1),  # a very small one
        ({8: 1.0, 4: 0.99, 2: 0.1, 1: 0.1}, 8),  # as fast is not faster
    ],
)
def test_halved_while_that_is_faster(cost: dict[int, float], best: int) -> None:
    pace = TokenThreads(8)
    used = run(pace, cost)
    assert pace.settled
    assert used[-40:] == [best] * 40


def test_one_slow_token_does_not_decide() -> None:
    """The first after a change has cold caches, and any may be interrupted."""
    pace, cost = TokenThreads(2), {2: 1.0, 1: 0.5}
    for token in range(40):
        pace.took(cost[pace.count] * (9.0 if token in (0, 4, 6) else 1.0))
    assert pace.count == 1


@given(st.integers(1, 64), st.lists(st.floats(1e-4, 10), min_size=1, max_size=200))
def test_any_times_settle_on_a_number_that_was_tried(most: int, times: list[float]) -> None:
    pace, used = TokenThreads(most), {most}
    for seconds in times:
        pace.took(seconds)
        assert 1 <= pace.count <= most
        used.add(pace.count)
    tried = {most >> halvings for halvings in range(7)} - {0}
    assert used <= tried
    assert pace.settled or len(times) < 4 * (len(tried) + 1)


@pytest.mark.parametrize("flash_attn", ["off", "on"])
def test_the_number_changes_no_bit(flash_attn: str, tmp_path: Path) -> None:
    """Of logits; with flash attention it would, so there none is tried."""
    path, spec, _ = make(tmp_path)
    tokens = random_tokens(60, spec).astype(np.int32)
    seen = []
    with Model(path, gpu_layers=0, extra_buffers=False) as model:
        for threads, batch in ((1, 1), (None, 2), (None, 2)):
            options = ContextOptions(threads=threads, threads_batch=batch, flash_attn=flash_attn)
            with Context(model, 128, options) as context:
                assert context.pace.settled == (threads == 1 or flash_attn == "on")
                context.decode(tokens[:30], 0, MAIN)
                logits = []
                for position in range(30, 60):
                    context.decode(tokens[position : position + 1], position, MAIN, outputs=1)
                    logits.append(context.logits())
                assert context.pace.settled
                seen.append(np.stack(logits))
    assert np.array_equal(seen[1], seen[2])
    if flash_attn == "off":
        assert np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("options", "on_cpu", "on_gpu"),
    [
        ({}, 128, 512),
        ({"flash_attn": "on"}, 512, 512),
        ({"flash_attn": "off"}, 128, 512),
        ({"type_v": "q8_0"}, 512, 512),  # which needs flash attention
        ({"ubatch_size": 300}, 300, 300),
        ({"ubatch_size": 300, "batch_size": 200}, 200, 200),
        ({"batch_size": 100}, 100, 100),
    ],
)
def test_tokens_computed_at_a_time(
    options: dict[str, Any],
    on_cpu: int,
    on_gpu: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ContextOptions(**options, threads=1)
    assert (wanted.micro_batch(False), wanted.micro_batch(True)) == (on_cpu, on_gpu)
    path, *_ = make(tmp_path)
    with (
        Model(path, gpu_layers=0, extra_buffers=False) as model,
        Context(model, 1024, wanted) as context,
    ):
        assert context.ubatch_size == L.llama_n_ubatch(context.handle) == on_cpu
        # with a device llama.cpp computes large batches there, whatever -ngl is
        monkeypatch.setattr(model, "devices", ("CUDA0",))
        with Context(model, 1024, wanted) as context:
            assert context.ubatch_size == on_gpu


def test_all_is_decoded_in_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks, and however many tokens: OpenMP has one team then, as large as the cores."""
    path, spec, _ = make(tmp_path)
    tokens = random_tokens(60, spec).astype(np.int32)
    seen, decode = set(), L.llama_decode

    def watched(*arguments: Any) -> int:
        seen.add(threading.get_ident())
        return int(decode(*arguments))

    monkeypatch.setattr(L, "llama_decode", watched)
    with (
        Model(path, gpu_layers=0, extra_buffers=False) as model,
        Context(model, 128, ContextOptions(threads=1)) as context,
        ThreadPoolExecutor(1) as other,
    ):
        context.decode(tokens[:40], 0, MAIN)
        context.decode(tokens[40:41], 40, MAIN)
        other.submit(context.decode, tokens[41:59], 41, MAIN).result()
        other.submit(context.decode, tokens[59:], 59, MAIN).result()
        assert context.on_worker(threading.get_ident) in seen
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_a_worker_does_one_thing_after_the_other() -> None:
    worker, seen = Worker("a name"), list[int]()
    with ThreadPoolExecutor(8) as askers:
        found = list(
            askers.map(lambda n: worker.run(lambda: (seen.append(n), n * n)[1]), range(99))
        )
    assert found == [n * n for n in range(99)]
    assert sorted(seen) == list(range(99))
    thread = worker.run(threading.current_thread)
    assert thread.name == "a name"
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 // 0)
    assert worker.run(threading.current_thread) is thread
    worker.close()
    assert not thread.is_alive()


def test_ctrl_c_waits_for_what_is_under_way() -> None:
    worker, started, stopped, ended = Worker("w"), threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        started.set()
        assert stopped.wait(300)
        time.sleep(0.05)
        ended.append("work")

    def press() -> None:
        started.wait()
        signal.raise_signal(signal.SIGINT)

    def resume() -> None:
        ended.append("resumed")

    pressing = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pressing.start()
        with pytest.raises(KeyboardInterrupt):
            worker.run(work, stop=stopped.set, resume=resume)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["work", "resumed"]
    assert worker.run(lambda: 5) == 5
    pressing.join()
    worker.close()


def test_a_worker_that_nobody_knows_of_keeps_nothing_alive() -> None:
    """Nor does it keep the process from ending."""
    code = (
        "import weakref, gc; from laserkv_gguf.llama.worker import Worker;"
        "worker = Worker('w'); held = {1}; worker.run(held.copy);"
        "gone = weakref.ref(worker); del worker; gc.collect(); print(gone())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stderr


def test_a_context_that_cannot_be_made_leaves_no_thread(tmp_path: Path) -> None:
    path, _, _ = make(tmp_path)
    with Model(path, gpu_layers=0, extra_buffers=False) as model:
        before = threading.active_count()
        with pytest.raises(UserError, match="no memory"):
            Context(model, 1 << 30)
        assert threading.active_count() == before


def test_kernels_bring_threads_of_their_own() -> None:
    """Also where OpenMP is there: its threads would count as llama.cpp's."""
    code = (
        "import numba, numpy as np; from laserkv_gguf import kernels;"
        "ones = np.ones((1, 4, 2, 16), np.float32);"
        "kernels.attention_consensus(ones, ones); print(numba.threading_layer())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_THREADING_LAYER"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "workqueue"


def test_fixed() -> None:
    pace = TokenThreads(4, fixed=True)
    assert run(pace, {4: 9.0}) == [4] * 60
