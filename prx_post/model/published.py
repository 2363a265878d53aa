"""The shapes of PRX's published checkpoints, by which they can be planned without a network."""

from typing import Any

TRANSFORMER = {
    "_class_name": "PRXTransformer2DModel",
    "patch_size": 2,
    "in_channels": 16,
    "context_in_dim": 2304,
    "hidden_size": 1792,
    "mlp_ratio": 3.5,
    "num_heads": 28,
    "depth": 16,
    "axes_dim": [32, 32],
    "theta": 10_000,
}
FLUX_VAE = {"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [128, 256, 512, 512]}
DC_AE = {
    "_class_name": "AutoencoderDC",
    "latent_channels": 32,
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
}
SIZES = {
    **dict.fromkeys(("prx-256-t2i", "prx-256-t2i-sft"), 256),
    **dict.fromkeys(("prx-512-t2i", "prx-512-t2i-sft", "prx-512-t2i-sft-distilled"), 512),
    **dict.fromkeys(("prx-512-t2i-dc-ae", "prx-512-t2i-dc-ae-sft", "prx-512-t2i-dc-ae-sft-distilled"), 512),
    "prx-1024-t2i-beta": 1024,
}
"""default_sample_size of the latent checkpoints, pixels."""
OWNER = "Photoroom/"


def published(repo_id: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]] | None:
    """model_index.json, and each component's configuration as far as sizes depend on it; None for another id."""
    size = SIZES.get(repo_id.removeprefix(OWNER)) if repo_id.startswith(OWNER) else None
    if size is None:
        return None
    is_dc = "-dc-ae" in repo_id
    transformer = {**TRANSFORMER, "in_channels": 32, "patch_size": 1} if is_dc else TRANSFORMER
    index = {
        "_class_name": "PRXPipeline",
        "default_sample_size": size,
        "transformer": ["diffusers", "PRXTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["prx", "T5GemmaEncoder"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "vae": ["diffusers", "AutoencoderDC" if is_dc else "AutoencoderKL"],
    }
    return index, {
        "transformer": transformer,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
        "text_encoder": {"encoder": {"hidden_size": transformer["context_in_dim"]}},
        "tokenizer": {"model_max_length": 256},
        "vae": DC_AE if is_dc else FLUX_VAE,
    }
