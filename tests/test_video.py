"""Video question answering: saved predictions in Video-ChatGPT's format, exact match, a grader's judgement; and runs of
a tiny model on drawn videos, with multiple choice."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from datasets import Dataset
from video_world import build_processor, mvbench_row, videomme_row, write_gif, write_model, write_videos

from prunetune.cli import main
from prunetune.configs import EvaluateConfig, load_config
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.evaluation.metrics.choices import chosen_letter, first_letter
from prunetune.evaluation.records import read_manifest, read_results
from prunetune.evaluation.report.grader import Grader, read_grade
from prunetune.evaluation.report.score import score_file
from prunetune.evaluation.run.calibrate import _task_slice, calibrate
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import TaskError, get_task
from prunetune.evaluation.tasks.video import NAMES, write_predictions
from prunetune.models import loading
from prunetune.models.profile import ProfiledData


@pytest.fixture
def files(tmp_path):
    questions = [{"video_name": f"v{n // 2}", "question_id": f"q{n}", "question": f"what {n} ?"} for n in range(4)]
    answers = [{"question_id": f"q{n}", "answer": a, "type": 1} for n, a in enumerate(("dog", "two", "run", "red"))]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test_q.json").write_text(json.dumps(questions))
    (tmp_path / "data" / "test_a.json").write_text(json.dumps(answers))
    items = get_task("msvd").read_answers(tmp_path / "data")
    said = ("A dog.", "2", "running", "blue")
    write_predictions(list(zip(said, items, strict=True)), tmp_path / "pred.jsonl")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_exact_match_is_computed_locally(files, name):
    result = score_file(name, files / "pred.jsonl", files / "data")
    assert result["accuracy"] == 50 and result["items"] == 4 and result["protocol"] == "video-chatgpt"
    row = json.loads((files / "pred.jsonl").read_text().splitlines()[2])
    assert row == {"id": "q2", "video_name": "v1", "question": "what 2 ?", "answer": "run", "pred": "running"}


@pytest.fixture
def endpoint():
    """A server that finds every prediction right that starts as the answer does; it keeps what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            lines = dict(line.split(": ", 1) for line in body["messages"][1]["content"].splitlines())
            right = lines["Predicted answer"].startswith(lines["Correct answer"])
            reply = {
                "choices": [{"message": {"content": f"Sure: {{'pred': '{'yes' if right else 'no'}', 'score': 4}}"}}]
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()


def test_a_grader_judges_beside_exact_match(files, endpoint, monkeypatch, capsys):
    url, asked = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    main(["score", "msvd", "--predictions", str(files / "pred.jsonl"), "--data", str(files / "data"),
          "--grader", url, "--grader-model", "judge"])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] == 50 and result["graded_accuracy"] == 25 and result["graded_score"] == 4
    assert len(asked) == 4 and asked[0][0] == "/v1/chat/completions" and asked[0][1] == "Bearer secret"
    assert asked[0][2]["model"] == "judge" and asked[0][2]["temperature"] == 0


def test_failures_are_named(files):
    with pytest.raises(TaskError, match="the grader at http://127.0.0.1:9/v1/chat/completions did not answer"):
        Grader("http://127.0.0.1:9/v1", "m", timeout=2).ask("q", "a", "b")
    with pytest.raises(TaskError, match="expected a JSON object with pred and score"):
        read_grade("I think yes")
    assert read_grade('{"pred": "Yes", "score": 9}') == (True, 5)
    (files / "data" / "test_a.json").write_text("[]")
    with pytest.raises(TaskError, match=r"question q0 has no answer in test_a.json"):
        score_file("msvd", files / "pred.jsonl", files / "data")


# ---- running on videos -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def settings(folder, tmp_path, monkeypatch):
    """Configurations of the tiny model; its processor is put in, since loading one needs torchvision."""
    monkeypatch.setattr(loading, "_processor", lambda path, folder: build_processor())

    def make(task, out, *overrides):
        base = ["--model.path", str(folder), "--model.dtype", "float32", "--tasks", f"[{task}]", "--data",
                str(tmp_path / "data"), "--batch_size", "3", "--max_new_tokens", "2", "--pruning.pruner", "evs",
                "--pruning.keep", "8", "--video.frames", "4", "--output", str(tmp_path / out)]  # fmt: skip
        return load_config(EvaluateConfig, None, [*base, *overrides])

    return make


@pytest.mark.parametrize("name", ["msvd", "activitynet", "mvbench", "videomme"])
def test_tasks_run_on_a_model_for_videos(settings, tmp_path, name):
    (tmp_path / "data").mkdir()
    write_videos(tmp_path / "data", name)
    arm = evaluate(settings(name, "arm", "--video.frame_rate", "3.0"))
    rows, manifest = read_results(arm), read_manifest(arm)
    assert [row.id for row in rows] == [item.id for item in get_task(name).read(tmp_path / "data")] and len(rows) == 4
    # Two frames of tokens of 12 each, the first kept whole: eight a frame.
    assert {row.kept for row in rows} == {16} and all(row.kept_per_frame == [12, 4] for row in rows)
    assert manifest.video.frames == 4 and manifest.video.frame_rate == 3.0 and manifest.kept_tokens.mean == 16
    again = score_file(name, arm / "results.jsonl", tmp_path / "data")
    assert again["accuracy"] == manifest.metrics[name].metrics["accuracy"]
    with pytest.raises(TaskError, match="differs in video"):
        evaluate(settings(name, "arm", "--video.frames", "6"))


