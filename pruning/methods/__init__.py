"""One file per pruning method: pure tensor code, no model library. Adding a file here adds a method."""
