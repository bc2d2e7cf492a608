"""The steps that are planned and compiled, and what their sizes may be."""
from jaxllm.config import Config

STEPS = ("decode", "prefill", "verify")
TOKENS = {"decode": 1, "prefill": 4096, "verify": 4}      # new ones of a row, unless others are asked for


def new_tokens(config: Config, step: str, batch: int, context: int, tokens: int | None) -> int:
    """Of each row: one in decode, else `tokens` or TOKENS. ValueError for sizes that make no step of the model."""
    tokens = TOKENS[step] if tokens is None or step == "decode" else tokens
    for name, number in (("batch", batch), ("context", context), ("tokens", tokens)):
        if number < 1:
            raise ValueError(f"{name} = {number}: expected a positive whole number")
    if context > config.max_position_embeddings:
        raise ValueError(f"context = {context} is more than the model's {config.max_position_embeddings}")
    return tokens
