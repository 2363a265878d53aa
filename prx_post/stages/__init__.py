"""Post-training stages. A stage builds, fits and emits; it never imports another."""
