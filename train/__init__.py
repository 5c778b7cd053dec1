"""Recalibration of projectors, and the training of the bundled tiny VLM."""
