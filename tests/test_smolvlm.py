"""SmolVLM: the suite on images, and on the frames of videos; the rest is tested with Idefics3."""

from types import SimpleNamespace

import pytest
from idefics_world import KEEP, MIXED, ROWS, Tiles, tiny_idefics

from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.run.evaluate import _check_takes_videos
from prunetune.pruning import PrunedModel, PruningError, PruningSpec


class TestImages(Tiles):
    """The suite of every family."""

    kind = "smolvlm"
    samples = ROWS


class TestVideos(Tiles):
    """The same with frames of videos, in one sequence with images and alone."""

    kind = "smolvlm"
    samples = MIXED


@pytest.mark.parametrize("unit", ["frame", "clip", "second"])
def test_a_budget_of_videos_is_refused_where_frames_are_images(unit):
    with pytest.raises(PruningError, match=f"video_budget: {unit} can't .* 'smolvlm' gets the frames of a video as im"):
        PrunedModel(tiny_idefics("smolvlm"), PruningSpec("divprune", KEEP, video_budget=unit))
    with pytest.raises(PruningError, match="'idefics3' takes no videos; leave pruning.video_budget at auto"):
        PrunedModel(tiny_idefics("idefics3"), PruningSpec("divprune", KEEP, video_budget=unit))


@pytest.mark.parametrize(("kind", "said"), [
    ("smolvlm", "family 'smolvlm' gets their frames as images, which is not done here; choose a model that takes"),
    ("idefics3", "family 'idefics3' takes none; choose a model that takes videos"),
])  # fmt: skip
def test_tasks_about_videos_say_what_the_family_takes(kind, said):
    arm = SimpleNamespace(pruned=PrunedModel(tiny_idefics(kind), PruningSpec("divprune", KEEP)))
    work = SimpleNamespace(task=SimpleNamespace(name="msvd", video=True))
    with pytest.raises(TaskError, match=f"^msvd ask about videos, and model {said}"):
        _check_takes_videos(arm, [work])
