"""What a callback's arguments may be; each function raises a ValueError that names the argument."""

from __future__ import annotations

from numbers import Integral

from lightning_rmt.curvature.gradient_factors import GROUPS


def choose(argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a word that isn't among the choices."""
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def at_least_one(**arguments: int) -> None:
    """Refuses what isn't a positive integer."""
    for argument, value in arguments.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{argument} must be an integer of at least 1, got {value!r}")


def refuse_bad_values(
    every_n_steps: int | None,
    light_every_n_steps: int | None,
    max_overhead: float,
    parameters: list[str] | None,
    seed: int,
    name: str,
) -> None:
    """Refuses what is out of its range, in words that say what is expected."""
    if every_n_steps is not None and (not isinstance(every_n_steps, Integral) or every_n_steps < 1):
        raise ValueError(
            f"every_n_steps must be an integer of at least 1, or None for a schedule by budget, got {every_n_steps!r}"
        )
    if light_every_n_steps is not None:
        at_least_one(light_every_n_steps=light_every_n_steps)
        if every_n_steps is None or every_n_steps % light_every_n_steps or every_n_steps == light_every_n_steps:
            raise ValueError(
                f"light_every_n_steps must divide every_n_steps and be smaller, got {light_every_n_steps} and "
                f"{every_n_steps}; without every_n_steps the budget decides on light probes too"
            )
    if not 0.0 < max_overhead <= 1.0:
        raise ValueError(f"max_overhead is a share of the training time, above 0 and at most 1, got {max_overhead}")
    _refuse_bad_patterns(parameters)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    refuse_bad_name(name)


def refuse_bad_factor_values(
    every_n_steps: int | None,
    factor_steps: int,
    held_out_steps: int,
    beta: float,
    parameters: list[str] | None,
    max_dim: int,
    max_memory_mib: float,
    name: str,
) -> None:
    """Refuses what a measurement of Kronecker factors can't be made with."""
    at_least_one(factor_steps=factor_steps, held_out_steps=held_out_steps, max_dim=max_dim)
    if factor_steps < 2:
        raise ValueError(f"factor_steps must be at least 2, got {factor_steps}")
    if held_out_steps < GROUPS:
        raise ValueError(
            f"held_out_steps must be at least {GROUPS}, one for each group of the jackknife, got {held_out_steps}"
        )
    if every_n_steps is not None:
        at_least_one(every_n_steps=every_n_steps)
        if every_n_steps < factor_steps + held_out_steps:
            raise ValueError(
                f"a measurement takes {factor_steps} + {held_out_steps} steps, which don't fit into "
                f"every_n_steps={every_n_steps}"
            )
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta is the decay of a moving average, above 0 and below 1, got {beta}")
    if not 0.0 < max_memory_mib < float("inf"):
        raise ValueError(f"max_memory_mib must be above 0 and finite, got {max_memory_mib}")
    _refuse_bad_patterns(parameters)
    refuse_bad_name(name)


def _refuse_bad_patterns(parameters: list[str] | None) -> None:
    if parameters is not None and (isinstance(parameters, str) or not parameters):
        raise ValueError(f"parameters must be a list of name patterns, or None for all, got {parameters!r}")


def refuse_bad_name(name: str) -> None:
    """Refuses what can't be a tag prefix and a folder."""
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):  # "a/" would be the folder of "a"
        raise ValueError(f"name becomes a tag prefix and a folder, and can't be {name!r}")


def refuse_bad_levels(levels: object, curvature: str) -> None:
    """Refuses what isn't a choice of blocks, and blocks of a matrix whose levels aren't taken."""
    if levels is None or levels == "auto":
        return
    if isinstance(levels, str) or not isinstance(levels, (list, tuple)) or not levels:
        raise ValueError(f'levels must be "auto", None or a list of layers or name patterns, got {levels!r}')
    if curvature != "hessian":
        raise ValueError(
            f'level statistics are those of the Hessian\'s exact blocks: with curvature="{curvature}" leave levels="auto" '
            "(which then takes none) or None"
        )


def refuse_bad_metric(preconditioned: bool, curvature: str, product: str, levels: object) -> None:
    """Refuses what isn't measured in the optimizer's metric."""
    if not preconditioned:
        return
    if curvature == "gradient_covariance":
        raise ValueError('preconditioned=True is about the curvature of the loss: take curvature="hessian" or "ggn"')
    if product == "finite_difference":
        raise ValueError(
            "preconditioned=True takes exact products: the error of finite differences is known in the plain coordinates "
            'only, and the metric may make much more of it; take product="auto" or "exact"'
        )
    if levels is not None and levels != "auto":
        raise ValueError(
            'level statistics are those of the Hessian\'s exact blocks: with preconditioned=True leave levels="auto" (which '
            "then takes none) or None, and give the blocks to a second monitor with another name"
        )


def refuse_bad_blocks(blocks: object) -> None:
    """Refuses what isn't a list of groups."""
    if blocks is not None and (isinstance(blocks, str) or not isinstance(blocks, (list, tuple)) or not blocks):
        raise ValueError(f"blocks must be a list of layers or name patterns, or None, got {blocks!r}")
