"""Experiments: data, models, training on Hugging Face's `Trainer`, results and reports.

It imports the library, never the reverse; install it with `pip install "nmflow[experiments]"`.
"""
