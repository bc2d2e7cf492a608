"""AdamW with warm-up and decay, by optax."""
import jax.numpy as jnp
import optax

from jaxllm.train.run import Run


def schedule(run: Run) -> optax.Schedule:
    """Learning rate by step: linear warm-up, constant, and over the last `decay` steps down to the final rate."""
    peak, final = run.learning_rate, run.final_learning_rate
    constant = run.steps - run.decay
    if run.schedule == "cosine":
        down = optax.cosine_decay_schedule(peak, max(1, run.decay), alpha=final / peak)
    else:
        down = optax.linear_schedule(peak, final, max(1, run.decay))
    up = optax.linear_schedule(peak / max(1, run.warmup), peak, max(1, run.warmup - 1))
    return optax.join_schedules([up, optax.constant_schedule(peak), down], [run.warmup, max(run.warmup, constant)])


def make_optimizer(run: Run) -> optax.GradientTransformation:
    """Over a mapping path -> parameter. Matrices decay; norms, sinks and other vectors do not (MODEL.md 2.7)."""
    return optax.chain(
        optax.clip_by_global_norm(run.clip),
        optax.scale_by_adam(run.beta1, run.beta2, run.epsilon, mu_dtype=jnp.float32),
        optax.add_decayed_weights(run.weight_decay, lambda params: {path: p.ndim > 1 for path, p in params.items()}),
        optax.scale_by_learning_rate(schedule(run)))
