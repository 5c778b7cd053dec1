"""One file per stage: pure tensor code, no model library. Adding a file here adds a stage."""
