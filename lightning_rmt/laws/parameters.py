"""The parameters of a law by name, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

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


def law_to_dict(law: Law) -> dict[str, Any]:
    """Name and fields, for JSON."""
    values = {field.name: getattr(law, field.name) for field in fields(law)}
    return {"name": type(law).__name__} | {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def law_from_dict(saved: dict[str, Any]) -> Law:
    """The law that `law_to_dict` saved.

    Raises:
        ValueError: there is no law of that name, or it doesn't have these parameters.
    """
    import lightning_rmt.laws  # noqa: F401  (the laws register themselves by being defined)

    values = {key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()}
    name = values.pop("name", None)
    known = {law.__name__: law for law in _all_below(Law)}
    if name not in known:
        raise ValueError(f"there is no law {name!r} here, only {', '.join(sorted(known))}")
    try:
        return known[name](**values)
    except TypeError as error:
        raise ValueError(f"this saved {name} is damaged: {error}") from error


def _all_below(family: Any) -> list[type[Law]]:
    found: list[type[Law]] = []
    direct: Sequence[type[Law]] = family.__subclasses__()
    for below in direct:
        found += [below, *_all_below(below)]
    return found
