"""Pruning inside the LLM: stages that drop visual tokens between two of its layers, by hooks on the stock model."""
