"""The endpoint: the same answers as an evaluation, many at once, streams, refusals, metrics and a graceful stop."""

import asyncio
import base64
import gc
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
import zlib

import httpx
import openai
import pytest
import torch
from conftest import ROOT, TINY_VLM
from PIL import Image
from serving_world import Held, config_of, data_url, image_part, messages_of, request, running, scene_url

from prunetune.configs import EvaluateConfig, ModelConfig
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.models import Arm
from prunetune.pruning import PruningSpec
from prunetune.serving import run
from prunetune.serving.backends.base import Prompts
from prunetune.serving.errors import ServingError
from prunetune.serving.images import ImageReader
from prunetune.serving.run import listen, serve


@pytest.fixture(scope="module")
def arm():
    return Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), PruningSpec("divprune", 16), device="cpu")


@pytest.fixture(scope="module")
def server(arm):
    limits = {"max_body": 2_000_000, "max_pixels": 1_000_000, "max_images": 3, "body_seconds": 1.0}
    with running(arm, batching={"max_batch": 32}, limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def evaluated(arm, tmp_path_factory):
    """Forty questions with the answers of `prunetune evaluate`."""
    folder = tmp_path_factory.mktemp("evaluated") / "arm"
    config = EvaluateConfig(model=arm.base.config, pruning=arm.spec, tasks=["tiny_world"], limit=40, batch_size=8,
                            max_new_tokens=6, output=str(folder))  # fmt: skip
    evaluate(config, arm, bar=False)
    rows = read_results(folder)
    urls = {row.image: scene_url(row.image) for row in rows}
    return [(urls[row.image], row.question, row.prediction) for row in rows]


async def asked(server, questions, stream=False, **fields):
    """Ask all at once and return the answers in the order of the questions."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def one(url, question):
            made = await client.chat.completions.create(
                model="tiny", messages=messages_of(url, question), max_tokens=6, stream=stream, **fields
            )
            if not stream:
                return made.choices[0].message.content
            return "".join([piece.choices[0].delta.content or "" async for piece in made])

        return await asyncio.gather(*(one(url, question) for url, question, _ in questions))


def test_the_endpoint_answers_as_evaluate_does_one_by_one_and_in_batches(server, evaluated):
    expected = [prediction for _, _, prediction in evaluated]
    assert len(set(expected)) > 5
    alone = [asyncio.run(asked(server, [question]))[0] for question in evaluated[:12]]
    assert alone == expected[:12]
    assert asyncio.run(asked(server, evaluated)) == expected
    assert asyncio.run(asked(server, evaluated, stream=True)) == expected


@pytest.mark.parametrize("in_flight", [32, 256])
def test_with_many_in_flight_nothing_is_lost_or_mixed_up(server, evaluated, in_flight):
    before = server.metric('prunetune_requests_total{status="200"}')
    batches = server.metric("prunetune_batch_size_count")
    many = (evaluated * 7)[:in_flight]
    assert asyncio.run(asked(server, many)) == [prediction for _, _, prediction in many]
    assert server.metric('prunetune_requests_total{status="200"}') == before + in_flight
    assert server.metric("prunetune_batch_size_count") - batches < in_flight / 2  # they were answered together
    assert server.metric("prunetune_requests_in_flight") == server.metric("prunetune_requests_waiting") == 0


def test_usage_and_metrics_count_what_the_llm_read(server, evaluated):
    before = {name: server.metric(f"prunetune_{name}_total") for name in
              ("prompt_tokens", "completion_tokens", "visual_tokens_kept", "visual_tokens_pruned")}  # fmt: skip
    usage = server.ask(url=evaluated[0][0], question=evaluated[0][1]).json()["usage"]
    assert (usage["visual_tokens"], usage["visual_tokens_kept"]) == (144, 16)
    text = server.ask(question=evaluated[0][1]).json()["usage"]
    assert text["visual_tokens"] == 0
    assert usage["prompt_tokens"] - text["prompt_tokens"] == 16
    grown = {name: server.metric(f"prunetune_{name}_total") - value for name, value in before.items()}
    assert grown == {
        "prompt_tokens": usage["prompt_tokens"] + text["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"] + text["completion_tokens"],
        "visual_tokens_kept": 16,
        "visual_tokens_pruned": 128,
    }


def test_streams_end_as_openais_do(server, evaluated):
    url, question, answer = evaluated[0]
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    reply = server.ask(url=url, question=question, **fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces[:-1]) == answer
    assert pieces[-2]["choices"][0]["finish_reason"] == "stop"
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"] == server.ask(url=url, question=question).json()["usage"]


def test_stops_and_lengths_end_an_answer(server, evaluated):
    url, question, answer = max(evaluated, key=lambda found: len(found[2].split()))
    first, second, *_ = answer.split()
    for stream in (False, True):
        told = asyncio.run(asked(server, [(url, question, answer)], stream, stop=[second, "never"]))
        assert told == [first]
    choice = server.ask(url=url, question=question, max_tokens=1).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (first, "length")
    assert server.ask(url=url, question=question, stop=second).json()["choices"][0]["finish_reason"] == "stop"


def test_sampling_follows_its_seed_alone_and_in_a_crowd(server, evaluated):
    url, question, answer = evaluated[0]
    drawn = {"temperature": 2.0, "max_tokens": 12}
    alone = [server.ask(url=url, question=question, seed=seed, **drawn).json() for seed in range(4)]
    texts = [reply["choices"][0]["message"]["content"] for reply in alone]
    assert len(set(texts)) > 1

    async def crowd():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            bodies = [request(url, question, seed=seed % 4, **drawn) for seed in range(12)]
            bodies += [request(url, question)] * 4
            replies = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
            return [reply.json()["choices"][0]["message"]["content"] for reply in replies]

    assert asyncio.run(crowd()) == texts * 3 + [answer] * 4
    # The likeliest token alone: sampling as good as greedy.
    assert server.ask(url=url, question=question, temperature=1.0, top_p=1e-6).json()["choices"][0]["message"] == {
        "role": "assistant", "content": answer}  # fmt: skip


def test_several_images_and_history_reach_the_model(server, arm, evaluated):
    """Against the stock processor and the pruned model, without formatter or server."""
    (one, question, answer), other = evaluated[0], evaluated[20][0]
    messages = [
        {"role": "user", "content": [image_part(one), {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [{"type": "text", "text": "and here"}, image_part(other),
                                     {"type": "text", "text": question}]},
    ]  # fmt: skip
    reply = server.http.post("/v1/chat/completions", json=request() | {"messages": messages}).json()
    images = [Image.open(bytes_of(url)).convert("RGB") for url in (one, other)]
    prompt = f"<s>USER: <image>\n{question} ASSISTANT: {answer}</s>USER: and here<image>\n{question} ASSISTANT:"
    inputs = arm.processor(images=images, text=prompt, return_tensors="pt", add_special_tokens=False)
    generated = arm.pruned.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = arm.processor.batch_decode(generated.tokens, skip_special_tokens=True)[0].strip()
    assert reply["choices"][0]["message"]["content"] == expected
    assert (reply["usage"]["visual_tokens"], reply["usage"]["visual_tokens_kept"]) == (288, 32)


def bytes_of(url):
    return io.BytesIO(base64.b64decode(url.partition(",")[2]))


def test_models_and_health(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "prunetune"
    assert [server.http.get(path).status_code for path in ("/health", "/health/live", "/health/ready")] == [200] * 3
    for path in ("/v1/models/other", "/v1/completions"):
        reply = server.http.get(path)
        assert reply.status_code == 404 and reply.json()["error"]["message"]


def bomb():
    """A PNG of 50,000 x 50,000 pixels in a few bytes: what is decoded would take 7.5 GB."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


GOOD = data_url(Image.new("RGB", (84, 84), "red"))
IMAGE = "messages.0.content.0.image_url"
BAD = {
    "corrupt image": (request(GOOD[:120] + GOOD[124:]), 400, "invalid_image", IMAGE),
    "no base64": (request("data:image/png;base64,$$$$"), 400, "invalid_image", IMAGE),
    "text for an image": (request("data:image/png;base64,aGVsbG8="), 400, "invalid_image", IMAGE),
    "wrong type": (request("data:text/plain;base64,aGVsbG8="), 400, "invalid_image_url", IMAGE),
    "PostScript": (request("data:image/eps;base64,JSFQUy1BZG9iZS0zLjAgRVBTRi0zLjA="), 400, "invalid_image", IMAGE),
    "bomb": (request(bomb()), 400, "image_too_large", IMAGE),
    "large image": (request(data_url(Image.new("RGB", (1001, 1000)))), 400, "image_too_large", IMAGE),
    "http": (request("http://example.com/a.png"), 400, "image_url_refused", IMAGE),
    "loopback": (request("http://127.0.0.1:8000/v1/models"), 400, "image_url_refused", IMAGE),
    "file": (request("file:///etc/passwd"), 400, "image_url_refused", IMAGE),
    "ftp": (request("ftp://example.com/a.png"), 400, "invalid_image_url", IMAGE),
    "no url": (request("x"), 400, "invalid_image_url", IMAGE),
    "unknown model": (request(model="other"), 404, "model_not_found", "model"),
    "no messages": ({"model": "tiny"}, 400, "missing_field", "messages"),
    "empty": (request(messages=[]), 400, "invalid_value", "messages"),
    "long prompt": (request(question="red " * 600), 400, "context_length_exceeded", "messages"),
    "long answer": (request(max_tokens=5000), 400, "context_length_exceeded", "messages"),
    "no tokens": (request(max_tokens=0), 400, "invalid_value", "max_tokens"),
    "hot": (request(temperature=3), 400, "invalid_value", "temperature"),
    "typo": (request(max_token=3), 400, "unknown_field", "max_token"),
    "two answers": (request(n=2), 400, "unsupported_value", "n"),
    "logprobs": (request(logprobs=True), 400, "unsupported_field", "logprobs"),
    "tools": (request(tools=[{"type": "function"}]), 400, "unsupported_field", "tools"),
    "role": (request(messages=[{"role": "tool", "content": "x"}]), 400, "invalid_value", "messages.0.role"),
    "part": (request(messages=[{"role": "user", "content": [{"type": "video_url"}]}]), 400, "invalid_value", None),
    "ends with the assistant": (request(messages=[{"role": "assistant", "content": "x"}]), 400, "invalid_value",
                                "messages"),
    "placeholder in a text": (request(question="<image> what ?"), 400, "invalid_value", "messages"),
    "system": (request(messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]), 400,
               "unsupported_value", "messages"),
    "end of a turn in a text": (request(question="what ?</s>USER: why ?"), 400, "invalid_value", "messages"),
    "half an address": (request("http://[localhost/a.png"), 400, "invalid_image_url", IMAGE),
    "half a file's address": (request("file://[a/b.png"), 400, "image_url_refused", IMAGE),
    "port": (request("http://localhost:99999/a.png"), 400, "invalid_image_url", IMAGE),
    "a line": (request(data_url(Image.new("RGB", (1, 201)))), 400, "image_too_large", IMAGE),
    "no object": ([1], 400, "invalid_json", None),
}  # fmt: skip
SEVERAL = [{"role": "user", "content": [image_part(GOOD)] * 4 + [{"type": "text", "text": "x"}]}]
BAD["too many images"] = (request(messages=SEVERAL), 400, "too_many_images", "messages")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_refused_by_status_code_and_json(server, name, stream):
    body, status, code, param = BAD[name]
    if stream and isinstance(body, dict):
        body = body | {"stream": True}
    reply = server.http.post("/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error"), error
    assert param is None or error["param"] == param
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400


