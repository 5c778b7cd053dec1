"""One file per model family: how its images are encoded and where its visual tokens sit."""

from pruning.families.base import Encoded, Family, family_of, register_family, registered_families

__all__ = ["Encoded", "Family", "family_of", "register_family", "registered_families"]
