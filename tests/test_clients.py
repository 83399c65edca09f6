"""Other programs' clients of a server of the embedded model, each in an environment of its own.

`pytest -m clients` installs them; with LASERKV_CLIENTS=FOLDER they are kept for the next time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, call
from test_server import FLAGS, SPEC
from test_server_page import environment
from tiny import make

from laserkv_gguf import models
from laserkv_gguf.errors import UserError

pytestmark = pytest.mark.clients

HOUSES = " ".join(f"The number of house {n} is {n * 37 % 101}." for n in range(90))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    try:
        model = models.find(None)
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("clients")
    flags = ["--block-size", "512", "--cache-dir", str(folder / "cache"), "-n", "24"]
    with Served(model, *flags) as one:
        (folder / "houses.txt").write_text(HOUSES)
        yield one


def run(*command: Any, environ: dict[str, str] | None = None, folder: Path | None = None) -> str:
    """What a program says; it has to end well. Some write where they are started."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "", "OPENAI_API_KEY": "x", **(environ or {})},
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


NODE = """
import OpenAI from "openai";
const [url, text] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "x", maxRetries: 0 });
const about = (question) => ({
  model: "any", max_completion_tokens: 8, temperature: 0,
  messages: [{ role: "user", content: text + "\\n\\n" + question }],
});
const first = await client.chat.completions.create(about("Which number has house 3?"));
const again = await client.chat.completions.create(about("Which number has house 4?"));
const stream = await client.chat.completions.create(
  { ...about("Which number has house 5?"), stream: true, stream_options: { include_usage: true } });
let said = "", usage;
for await (const chunk of stream) {
  said += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
let refused = "";
try { await client.chat.completions.create({ ...about("?"), tools: [{ type: "function" }] }); }
catch (error) { refused = error.constructor.name + " " + error.status; }
console.log(JSON.stringify({
  first: first.choices[0].message.content, said, refused,
  cached: [first, again].map((one) => one.usage.prompt_tokens_details.cached_tokens),
  streamed: usage.prompt_tokens_details.cached_tokens,
}));
"""


@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm")
def test_openai_for_node(served: Served, tmp_path: Path) -> None:
    kept = os.environ.get("LASERKV_CLIENTS")
    folder = Path(kept or tmp_path) / "node"
    if not (folder / "node_modules" / "openai").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"type": "module"}')
        subprocess.run(["npm", "install", "--silent", "openai"], cwd=folder, check=True)
    (folder / "ask.mjs").write_text(NODE)
    text = HOUSES + " They are all of brick."
    found = json.loads(run("node", folder / "ask.mjs", served.url, text))
    assert found["cached"][0] == 0
    assert found["cached"][1] == found["streamed"] > 1000
    assert found["first"]
    assert found["said"]
    assert found["refused"] == "BadRequestError 400"


LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

class House(BaseModel):
    number: int

url, text = sys.argv[1:]
model = ChatOpenAI(model="any", base_url=url + "/v1", api_key="x", temperature=0, max_retries=0)
first = model.invoke(text + "\\n\\nWhich number has house 3?")
again = model.invoke(text + "\\n\\nWhich number has house 4?")
said = "".join(chunk.content for chunk in model.stream("Say a word."))
house = model.with_structured_output(House, method="json_schema", strict=True).invoke(
    "A house has the number 7. What is its number?")
print(json.dumps({"first": first.content, "said": said, "house": house.number,
    "cached": again.usage_metadata["input_token_details"]["cache_read"]}))
"""


def test_langchain(served: Served, tmp_path: Path) -> None:
    python = environment(tmp_path, "langchain-openai")
    text = HOUSES + " They are all of wood."
    found = json.loads(run(python, "-c", LANGCHAIN, served.url, text))
    assert found["cached"] > 1000
    assert isinstance(found["house"], int)
    assert found["first"]
    assert found["said"]


LLAMAINDEX = """
import json, sys
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url, text = sys.argv[1:]
chats, texts = (
    OpenAILike(model="any", api_base=url + "/v1", api_key="x", is_chat_model=chat,
               context_window=100000, max_retries=0, timeout=600) for chat in (True, False))
