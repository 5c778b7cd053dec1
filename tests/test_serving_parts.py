"""Parts of the server by themselves: where images come from, text as it comes, sampling, prompts, requests."""

import base64
import contextlib
import io
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from conftest import TINY_VLM
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prunetune.configs.serving import LimitsConfig
from prunetune.data_recipes.images import Dialogue, FolderImages
from prunetune.data_recipes.sample import Sample, Turn
from prunetune.models import load_processor
from prunetune.serving import remote
from prunetune.serving.backends.rows import draw
from prunetune.serving.errors import Refused
from prunetune.serving.images import ImageReader
from prunetune.serving.job import Delta, Finished, Job, Usage, Wanted
from prunetune.serving.prompts import read_prompt
from prunetune.serving.schema import read_request
from prunetune.serving.text import AnswerText

PNG = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PNG, "PNG")


class Site(BaseHTTPRequestHandler):
    """Serves an image, a redirect and more bytes than are read."""

    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/image.png")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"x" * 5000 if self.path == "/large" else PNG.getvalue())

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    server = HTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def code(call, *arguments):
    with pytest.raises(Refused) as refused:
        call(*arguments)
    return refused.value.code


def test_images_of_allowed_hosts_are_fetched_but_of_no_private_address(site, monkeypatch):
    allowed = ImageReader(LimitsConfig(image_hosts=["localhost", "127.0.0.1", "10.0.0.1"], max_body=4000))
    url = f"http://localhost:{site}"
    for address in (f"{url}/image.png", f"http://127.0.0.1:{site}/image.png", "http://10.0.0.1/a.png"):
        assert code(allowed.open, address, "x") == "image_url_refused"  # allowed by name, and private all the same
    for host in ("example.com", "localhost.example.com", "user@localhost", "localhost@example.com"):
        assert code(allowed.open, f"http://{host}:{site}/image.png", "x") == "image_url_refused"
    # As if the address were public.
    monkeypatch.setattr(remote, "public_address", lambda host, port, where: "127.0.0.1")
    assert allowed.open(f"{url}/image.png", "x").size == (8, 8)
    assert code(allowed.open, f"{url}/moved", "x") == "image_not_fetched"
    assert code(allowed.open, f"{url}/large", "x") == "image_too_large"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "::1", "fd00::1", "fe80::1",
     "::ffff:127.0.0.1", "100.64.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::", "fec0::1",
     "2001:0:7f00:1::", "224.0.0.1", "ff0e::1", "240.0.0.1", "::", "::7f00:1"],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused_whatever_the_name(address, monkeypatch):
    found = [(None, None, None, "", ("93.184.216.34", 80)), (None, None, None, "", (address, 80))]
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *arguments, **options: found)
    assert code(remote.public_address, "innocent.example.com", 80, "x") == "image_url_refused"
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *arguments, **options: found[:1])
    assert remote.public_address("innocent.example.com", 80, "x") == "93.184.216.34"


