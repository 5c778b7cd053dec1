"""``prunetune profile``: what an arm costs: computed, counted by torch, and measured beside the dense model.

It lies among the scripts, as tables do: it needs the shapes of ``train/`` and the questions of ``evaluation/``, which
never import each other.
"""
