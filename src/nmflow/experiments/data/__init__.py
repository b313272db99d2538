"""Data of an experiment: sources, streams, stand-ins and tokenisers."""