def test_files_are_read_below_the_folder_that_may_be_read(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").write_bytes(PNG.getvalue())
    (tmp_path / "secret.png").write_bytes(PNG.getvalue())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    reader = ImageReader(LimitsConfig(image_root=str(root)))
    assert reader.open(f"file://{root}/a.png", "x").size == (8, 8)
    for path in (
        f"{root}/../secret.png",
        f"{root}/%2e%2e/secret.png",
        f"{root}/link.png",
        "/etc/passwd",
        str(tmp_path),
    ):
        assert code(reader.open, f"file://{path}", "x") == "image_url_refused"
    assert code(reader.open, f"file://other{root}/a.png", "x") == "image_url_refused"
    assert code(reader.open, f"file://{root}/none.png", "x") == "invalid_image"
    assert code(reader.open, f"file://{root}/%00.png", "x") == "image_url_refused"
    assert code(reader.open, "file://[a/b.png", "x") == "invalid_image_url"
    os.mkfifo(root / "pipe.png")  # whose end nobody writes
    assert code(reader.open, f"file://{root}/pipe.png", "x") == "invalid_image"


def odd_pictures():
    """Pictures that readers may open in different ways."""
    random = np.random.default_rng(0)
    pixels = random.integers(256, size=(12, 20, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    frames = [Image.fromarray(pixels[:, :, :3]), Image.new("RGB", (20, 12), "blue")]
    return {
        "EXIF": (frames[0], "JPEG", {"exif": turned}),
        "palette": (frames[0].quantize(8), "PNG", {"transparency": 0}),
        "alpha": (Image.fromarray(pixels), "PNG", {}),
        "16 bits": (Image.fromarray(random.integers(2**16, size=(12, 20), dtype=np.uint16)), "PNG", {}),
        "grey with alpha": (Image.fromarray(pixels).convert("LA"), "PNG", {}),
        "CMYK": (frames[0].convert("CMYK"), "JPEG", {}),
        "animated": (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_are_what_an_evaluation_sees(name, tmp_path):
    image, kind, options = odd_pictures()[name]
    path = tmp_path / f"odd.{kind.lower()}"
    image.save(path, kind, **options)
    seen = FolderImages(tmp_path).open(path.name, "x")
    assert ImageReader(LimitsConfig()).decode(path.read_bytes(), "x").tobytes() == seen.tobytes()


def test_a_host_that_trickles_is_hung_up_on(monkeypatch):
    """A byte now and then, of the head as of the image, keeps every single read short."""
    monkeypatch.setattr(remote, "SECONDS", 0.4)
    monkeypatch.setattr(remote, "public_address", lambda host, port, where: "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle():
            line, _ = listening.accept()
            with line, contextlib.suppress(OSError):
                for letter in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 60:
                    line.sendall(bytes([letter]))
                    time.sleep(0.05)

        thread = threading.Thread(target=trickle)
        thread.start()
        began = time.monotonic()
        reader = ImageReader(LimitsConfig(image_hosts=["localhost"]))
        assert code(reader.open, f"http://localhost:{listening.getsockname()[1]}/a.png", "x") == "image_not_fetched"
        assert time.monotonic() - began < 2.5
        thread.join()


def test_a_name_server_that_does_not_answer_holds_nobody(monkeypatch):
    answers = threading.Event()
    monkeypatch.setattr(remote, "SECONDS", 0.2)
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *arguments, **options: answers.wait(30) and [])
    reader = ImageReader(LimitsConfig(image_hosts=["slow.example.com"]))
    try:
        with pytest.raises(Refused, match="its address was not found within 0.2 s") as refused:
            reader.open("http://slow.example.com/a.png", "x")
        assert refused.value.status == 502 and not answers.is_set()
    finally:
        answers.set()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pictures_of_every_kind_are_opened_and_others_are_not(kind):
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, kind)
    url = f"data:image/any;base64,{base64.b64encode(file.getvalue()).decode()}"
    opened = ImageReader(LimitsConfig()).open(url, "x")
    assert opened.size == (20, 10) and opened.mode == "RGB" and opened.getpixel((5, 5))[0] > 250
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "TIFF")  # which Pillow reads, by code that few look at
    url = f"data:image/tiff;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert code(ImageReader(LimitsConfig()).open, url, "x") == "invalid_image"


class Letters:
    """A tokenizer whose tokens are bytes."""

    clean_up_tokenization_spaces = False

    def decode(self, tokens, skip_special_tokens):
        return bytes(token for token in tokens if token).decode(errors="replace")


def run_text(text, stops=(), stream=True, longest=1000):
    events = []
    job = Job(Sample("x", "x", None, (Turn("x", None),)), None, Wanted(stops=stops, stream=stream), events.append)
    answer = AnswerText(job, Letters(), {0}, longest, Usage(3, 0))
    for token in [*text.encode(), 0]:
        if answer.add(token):
            break
    deltas = [event.text for event in events if isinstance(event, Delta)]
    assert isinstance(events[-1], Finished) and len(events) == len(deltas) + 1
    return deltas, events[-1]


@settings(max_examples=300)
@given(
    st.text(alphabet="ab é\n漢", max_size=12), st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), max_size=2)
)
def test_a_stream_is_the_whole_answer_whatever_stops_it(text, stops):
    deltas, finished = run_text(text, tuple(stops))
    assert "".join(deltas) == finished.text and "\ufffd" not in finished.text
    assert run_text(text, tuple(stops), stream=False) == ([], finished)
    # The answer by another way: cut at the first stop that the growing, stripped text ever holds.
    grown = [text[:end].strip() for end in range(len(text) + 1)]
    held = next((one for one in grown if any(stop in one for stop in stops)), None)
    expected = text.strip()
    if held is not None:
        expected = held[: min(held.find(stop) for stop in stops if stop in held)].rstrip()
    assert finished.text == expected


def test_an_answer_ends_by_its_length_and_counts_its_end():
    _, finished = run_text("abcdef", longest=3)
    assert (finished.text, finished.reason, finished.usage.completion) == ("abc", "length", 3)
    _, finished = run_text("abc")
    assert (finished.reason, finished.usage.completion) == ("stop", 4)


def test_sampling_draws_by_the_softmax_and_within_top_p():
    scores, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw(scores, 0.7, 1.0, generator) for _ in range(4000)])
    expected = torch.softmax(scores / 0.7, 0)
    assert torch.allclose(drawn.bincount(minlength=4) / 4000, expected, atol=0.03)
    # Of 0.64, 0.24, 0.09 and 0.03 the first two reach 0.7.
    assert {draw(scores, 1.0, 0.7, generator) for _ in range(200)} == {0, 1}
    assert {draw(scores, 1.0, 1e-9, generator) for _ in range(50)} == {0}


