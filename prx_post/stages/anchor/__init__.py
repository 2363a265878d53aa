"""A distillation that is trained beside an alignment, and holds its images together."""
