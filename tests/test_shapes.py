"""Shape types are checked while the tests run: a tensor of another shape or kind is refused where it enters."""

import pytest
import shapes
import torch
from jaxtyping import TypeCheckError

from prunetune.pruning.methods.divprune import most_distant
from prunetune.pruning.ops.greedy import pick_spread
from prunetune.pruning.ops.indexing import mask_of, rows_of
from prunetune.pruning.ops.similarity import cosine_similarity
from prunetune.pruning.sequence import placeholders

WRONG = {
    "another rank": lambda: mask_of(torch.zeros(4, dtype=torch.long), 6),
    "another kind": lambda: mask_of(torch.zeros(2, 4), 6),
    "another batch": lambda: rows_of(torch.zeros(2, 6, 3), torch.zeros(3, 4, dtype=torch.long)),
    "another width": lambda: cosine_similarity(torch.zeros(1, 6, 3), torch.zeros(1, 5, 4)),
    "no square": lambda: pick_spread(torch.zeros(1, 6, 5), torch.zeros(1, 6), 2, "minimum"),
    "a method's function": lambda: most_distant(torch.zeros(6, 3), 2),
    "a function of the plug": lambda: placeholders(torch.zeros(4, dtype=torch.long), 9, [2]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_shape_is_refused(what):
    with pytest.raises(TypeCheckError):
        WRONG[what]()


def test_all_tensor_code_is_checked():
    assert len(shapes.modules()) > 25
    assert mask_of(torch.tensor([[0, 2]]), 4).tolist() == [[True, False, True, False]]