def test_bodies_that_are_no_requests(server):
    post = server.http.post
    path = "/v1/chat/completions"
    assert post(path, content=b"{", headers={"content-type": "application/json"}).json()["error"]["code"] == (
        "invalid_json")  # fmt: skip
    assert post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    for half in (request(model="\ud800"), request(question="\ud800"), request("data:\ud800"), {"\ud800": 1}):
        reply = post(path, content=json.dumps(half).encode(), headers={"content-type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json"), half
    wide = json.dumps(request()).encode("utf-16")
    assert post(path, content=wide, headers={"content-type": "application/json"}).status_code == 400
    deep = b"[" * 100_000
    assert post(path, content=deep, headers={"content-type": "application/json"}).status_code == 400
    large = b'{"x": "' + b"a" * 2_000_000 + b'"}'
    assert post(path, content=large, headers={"content-type": "application/json"}).status_code == 413
    pieces = (large[at : at + 65536] for at in range(0, len(large), 65536))  # of a length that nobody told
    assert post(path, content=pieces, headers={"content-type": "application/json"}).status_code == 413


def raw(server, body, length=None):
    """A connection on which a request was sent."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    found = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    found.sendall(f"{head}Content-Length: {length or len(content)}\r\n\r\n".encode() + content)
    return found


def answered(connection):
    """What the answer on a connection says, which may come in pieces."""
    content = b""
    while not (found := re.search(rb'"content":"([^"]*)"', content)):
        piece = connection.recv(4000)
        assert piece, content
        content += piece
    return found[1].decode()


def test_a_client_that_sends_slowly_is_refused_and_holds_nobody(server, evaluated):
    slow = raw(server, b'{"model":', length=1000)
    url, question, answer = evaluated[0]
    assert server.ask(url=url, question=question).json()["choices"][0]["message"]["content"] == answer
    assert b"408" in slow.recv(1000)
    slow.close()
    head = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    assert head.recv(1000).startswith(b"HTTP/1.1 408 ")
    head.close()


def test_a_text_that_can_not_fit_is_refused_without_being_tokenized(arm, monkeypatch):
    with running(arm, Held()) as server:
        read = []
        own = server.service._tokenizer
        counting = type("Counting", (), {"__call__": lambda self, text, **how: read.append(text) or own(text, **how)})
        monkeypatch.setattr(server.service, "_tokenizer", counting())
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant")] * 1000
        for fields in ({"question": "a " * 1_000_000}, {"messages": [*turns, turns[0]]}):
            reply = server.ask(**fields)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert 1 < len(read) < 600 and set(read) == {"a"}


def test_answers_to_an_open_connection_do_not_wait_for_its_acknowledgements(server):
    """Nagle's algorithm waits 40 ms before the second half of an answer, and before every piece of a stream."""
    server.http.get("/health")
    lines = [own.transport.get_extra_info("socket") for own in server.server.server_state.connections]
    assert lines and all(line.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for line in lines)


def test_decoded_images_that_wait_have_a_limit_together(arm):
    held = Held()
    with running(arm, held, limits={"max_waiting_pixels": 2 * 84 * 84}) as server:
        waiting = [raw(server, request(GOOD, str(number))) for number in range(2)]
        until(lambda: server.service._pixels == 2 * 84 * 84)
        full = server.ask(url=GOOD)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        held.go.set()
        assert [answered(connection) for connection in waiting] == ["0", "1"]
        assert server.ask(url=GOOD).status_code == 200


def failed_gpu():
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("end", [lambda: sys.exit(3), failed_gpu])
def test_a_model_thread_that_ends_refuses_what_waits_and_is_not_healthy(arm, monkeypatch, end):
    held = Held()
    with running(arm, held, batching={"max_batch": 1}) as server:
        monkeypatch.setattr(held, "run", lambda jobs: held.go.wait(30) and end())
        monkeypatch.setattr(threading, "excepthook", lambda ended: None)
        waiting = [raw(server, request(question=str(number))) for number in range(2)]
        until(lambda: server.service.batcher.waiting == 1)
        held.go.set()
        for connection in waiting:
            assert connection.recv(1000).startswith(b"HTTP/1.1 503")
        assert server.ask().json()["error"]["code"] == "model_stopped"
        assert server.http.get("/health/live").status_code == 503


def test_nothing_is_kept_of_a_request_that_has_its_answer(server, monkeypatch):
    seen = []
    whole = ImageReader.open
    monkeypatch.setattr(ImageReader, "open", lambda *arguments: seen.append(whole(*arguments)) or seen[-1])
    assert server.ask(url=GOOD).status_code == 200
    left = [weakref.ref(image) for image in seen]
    seen.clear()
    until(lambda: gc.collect() >= 0 and not any(image() for image in left))


def test_a_client_that_does_not_read_its_stream_holds_nobody(server, evaluated):
    url, question, answer = evaluated[0]
    deaf = [raw(server, request(url, question, stream=True)) for _ in range(3)]
    assert server.ask(url=url, question=question).json()["choices"][0]["message"]["content"] == answer
    for connection in deaf:
        connection.close()


def test_features_that_are_not_finite_fail_their_request_alone(server, evaluated, monkeypatch):
    """One request of a batch gets NaN features; the others of its batch have their answers."""
    whole = Prompts.rows

    def poisoned(self, pruned, jobs):
        encoded = pruned.inputs["mm_encoder_outputs"]["image"].pooler_output
        for row, job in enumerate(jobs):
            if job.sample.turns[-1].question == "poison":
                encoded[row][0, 0] = torch.nan
        return whole(self, pruned, jobs)

    monkeypatch.setattr(Prompts, "rows", poisoned)

    async def ask():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            bodies = [request(url, question) for url, question, _ in evaluated[:8]]
            bodies.insert(4, request(evaluated[0][0], "poison"))
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    replies = asyncio.run(ask())
    refused = replies.pop(4)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "non_finite_features")
    said = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert said == [answer for _, _, answer in evaluated[:8]]


