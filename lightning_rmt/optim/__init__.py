"""Optimizers that use what a probe measured. Torch only: works in any training loop."""
