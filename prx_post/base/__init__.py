"""What every room may use: errors, settings, files, ranks, net. Imports neither torch nor the rest of the package."""
