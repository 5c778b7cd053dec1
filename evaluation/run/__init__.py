"""Running arms on benchmarks: what loads a model, or is called by something that did."""
