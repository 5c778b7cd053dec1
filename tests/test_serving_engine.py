"""The LLM elsewhere: the protocol with a fake engine, what is refused beforehand, and the real vLLM where it is."""

import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from conftest import ROOT, TINY_VLM
from fake_engine import fake_engine
from PIL import Image
from serving_world import config_of, data_url, image_part, messages_of, request, running, scene_url

from prunetune.configs import ModelConfig
from prunetune.models import Arm
from prunetune.pruning import PruningSpec, registered_families, registered_methods
from prunetune.serving.backends.vllm import VllmEmbeds
from prunetune.serving.errors import ServingError
from prunetune.serving.run import backend_of, let_go_of_llm
from prunetune.serving.servable import embeds_servable, method_servable
from prunetune.serving.vllm_plugin import ARCHITECTURE
from prunetune.tiny_world.task import read_items

MODEL = ModelConfig(path=str(TINY_VLM), dtype="float32")


@pytest.fixture(scope="module")
def arm():
    return Arm.load(MODEL, PruningSpec("divprune", 16), device="cpu")


@pytest.fixture(scope="module")
def engine(arm):
    with fake_engine(arm.untouched().model, arm.processor, config_of()) as found:
        yield found


def engine_options(url, **fields):
    return {"engine": "vllm", "vllm": {"url": url, "keep_llm": True} | fields}


@pytest.fixture(scope="module")
def front(arm, engine):
    with running(arm, **engine_options(engine[1])) as found:
        yield found


@pytest.fixture(autouse=True)
def _forgotten(engine):
    engine[0].seen.clear()
    engine[0].fail, engine[0].miscounts = None, False