chat = chats.chat([ChatMessage(role="user", content=text + "\\n\\nWhich number has house 3?")])
said = "".join(piece.delta or "" for piece in chats.stream_complete("Say a word."))
goes_on = texts.complete("The capital of France is")
print(json.dumps({"chat": str(chat.message.content), "said": said, "on": goes_on.text}))
"""


def test_llamaindex(served: Served, tmp_path: Path) -> None:
    python = environment(tmp_path, "llama-index-llms-openai-like")
    text = HOUSES + " They are all of stone."
    found = json.loads(run(python, "-c", LLAMAINDEX, served.url, text))
    assert all(found.values())


def test_llm(served: Served, tmp_path: Path) -> None:
    python = environment(tmp_path, "llm")
    home = tmp_path / "home"
    home.mkdir()
    (home / "extra-openai-models.yaml").write_text(
        f"- model_id: served\n  model_name: any\n  api_base: {served.url}/v1\n"
    )
    (home / "houses.txt").write_text(HOUSES + " They are all of glass.")
    environ = {"LLM_USER_PATH": str(home)}
    llm = python.with_name("llm")
    asked = ("-m", "served", "-f", home / "houses.txt")
    assert run(llm, *asked, "Which number has house 3?", environ=environ).strip()
    before = served.metric('laserkv_tokens_total{kind="cached"}')
    assert run(llm, *asked, "Which number has house 4?", environ=environ).strip()
    after = served.metric('laserkv_tokens_total{kind="cached"}')
    assert after - before > 1000
    assert run(llm, "-c", "And house 5?", environ=environ).strip()
    assert served.metric('laserkv_tokens_total{kind="cached"}') - after > 1000
    assert "cached_tokens" in run(llm, "logs", "list", "-n", "1", "--json", environ=environ)


def _task(folder: Path, kind: str) -> Path:
    data = folder / "data.jsonl"
    rows = [
        {"question": f"{n} and one more is", "answer": f" {n + 1}", "others": [f" {n}", " a"]}
        for n in range(3)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = kind == "multiple_choice"
    lines = [
        f"task: local_{kind}",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}",
        "test_split: test",
        f"output_type: {kind}",
        'doc_to_text: "{{question}}"',
        'doc_to_choice: "{{[answer] + others}}"\ndoc_to_target: 0'
        if choice
        else 'doc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 8}',
        "metric_list: [{metric: %s}]" % ("acc" if choice else "exact_match"),
    ]
    (folder / f"{kind}.yaml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("adapter", "kind", "path"),
    [
        ("local-chat-completions", "generate_until", "chat/completions"),
        ("local-completions", "multiple_choice", "completions"),
        ("local-completions", "generate_until", "completions"),
    ],
)
def test_lm_eval(served: Served, tmp_path: Path, adapter: str, kind: str, path: str) -> None:
    python = environment(tmp_path, "lm-eval[api]")
    backend = "remote" if adapter == "local-completions" else "None"
    arguments = f"model=any,base_url={served.url}/v1/{path},tokenizer_backend={backend}"
    arguments += ",num_concurrent=1,max_retries=1"
    if backend == "None":
        arguments += ",tokenized_requests=False"
    chat = ["--apply_chat_template"] if "chat" in adapter else []
    said = run(
        python.with_name("lm-eval"), "run", "--model", adapter, "--model_args", arguments,
        "--include_path", _task(tmp_path, kind), "--tasks", f"local_{kind}", *chat,
        environ={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert f"local_{kind}" in said


def test_schemathesis(tmp_path: Path) -> None:
    """What the description says is what the server does, whatever is sent to it."""
    python = environment(tmp_path, "schemathesis")
    tiny = make(tmp_path, spec=SPEC)
    with Served(tiny.path, *FLAGS, "--cache-dir", str(tmp_path / "cache")) as one:
        said = run(
            python.with_name("schemathesis"), "run", f"{one.url}/openapi.json",
            "--checks", "not_a_server_error,status_code_conformance,content_type_conformance",
            "--max-examples", "20", "--phases", "coverage,fuzzing", "--seed", "1",
            "--request-timeout", "120",
            folder=tmp_path,
        )  # fmt: skip
        assert call(f"{one.url}/health")[0] == 200
        assert "Traceback" not in one.said
    assert "No issues found" in said or "0 failed" in said or "passed" in said
