"""Videos from folders of frames, animations and files: which frames are looked at, and what is said of broken ones."""

import sys
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_world import tiny_qwen
from transformers import BatchFeature
from transformers.video_utils import make_batched_videos
from video_world import VideoProcessor, build_processor, draw, write_folder, write_gif

from prunetune.data_recipes import DataError, Formatter, Sample, Turn, load_recipe
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.data_recipes.videos import VIDEO, FolderVisuals, NamedVideos, part_of, read_clip
from prunetune.pruning import PrunedModel, PruningSpec


def test_frames_are_spread_evenly_or_taken_by_the_second():
    assert VideoSampling(frames=4).indices(10, None) == [0, 3, 6, 9]
    assert VideoSampling(frames=8).indices(3, None) == [0, 1, 2] and VideoSampling(frames=1).indices(9, 5.0) == [0]
    assert VideoSampling(fps=2.0).indices(10, 5.0) == [0, 2, 5, 7]
    assert VideoSampling(fps=2.0, frames=3).indices(10, 5.0) == [0, 4, 9]  # too many: spread evenly
    assert VideoSampling(fps=60.0, frames=99).indices(4, 24.0) == [0, 1, 2, 3]  # no frame twice
    for total in range(1, 40):
        for frames in range(1, 12):
            found = VideoSampling(frames=frames).indices(total, None)
            assert len(found) == min(frames, total) == len(set(found)) and found == sorted(found)
            assert found == [int(place) for place in np.linspace(0, total - 1, min(frames, total))] or frames == 1


def test_folders_of_frames_are_in_order_of_their_numbers(tmp_path):
    folder = write_folder(tmp_path / "v", 12)
    clip = read_clip(folder, VideoSampling(frames=4, frame_rate=6.0), "v")
    drawn = draw(12)
    assert clip.indices == (0, 3, 7, 11) and clip.total == 12 and clip.seconds == 2.0
    assert all(list(f.getdata()) == list(drawn[i].getdata()) for f, i in zip(clip.frames, clip.indices, strict=True))
    assert read_clip(folder, VideoSampling(frames=2), "v").seconds is None
    part = read_clip(folder, VideoSampling(frames=3, frame_rate=6.0), "v", span=(0.5, 1.0))
    assert part.indices == (3, 4, 6) and part.seconds == 0.5


def test_animations_say_how_long_they_are(tmp_path):
    clip = read_clip(write_gif(tmp_path / "v.gif", 10, milliseconds=200), VideoSampling(fps=1.0), "v")
    assert clip.indices == (0, 5) and clip.total == 10 and clip.rate == pytest.approx(5.0) and clip.seconds == 2.0
    assert {frame.mode for frame in clip.frames} == {"RGB"} and clip.frames[0].size == (32, 24)
    webp = write_gif(tmp_path / "v.webp", 6, milliseconds=100)
    assert read_clip(webp, VideoSampling(), "v").total == 6


def test_broken_videos_are_one_line_each(tmp_path, monkeypatch):
    def said(path, sampling=None, **options):
        with pytest.raises(DataError) as raised:
            read_clip(path, sampling or VideoSampling(), "sample 's': video v", **options)
        assert "\n" not in str(raised.value) and str(raised.value).startswith("sample 's': video v")
        return str(raised.value)

    (tmp_path / "empty").mkdir()
    assert "has no frames" in said(tmp_path / "empty")
    assert "is missing" in said(tmp_path / "none.mp4")
    (tmp_path / "a.txt").write_text("x")
    assert "is no video: expected" in said(tmp_path / "a.txt")
    gif = write_gif(tmp_path / "v.gif", 5)
    (tmp_path / "cut.gif").write_bytes(gif.read_bytes()[:40])
    assert "can't be decoded" in said(tmp_path / "cut.gif")
    folder = write_folder(tmp_path / "v", 4)
    (folder / "frame_2.png").write_bytes(b"no image")
    assert "frame frame_2.png can't be decoded" in said(folder)
    Image.new("RGB", (8, 8)).save(folder / "frame_2.png")
    assert "frames of different sizes" in said(folder)
    assert "does not say how many frames a second has" in said(folder, VideoSampling(fps=1.0))
    assert "asked about from second 1 to 2" in said(folder, span=(1, 2))
    (tmp_path / "v.mp4").write_bytes(b"\0" * 20)
    monkeypatch.setitem(sys.modules, "av", None)  # as where it is not installed
    assert "needs PyAV" in said(tmp_path / "v.mp4") and "prunetune[video]" in said(tmp_path / "v.mp4")