def questions(count):
    items = read_items("test", count // 8 + 1)[:count]
    urls = {item.image: scene_url(item.image) for item in items}
    return [(urls[item.image], item.question) for item in items]


async def asked(url, many, stream=False, **fields):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def one(image, question):
            made = await client.chat.completions.create(
                model="tiny", messages=messages_of(image, question), max_tokens=6, stream=stream, **fields
            )
            if not stream:
                return made.choices[0].message.content
            return "".join([piece.choices[0].delta.content or "" async for piece in made])

        return await asyncio.gather(*(one(*question) for question in many))


def test_the_protocol_gives_the_answers_of_the_embedded_backend(arm, front, engine):
    many = questions(40)
    with running(arm) as embedded:
        expected = asyncio.run(asked(embedded.url, many))
    assert len(set(expected)) > 5
    assert asyncio.run(asked(front.url, many)) == expected
    assert asyncio.run(asked(front.url, many[:12], stream=True)) == expected[:12]
    body = engine[0].seen[0]
    features = np.load(io.BytesIO(base64.b64decode(body["messages"][0]["content"][0]["image_embeds"])))
    assert features.shape == (16, 128) and features.dtype == np.float32 and np.isfinite(features).all()
    assert set(body) == {"model", "messages", "max_tokens", "temperature", "top_p", "stream", "stream_options"}


def test_several_images_with_history_and_no_image_at_all(arm, front):
    one, other = (data_url(Image.new("RGB", (84, 84), color)) for color in ("red", "blue"))
    messages = [
        {"role": "user", "content": [image_part(one), {"type": "text", "text": "what color ?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [image_part(other), {"type": "text", "text": "and here ?"}]},
    ]
    with running(arm) as embedded:
        for body in (request(messages=messages), request()):
            expected, got = embedded.ask(**body).json(), front.ask(**body).json()
            assert got["choices"] == expected["choices"] and got["usage"] == expected["usage"]


def test_a_clients_uuid_is_not_handed_on(front, engine):
    url, question = questions(1)[0]
    messages = messages_of(url, question)
    messages[0]["content"][0]["uuid"] = "the same for every image"
    assert front.ask(messages=messages).status_code == 200
    assert "uuid" not in str(engine[0].seen)


@pytest.mark.parametrize(
    ("fail", "status", "code"),
    [((400, "bad tensor"), 502, "engine_refused"), ((500, "broken"), 502, "engine_refused"),
     ((503, "busy"), 503, "engine_busy")],
)  # fmt: skip
def test_what_the_engine_refuses_is_told_without_its_echo(front, engine, fail, status, code):
    engine[0].fail = (fail[0], fail[1] + " 0.1234" * 1000)
    url, question = questions(1)[0]
    error = front.ask(url=url, question=question).json()["error"]
    assert error["code"] == code and fail[1] in error["message"] and len(error["message"]) < 300
    assert front.ask(url=url, question=question, stream=True).status_code == status


def test_a_prompt_that_the_engine_counts_otherwise_is_no_answer(front, engine):
    engine[0].miscounts = True
    url, question = questions(1)[0]
    reply = front.ask(url=url, question=question)
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "engine_prompt_differs")
    engine[0].miscounts = False
    assert front.ask(url=url, question=question).status_code == 200


def test_features_that_would_spoil_others_never_reach_the_engine(front, engine, monkeypatch):
    url, question = questions(1)[0]
    prepare = front.service.batcher.backend.arm.pruned.prepare

    def with_value(value):
        def prepared(*arguments, **fields):
            pruned = prepare(*arguments, **fields)
            pruned.inputs["mm_encoder_outputs"]["image"].pooler_output[0][0, 0] = value
            return pruned

        return prepared

    for value in (torch.nan, torch.inf, -torch.inf):
        with monkeypatch.context() as patch:
            patch.setattr(front.service.batcher.backend.arm.pruned, "prepare", with_value(value))
            reply = front.ask(url=url, question=question)
        assert (reply.status_code, reply.json()["error"]["code"]) == (422, "non_finite_features")
    assert engine[0].seen == []


def test_an_image_of_which_nothing_is_kept_never_reaches_the_engine(front, engine, monkeypatch):
    backend = front.service.batcher.backend
    rows = backend.prompts.rows

    def nothing(pruned, jobs):
        found = rows(pruned, jobs)
        for row in found:
            row.features[0] = row.features[0][:0]
        return found

    monkeypatch.setattr(backend.prompts, "rows", nothing)
    reply = front.ask(url=questions(1)[0][0])
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "no_visual_tokens")
    assert engine[0].seen == []


def test_the_engines_context_counts(arm, engine):
    engine[0].context = 64
    try:
        with running(arm, **engine_options(engine[1], questions=0)) as front:
            assert front.ask(question="red " * 20, max_tokens=20).status_code == 200
            reply = front.ask(question="red " * 40, max_tokens=20)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    finally:
        engine[0].context = 512


def test_the_preflight_stops_a_server_whose_engine_has_another_projector(arm, engine):
    """The engine runs the base's LLM; an arm of other LLM weights answers otherwise, and does not start."""
    other = Arm.load(MODEL, PruningSpec("divprune", 16), device="cpu")
    with torch.no_grad():
        for parameter in other.pruned.family.llm(other.model).parameters():
            parameter.mul_(-0.5)
    with pytest.raises(ServingError, match=r"[1-4] of 4 reference answers differ"):
        backend_of(config_of(**engine_options(engine[1])), other)
    engine[0].miscounts = True
    with pytest.raises(ServingError, match="could not answer a reference question: the engine read"):
        backend_of(config_of(**engine_options(engine[1])), arm)


def test_an_engine_that_is_not_there_or_has_another_model_is_one_line(arm, engine):
    with pytest.raises(ServingError, match=r"there is no engine at http://127.0.0.1:9 .*serve.sh"):
        backend_of(config_of(**engine_options("http://127.0.0.1:9")), arm)
    with pytest.raises(ServingError, match="has no model 'other'; it has fake"):
        backend_of(config_of(**engine_options(engine[1], model="other")), arm)


def test_without_its_llm_the_front_still_prunes(engine):
    own = Arm.load(MODEL, PruningSpec("divprune", 16), device="cpu")
    url, question = questions(1)[0]
    with running(own, **engine_options(engine[1], keep_llm=False)) as front:
        assert all(weight.is_meta for weight in own.pruned.family.llm(own.model).layers.parameters())
        assert front.ask(url=url, question=question).json()["usage"]["visual_tokens_kept"] == 16
    let_go_of_llm(own)  # again


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"position_policy": "original"}, "engines number positions 0..n"),
        ({"stages": [{"name": "vtw", "boundaries": [1]}]}, "pruning.stages run between the layers"),
    ],
)
def test_what_an_engine_can_not_serve_is_refused_at_start(arm, engine, fields, why):
    spec = PruningSpec.model_validate({"pruner": "divprune", "keep": 16, **fields})
    with pytest.raises(ServingError, match=why):
        VllmEmbeds(arm.with_pruning(spec), config_of().limits, config_of(**engine_options(engine[1])).vllm)


