"""`prx-post sft`: supervised fine-tuning by flow matching."""
