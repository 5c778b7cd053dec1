"""Metrics as pure functions, shared by tasks."""
