"""Sampler policies beside the standard one (`dgrpo.sampling.policy`), each named by its dotted path."""
