"""Direct reward gradients."""
