"""Two ranks under ZeRO-2 and ZeRO-3 train a projector as one process does, whatever each of them meets at a step."""

from functools import cache

import pytest
import torch
from launched import families
from launched.families import FAMILIES, METHODS, RATE, batches, suite_of
from launches import call

from prunetune.models.adapter import projector_state

THERE = [family for family in FAMILIES if suite_of(family) is not None]


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def trained(request, tmp_path_factory):
    """All families in one launch: what each rank found."""
    file = tmp_path_factory.mktemp("families") / "found"
    call(families.main, request.param, file, THERE)
    return [torch.load(f"{file}.{rank}") for rank in (0, 1)]


@cache
def in_one_process(family, method):
    """The losses of both ranks, and the projector after steps along the mean of their gradients."""
    suite = suite_of(family)
    model = suite.make_model()
    projector = suite.train_projector(model)
    losses = [[], []]
    with suite.plug(model, method).attach():
        for step in zip(batches(suite, 0), batches(suite, 1), strict=True):
            model.zero_grad()
            for own, inputs in zip(losses, step, strict=True):
                suite.forget(model)
                loss = model(**inputs).loss
                (loss / 2).backward()
                own.append(float(loss.detach()))
            with torch.no_grad():
                for parameter in projector.values():
                    parameter -= RATE * parameter.grad
    return losses, projector_state(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_that_meet_images_videos_and_text_train_as_one_process(trained, family, method):
    if family not in THERE:
        pytest.skip(f"there is no tests/{FAMILIES[family][0]}.py yet")
    losses, projector = in_one_process(family, method)
    untrained = projector_state(suite_of(family).make_model())
    for rank, found in enumerate(trained):
        own, tensors = found[family, method]
        assert own == pytest.approx(losses[rank], rel=1e-4)
        assert tensors.keys() == projector.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, projector[name].float(), rtol=1e-3, atol=1e-5)
            assert not torch.equal(tensor, untrained[name].float()), name
