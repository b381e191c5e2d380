"""What a damping rule refuses because of the data, apart from wrong arguments."""

from __future__ import annotations


class NoDampingError(ValueError):
    """The rule has no honest answer for this spectrum; the message says why and what would help."""
