"""Data of an experiment: sources, streams, synthetic data and tokenisers."""
