"""Rewards over HTTP: `prx-post reward-serve` and its client."""
