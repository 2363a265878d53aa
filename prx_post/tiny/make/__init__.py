"""How the embedded world was made: judge, tokenizer and text encoder, autoencoder, then the base by pretraining."""