def chat(messages):
    return read_request({"model": "x", "messages": messages})


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def test_what_an_evaluation_could_ask_becomes_the_same_sample():
    picture = Image.new("RGB", (8, 8))
    asked = chat([{"role": "user", "content": [IMAGE, {"type": "text", "text": "a ?"}]},
                  {"role": "assistant", "content": "b"}, {"role": "user", "content": "c ?"}])  # fmt: skip
    sample, opened = read_prompt(asked, [picture], "r")
    assert sample.turns == (Turn("a ?", "b"), Turn("c ?", None)) and opened is picture and sample.image == "r"
    sample, opened = read_prompt(chat([{"role": "user", "content": "a ?"}]), [], "r")
    assert (sample.turns, sample.image, opened) == ((Turn("a ?", None),), None, None)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "s"}, {"role": "user", "content": [IMAGE, {"type": "text", "text": "a ?"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a ?"}, IMAGE]}],
        [{"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "a ?"}]}],
        [{"role": "user", "content": "a ?"}, {"role": "assistant", "content": "b"},
         {"role": "user", "content": [IMAGE, {"type": "text", "text": "c ?"}]}],
    ],
)  # fmt: skip
def test_other_conversations_go_to_the_template_as_they_are_written(messages):
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    count = json.dumps(messages).count("image_url")
    _, opened = read_prompt(chat(messages), pictures[: count // 2], "r")
    assert isinstance(opened, Dialogue)
    whole = opened.whole()
    assert [message["role"] for message in whole] == [message["role"] for message in messages]
    for written, made in zip(messages, whole, strict=True):
        if isinstance(written["content"], str):
            assert made["content"] == [{"type": "text", "text": written["content"]}]
            continue
        kinds = ["image" if part["type"] == "image_url" else "text" for part in written["content"]]
        assert [part["type"] for part in made["content"]][: len(kinds)] == kinds
    images = [part["image"] for message in whole for part in message["content"] if part["type"] == "image"]
    assert images == pictures[: len(images)] and len(images) == count // 2


def test_harmless_fields_are_taken_and_empty_values_ask_for_nothing():
    body = {"model": "x", "messages": [{"role": "user", "content": "a"}], "user": "me", "logprobs": False, "tools": [],
            "presence_penalty": 0, "n": 1, "response_format": {"type": "text"}, "max_completion_tokens": 3,
            "max_tokens": 9, "temperature": 1}  # fmt: skip
    request = read_request(body)
    assert (request.longest, request.temperature) == (3, 1.0)


def test_the_tokenizer_that_counts_is_no_other_threads(monkeypatch):
    """The model's thread pads with its tokenizer while requests are counted: with one for both, that fails."""
    from prunetune.serving.service import Service

    processor = load_processor(str(TINY_VLM))

    class Arm:
        template = ""

    arm = Arm()
    arm.processor = processor
    arm.model = type("M", (), {"config": type("C", (), {"get_text_config": lambda self: type(
        "T", (), {"max_position_embeddings": 512})()})()})()  # fmt: skip
    from serving_world import Held, config_of

    held = Held()
    service = Service(config_of(), arm, held)
    assert service._tokenizer is not processor.tokenizer
    service.close()
