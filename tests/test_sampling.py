"""Grouped sampling: everything once, batches of one kind and of similar length, the same again when resumed."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from prunetune.train.sampling import GroupedSampler


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 300), group=st.integers(1, 20), seed=st.integers(0, 1000), mixed=st.booleans())
def test_every_sample_comes_once_and_whole_batches_are_of_one_kind(count, group, seed, mixed):
    chance = random.Random(seed)
    lengths = [chance.randint(1, 500) for _ in range(count)]
    pictures = [chance.choice((2, 2, 1, 0)) for _ in range(count)]  # images, videos, text
    sampler = GroupedSampler(lengths, group, seed, pictures if mixed else None)
    order = list(sampler)
    assert sorted(order) == list(range(count)) and len(sampler) == count
    if mixed:
        whole = sum(pictures.count(kind) // group for kind in range(3))
        for batch in range(whole):
            assert len({pictures[n] for n in order[batch * group : (batch + 1) * group]}) == 1


def test_batches_are_of_similar_length_and_come_in_random_order():
    chance = random.Random(0)
    lengths = [chance.randint(1, 1000) for _ in range(4000)]
    batches = [[lengths[n] for n in batch] for batch in zip(*[iter(GroupedSampler(lengths, 16, 0))] * 16, strict=True)]
    padding = sum(max(batch) * 16 - sum(batch) for batch in batches) / sum(lengths)
    assert padding < 0.05  # shuffled, 16 lengths pad by about 90 %
    means = [sum(batch) / 16 for batch in batches]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = list(range(100))
    sampler = GroupedSampler(lengths, 4, 7)
    first = list(sampler)
    assert first == list(sampler) == list(GroupedSampler(lengths, 4, 7))
    sampler.epoch = lambda: 1
    assert list(sampler) != first != list(GroupedSampler(lengths, 4, 8))
