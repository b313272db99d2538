"""The report over finished runs: comparisons, sentences, plots and one page."""
