"""Pairwise judges: which of two images of a prompt is the better one."""
