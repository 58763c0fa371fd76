"""Watching a rollout: its denoising step by step, in the terminal, as a web page and as an animated image."""
