"""Servers for tests: the tiny VLM behind its endpoint, and a backend that answers when it is told to."""

import base64
import io
import threading
import time
from contextlib import contextmanager

import httpx

from prunetune.configs import ServeConfig
from prunetune.pruning import PruningSpec
from prunetune.serving.job import Finished, Usage
from prunetune.serving.run import Server, backend_of, listen
from prunetune.serving.service import Service
from prunetune.tiny_world.images import SceneImages

NAME = "tiny"


def config_of(**fields):
    values = {"model": {"path": "assets/tiny_vlm", "dtype": "float32"}, "port": 0, "name": NAME,
              "pruning": PruningSpec("divprune", 16)} | fields  # fmt: skip
    return ServeConfig.model_validate(values)


class Running:
    """A server on a thread, and a client that asks it."""

    def __init__(self, server, listening):
        self.server = server
        self.service = server.service
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def ask(self, **fields):
        return self.http.post("/v1/chat/completions", json=request(**fields))

    def metric(self, name):
        """The value of a metric, its labels included in the name."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        return 0.0


def wait_for(server):
    """Wait until a server on another thread listens."""
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def running(arm, backend=None, **fields):
    config = config_of(**fields)
    listening = listen(config)
    server = Server(Service(config, arm, backend or backend_of(config, arm)))
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    wait_for(server)
    found = Running(server, listening)
    try:
        yield found
    finally:
        found.http.close()
        server.should_exit = True
        if backend is not None:
            backend.go.set()
        thread.join(30)
        assert not thread.is_alive()


def data_url(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def scene_url(reference):
    return data_url(SceneImages().open(reference, "test"))


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def messages_of(url, question):
    return [{"role": "user", "content": [image_part(url), {"type": "text", "text": question}]}]


def request(url=None, question="where is the circle ?", **fields):
    messages = messages_of(url, question) if url else [{"role": "user", "content": question}]
    return {"model": NAME, "messages": messages, "max_tokens": 6} | fields


class Held:
    """A backend that answers its batches when it is told to, and remembers them."""

    def __init__(self):
        self.go = threading.Event()
        self.taken = threading.Semaphore(0)
        self.batches = []

    def run(self, jobs):
        self.batches.append([job.sample.turns[-1].question for job in jobs])
        self.taken.release()
        self.go.wait(30)
        for job in jobs:
            job.tell(Finished(job.sample.turns[-1].question, "stop", Usage(3, 1, 144, 16)))

    def close(self):
        pass
