"""Accuracy of checkpoints and of stored generations."""
