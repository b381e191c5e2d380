"""Seeds of what is drawn while the training is looked at: none of them the training's own."""

from __future__ import annotations


def mixed_seed(seed: int, step: int, rank: int) -> int:
    """One seed from three numbers, within what a torch generator takes."""
    return ((seed * 1_000_003 + step) * 8191 + rank) % 2**63
