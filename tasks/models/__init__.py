"""What tasks train: models, tokenizers, and the code shared by classifiers and by language models."""
