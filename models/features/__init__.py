"""The feature cache: what pruners keep of the images of a data set, made once and read in place of tower and pruner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunetune.lazy import importer

if TYPE_CHECKING:
    from prunetune.models.features.batches import FeatureFormatter as FeatureFormatter
    from prunetune.models.features.make import FeatureData as FeatureData
    from prunetune.models.features.make import make_features as make_features
    from prunetune.models.features.store import FeatureStore as FeatureStore

# A name is imported when it is first used.
_HOMES = {
    "FeatureData": "make",
    "FeatureFormatter": "batches",
    "FeatureStore": "store",
    "make_features": "make",
}

__all__ = list(_HOMES)
__getattr__ = importer(__name__, _HOMES)