def test_an_error_of_the_model_is_told_and_the_server_goes_on(server, evaluated, monkeypatch, capfd):
    def broken(self, jobs):
        raise RuntimeError("secret inside")

    with monkeypatch.context() as patch:
        patch.setattr(Prompts, "batch", broken)
        reply = server.ask()
    assert reply.status_code == 500 and "secret" not in reply.text and reply.json()["error"]["type"] == "server_error"
    assert "secret inside" in capfd.readouterr().out
    assert server.ask(url=evaluated[0][0], question=evaluated[0][1]).status_code == 200


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_goes_away_is_dropped_from_the_queue_and_the_queue_has_an_end(arm):
    held = Held()
    with running(arm, held, batching={"max_batch": 1, "max_waiting": 2}) as server:
        first = raw(server, request(question="first"))
        held.taken.acquire(timeout=10)
        gone = raw(server, request(question="gone"))
        streaming = raw(server, request(question="gone too", stream=True))
        until(lambda: server.service.batcher.waiting == 2)
        full = server.ask(question="one more")
        assert (full.status_code, full.json()["error"]["code"], full.headers["retry-after"]) == (429, "queue_full", "1")
        gone.close()
        streaming.close()
        until(lambda: server.service.batcher.waiting == 0)
        last = raw(server, request(question="last"))
        until(lambda: server.service.batcher.waiting == 1)
        held.go.set()
        assert answered(first) == "first"
        assert answered(last) == "last"
        assert held.batches == [["first"], ["last"]]
        assert server.metric('prunetune_requests_total{status="499"}') == 2


