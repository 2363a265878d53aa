"""Images with captions, their latents and embeddings, and batches of them."""
