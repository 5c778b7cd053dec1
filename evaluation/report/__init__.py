"""Reading what runs left behind: arms, comparisons, tables, plots and saved predictions. Nothing here loads a model."""