def test_calibrate_looks_at_the_frames_that_are_evaluated(settings, tmp_path):
    (tmp_path / "data").mkdir()
    write_videos(tmp_path / "data", "msvd")
    for frames in (2, 6):
        config = settings("msvd", "o", "--video.frames", str(frames), "--pruning.pruner", "cdpruner")
        data = _task_slice(config, 4)
        clip = data.images.open(data.samples[0].image, "s")
        assert len(clip.frames) == frames and data.about.video == config.video
    with pytest.raises(TaskError, match="calibrate measures the checkpoint's own projector, not the one in runs/a"):
        calibrate(settings("msvd", "o", "--adapter", "runs/a"), 4)


def test_a_profile_of_videos_says_which_frames_it_was_fitted_on():
    images = ProfiledData(source="task", name="gqa", part="p", samples=1, hash="h")
    assert "video" not in images.model_dump()  # profiles of images keep their seals
    videos = images.model_copy(update={"video": VideoSampling(frames=16)})
    assert ProfiledData.model_validate(json.loads(videos.model_dump_json())) == videos


def test_a_model_for_images_is_not_asked(untrained_folder, tmp_path):
    write_videos(tmp_path, "msvd")
    line = ["--model.path", str(untrained_folder), "--tasks", "[msvd]", "--data", str(tmp_path),
            "--output", str(tmp_path / "arm")]  # fmt: skip
    with pytest.raises(TaskError, match="^msvd ask about videos, and model family 'llava' takes none; choose"):
        evaluate(load_config(EvaluateConfig, None, line))


@pytest.mark.parametrize("name", ["mvbench", "videomme", "msvd"])
def test_lmms_labs_tables_ask_the_same(tmp_path, name):
    published, tables = tmp_path / "published", tmp_path / "tables"
    published.mkdir()
    write_videos(published, name)
    if name == "mvbench":
        for task in ("action_antonym", "moving_count"):
            rows = [{"start": None, "end": None, **mvbench_row(n)} for n in range(2)]
            (tables / task).mkdir(parents=True)
            Dataset.from_list(rows).to_parquet(tables / task / "train-00000.parquet")
    else:
        tables.mkdir()
        rows = [videomme_row(n) for n in range(4)]
        if name == "msvd":
            rows = [{"question_id": str(n), "video_name": f"v{n // 2}", "question": "what moves ?", "answer": "square"}
                    for n in range(4)]  # fmt: skip
        Dataset.from_list(rows).to_parquet(tables / "test-00000.parquet")
    write_gif(tables / "videos" / "v0.gif", 8, milliseconds=250)
    task = get_task(name)
    assert task.read(tables) == task.read(published)
    clip = task.open(tables).open_images().open(task.read(tables)[0].image, "s")
    assert clip.seconds == pytest.approx(1.0 if name == "mvbench" else 2.0)


def test_prompts_and_scores_of_the_multiple_choice_benchmarks(tmp_path):
    for name in ("mvbench", "videomme"):
        (tmp_path / name).mkdir()
        write_videos(tmp_path / name, name)
    one = get_task("mvbench").read(tmp_path / "mvbench")[0]
    assert one.id == "action_antonym/0" and one.image == "v0.gif#t=0.5,1.5" and one.answer["letter"] == "B"
    asked = one.question.splitlines()
    assert asked[1:] == [
        "Question: what moves ?",
        "Options:",
        "(A) square",
        "(B) red",
        "(C) left",
        "Only give the best option.",
    ]
    two = get_task("videomme").read(tmp_path / "videomme")[3]
    assert (two.image, two.source, two.question.splitlines()[1]) == ("v1", "long", "what moves ?")
    rows = [("B", 1), ("(B) red", 1), ("A", 0), ("red", 1), ("nothing", 0)]
    task = get_task("mvbench")
    assert [task.score(text, one).score for text, _ in rows] == [right for _, right in rows]
    summary = task.summarise([task.score("B", one), task.score("A", replace(one, source="other"))]).metrics
    assert summary == {"accuracy": 50, "task_mean": 50, "intervals": {"task_mean": [50, 50]}}
    by_length = get_task("videomme").summarise([get_task("videomme").score("B.", two)]).metrics
    assert by_length == {"accuracy": 100, "long_accuracy": 100}


@pytest.mark.parametrize(
    ("text", "first", "chosen"),
    [
        ("B", "B", "B"),
        ("(C)", "C", "C"),
        ("b.", "", "B"),
        ("The best answer is: D.", "D", ""),
        ("Best option: (A)", "A", "A"),
        ("dark red", "", "B"),
        ("It is dark red.", "", "B"),
        ("red", "", "A"),
        ("A dog runs away from a cat over there in the very long grass", "A", ""),
        ("It goes on and on about Anna and Bob and what they might have done", "", ""),
        ("", "", ""),
    ],
)
def test_choices_are_read_from_answers(text, first, chosen):
    assert first_letter(text, "ABCD") == first
    assert chosen_letter(text, {"A": "red", "B": "dark red", "C": "left", "D": "x yz"}) == chosen
