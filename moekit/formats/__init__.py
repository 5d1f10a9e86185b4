"""What is on disk: checkpoint directories, Hugging Face names, tokenizers."""
