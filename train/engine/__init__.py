"""How a step of a frozen LLM is computed for less: each file holds one saving, and ``engine.py`` puts them together."""
