"""Stages, a folder each, and what runs any of them."""
