"""One file per model family: how its images are encoded and where its visual tokens sit."""

from prunetune.pruning.families.base import Family, PrunedOutput, family_of, register_family, registered_families
from prunetune.pruning.families.generic import name_projector

__all__ = ["Family", "PrunedOutput", "family_of", "name_projector", "register_family", "registered_families"]
