"""The steps that are planned and compiled, and what their sizes may be."""
import dataclasses

from jaxllm.config import Config

STEPS = ("decode", "prefill", "verify")
TRAIN, TRAIN_CONTEXT = "train", 4096
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
    check_sizes(config, batch=batch, context=context, tokens=tokens)
    return Work(step, batch, context, tokens)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training step does, and the run that it is a step of."""
    batch: int              # rows
    context: int            # tokens of a row
    rank: int | None        # of adapters of all projections, which are trained alone; None: all parameters are
    run_tokens: int | None  # that the whole run reads, if it is said
    step: str = TRAIN

    @property
    def num_tokens(self) -> int:
        return self.batch * self.context

    def __str__(self) -> str:
        return (f"{self.batch} rows of {self.context} tokens, "
                + (f"adapters of rank {self.rank}" if self.rank else "all parameters"))


def training_of(config: Config, batch: int, context: int, rank: int | None = None, run_tokens: float | None = None
                ) -> Training:
    """ValueError for sizes that make no step of the model."""
    check_sizes(config, batch=batch, context=context, **{} if rank is None else {"lora": rank},
                **{} if run_tokens is None else {"tokens": run_tokens})
    if context < 2:
        raise ValueError(f"context = {context}: expected at least 2, or there is nothing to predict")
    return Training(batch, context, rank, None if run_tokens is None else int(run_tokens))


def check_sizes(config: Config, context: int, **sizes: float) -> None:
    for name, number in (("context", context), *sizes.items()):
        if not 1 <= number < float("inf") or number != int(number):
            raise ValueError(f"{name} = {number}: expected a positive whole number")
    if context > config.max_position_embeddings:
        raise ValueError(f"context = {context} is more than the model's {config.max_position_embeddings}")
