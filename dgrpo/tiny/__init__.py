"""The embedded default: generated problems, a tokenizer of a few hundred tokens and a small checkpoint."""
