"""The steps that are planned and compiled, and what their sizes may be."""
import dataclasses

from jaxllm.config import Config

STEPS = ("decode", "prefill", "verify")
TOKENS = {"decode": 1, "prefill": 4096, "verify": 4}      # new ones of a row, unless others are asked for


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does."""
    step: str        # of STEPS
    batch: int       # rows
    context: int     # tokens of a row that its cache has room for
    tokens: int      # new ones of a row

    @property
    def num_tokens(self) -> int:
        return self.batch * self.tokens

    @property
    def in_flight(self) -> int:
        """New tokens of a row that the cache must hold beside the window; a prefill reads its own."""
        return 1 if self.step == "prefill" else self.tokens

    def __str__(self) -> str:
        return f"{self.batch} rows of {self.tokens} new tokens and a context of {self.context}"


def work_of(config: Config, step: str, batch: int, context: int, tokens: int | None = None) -> Work:
    """`tokens`: one in decode, else by default TOKENS. ValueError for sizes that make no step of the model."""
    tokens = TOKENS[step] if tokens is None or step == "decode" else tokens
    for name, number in (("batch", batch), ("context", context), ("tokens", tokens)):
        if number < 1:
            raise ValueError(f"{name} = {number}: expected a positive whole number")
    if context > config.max_position_embeddings:
        raise ValueError(f"context = {context} is more than the model's {config.max_position_embeddings}")
    return Work(step, batch, context, tokens)
