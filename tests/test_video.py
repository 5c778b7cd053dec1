"""Video question answering: saved predictions in Video-ChatGPT's format, exact match, and a grader's judgement."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from prunetune.cli import main
from prunetune.evaluation.report.grader import Grader, read_grade
from prunetune.evaluation.report.score import score_file
from prunetune.evaluation.tasks import TaskError, get_task
from prunetune.evaluation.tasks.video import NAMES, write_predictions


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
    with pytest.raises(TaskError, match="no model family here encodes videos"):
        get_task("tgif").read(files / "data")
    with pytest.raises(TaskError, match="the grader at http://127.0.0.1:9/v1/chat/completions did not answer"):
        Grader("http://127.0.0.1:9/v1", "m", timeout=2).ask("q", "a", "b")
    with pytest.raises(TaskError, match="expected a JSON object with pred and score"):
        read_grade("I think yes")
    assert read_grade('{"pred": "Yes", "score": 9}') == (True, 5)
    (files / "data" / "test_a.json").write_text("[]")
    with pytest.raises(TaskError, match=r"question q0 has no answer in test_a.json"):
        score_file("msvd", files / "pred.jsonl", files / "data")
