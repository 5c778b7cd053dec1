"""A table drawn: as Markdown, CSV, LaTeX, JSON and one HTML page; nothing is computed here but looks."""