def test_families_and_methods_say_how_they_are_served():
    families = {name: embeds_servable(family) for name, family in registered_families().items()}
    assert {name for name, served in families.items() if served} == {"llava", "llava_next", "llava_onevision",
                                                                     "internvl"}  # fmt: skip
    methods = registered_methods()
    assert method_servable(methods["divprune"]) == ["embeds", "plugin"]
    assert method_servable(methods["cdpruner"]) == ["embeds", "approximate"]  # reads the text
    assert method_servable(methods["prumerge"]) == ["embeds"]  # merges
    assert method_servable(methods["dycoke"]) == []  # of videos


VLLM = os.environ.get("PRUNETUNE_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(VLLM is None, reason="PRUNETUNE_VLLM_PYTHON names no interpreter that has vLLM")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The tiny VLM as `prunetune export --for vllm` writes it; without an adapter there is nothing to merge."""
    from prunetune.serving.export import name_tower_as_engine_does

    folder = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(TINY_VLM, folder)
    name_tower_as_engine_does(folder)
    return folder


@pytest.fixture
def real_engine(exported, tmp_path, unused_tcp_port):
    """Return a function that starts vLLM's server with these arguments and returns its address."""
    started = []

    def start(*arguments):
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                       "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": path_of_prunetune(tmp_path)}  # fmt: skip
        line = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(exported), "--served-model-name",
                "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16",
                "--host", "127.0.0.1", "--port", str(unused_tcp_port), *arguments]  # fmt: skip
        log = (tmp_path / "vllm.log").open("w")
        process = subprocess.Popen(line, env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
        started.append(process)
        url = f"http://127.0.0.1:{unused_tcp_port}"
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "vllm.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                return url
            except OSError:
                time.sleep(0.5)
        raise AssertionError((tmp_path / "vllm.log").read_text()[-3000:])

    yield start
    for process in started:
        process.terminate()
        process.wait(60)


def path_of_prunetune(folder):
    """A folder in which vLLM finds this checkout's package, and the entry point of its plug-in."""
    metadata = folder / "prunetune-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: prunetune\nVersion: 0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    lines = "\n".join(f"{name} = {value}" for name, value in points.items())
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{lines}\n")
    return os.pathsep.join([str(folder), str(ROOT)])


@pytest.fixture
def unused_tcp_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.vllm
@needs_vllm
def test_vllm_answers_from_features_as_the_embedded_backend_does(arm, real_engine):
    url = real_engine("--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0}')
    many = questions(200)
    with running(arm) as embedded:
        expected = asyncio.run(asked(embedded.url, many))
    for name, spec in {"divprune": arm.spec, "prumerge": PruningSpec("prumerge", 16, {"neighbours": 8})}.items():
        own = arm.with_pruning(spec)
        if name != "divprune":
            with running(own, pruning=spec) as embedded:
                expected = asyncio.run(asked(embedded.url, many))
        with running(own, pruning=spec, **engine_options(url)) as front:  # its preflight has passed
            got = asyncio.run(asked(front.url, many))
            print(f"{name}: {sum(map(str.__eq__, got, expected))} of {len(many)} equal")
            assert got == expected
            assert asyncio.run(asked(front.url, many[:24], stream=True)) == expected[:24]


@pytest.mark.vllm
@needs_vllm
def test_vllm_prunes_pixels_by_itself_with_the_plugin(arm, real_engine):
    overrides = {"architectures": [ARCHITECTURE], "prunetune": {"pruner": "divprune", "keep": 16}}
    url = real_engine("--hf-overrides", json.dumps(overrides), "--limit-mm-per-prompt", '{"image": 1}')
    many = questions(200)
    with running(arm) as embedded:
        expected = asyncio.run(asked(embedded.url, many))
        prompt = embedded.ask(url=many[0][0], question=many[0][1]).json()["usage"]["prompt_tokens"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    made = client.chat.completions.create(model="tiny", messages=messages_of(*many[0]), max_tokens=6, temperature=0)
    assert made.usage.prompt_tokens == prompt
    got = [text.strip() for text in asyncio.run(asked(url, many, temperature=0))]
    print(f"plug-in: {sum(map(str.__eq__, got, expected))} of {len(many)} equal")
    assert got == expected


def test_the_plugin_imports_without_what_an_engines_environment_lacks():
    """vLLM calls it in each of its processes; peft, deepspeed and FastAPI of ours are not there."""
    code = ("import sys; import prunetune.serving.vllm_plugin, prunetune.pruning.registry, prunetune.pruning.types; "
            "import prunetune.pruning.methods.divprune; print([name for name in ('peft', 'deepspeed', 'transformers', "
            "'fastapi', 'pydantic', 'prometheus_client') if name in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path("/"))
    assert done.stdout.strip() == "[]"
