"""One step: gradients of the loss over a batch, AdamW, and the balancing of the routers' biases."""
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.axes import spec
from jaxllm.train.batch import Batch
from jaxllm.train.loss import count_targets, loss
from jaxllm.train.optimizer import make_optimizer, schedule
from jaxllm.train.state import BIAS, Plan, TrainState


def make_step(plan: Plan) -> jax.stages.Wrapped:
    """The jitted step: (state, frozen parameters, batch) to (state, metrics, float32); the state is donated.

    Where loss or gradient is not finite, the state stays as it was but for its step, and metrics["skipped"] is 1.
    """
    run, optimizer, rate = plan.run, make_optimizer(plan.run), schedule(plan.run)

    def step(state: TrainState, frozen: dict[str, Any], batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        gradients, metrics, counts = gradients_of(plan, state, frozen, batch)
        norm = optax.tree.norm(gradients)
        is_good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        with jax.numpy_dtype_promotion("standard"):      # optax counts in int32 and multiplies by floats
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
            learning_rate = jnp.asarray(rate(state.step), jnp.float32)
        biases = {path: balanced(bias, counts[path.removesuffix(BIAS)], run.bias_update)
                  for path, bias in state.biases.items()}
        new = TrainState(state.step, optax.apply_updates(state.trained, updates), biases, opt_state)
        new = jax.tree.map(lambda after, before: jnp.where(is_good, after, before), new, state)
        metrics |= {"grad_norm": norm, "learning_rate": learning_rate,
                    "skipped": 1.0 - is_good.astype(jnp.float32)}
        if counts:
            metrics["most_loaded_expert"] = jnp.stack([count.max() / count.mean() for count in counts.values()]).max()
        return TrainState(state.step + 1, new.trained, new.biases, new.opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def gradients_of(plan: Plan, state: TrainState, frozen: dict[str, Any], batch: Batch
                 ) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """(float32 gradients by path, the parts of the loss, tokens of each expert by layer), of the whole batch: the sum
    over `accumulate` parts of it, one after the other."""
    run = plan.run
    totals = count_targets(batch, len(plan.computed.mtp))

    def of_part(part: Batch) -> Any:
        def value(trained: dict[str, jax.Array]) -> Any:
            model = plan.model(trained, state.biases, frozen)
            return loss(model, part, run.mtp_weight, run.balance_weight, run.remat, totals)
        gradients, rest = jax.grad(value, has_aux=True)(state.trained)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), *rest

    if run.accumulate == 1:
        return of_part(batch)

    def cut(x: jax.Array) -> jax.Array:
        B, T = x.shape
        x = jax.lax.reshape(x, (B // run.accumulate, run.accumulate, T), out_sharding=spec("batch", None, None))
        return jnp.moveaxis(x, 1, 0)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_part(part)), None

    parts = jax.tree.map(cut, batch)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.scan(add, zero, parts)[0]


def balanced(bias_E: jax.Array, count_E: jax.Array, update: float) -> jax.Array:
    """The bias after experts with more tokens than the mean have lost `update` of it, those with fewer won it
    (arXiv 2408.15664)."""
    return bias_E + update * jnp.sign(count_E.mean() - count_E)
