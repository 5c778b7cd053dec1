"""SmolVLM: the suite on images, and on the frames of videos; the rest is tested with Idefics3."""

import torch
from idefics_world import KEEP, MIXED, ROWS, Tiles, batch, tiny_idefics

from prunetune.pruning import PrunedModel, PruningSpec


class TestImages(Tiles):
    """The suite of every family."""

    kind = "smolvlm"
    samples = ROWS


class TestVideos(Tiles):
    """The same with frames of videos, in one sequence with images and alone."""

    kind = "smolvlm"
    samples = MIXED


def test_packing_changes_neither_loss_nor_gradients():
    model = tiny_idefics("smolvlm").requires_grad_(False)
    projection = model.model.connector.modality_projection.requires_grad_(True)
    model.train()
    found = []
    for packed in (False, True):
        model.zero_grad()
        with PrunedModel(model, PruningSpec("divprune", KEEP)).attach(packed=packed):
            loss = model(**batch(ROWS)).loss
        loss.backward()
        found.append((loss.detach(), projection.proj.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
