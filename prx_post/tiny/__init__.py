"""The embedded world: "write this number". Real handwriting, a tiny but genuine PRX pipeline, two cores."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
BASE = WEIGHTS / "base"
JUDGE = WEIGHTS / "judge.safetensors"
