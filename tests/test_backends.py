"""Continuous batching and static caches: token for token what plain generation says."""

from __future__ import annotations

import copy
import gc
import json
import threading
import time

import pytest
import test_gemma3
import test_idefics3
import test_internvl
import test_llava
import test_llava_next
import test_llava_next_video
import test_llava_onevision
import test_paligemma
import test_qwen2_5_vl
import test_qwen2_vl
import test_qwen3_vl
import test_smolvlm
import test_video_llava
import torch
from pydantic import ValidationError
from test_shared_prefix import last_logits
from transformers.generation.continuous_batching import ContinuousBatchingManager

from prunetune.assets import shipped
from prunetune.configs import BackendOptions, EvaluateConfig, ModelConfig, TableConfig
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.run import evaluate as evaluate_module
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.run.features import feature_data, sample_of
from prunetune.evaluation.tasks import TaskError, get_task
from prunetune.models import Arm
from prunetune.models.answering import answered
from prunetune.models.features import make_features
from prunetune.models.ranks import Ranks
from prunetune.outputs import FEATURES, OutputFolder
from prunetune.pruning import PruningError, PruningSpec, StageSpec
from prunetune.pruning.continuous import FeatureRows, LonePrompt
from prunetune.scripts.tables.cells import lay_out

PLAIN = {
    "llava": test_llava.TestLlava,
    "llava_next": test_llava_next.TestLlavaNext,
    "llava_onevision": test_llava_onevision.TestLlavaOnevision,
    "internvl": test_internvl.TestInternVL,
    "smolvlm": test_smolvlm.TestImages,
    "idefics3": test_idefics3.TestIdefics3,
    "video_llava": test_video_llava.TestVideoLlava,
    "llava_next_video": test_llava_next_video.TestLlavaNextVideo,
}
OTHERS = {
    "qwen2_vl": (test_qwen2_vl.TestImages, "positions of rows and columns"),
    "qwen2_5_vl": (test_qwen2_5_vl.TestImages, "positions of rows and columns"),
    "qwen3_vl": (test_qwen3_vl.TestImages, "positions of rows and columns"),
    "gemma3": (test_gemma3.TestIdentity, "visual tokens that see what follows them"),
    "paligemma": (test_paligemma.TestIdentity, "visual tokens that see what follows them"),
}
TOKENS = 4


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Each batch that closes collects garbage three times, which takes longer here than what it answered."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def ready(kind):
    """A family's tests, its model, and a ragged batch of six prompts; answers have one length, and no placeholders."""
    family = kind()
    model = family.make_model()
    options = copy.deepcopy(model.generation_config)
    options.suppress_tokens = [2, *family.suppressed]
    model.generation_config = options
    return family, model, family.asked(family.rows() * 2, "left", False)


def run(pruned, inputs, requests=2, **sizes):
    """What a continuous batch answers, which holds fewer prompts than there are; and what it says of the batch."""
    with pruned.continuous(requests, TOKENS, **sizes) as batch:
        prompts, said = pruned.lone_prompts(**inputs)
        found = [batch.submit(prompt) for prompt in prompts]
        return [request.result() for request in found], said


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_every_backend_says_what_plain_generation_says(name):
    """Ragged prompts and text alone, more than a continuous batch holds, in steps shorter than a prompt."""
    family, model, inputs = ready(PLAIN[name] if name in PLAIN else OTHERS[name][0])
    for method, keep in (("identity", "100%"), ("divprune", family.keep)):
        pruned = family.plug(model, method, keep)
        with last_logits(model) as expected:
            plain = pruned.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        family.forget(model)
        static = pruned.generate_static(**inputs, max_new_tokens=TOKENS, compiled=False, do_sample=False)
        family.forget(model)
        assert torch.equal(static.tokens, plain.tokens)
        assert (static.kept, static.rows, static.notes) == (plain.kept, plain.rows, plain.notes)
        if name in OTHERS:
            continue
        found, said = run(pruned, inputs, step_tokens=16, cache_tokens=1024)
        assert found == plain.tokens.tolist()
        assert (said.kept, said.rows) == (plain.kept, plain.rows)
        assert list(said.kept_per_frame) == list(plain.kept_per_frame)
    assert "forward" not in vars(model.get_input_embeddings())  # left as it was found
    if name in PLAIN:
        # Answers may stay where features are in each other's place; logits don't. One prompt after the other.
        with last_logits(model) as logits:
            run(pruned, inputs, requests=1)
        ours = torch.cat(logits).view(-1, TOKENS, logits[0].shape[-1])
        theirs = torch.stack(expected, dim=1)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", OTHERS)
