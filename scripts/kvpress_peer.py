"""NVIDIA's kvpress on the same weights and the same tokens: a peer for eval's tables.

kvpress compresses in PyTorch, with transformers, and chooses for every head by itself; llama.cpp's
cells are shared by all layers and heads. It needs an environment of its own:

    python -m venv peer && peer/bin/pip install torch transformers kvpress gguf

Then, with the environment of this package at first and at last:

    python scripts/kvpress_peer.py samples niah_multikey_1 --lengths 2048 --samples 30 \
        --background BOOK.txt --out samples.jsonl
    peer/bin/python scripts/kvpress_peer.py run samples.jsonl --model MODEL.gguf \
        --presses SnapKVPress,TOVAPress --ratios 0.25,0.1 --out rows.jsonl
    python scripts/kvpress_peer.py add rows.jsonl --to RESULTS

`samples` writes the token ids that eval reads and asks for the same tasks, lengths, seed and model.
`run` dequantises the GGUF, compresses what stands before the question with each press, and measures
the right answer's likelihood and the greedy answer; a run that was stopped goes on. With --asked
the question is read, and compressed, with the document, as far as its last token: kvpress's presses
do not know it otherwise, while this package's policies read for a question. `add` puts the rows
beside those of an eval folder; the next `eval` into it shows them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


# ---- with this package -------------------------------------------------------------------------


def samples(options: argparse.Namespace) -> None:
    """Writes what is read and asked, a line a sample."""
    from laserkv_gguf import LaserKV, models
    from laserkv_gguf.evaluation import measure, tasks
    from laserkv_gguf.evaluation.background import Background
    from laserkv_gguf.evaluation.samples import Source

    given = (Background.load(options.background), options.babi, None)
    with (
        LaserKV(models.find(options.model), policy="full") as engine,
        options.out.open("w") as file,
    ):
        model = engine.model
        ends = [token for token in range(model.vocab_size) if model.ends_generation(token)]
        source = Source(model, options.seed, *given, options.squad, options.hotpotqa)
        for task in tasks.find(options.tasks):
            for length in (int(part) for part in options.lengths.split(",")):
                for number in range(options.samples):
                    sample = task.sample(source, length, number)
                    asked = measure.question(task, sample)
                    if asked is None:
                        raise SystemExit(f"{task.name} asks nothing; leave it out")
                    talk = measure.conversation(engine, task, sample, task.max_tokens)
                    tokens, question, _ = talk.to_read(asked)
                    assert question is not None
                    line = {
                        "task": task.name,
                        "length": length,
                        "sample": number,
                        "seed": options.seed,
                        "document_tokens": len(sample.tokens),
                        "tokens": tokens.tolist(),
                        "question": question.tokens.tolist(),
                        "answer": model.tokenize(sample.answer).tolist(),
                        "golds": sample.golds,
                        "max_tokens": task.max_tokens,
                        "ends": ends,
                    }
                    file.write(json.dumps(line) + "\n")


def add(options: argparse.Namespace) -> None:
    """Scores the answers and appends the rows to an eval folder."""
    from laserkv_gguf import models
    from laserkv_gguf.evaluation import tasks
    from laserkv_gguf.evaluation.results import Results, key_of
    from laserkv_gguf.evaluation.samples import Sample
    from laserkv_gguf.llama.model import Model

    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    config = json.loads((options.to / "config.json").read_text())
    if {row["seed"] for row in rows} != {config["seed"]}:
        raise SystemExit(f"{options.to} has samples of seed {config['seed']}, these are of others")
    of: dict[str, Row] = {}
    for row in rows:
        known = of.setdefault(row["policy"], {"kvpress": row["kvpress"], "ratios": []})
        known["ratios"] = sorted({*known["ratios"], row["ratio"]}, reverse=True)
    config["policies"] |= of
    command = config.pop("commands", [""])[-1]
    with Model(models.find(options.model)) as model, Results(options.to, config, command) as found:
        for row in rows:
            if key_of(row) in found.done:
                continue
            task, golds = tasks.TASKS[row["task"]], tuple(row.pop("golds"))
            text = model.text(_numbers(row.pop("said")))
            sample = Sample(task.name, row["sample"], "", _numbers([]), "", golds, "")
            scored = {"score": task.score(sample, text), **task.beside(sample, text)}
            found.add({**row, "gold": list(golds), "prediction": text, **scored})


def _numbers(tokens: list[int]) -> Any:
    import numpy as np

    return np.array(tokens, np.int32)


# ---- with kvpress ------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Measures every sample with every press at every ratio; appends a line each."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    lines = [json.loads(line) for line in options.samples.read_text().splitlines()]
    presses = ["full", *(name for name in options.presses.split(",") if name != "full")]
    ratios = [float(part) for part in options.ratios.split(",")]
    done = set()
    if options.out.exists():
        done = {_key(json.loads(line)) for line in options.out.read_text().splitlines()}
    model = _model(options.model)
    with options.out.open("a") as file, torch.no_grad():
        for line in lines:
            for name, ratio in _variants(presses, ratios):
                row = {
                    **{key: line[key] for key in ("task", "length", "sample", "seed")},
                    "policy": _named(name, options.asked),
                    "ratio": ratio,
                }
                if _key(row) in done:
                    continue
                started = time.perf_counter()
                row |= _measured(model, line, name, ratio, options.asked)
                row["seconds"] = round(time.perf_counter() - started, 3)
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(*_key(row), row["kept_tokens"], round(row["gold_logprob"], 3), flush=True)


def _variants(presses: list[str], ratios: list[float]) -> Iterator[tuple[str, float]]:
    for name in presses:
        for ratio in [1.0] if name == "full" else ratios:
            yield name, ratio


def _named(press: str, asked: bool) -> str:
    return f"kvpress {press}" + " asked" * (asked and press != "full")


def _key(row: Row) -> tuple[Any, ...]:
    return row["task"], row["length"], row["sample"], row["policy"], row["ratio"]


def _model(path: Path) -> Any:
    """The GGUF's weights, dequantised to float32."""
    import kvpress  # noqa: F401 - patches attention
    import torch
    from transformers import AutoModelForCausalLM

    folder, name = str(path.resolve().parent), path.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


