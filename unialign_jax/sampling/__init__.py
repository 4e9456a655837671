"""Sampling runs: many prompts in, files out, on any number of hosts, resumable."""

from unialign_jax.sampling.run import Job, sample

__all__ = ["Job", "sample"]
