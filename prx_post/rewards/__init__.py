"""Scorers of pictures: higher is better."""