def _measured(model: Any, line: Row, press: str, ratio: float, asked: bool) -> Row:
    """Likelihood and greedy answer of a sample, from one compressed reading."""
    from importlib.metadata import version

    import torch
    from transformers import DynamicCache

    tokens, question = line["tokens"], line["question"]
    if asked and press != "full":
        # one token is left to ask with
        tokens, question = [*tokens, *question[:-1]], question[-1:]
    cache = DynamicCache()
    read = torch.tensor([tokens])
    if press == "full":
        model.model(input_ids=read, past_key_values=cache)
    else:
        keep = ratio * len(line["tokens"]) / len(tokens)  # the document's share, in both ways
        with _press(press, 1 - keep)(model):
            model.model(input_ids=read, past_key_values=cache)
    kept = _kept(model, cache)

    def following(given: list[int], place: int, held: Any, last: int) -> Any:
        """Log-probabilities (last, vocab) after the last tokens of `given`."""
        positions = torch.arange(place, place + len(given))[None]
        logits = model(
            input_ids=torch.tensor([given]),
            past_key_values=held,
            position_ids=positions,
            logits_to_keep=last,
        ).logits[0]
        return torch.log_softmax(logits.double(), dim=-1)

    answer, place = line["answer"], len(tokens)
    rows = following([*question, *answer[:-1]], place, copy.deepcopy(cache), len(answer))
    likelihood = rows[torch.arange(len(answer)), torch.tensor(answer)].mean().item()
    said: list[int] = []
    given, finish = question, "length"
    while len(said) < line["max_tokens"]:
        token = int(following(given, place, cache, 1)[0].argmax())
        if token in line["ends"]:
            finish = "stop"
            break
        said.append(token)
        place += len(given)
        given = [token]
    return {
        "document_tokens": line["document_tokens"],
        "read_tokens": len(line["tokens"]),
        "kept_tokens": round(kept),
        "golds": line["golds"],
        "said": said,
        "gold_logprob": likelihood,
        "finish_reason": finish,
        "kvpress": version("kvpress"),
    }


def _press(name: str, compression_ratio: float) -> Any:
    """A press, or one around another, such as AdaKVPress:SnapKVPress."""
    import kvpress

    outer, _, inner = name.partition(":")
    if inner:
        return getattr(kvpress, outer)(_press(inner, compression_ratio))
    return getattr(kvpress, outer)(compression_ratio=compression_ratio)


def _kept(model: Any, cache: Any) -> float:
    """Tokens in the cache, as the mean over layers and heads; some presses mask instead."""
    counts = []
    for index, layer in enumerate(model.model.layers):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        heads = model.config.num_key_value_heads
        hidden = 0 if masked is None else len(masked[0]) / heads
        counts.append(cache.get_seq_length(index) - hidden)
    return sum(counts) / len(counts)


# ---- the command -------------------------------------------------------------------------------


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    made = commands.add_parser("samples", help="write what is read and asked")
    made.add_argument("tasks", nargs="+")
    made.add_argument("--model", help="as of eval")
    made.add_argument("--lengths", default="2048")
    made.add_argument("--samples", type=int, default=10)
    made.add_argument("--seed", type=int, default=0)
    for name in ("background", "babi", "squad", "hotpotqa"):
        made.add_argument(f"--{name}", type=Path, help="as of eval")
    made.add_argument("--out", type=Path, required=True)
    made.set_defaults(run=samples)
    measured = commands.add_parser("run", help="measure presses")
    measured.add_argument("samples", type=Path)
    measured.add_argument("--model", type=Path, required=True, help="the GGUF")
    measured.add_argument(
        "--presses",
        default="SnapKVPress,TOVAPress,KeyDiffPress,CompactorPress",
        help="classes of kvpress; AdaKVPress:SnapKVPress is one around another",
    )
    measured.add_argument("--ratios", default="0.25,0.1", help="of the tokens to keep")
    measured.add_argument("--asked", action="store_true", help="compress the question, too")
    measured.add_argument("--threads", type=int, default=0)
    measured.add_argument("--out", type=Path, required=True)
    measured.set_defaults(run=run)
    added = commands.add_parser("add", help="put the rows into an eval folder")
    added.add_argument("rows", type=Path)
    added.add_argument("--model", help="as of eval")
    added.add_argument("--to", type=Path, required=True, help="the folder")
    added.set_defaults(run=add)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
