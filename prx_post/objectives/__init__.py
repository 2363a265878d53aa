"""Losses: tensors in, (loss, metrics) out."""
