"""The parameters of a law by name, as plain numbers."""

from __future__ import annotations

from dataclasses import fields, replace

from lightning_rmt.laws.law import Law


def parameters_of(law: Law) -> dict[str, float]:
    """Every number among the law's fields; ``ratios = (2.0, 0.5)`` gives ``ratios[0]`` and ``ratios[1]``."""
    found: dict[str, float] = {}
    for field in fields(law):
        value = getattr(law, field.name)
        if isinstance(value, tuple):
            found |= {f"{field.name}[{place}]": float(one) for place, one in enumerate(value)}
        elif isinstance(value, float | int) and not isinstance(value, bool):
            found[field.name] = float(value)
    return found


def with_parameter(law: Law, name: str, value: float) -> Law:
    """The same law with another value of one parameter, named as in `parameters_of`.

    Raises:
        ValueError: the law has no such member.
    """
    field, _, place = name.partition("[")
    if place:
        values = list(getattr(law, field))
        values[int(place.rstrip("]"))] = value
        return replace(law, **{field: tuple(values)})
    return replace(law, **{field: value})
