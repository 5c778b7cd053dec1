"""The study behind docs/findings.md: one projector for many pruners and budgets, on the tiny world."""