def test_families_whose_prompts_are_more_than_ids_are_refused_in_one_line(name):
    kind, why = OTHERS[name]
    family = kind()
    pruned = family.plug(family.make_model(), "divprune")
    with pytest.raises(PruningError, match=f"continuous can't run '{name}', which has {why}.*backend: plain") as error:
        pruned.continuous(2, TOKENS)
    assert "\n" not in str(error.value)


def test_what_cannot_run_is_refused_in_one_line(monkeypatch):
    family, model, inputs = ready(test_llava.TestLlava)
    for fields, why in (
        ({"position_policy": "original"}, "position_policy is original; set it to compact"),
        ({"stages": [StageSpec(name="fastv", boundaries=[1], keep=2)]}, "can't run pruning.stages"),
    ):
        pruned = family.plug(model, "divprune", **fields)
        with pytest.raises(PruningError, match=why) as error:
            pruned.check_continuous()
        assert "\n" not in str(error.value)
    with pytest.raises(PruningError, match="static can't run pruning.stages"):
        pruned.generate_static(**inputs, max_new_tokens=1)
    pruned = family.plug(model, "divprune")
    for name, value, why in (
        ("num_beams", 3, "can't run num_beams: 3, only 1"),
        ("repetition_penalty", 1.5, "can't run RepetitionPenaltyLogitsProcessor"),
        ("stop_strings", ["."], "does not read stop_strings"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(model.generation_config, name, value)
            with pytest.raises(PruningError, match=why):
                pruned.check_continuous()
    for name, value in (("use_cache", False), ("cache_implementation", "quantized")):
        with monkeypatch.context() as patched:
            patched.setattr(model.generation_config, name, value)
            with pytest.raises(PruningError, match=f"backend: static.*{value}"):
                pruned.check_static()
    with monkeypatch.context() as patched:
        patched.setattr(type(pruned.family), "unproven", True)
        for check in (pruned.check_continuous, pruned.check_static):
            with pytest.raises(PruningError, match="'llava'.* no family of its own.*backend: plain"):
                check()
    eager = family.plug(test_llava.TestLlava().make_model(), "divprune")
    eager.model.set_attn_implementation("eager")
    with pytest.raises(PruningError, match="needs model.attention sdpa or flash_attention_2, and it is eager"):
        eager.check_continuous()
    shifted = {**inputs, "position_ids": inputs["attention_mask"].cumsum(1) + 4}
    with pytest.raises(PruningError, match="the batch has other positions"):
        family.plug(model, "identity", "100%").lone_prompts(**shifted)


# ---- ids beyond the vocabulary ----------------------------------------------------------------------------------


def test_ids_are_never_given_twice_and_rows_are():
    words = torch.nn.Embedding(10, 2)
    rows = FeatureRows(words, 5)
    first, second = torch.arange(6.0).view(3, 2), torch.arange(10.0, 14.0).view(2, 2)
    assert (rows.put(first), rows.put(second)) == (range(10, 13), range(13, 15))
    ids = torch.tensor([[3, 10, 12], [14, 13, 9]])
    expected = torch.stack([torch.stack([words.weight[3], first[0], first[2]]),
                            torch.stack([second[1], second[0], words.weight[9]])])  # fmt: skip
    assert torch.equal(rows.embed(ids), expected)
    assert rows.put(second, wait=False) is None
    rows.drop(range(13, 15))
    assert rows.put(second, wait=False) is None  # rows are a ring, and the oldest prompt is still there
    rows.drop(range(10, 13))
    assert rows.put(second) == range(15, 17) and torch.equal(rows.embed(torch.tensor([15, 16])), second)
    assert rows.put(torch.zeros(0, 2)) == range(0)
    with pytest.raises(PruningError, match="6 visual tokens, and 5 rows"):
        rows.put(torch.zeros(6, 2))
    rows.drop(range(15, 17))
    rows._next = 2**31 - 12
    with pytest.raises(PruningError, match="used all ids"):
        rows.put(second)


def test_a_prompt_waits_for_room():
    rows = FeatureRows(torch.nn.Embedding(10, 2), 3)
    ids = rows.put(torch.zeros(3, 2))
    given = []
    waiter = threading.Thread(target=lambda: given.append(rows.put(torch.ones(2, 2))))
    waiter.start()
    time.sleep(0.05)
    assert given == []
    rows.drop(ids)
    waiter.join(timeout=10)
    assert given == [range(13, 15)]


# ---- the running batch ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return Arm.load(ModelConfig(path=shipped("assets/tiny_vlm"), dtype="float32"), device="cpu")


@pytest.fixture(scope="module")
def questions(tiny):
    opened = get_task("tiny_world").open(None)
    formatter = tiny.formatter(opened.open_images())
    return formatter, [sample_of(item) for item in opened.items[:24]]


def prompts_of(arm, questions):
    formatter, samples = questions
    inputs = arm.place(formatter.prompt_batch(samples))
    plain = arm.pruned.generate(**inputs, max_new_tokens=6, do_sample=False).tokens.tolist()
    end = arm.model.generation_config.eos_token_id
    expected = [row[: row.index(end) + 1] if end in row else row for row in plain]
    return arm.pruned.lone_prompts(**inputs)[0], expected


def test_tokens_stream_requests_cancel_and_answers_have_their_own_length(tiny, questions):
    arm = tiny.with_pruning(PruningSpec("divprune", 16))
    prompts, expected = prompts_of(arm, questions)
    state = torch.get_rng_state()
    with arm.pruned.continuous(4, 6) as batch:
        assert torch.equal(torch.get_rng_state(), state)
        streams = [batch.submit(prompt, streaming=True) for prompt in prompts[:8]]
        cancelled = batch.submit(prompts[8], streaming=True)
        cancelled.cancel()
        cancelled.cancel()
        short = batch.submit(prompts[9], max_new_tokens=1)
        assert [list(stream) for stream in streams] == expected[:8]
        assert cancelled.done and cancelled.result() == expected[8][: len(cancelled.result())]
        assert short.result() == expected[9][:1] and short.visual_tokens == 16
        with pytest.raises(PruningError, match="runs a continuous batch already"), arm.pruned.continuous(4, 6):
            pass
        # Joined late; and the model encodes others meanwhile.
        late = [batch.submit(prompt) for prompt in prompts_of(arm, questions)[0]]
        assert [request.result() for request in late] == expected
        assert not batch.rows._live
    with pytest.raises(PruningError, match="the continuous batch is closed"):
        batch.submit(prompts[0])


def test_a_cache_for_few_prompts_gives_the_same_answers(tiny, questions):
    """Prompts that lose their place in it are computed again, with the pictures they had."""
    prompts, expected = prompts_of(tiny, questions)
    longest = max(len(prompt.ids) for prompt in prompts)
    with tiny.pruned.continuous(8, 6, cache_tokens=2 * longest + 64) as batch:
        assert [request.result() for request in [batch.submit(prompt) for prompt in prompts]] == expected
        with pytest.raises(PruningError, match=r"do not fit into the cache of \d+; raise backend_options.cache_tokens"):
            batch.submit(LonePrompt([1] * batch.capacity, [], torch.zeros(0, 0)))


def test_a_cache_beyond_memory_is_refused_in_one_line(tiny):
    with (
        pytest.raises(
            PruningError, match="does not fit: .*; lower batch_size or backend_options.cache_tokens"
        ) as error,
        tiny.pruned.continuous(4, 6, cache_tokens=10**12),
    ):
        pass
    assert "\n" not in str(error.value)
    assert "forward" not in vars(tiny.model.get_input_embeddings())


def test_a_batch_that_can_not_begin_leaves_the_model_as_it_was(tiny, monkeypatch):
    batch = tiny.pruned.continuous(4, 6)
    with pytest.raises(PruningError, match="the continuous batch is not open"):
        batch.submit(LonePrompt([1], [], torch.zeros(0, 0)))

    def broken(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ContinuousBatchingManager, "start", broken)
    with pytest.raises(RuntimeError) as held:  # and with it all that it refers to
        batch.__enter__()
    assert "can't start" in str(held.value) and "forward" not in vars(tiny.model.get_input_embeddings())


def test_what_breaks_while_generating_reaches_who_waits(tiny, questions, monkeypatch, caplog):
    prompts, _ = prompts_of(tiny, questions)
    with tiny.pruned.continuous(4, 6) as batch:
        monkeypatch.setattr(batch.rows, "_words", lambda ids: 1 / 0)
        waiting = batch.submit(prompts[0])
        with pytest.raises(PruningError, match="continuous batch(ing)? failed: division by zero"):
            waiting.result()
        with pytest.raises(PruningError, match="the continuous batch"):
            for _ in range(100):  # until its end is known
                batch.submit(prompts[0]).result()
    assert "forward" not in vars(tiny.model.get_input_embeddings())


# ---- evaluation -------------------------------------------------------------------------------------------------


def settings(tiny, tmp_path, name, spec=None, limit=28, **fields):
    return EvaluateConfig(
        model=tiny.base.config,
        pruning=PruningSpec() if spec is None else spec,
        tasks=["tiny_world"],
        limit=limit,
        batch_size=8,
        max_new_tokens=6,
        output=str(tmp_path / name),
        **fields,
    )


def evaluated(tiny, *args, **fields):
    config = settings(tiny, *args, **fields)
    return evaluate(config, tiny.with_pruning(config.pruning), bar=False)


EAGER = {"backend": "static", "backend_options": BackendOptions(compile=False)}


@pytest.mark.parametrize(
    "spec",
    [PruningSpec(), PruningSpec("prumerge", 16), PruningSpec("trimtokenator", 16)],
    ids=["dense", "prumerge", "trimtokenator"],
)
def test_results_are_the_same_bytes(tiny, tmp_path, spec):
    plain = evaluated(tiny, tmp_path, "plain", spec)
    backends = {"continuous": {"backend": "continuous"}, "static": EAGER}
    for name, fields in backends.items():
        folder = evaluated(tiny, tmp_path, name, spec, **fields)
        assert (folder / "results.jsonl").read_bytes() == (plain / "results.jsonl").read_bytes()
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["backend"] == name and manifest["items_per_second"] > 0
        assert f"backend: {name}" in (folder / "config.yaml").read_text()
    assert manifest["backend_options"] == {"compile": False}
    assert not {"backend", "backend_options"} & json.loads((plain / "manifest.json").read_text()).keys()
    assert "backend" not in (plain / "config.yaml").read_text()


def test_stored_features_are_answered_the_same(tiny, tmp_path):
    spec = PruningSpec("divprune", 16)
    with OutputFolder(tmp_path / "features", FEATURES) as output:
        make_features(output, tiny, [spec], feature_data(["tiny_world"], None, 28, 50_000_000, None), Ranks())
    stored = {"features": str(tmp_path / "features")}
    plain = evaluated(tiny, tmp_path, "plain", spec, **stored)
    for name, fields in (("continuous", {"backend": "continuous"}), ("static", EAGER)):
        folder = evaluated(tiny, tmp_path, name, spec, **fields, **stored)
        assert (folder / "results.jsonl").read_bytes() == (plain / "results.jsonl").read_bytes()


def test_an_interrupted_continuous_evaluation_goes_on(tiny, tmp_path, monkeypatch):
    whole = (evaluated(tiny, tmp_path, "plain") / "results.jsonl").read_bytes()
    real, calls = evaluate_module._rows, []

    def dies_in_the_third_batch(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(evaluate_module, "_rows", dies_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tiny, tmp_path, "arm", backend="continuous")
    assert "forward" not in vars(tiny.model.get_input_embeddings())
    assert len((tmp_path / "arm" / "results.jsonl").read_text().splitlines()) == 16
    assert (evaluated(tiny, tmp_path, "arm", backend="continuous") / "results.jsonl").read_bytes() == whole
    assert len(calls) == 3 + 2


def test_arms_of_other_backends_are_not_compared_unless_allowed(tiny, tmp_path):
    folders = [evaluated(tiny, tmp_path, "plain", limit=8), evaluated(tiny, tmp_path, "other", limit=8, **EAGER)]
    with pytest.raises(TaskError, match="backend"):
        compare([str(folder) for folder in folders])
    compare([str(folder) for folder in folders], allow=["backend", "backend_options"])


def test_items_per_second_are_said(tiny, tmp_path, capsys):
    evaluate(settings(tiny, tmp_path, "arm", limit=8, backend="continuous"), tiny)
    rate = json.loads((tmp_path / "arm" / "manifest.json").read_text())["items_per_second"]
    assert f"arm: {rate} items/s (backend continuous, batch size 8)" in capsys.readouterr().out


def test_a_backend_is_told_nothing_it_does_not_read(tiny, tmp_path):
    for fields, why in (
        ({"backend_options": BackendOptions(compile=False)}, "compile is read by backend static, and it is plain"),
        (
            {"backend": "static", "backend_options": BackendOptions(cache_tokens=9)},
            "cache_tokens is read by backend co",
        ),
        ({"backend": "continuous", "share_prefix": True}, "share_prefix needs backend: plain, and it is continuous"),
    ):
        with pytest.raises(ValidationError, match=why):
            settings(tiny, tmp_path, "arm", **fields)


def test_a_table_hands_it_to_its_evaluations():
    fields = {"models": [{"model": {"path": "assets/tiny_vlm"}}], "methods": ["divprune"], "budgets": [16],
              "tasks": ["tiny_world"], "output": "runs/table"}  # fmt: skip
    assert "backend" not in TableConfig(**fields).model_dump()
    config = TableConfig(**fields, backend="continuous", backend_options={"cache_tokens": 4096})
    (cell,) = {(own.config.backend, own.config.backend_options.cache_tokens) for own in lay_out(config).cells}
    assert cell == ("continuous", 4096)
    with pytest.raises(ValidationError, match="share_prefix needs backend: plain"):
        TableConfig(**fields, backend="static", share_prefix=True)


def test_steps_go_through_the_compiler_and_are_forgotten(tiny, questions):
    """A copy of the model would call what the original compiled. Tests switch the compiler itself off; it runs in
    benchmarks/backends.py."""
    arm = tiny.with_pruning(PruningSpec("divprune", 16))
    formatter, samples = questions
    batches = [(formatter, samples[:8]), (formatter, samples[8:13])]
    expected = list(answered(arm, batches, 6, 8))
    with last_logits(arm.model) as logits:
        running = answered(arm, batches, 6, 8, "static")
        found = [next(running), next(running)]
    assert found == expected
    assert {len(own) for own in logits} == {8}  # the last batch is filled up: each size is compiled for itself
    assert "_compiled_call" in vars(arm.model)
    running.close()
    assert "_compiled_call" not in vars(arm.model)
