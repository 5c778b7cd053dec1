"""Running arms on tasks, and comparing dense, training-free and tuned."""
