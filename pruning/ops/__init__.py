"""Tensor arithmetic that pruning methods share: batched, in float32 or better, ties to the lower index."""

from prunetune.pruning.ops.complexity import attention_entropy, erank
from prunetune.pruning.ops.duplicates import without_duplicates, without_duplicates_each
from prunetune.pruning.ops.greedy import pick_determinantal, pick_spread
from prunetune.pruning.ops.indexing import ascending, first_ranked, mask_of, mask_of_picks, rows_of, top_k
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.ops.relevance import instruction_relevance
from prunetune.pruning.ops.similarity import ALIKE, cosine_distance, cosine_similarity, euclidean_distance
from prunetune.pruning.ops.statistics import image_range, masked_mean, outlier_share, text_mask

__all__ = [
    "ALIKE",
    "ascending",
    "attention_entropy",
    "cosine_distance",
    "cosine_similarity",
    "erank",
    "euclidean_distance",
    "exact_float32",
    "first_ranked",
    "image_range",
    "instruction_relevance",
    "mask_of",
    "mask_of_picks",
    "masked_mean",
    "outlier_share",
    "pick_determinantal",
    "pick_spread",
    "rows_of",
    "text_mask",
    "top_k",
    "without_duplicates",
    "without_duplicates_each",
]
