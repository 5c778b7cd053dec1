"""Families behind the endpoint: one batch of requests is answered as each is alone, by the path of `evaluate`."""

import pytest
import video_world
import visual_world
from visual_world import gradient

from prunetune.configs import ModelConfig
from prunetune.configs.serving import LimitsConfig
from prunetune.data_recipes.sample import Sample, Turn
from prunetune.models import Arm
from prunetune.pruning import PruningSpec
from prunetune.serving.backends.embedded import Embedded
from prunetune.serving.job import Delta, Finished, Job, Wanted
from prunetune.serving.prompts import OpenedImages, read_prompt
from prunetune.serving.schema import read_request

IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize("kind", [*visual_world.MADE, "qwen2_5_vl"])
def test_a_batch_of_a_family_is_answered_as_each_alone(kind, tmp_path, monkeypatch):
    """Pictures of two sizes, two pictures at once, and text: whole and in streams."""
    if kind == "qwen2_5_vl":
        video_world.write_model(tmp_path)
        processor = video_world.build_processor()
    else:
        processor = visual_world.write(kind, tmp_path)
    monkeypatch.setattr("prunetune.models.loading._processor", lambda path, folder: processor)
    spec = PruningSpec("divprune", "50%")
    arm = Arm.load(ModelConfig(path=str(tmp_path), dtype="float32"), spec, device="cpu")
    backend = Embedded(arm, LimitsConfig())
    pictures = [gradient(40, 60), gradient(64, 64)]
    asked = [([0], "what ?"), ([1], "where is it ?"), ([], "why ?"), ([0, 1], "which ?")]
    events = {number: [] for number in range(len(asked))}
    jobs = []
    for number, (images, question) in enumerate(asked):
        content = [*[IMAGE] * len(images), {"type": "text", "text": question}]
        request = read_request({"model": "x", "messages": [{"role": "user", "content": content}]})
        sample, opened = read_prompt(request, [pictures[image] for image in images], f"request {number}")
        jobs.append(Job(sample, opened, Wanted(longest=5, stream=number % 2 == 1), events[number].append))
    backend.run(jobs)
    for number, (job, (images, question)) in enumerate(zip(jobs, asked, strict=True)):
        finished = events[number][-1]
        assert isinstance(finished, Finished)
        streamed = "".join(event.text for event in events[number] if isinstance(event, Delta))
        assert streamed == (finished.text if job.wanted.stream else "")
        if len(images) > 1:
            expected = arm.answer(arm.formatter(OpenedImages({job.sample.id: job.opened})), [job.sample], 5)[0]
        else:
            sample = Sample("one", "x", "one" if images else None, (Turn(question, None),))
            opener = OpenedImages({"one": pictures[images[0]]} if images else {})
            expected = arm.answer(arm.formatter(opener), [sample], 5)[0]
        assert (finished.text, finished.usage.kept) == (expected.text, expected.kept)
        assert (finished.usage.visual > finished.usage.kept) == bool(images)
