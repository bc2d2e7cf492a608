"""What a Pallas kernel of somebody else's does and moves, said to XLA: without an estimate it counts as nothing.

`pallas_call` takes a `CostEstimate`, which the kernels that ship with JAX do not all pass on. It is a parameter of the
traced equation, so it can be set there.
"""
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.extend import core


def with_cost(function: Callable[..., Any], cost: pl.CostEstimate, *args: Any) -> Any:
    """function(*args), in which each Pallas kernel has this estimate. Not to be differentiated."""
    traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    found = core.jaxpr_as_fun(_priced(traced, cost))(*jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _priced(traced: core.ClosedJaxpr, cost: pl.CostEstimate) -> core.ClosedJaxpr:
    def one(equation: core.JaxprEqn) -> core.JaxprEqn:
        if equation.primitive.name == "pallas_call":
            return equation.replace(params=equation.params | {"cost_estimate": cost})
        return equation.replace(params={name: _priced(value, cost) if isinstance(value, core.ClosedJaxpr) else value
                                        for name, value in equation.params.items()})
    return traced.replace(jaxpr=traced.jaxpr.replace(eqns=[one(equation) for equation in traced.jaxpr.eqns]))
