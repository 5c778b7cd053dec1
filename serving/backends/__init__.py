"""Who runs the LLM: this process, or a stock engine."""
