"""The table that papers print: arms in rows, benchmarks by their native metrics in columns."""
