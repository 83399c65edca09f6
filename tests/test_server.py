"""The server, asked by OpenAI's own client, against answers of the library and of NumPy."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from serving import PATIENCE, Served, call
from test_session import TEMPLATE
from tiny import Tiny, TinySpec, forward, make

from laserkv_gguf.api import LaserKV
from laserkv_gguf.llama.context import ContextOptions
from laserkv_gguf.server.run import bound, serve
from laserkv_gguf.server.settings import ServerSettings

SPEC = TinySpec(layers=2, ctx_train=4096, chat_template=TEMPLATE)
BLOCK = 128
FLAGS = ["--block-size", str(BLOCK), "-n", "8", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
DOCUMENT = " ".join(f"The number of house {n} is {n * 37 % 101}." for n in range(24))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(tmp_path_factory.mktemp("served"), spec=SPEC)


@pytest.fixture(scope="module")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("cache")
    with Served(tiny.path, *FLAGS, "--cache-dir", str(folder)) as one:
        yield one


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return client_of(served)


def client_of(served: Served, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def ask(client: openai.OpenAI, *messages: dict[str, Any], **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=list(messages), **more)


def account(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_extra["laserkv"]
    return found


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


# ---- answers ------------------------------------------------------------------------------------


def test_a_short_question_is_answered_as_by_the_library(tiny: Tiny, client: openai.OpenAI) -> None:
    options = ContextOptions(type_k="f32", type_v="f32", flash_attn="off", threads=1)
    with LaserKV(tiny.path, context=options, block_size=BLOCK) as engine:
        expected = engine.ask("What is ore?", system="Be brief.", max_tokens=8)
    system = {"role": "system", "content": "Be brief."}
    answer = ask(client, system, user("What is ore?"))
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert account(answer)["kept_fraction"] == 1
    chunks = list(
        ask(client, system, user("What is ore?"), stream=True,
            stream_options={"include_usage": True})
    )  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected.text
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)


def test_a_conversation_goes_on_from_what_is_there(client: openai.OpenAI) -> None:
    first = ask(client, user("Which metal is it?"), temperature=1.0, seed=5)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    alone = ask(
        client, user("Which metal is it?"), said, user("And why?"),
        extra_body={"cache_prompt": False},
    )  # fmt: skip
    assert cached(alone) == 0
    second = ask(client, user("Which metal is it?"), said, user("And why?"))
    assert cached(second) >= first.usage.prompt_tokens
    assert second.choices[0].message.content == alone.choices[0].message.content


def test_documents_are_read_once(client: openai.OpenAI) -> None:
    first = ask(client, user(f"{DOCUMENT}\n\nWhich number has house 3?"))
    assert account(first)["found"] == "new"
    assert account(first)["kept_tokens"] < account(first)["document_tokens"]
    assert cached(first) == 0
    second = ask(client, user(f"{DOCUMENT}\n\nWhich number has house 17?"))
    assert cached(second) == account(first)["document_tokens"]
    assert account(second)["found"] == "cache"
    parts = [{"type": "text", "text": DOCUMENT}, {"type": "text", "text": "House 5?"}]
    third = ask(client, {"role": "user", "content": parts})
    assert cached(third) == cached(second)
    other = ask(client, user("A word in between."))
    assert cached(other) == 0
    again = ask(client, user(f"{DOCUMENT}\n\nWhich number has house 17?"))
    assert cached(again) == cached(second)
    assert again.choices[0].message.content == second.choices[0].message.content
    salted = ask(client, user(f"{DOCUMENT}\n\nHouse 17?"), extra_body={"cache_salt": "mine"})
    assert cached(salted) == 0


HOUSES = "".join(f"House {n} has the number {n * 37 % 101}. " for n in range(60))
CHANGED = HOUSES.replace("House 48 has", "House 48 had")
SHIPS = "".join(f"Ship {n} carries {n * 31 % 97} jars. " for n in range(40))


def likelihood(answer: Any) -> float:
    found: float = answer.choices[0].logprobs.content[0].logprob
    return found


def test_what_is_shared_with_a_read_document_is_not_read_again(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*FLAGS, "--cache-dir", str(tmp_path), "--ratio", "0.98"]
    head = len("[user]") + 1

    def as_alone(client: openai.OpenAI, *said: Any) -> Any:
        """An answer, whose first token is about as likely as where everything is read anew."""
        found = ask(client, *said, logprobs=True)
        alone = ask(client, *said, logprobs=True, extra_body={"cache_prompt": False})
        assert cached(alone) == 0
        assert likelihood(found) == pytest.approx(likelihood(alone), abs=0.1)
        return found

    with Served(tiny.path, *flags) as one:
        client, asked = client_of(one), user(f"{HOUSES}\n\nHouse 3?")
        ask(client, user(f"{HOUSES}\n\nHouse 9?"))
        first = ask(client, asked)
        # changed behind some blocks
        changed = as_alone(client, user(f"{CHANGED}\n\nHouse 3?"))
        before = head + CHANGED.index("had ") + 2
        assert before - BLOCK < cached(changed) <= before
        assert cached(changed) % BLOCK == 0
        assert account(changed)["found"] == "memory"
        again = ask(client, user(f"{CHANGED}\n\nHouse 5?"))
        assert cached(again) == account(again)["document_tokens"]
        # it has grown
        grown = as_alone(client, user(f"{HOUSES}{SHIPS}\n\nHouse 3?"))
        assert cached(grown) >= len(HOUSES) - BLOCK
        # and the first one is as it was
        same = ask(client, asked)
        assert cached(same) == account(first)["document_tokens"]
        assert same.choices[0].message.content == first.choices[0].message.content
        # a second document in a conversation
        said = [asked, {"role": "assistant", "content": same.choices[0].message.content}]
        second = as_alone(client, *said, user(f"{SHIPS}\n\nShip 7?"))
        both = first.usage.prompt_tokens + len(SHIPS)
        assert cached(second) >= first.usage.prompt_tokens
        assert account(second)["document_tokens"] >= len(HOUSES) + len(SHIPS)
        other = ask(client, *said, user(f"{SHIPS}\n\nHouse 5?"))
        assert cached(other) >= both
        said += [user(f"{SHIPS}\n\nShip 7?")]
        said += [{"role": "assistant", "content": second.choices[0].message.content}]
        third = ask(client, *said, user("And ship 8?"))
        assert cached(third) >= both
        one.wait_for("laserkv_running", 0)
    with Served(tiny.path, *flags) as one:
        client, more = client_of(one), HOUSES.replace("House 50 has", "House 50 had")
        found = as_alone(client, user(f"{more}\n\nHouse 3?"))
        assert account(found)["found"] == "disk"
        assert cached(found) > before - BLOCK
        found = ask(client, *said, user("And ship 8?"))
        assert account(found)["found"] == "disk"
        assert cached(found) >= both
        one.wait_for("laserkv_running", 0)


def test_documents_survive_a_kill(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*FLAGS, "--cache-dir", str(tmp_path)]
    with Served(tiny.path, *flags) as one:
        client = client_of(one)
        ask(client, user(f"{DOCUMENT}\n\nWhich number has house 3?"))
        second = ask(client, user(f"{DOCUMENT}\n\nWhich number has house 17?"))
        one.wait_for("laserkv_running", 0)
    files = list(tmp_path.glob("documents/*/*.laserkv"))
    assert len(files) == 1
    with Served(tiny.path, *flags) as one:
        found = ask(client_of(one), user(f"{DOCUMENT}\n\nWhich number has house 17?"))
        assert account(found)["found"] == "disk"
        assert cached(found) == cached(second)
        assert found.choices[0].message.content == second.choices[0].message.content
        one.wait_for("laserkv_running", 0)


def test_what_is_found_on_disk_need_not_wait_for_kernels(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(LaserKV, "warm_up_beside", lambda engine: begun.append("kernels"))

    def started(where: str) -> None:
        begun.append("requests")
        os.kill(os.getpid(), signal.SIGTERM)

    settings = ServerSettings(port=0)
    with LaserKV(tiny.path, parallel=settings.workers) as engine:
        serve(engine, settings, bound(settings), started)
    assert begun == ["kernels", "requests"]


@pytest.mark.long
def test_a_damaged_document_is_read_again(tiny: Tiny, tmp_path: Path) -> None:
    flags, asked = [*FLAGS, "--cache-dir", str(tmp_path)], user(f"{DOCUMENT}\n\nHouse 17?")
    with Served(tiny.path, *flags) as one:
        ask(client_of(one), asked)
        one.wait_for("laserkv_running", 0)
    (file,) = tmp_path.glob("documents/*/*.laserkv")
    file.write_bytes(file.read_bytes()[:-9] + b"something")
    with Served(tiny.path, *flags) as one:
        assert account(ask(client_of(one), asked))["found"] == "new"
        assert one.end() == 0


def test_sampling_is_each_request_s_own(client: openai.OpenAI) -> None:
    hot = {"temperature": 1.5, "top_p": 1.0, "extra_body": {"top_k": 0, "min_p": 0.0}}
    one, two = (ask(client, user("Say a word"), seed=7, **hot) for _ in range(2))
    assert one.choices[0].message.content == two.choices[0].message.content
    many = ask(client, user("Say a word"), seed=7, n=3, **hot)
    assert [c.index for c in many.choices] == [0, 1, 2]
    assert many.choices[0].message.content == one.choices[0].message.content
    assert len({c.message.content for c in many.choices}) > 1
    biased = ask(client, user("Say a word"), logit_bias={"300": 100}, max_tokens=4)
    assert biased.choices[0].message.content == "I" * 4
    stopped = ask(client, user("Say a word"), logit_bias={"300": 100}, stop=["II"])
    assert stopped.choices[0].message.content == ""
    assert stopped.choices[0].finish_reason == "stop"
    tired = ask(
        client, user("Say a word"), logit_bias={"300": 20}, frequency_penalty=2.0,
        extra_body={"repeat_penalty": 10.0},
    )  # fmt: skip
    assert tired.choices[0].message.content[:2] != "II"


def test_answers_follow_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["ore", "tin"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    for heat in (0.0, 1.5):
        answer = ask(client, user("What?"), response_format=form, max_tokens=64, temperature=heat)
        assert json.loads(answer.choices[0].message.content)["kind"] in ("ore", "tin")
    answer = ask(client, user("What?"), extra_body={"grammar": 'root ::= "yes" | "no"'})
    assert answer.choices[0].message.content in ("yes", "no")


def test_log_probabilities_are_the_model_s(tiny: Tiny, client: openai.OpenAI) -> None:
    text = "ore and tin"
    answer = client.completions.create(
        model="tiny", prompt=text, echo=True, logprobs=3, max_tokens=1
    )
    found = answer.choices[0].logprobs
    tokens = call(f"{client.base_url}".removesuffix("v1/") + "tokenize",
                  {"prompt": text, "add_special_tokens": True})[1]["tokens"]  # fmt: skip
    logits = forward(tiny.weights, SPEC, tokens).logits
    scores = logits - logits.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    assert found.token_logprobs[0] is None
    expected = scores[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(found.token_logprobs[1 : len(tokens)], expected, atol=1e-3)
    assert len(found.tokens) == len(tokens) + 1
    best = [max(top.values()) for top in found.top_logprobs[1:]]
    np.testing.assert_allclose(best, scores.max(axis=1), atol=1e-3)
    assert "".join(found.tokens) == answer.choices[0].text
    by_ids = client.completions.create(
        model="tiny", prompt=[tokens, tokens], echo=True, logprobs=1, max_tokens=1
    )
    assert len(by_ids.choices) == 2
    assert by_ids.choices[1].logprobs.token_logprobs[1:] == pytest.approx(
        found.token_logprobs[1:], abs=1e-3
    )
    chat = ask(client, user("ore"), logprobs=True, top_logprobs=2, max_tokens=3)
    content = chat.choices[0].logprobs.content
    assert len(content) == 3
    for one in content:  # greedy
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"foo": 1}, "foo"),
        ({"temperature": 9}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"ratio": 0.5}, "ratio"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"$ref": "http://x"}}}, "$ref"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "last message"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(
    served: Served, more: dict[str, Any], name: str
) -> None:
    body = {"model": "tiny", "messages": [user("What?")], **more}
    status, reply = call(f"{served.url}/v1/chat/completions", body)
    assert status == 400
    assert set(reply) == {"error"}
    error = reply["error"]
    assert name in f"{error['message']} {error['param']}"
    assert "\n" not in error["message"]


def test_too_long_is_said_as_clients_know_it(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*FLAGS, "--ctx-size", "512", "--parallel", "2", "--cache-dir", str(tmp_path)]
    with Served(tiny.path, *flags, "--ratio", "1", "--api-key", "k1", "--api-key", "k2") as one:
        client = client_of(one, "k1")
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, user(f"{DOCUMENT}\n\nWhat?"))
        assert refused.value.code == "context_length_exceeded"
        body: Any = refused.value.body
        assert body["n_ctx"] == 256
        assert body["n_prompt_tokens"] > len(DOCUMENT)
        # keys
        with pytest.raises(openai.AuthenticationError):
            ask(client_of(one, "k3"), user("What?"))
        assert call(f"{one.url}/v1/models")[0] == 401
        assert call(f"{one.url}/health")[0] == 200
        mine = client.files.create(
            file=("../a\\b/tin.txt", b"Tin is a metal."), purpose="user_data"
        )
        assert mine.filename == "tin.txt"
        assert [file.id for file in client.files.list()] == [mine.id]
        other = client_of(one, "k2")
        assert not list(other.files.list())
        with pytest.raises(openai.NotFoundError):
            other.files.content(mine.id)
        asked: Any = [{"type": "file", "file": {"file_id": mine.id}}, {"type": "text", "text": "?"}]
        with pytest.raises(openai.NotFoundError):
            ask(other, {"role": "user", "content": asked})
        assert one.end() == 0


@pytest.mark.long
def test_files_survive_a_restart(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*FLAGS, "--cache-dir", str(tmp_path), "--api-key", "k1"]
    with Served(tiny.path, *flags) as one:
        text = b"Tin is a metal."
        mine = client_of(one, "k1").files.create(file=("tin.txt", text), purpose="user_data")
    with Served(tiny.path, *flags) as one:
        client = client_of(one, "k1")
        assert client.files.content(mine.id).text == "Tin is a metal."
        asked = [{"type": "file", "file": {"file_id": mine.id}}, {"type": "text", "text": "?"}]
        answer = ask(client, {"role": "user", "content": asked})
        assert answer.usage.prompt_tokens == len("[user]Tin is a metal.\n\n?\n[assistant]") + 1
        client.files.delete(mine.id)
        assert not list(client.files.list())


# ---- clients that go away, and the end ----------------------------------------------------------


def stream_of(served: Served, body: dict[str, Any]) -> socket.socket:
    """Sends a request, and reads no more than the head of what comes back."""
    data = json.dumps({"model": "tiny", "stream": True, **body}).encode()
    made = socket.create_connection(served.address, PATIENCE)
    host = ":".join(map(str, served.address))
    made.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return made


def known(served: Served) -> float:
    """Conversations that can be asked again."""
    places = ("new", "cache", "memory", "disk", "lost")
    return sum(served.metric(f'laserkv_conversations{{where="{place}"}}') for place in places)


def _some(made: socket.socket) -> bytes:
    data = made.recv(4096)
    assert data, "the server has closed the connection"
    return data


def test_who_goes_away_is_cancelled_while_reading(served: Served) -> None:
    long = " ".join(f"Line {n} of a long book." for n in range(400))
    before = known(served)
    made = stream_of(served, {"messages": [user(f"{long}\n\nWhat?")]})
    head = b""
    while b": read " not in head:  # it is being read
        head += _some(made)
    made.close()
    served.wait_for("laserkv_running", 0)
    assert known(served) == before  # a document that was read to its end would be kept
    assert call(f"{served.url}/health")[0] == 200


def test_who_waits_for_a_document_holds_nobody_up(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*FLAGS, "--parallel", "2", "--cache-dir", str(tmp_path)]
    with Served(tiny.path, *flags) as one:
        asked = {"messages": [user(f"{DOCUMENT}\n\nGo on.")], "logit_bias": {"300": 100}}
        first = stream_of(one, {**asked, "max_tokens": 3000})
        while b"content" not in _some(first):
            pass
        second = stream_of(one, {**asked, "max_tokens": 3000})
        one.wait_for("laserkv_waiting", 1)
        ask(client_of(one), user("What?"))
        assert one.metric("laserkv_waiting") == 1  # the first one is not at its end
        first.close()
        second.close()
        one.wait_for("laserkv_waiting", 0)


def test_the_queue_has_an_end_and_so_has_the_server(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*FLAGS, "--parallel", "1", "--queue", "1", "--cache-dir", str(tmp_path)]
    with Served(tiny.path, *flags, "--grace", str(PATIENCE)) as one:
        body = {"messages": [user("Go on.")], "max_tokens": 3000, "logit_bias": {"300": 100}}
        first = stream_of(one, body)
        while b"content" not in _some(first):
            pass
        second = stream_of(one, body)
        one.wait_for("laserkv_waiting", 1)
        status, reply = call(f"{one.url}/v1/chat/completions", {"messages": [user("What?")]})
        assert status == 503
        assert reply["error"]["code"] == "queue_full"
        second.close()
        one.wait_for("laserkv_waiting", 0)
        ended: list[int] = []
        thread = threading.Thread(target=lambda: ended.append(one.end(signal.SIGTERM)))
        thread.start()
        said = b""
        while part := first.recv(1 << 16):
            said += part
        assert said.rstrip().endswith(b"0")  # the last chunk of the body
        assert b"[DONE]" in said
        thread.join()
        assert ended == [0]