class Stream:
    width, height, average_rate = 32, 24, Fraction(10)

    def __init__(self, frames):
        self.frames = frames


class Container:
    """PyAV's container as far as it is used, over drawn frames."""

    def __init__(self, frames, said):
        self.drawn = frames
        self.streams = types.SimpleNamespace(video=[Stream(said)] if said is not None else [])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def decode(self, video):
        for image in self.drawn:
            yield types.SimpleNamespace(to_image=lambda image=image: image)


@pytest.mark.parametrize("said", [9, 0, 30], ids=["right", "unknown", "too many"])
def test_files_are_decoded_whatever_they_say_of_their_length(tmp_path, monkeypatch, said):
    """With a stand-in for PyAV, which is not a dependency of the tests."""
    drawn = draw(9)
    av = types.SimpleNamespace(open=lambda path: Container(drawn, said))
    monkeypatch.setitem(sys.modules, "av", av)
    (tmp_path / "v.mp4").write_bytes(b"x")
    clip = read_clip(tmp_path / "v.mp4", VideoSampling(frames=3), "v")
    assert clip.indices == (0, 4, 8) and clip.total == 9 and clip.seconds == pytest.approx(0.9)
    assert [list(f.getdata()) for f in clip.frames] == [list(drawn[i].getdata()) for i in (0, 4, 8)]


def test_files_without_pictures_are_named(tmp_path, monkeypatch):
    (tmp_path / "v.mp4").write_bytes(b"x")
    for drawn, said, message in (([], 0, "has no frames"), ([], None, "has no pictures in it")):
        av = types.SimpleNamespace(open=lambda path, drawn=drawn, said=said: Container(drawn, said))
        monkeypatch.setitem(sys.modules, "av", av)
        with pytest.raises(DataError, match=message):
            read_clip(tmp_path / "v.mp4", VideoSampling(), "v")


@pytest.mark.skipif(not __import__("importlib.util", fromlist=["util"]).find_spec("av"), reason="PyAV is not installed")
def test_an_encoded_file_gives_its_frames(tmp_path):
    import av

    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for image in draw(12):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    clip = read_clip(path, VideoSampling(frames=4), "v")
    assert clip.indices == (0, 3, 7, 11) and clip.total == 12 and clip.rate == pytest.approx(10)
    for frame, index in zip(clip.frames, clip.indices, strict=True):
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(draw(12)[index]).astype(int)).mean() < 12


def test_videos_are_found_by_their_names(tmp_path):
    write_gif(tmp_path / "deep" / "below" / "v_1.gif", 4)
    write_folder(tmp_path / "v_2", 3)
    videos = NamedVideos(tmp_path)
    assert videos.exists("v_1") and videos.exists("v_1.mp4") and videos.exists("v_2") and not videos.exists("v_3")
    assert videos.open("v_1", "s").total == 4 and videos.open("v_2", "s").total == 3
    assert videos.open(part_of("v_1.mp4", 0.1, 0.2), "s").indices == (1, 2)
    with pytest.raises(DataError, match="sample 's': video 'v_3' is nowhere below"):
        videos.open("v_3", "s")
    with pytest.raises(DataError, match="leaves the image folder"):
        videos.open("../v", "s")


# ---- recipes and batches -----------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """Two conversations about videos and one about an image, as LLaVA-Video writes them."""
    write_gif(tmp_path / "images" / "a.gif", 8, milliseconds=250)
    write_folder(tmp_path / "images" / "b", 6, seed=2)
    draw(1)[0].save(tmp_path / "images" / "c.png")

    def told(asked):
        return [{"from": "human", "value": asked}, {"from": "gpt", "value": "a red square"}]

    records = [
        {"id": 1, "video": "a.gif", "conversations": told("<video>\nwhat moves ?")},
        {"id": 2, "video": "b", "conversations": told("<image>\nwhat moves ?")},
        {"id": 3, "image": "c.png", "conversations": told("<image>\nwhat moves ?")},
    ]
    import json

    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "recipe.yaml").write_text(
        "name: videos\nformat: llava_json\nfile: data.json\nvideo: {frames: 4, frame_rate: 2.0}\n"
    )
    return load_recipe(str(tmp_path / "recipe.yaml"), image_root=str(tmp_path / "images"))


