"""A pruner, a model family and a benchmark outside of prunetune's repository."""
