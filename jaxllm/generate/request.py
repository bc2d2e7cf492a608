"""What a caller asks for, checked before anything runs: prompts as tokens, and the settings of each row."""
import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from jaxllm.config import Config
from jaxllm.generate.sample import Kind
from jaxllm.generate.text import Tokenizer

Prompt = str | Sequence[int]
_PROMPTS = "expected a text, a list of token ids, or a non-empty list of them"
_HIGHEST = float(np.finfo(np.float32).max)


class Settings(TypedDict, total=False):
    """Settings of a generation; each but max_new_tokens and stop may be a list, one value a prompt."""
    max_new_tokens: int                             # at most so many new tokens; default 128
    temperature: float | Sequence[float] | None     # 0 is greedy, the default; 1 if only top_k or top_p is given
    top_k: int | Sequence[int] | None               # draw among the k likeliest; 0 or None: all
    top_p: float | Sequence[float] | None           # and among the fewest whose probability reaches p; None: all
    seed: int | Sequence[int] | None                # of the draws; None: a new one each row and call
    stop: str | Sequence[str] | None                # strings that end a text, themselves left out


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts and the settings of each, in arrays over the prompts as `sample.Sampling` wants them."""
    prompts: list[list[int]]
    max_new_tokens: int
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    seed: np.ndarray
    stop: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """What the batch's most demanding row needs."""
        drawn = self.temperature > 0
        if not drawn.any():
            return "greedy"
        return "truncated" if (drawn & ((self.top_k > 0) | (self.top_p < 1))).any() else "sampled"


def make_request(prompts: Sequence[Prompt], config: Config, tokenizer: Tokenizer | None, *, max_new_tokens: int = 128,
                 temperature: Any = None, top_k: Any = None, top_p: Any = None, seed: Any = None,
                 stop: str | Sequence[str] | None = None) -> Request:
    """A request; ValueError names the prompt or setting that cannot be, what it was and what is accepted."""
    if not _is_int(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens!r}: expected a whole number from 1 up")
    stops = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(stops, Sequence) or not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop = {stop!r}: expected strings that are not empty")
    if stops and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and this model's folder has none")
    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None else 1.0
    if seed is None:
        seed = _new_seeds(len(prompts))
    tokens = [_tokens(i, prompt, config, tokenizer, max_new_tokens) for i, prompt in enumerate(prompts)]
    B = len(tokens)
    return Request(
        tokens, int(max_new_tokens),
        _column("temperature", temperature, B, np.float32, lambda x: 0 <= x <= _HIGHEST, "a number from 0 up, finite"),
        _column("top_k", 0 if top_k is None else top_k, B, np.int32,
                lambda x: _is_int(x) and 0 <= x < 2**31, "a whole number from 1 up, or 0 for all"),
        _column("top_p", 1.0 if top_p is None else top_p, B, np.float32, lambda x: 0 < x <= 1,
                "a number above 0 and up to 1"),
        _column("seed", seed, B, np.uint32, lambda x: _is_int(x) and 0 <= x < 2**32, "a whole number from 0 to 2^32-1"),
        tuple(stops))


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _column(name: str, value: Any, num: int, dtype: type, accepts: Any, accepted: str) -> np.ndarray:
    """One value for every prompt, or a list with one for each, as an array [num]."""
    value = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value] * num
    if len(values) != num:
        raise ValueError(f"{name} has {len(values)} values for {num} prompts")
    for x in values:
        if isinstance(x, bool) or not isinstance(x, int | float | np.integer | np.floating) or not accepts(x):
            raise ValueError(f"{name} = {x!r}: expected {accepted}")
    return np.asarray(values, dtype)


def as_prompts(prompts: Any) -> tuple[list[Prompt], bool]:
    """A list of prompts, and whether it is of a single one that was given alone: a text, or token ids.

    ValueError if there is none, or something else was given.
    """
    prompts = prompts.tolist() if isinstance(prompts, np.ndarray | jax.Array) else prompts
    if isinstance(prompts, str):
        return [prompts], True
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ValueError(f"prompts = {prompts!r}: {_PROMPTS}")
    if not prompts:
        raise ValueError(f"no prompts were given: {_PROMPTS}")
    single = not isinstance(prompts[0], Sequence | np.ndarray | jax.Array)
    return ([prompts] if single else list(prompts)), single


def _tokens(i: int, prompt: Prompt, config: Config, tokenizer: Tokenizer | None, max_new_tokens: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("this model's folder has no tokenizer (tokenizer.json or tokenizer.model): "
                             "give prompts as lists of token ids and read .tokens")
        tokens = tokenizer.encode(prompt)
    else:
        ids: Any = prompt.tolist() if isinstance(prompt, np.ndarray | jax.Array) else prompt
        if not isinstance(ids, Sequence) or isinstance(ids, bytes):
            raise ValueError(f"prompt {i} is {ids!r}: expected a text or a list of token ids")
        tokens = list(ids)
    if not tokens:
        raise ValueError(f"prompt {i} is empty: there is nothing to continue")
    check_ids(f"prompt {i}", tokens, config)
    if len(tokens) + max_new_tokens > config.max_position_embeddings:
        raise ValueError(f"prompt {i} has {len(tokens)} tokens; with max_new_tokens = {max_new_tokens} that is over "
                         f"max_position_embeddings = {config.max_position_embeddings}, the most a cache can hold")
    return [int(token) for token in tokens]


def check_ids(name: str, tokens: Sequence[Any], config: Config) -> None:
    """ValueError naming the first of these that is no token id of the model."""
    for token in tokens:
        if not _is_int(token) or not 0 <= token < config.vocab_size:
            raise ValueError(f"{name}: {token!r} is no token id; expected whole numbers from 0 to "
                             f"vocab_size - 1 = {config.vocab_size - 1}")


def _new_seeds(num: int) -> np.ndarray:
    seeds = np.array([secrets.randbits(32) for _ in range(num)], np.uint32)
    if jax.process_count() > 1:     # all must draw alike
        from jax.experimental import multihost_utils
        seeds = np.asarray(multihost_utils.broadcast_one_to_all(seeds))
    return seeds
