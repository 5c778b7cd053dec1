"""``prunetune table``: what a table is made of, what of it is missing, and where that is run."""
