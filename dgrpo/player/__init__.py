"""Rollouts to watch: frames, the terminal, web pages and images."""