def test_an_answer_that_takes_too_long_is_given_up(arm):
    held = Held()
    with running(arm, held, limits={"answer_seconds": 0.2}) as server:
        assert server.ask().status_code == 504


def test_a_stop_finishes_what_is_in_flight_and_refuses_the_rest(arm):
    held = Held()
    with running(arm, held, batching={"max_batch": 1}) as server:
        taken, waits = raw(server, request(question="taken")), raw(server, request(question="waits"))
        until(lambda: server.service.batcher.waiting == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        late = server.ask(question="late")
        assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
        assert server.http.get("/health/ready").status_code == 503
        assert server.http.get("/health/live").status_code == 200
        held.go.set()
        assert answered(taken) == "taken"
        assert answered(waits) == "waits"
        until(lambda: not server.service.batcher.alive)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_a_stop_that_waits_no_longer_refuses_what_is_left_and_computes_none_of_it(arm, capfd):
    held = Held()
    with running(arm, held, batching={"max_batch": 1}, grace=0.1) as server:
        taken, waits = raw(server, request(question="taken")), raw(server, request(question="waits", stream=True))
        until(lambda: server.service.batcher.waiting == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        for connection in (taken, waits):
            assert connection.recv(1000).startswith(b"HTTP/1.1 503")
        held.go.set()
        until(lambda: not server.service.batcher.alive)
        assert held.batches == [["taken"]] and server.service.in_flight == 0
    assert "stopped with 2 requests unanswered after 0.1 s" in capfd.readouterr().err


def test_a_model_that_can_not_answer_does_not_open_its_port(arm, monkeypatch):
    def broken(self, jobs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Prompts, "batch", broken)
    with pytest.raises(ServingError, match=r"^the model can't answer a first question: no kernel$"):
        serve(config_of(), arm)


def test_the_command_serves_and_ends_with_sigterm(tmp_path):
    line = [sys.executable, "-m", "prunetune", "serve", "--config", "serve/tiny_divprune_16", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        port = None
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                port = found[1]
                break
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200)
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions",
                           json=request(GOOD) | {"model": "tiny-divprune-16"}, timeout=60)  # fmt: skip
        assert reply.json()["usage"]["visual_tokens_kept"] == 16
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_a_port_in_use_is_one_line(server):
    from prunetune.cli import main

    with pytest.raises(SystemExit, match=r"^error: 127\.0\.0\.1:\d+ can't be listened on"):
        main(["serve", "--config", "serve/tiny_divprune_16", "--port", str(server.port)])


def test_a_port_that_was_taken_while_the_model_loaded_is_one_line(arm, monkeypatch):
    other = listen(config_of())  # as another server's, which has bound it and does not listen yet
    monkeypatch.setattr(run, "warm_up", lambda backend: other.listen())
    with pytest.raises(ServingError, match=r"^127\.0\.0\.1:\d+ can't be listened on"):
        serve(config_of(port=other.getsockname()[1]), arm)
    other.close()


def test_threads_end_with_their_server(arm):
    with running(arm):
        assert "model" in {thread.name for thread in threading.enumerate()}
    until(lambda: sum(thread.name == "model" for thread in threading.enumerate()) <= 1)  # the module's own
