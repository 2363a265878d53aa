"""The embedded world: "write this number". Real handwriting, a tiny but genuine PRX pipeline, two cores."""

from prx_post.model.config import EMBEDDED

BASE = EMBEDDED / "base"
JUDGE = EMBEDDED / "judge.safetensors"
