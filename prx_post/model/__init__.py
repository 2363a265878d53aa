"""The boundary to diffusers, transformers and peft."""