def test_a_recipe_holds_videos_and_images(recipe):
    assert [recipe[i].image for i in range(3)] == [f"{VIDEO}a.gif", f"{VIDEO}b", "c.png"]
    assert [recipe[i].turns[0].question for i in range(3)] == ["what moves ?"] * 3
    assert recipe.counts == {"custom": 1, "video": 2}
    clip = recipe.images.open(recipe[0].image, "1")
    assert len(clip.frames) == 4 and clip.seconds == 2.0


@torch.no_grad()
@pytest.mark.parametrize("side", ["training", "prompt"])
def test_batches_of_videos_and_images_reach_the_model(recipe, side):
    processor = build_processor()
    formatter = Formatter(processor, recipe.images)
    samples = [recipe[i] for i in range(3)]
    if side == "prompt":
        samples = [Sample(s.id, s.source, s.image, (Turn(s.turns[0].question, None),)) for s in samples]
    batch = formatter.training_batch(samples) if side == "training" else formatter.prompt_batch(samples)
    assert batch["video_seconds"] == [2.0, 3.0] and batch["video_grid_thw"].tolist() == [[2, 6, 8], [2, 6, 8]]
    assert processor.video_processor.seen[0][0]["frames_indices"] == [0, 2, 4, 7]
    # Four frames of two seconds, and of three: a token of two of them stands for half of that.
    assert [float(s) for s in batch["second_per_grid_ts"]] == pytest.approx([1.0, 1.5])
    model = tiny_qwen()
    per_second = PruningSpec("divprune", 3, video_budget="second")
    prepared = PrunedModel(model, per_second).prepare(batch)
    assert prepared.kept == {"image": [3], "video": [6, 9]} and torch.isfinite(model(**prepared.inputs).logits).all()
    evs = PrunedModel(model, PruningSpec("evs", "50%")).prepare(batch)
    assert evs.kept["video"] == [12, 12]
    if side == "training":
        assert (batch["labels"] != -100).sum(1).tolist() == [4, 4, 4]


class StackingVideoProcessor(VideoProcessor):
    """As those of llava_next_video, llava_onevision and video_llava: one tensor of all clips."""

    def __call__(self, videos, **_):
        values = [torch.from_numpy(np.asarray(video)) for video in make_batched_videos(videos)]
        return BatchFeature({"pixel_values_videos": values}, tensor_type="pt")


@pytest.mark.parametrize("side", ["training", "prompt"])
def test_clips_that_a_processor_can_not_stack_are_named(recipe, side):
    """With a processor that can, videos of any number of frames are one batch."""
    recipe.images.sampling = VideoSampling(frames=8, frame_rate=2.0)
    samples = [recipe[i] for i in (0, 1, 2)]
    batch = Formatter(build_processor(), recipe.images).training_batch(samples)
    assert batch["video_grid_thw"][:, 0].tolist() == [4, 3]
    processor = build_processor()
    processor.video_processor = StackingVideoProcessor()
    formatter = Formatter(processor, recipe.images)
    message = r"^samples '2' and '1' .* with 6 and 8 frames, and Processor takes .*; set batch_size"
    with pytest.raises(DataError, match=message) as error:
        formatter.training_batch(samples) if side == "training" else formatter.prompt_batch(samples)
    assert "\n" not in str(error.value)


def test_a_model_without_videos_says_so(recipe, processor):
    with pytest.raises(DataError, match="sample '1' is about a video, and LlavaProcessor takes no videos"):
        Formatter(processor, recipe.images).training_batch([recipe[0]])


def test_paths_and_both_kinds_are_checked(tmp_path):
    visuals = FolderVisuals(tmp_path)
    with pytest.raises(DataError, match="leaves the image folder"):
        visuals.open(f"{VIDEO}../v", "s")
    assert not visuals.exists(f"{VIDEO}none")
    from prunetune.data_recipes.llava_json import BrokenRecord, parse_record

    talk = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    with pytest.raises(BrokenRecord, match="an image or a video, and this one has both"):
        parse_record({"id": 1, "image": "a", "video": "b", "conversations": talk}, "w", None)
    with pytest.raises(BrokenRecord, match="`video` is a path, got int"):
        parse_record({"id": 1, "video": 5, "conversations": talk}, "w", None)
