"""Scores of checkpoints on the same prompts and seeds, with intervals, and a report to look at."""
