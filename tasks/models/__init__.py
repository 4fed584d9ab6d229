"""What tasks train: models, tokenizers, and what classifiers and language models have in common."""
