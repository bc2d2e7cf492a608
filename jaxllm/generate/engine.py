"""`Model`: a loaded model with its tokenizer, and what a user asks of it. Host code around the jitted steps of step.py.

Shapes are rounded up, so that calls of like size share compiled programs: rows, a prompt's chunk and the room for new
tokens to a power of two, the cache to a quarter of one.
"""
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.cache import Cache
from jaxllm.config import Config
from jaxllm.generate.request import Prompt, Request, Settings, as_prompts, check_ids, make_request
from jaxllm.generate.sample import Sampling
from jaxllm.generate.step import advance, fetch, init_cache, on_mesh, place, prefill, start
from jaxllm.generate.text import TextStream, Tokenizer
from jaxllm.model import Transformer

CHUNK = 512     # prompt tokens per prefill step: enough to keep matrix units busy, and it bounds the activations
BLOCK = 16      # tokens between two looks of the host where it must look: for stop strings, or to stream


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one prompt got."""
    text: str | None                            # without stop id or string; None if the folder has no tokenizer
    tokens: list[int]                           # the new tokens, a stop id or those of a stop string included
    finish_reason: Literal["stop", "length"]    # "stop": met a stop id or string; "length": max_new_tokens


class Model:
    """A model on its mesh, with its folder's tokenizer and stop ids. Made by `jaxllm.load`."""

    def __init__(self, transformer: Transformer, mesh: Mesh, tokenizer: Tokenizer | None, stop_ids: Sequence[int]):
        self.transformer = transformer
        self.mesh = mesh
        self.stop_ids = tuple(stop_ids)
        self._tokenizer = tokenizer

    @property
    def config(self) -> Config:
        return self.transformer.config

    @property
    def dtype(self) -> jnp.dtype:
        """What the model computes in."""
        return self.transformer.embed_WD.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer; ValueError if it has none."""
        if self._tokenizer is None:
            raise ValueError("this model's folder has no tokenizer (tokenizer.json or tokenizer.model): "
                             "give prompts as lists of token ids and read .tokens")
        return self._tokenizer

    def logits(self, tokens_BT: Any) -> np.ndarray:
        """Float32 logits [B, T, W] after every one of the tokens [B, T], by one forward pass without a cache."""
        tokens = np.asarray(tokens_BT)
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(f"logits wants token ids [B, T], at least one, but got shape {list(tokens.shape)}")
        check_ids("logits", tokens.ravel().tolist(), self.config)
        padded = np.pad(tokens.astype(np.int32), ((0, -len(tokens) % self.mesh.shape["data"]), (0, 0)))
        with on_mesh(self.transformer):
            out = _logits(self.transformer, place(self.transformer, padded, "batch", None))
        return fetch(self.transformer, out)[0][:len(tokens)]

    def generate(self, prompts: Any, **settings: Unpack[Settings]) -> Any:
        """Continues a prompt (text, or token ids): a Generation. Of a list of prompts: a list of them.

        Settings: see `Settings`. What a row gets depends on its prompt, its settings and its seed, not on the rest of
        the batch and not on the mesh. ValueError names a prompt or a setting that cannot be.
        """
        prompts, single = as_prompts(prompts)
        request = make_request(prompts, self.config, self._tokenizer, **settings)
        rows = [self._row(request) for _ in request.prompts]
        for _ in self._run(request, rows, BLOCK if request.stop else request.max_new_tokens):
            pass
        results = [row.result() for row in rows]
        return results[0] if single else results

    def stream(self, prompt: Prompt, **settings: Unpack[Settings]) -> Iterator[str]:
        """The text of one prompt in pieces, as it comes. Joined they equal `generate`'s text; none ends in half a
        character."""
        _ = self.tokenizer
        request = make_request([prompt], self.config, self._tokenizer, **settings)

        def pieces() -> Iterator[str]:
            row = self._row(request)
            for _ in self._run(request, [row], BLOCK):
                if piece := row.new_text():
                    yield piece
        return pieces()

    def chat(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
             enable_thinking: bool | None = None, **settings: Unpack[Settings]) -> Generation:
        """The assistant's next turn of a conversation, by the folder's chat template; settings as in `generate`."""
        variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        return self.generate(self.tokenizer.chat(messages, tools=tools, **variables), **settings)

    def _row(self, request: Request) -> "Row":
        return Row(self.stop_ids, TextStream(self._tokenizer, request.stop) if self._tokenizer else None)

    def _run(self, request: Request, rows: list["Row"], block: int) -> Iterator[None]:
        """Generates; after the first token and then every `block` of them gives each row its own, and yields."""
        sampling = self._sampling(request)
        stop_ids = place(self.transformer, np.array(self.stop_ids or (-1,)), None)
        limit = self._column(np.full(len(rows), request.max_new_tokens))
        cache, logits = self._prefill(request)
        state = start(self.transformer, cache, logits, sampling, stop_ids, limit, _power(request.max_new_tokens),
                      request.kind)
        while True:
            out, count, done = fetch(self.transformer, state.out_BT, state.count_B, state.done_B)
            for row, tokens, num, ended in zip(rows, out, count, done, strict=False):
                row.take(tokens[:num].tolist(), bool(ended))
            yield
            if all(row.reason for row in rows):
                return
            if any(row.reason and not ended for row, ended in zip(rows, done, strict=False)):
                ended = [row.reason is not None for row in rows] + [True] * (len(done) - len(rows))
                state = dataclasses.replace(state, done_B=self._column(np.array(ended)))     # by a stop string
            state = advance(self.transformer, state, sampling, stop_ids, block, request.kind)

    def _prefill(self, request: Request) -> tuple[Cache, jax.Array]:
        """A cache with the prompts in it, and the logits after each prompt's last token."""
        length = np.array([len(prompt) for prompt in request.prompts])
        B, longest = self._batch(len(length)), int(length.max())
        max_len = min(_quarter_power(longest + request.max_new_tokens), self.config.max_position_embeddings)
        cache = init_cache(self.config, self.mesh, B, max_len, dtype=self.dtype)
        logits = None
        for begin in range(0, longest, CHUNK):
            T = min(CHUNK, _power(longest - begin))
            tokens = np.zeros((B, T), np.int32)
            for row, prompt in zip(tokens, request.prompts, strict=False):
                row[:len(prompt[begin:begin + T])] = prompt[begin:begin + T]
            num = self._column(np.clip(length - begin, 0, T))
            new, cache = prefill(self.transformer, cache, tokens, num)
            if logits is not None:
                with on_mesh(self.transformer):
                    new = _where(num, new, logits)
            logits = new
        assert logits is not None
        return cache, logits

    def _sampling(self, request: Request) -> Sampling:
        return Sampling(*(self._column(x) for x in (request.temperature, request.top_k, request.top_p, request.seed)))

    def _batch(self, num: int) -> int:
        """Rows of a batch that holds `num`: a power of two where the data axis allows."""
        data = self.mesh.shape["data"]
        return _power(-(-num // data)) * data

    def _column(self, values: np.ndarray) -> jax.Array:
        """[B] on the mesh, from one value for each prompt; the rows that pad the batch get 0."""
        return place(self.transformer, np.pad(values, (0, self._batch(len(values)) - len(values))), "batch")


class Row:
    """One prompt's new tokens and text as they come in, and why it ended (None while it has not)."""

    def __init__(self, stop_ids: Sequence[int], stream: TextStream | None):
        self.tokens: list[int] = []
        self.reason: Literal["stop", "length"] | None = None
        self._stop_ids, self._stream = stop_ids, stream
        self._pieces: list[str] = []
        self._told = 0

    def take(self, tokens: list[int], done: bool) -> None:
        """All tokens so far; `done` if the device says that no more will come. Nothing changes once it has ended."""
        for token in tokens[len(self.tokens):] if self.reason is None else ():
            self.tokens.append(token)
            if token in self._stop_ids:
                self.reason = "stop"
            elif self._stream:
                self._pieces.append(self._stream.push([token]))
                self.reason = "stop" if self._stream.stopped else None
            if self.reason:
                break
        else:
            self.reason = self.reason or ("length" if done else None)
        if self.reason and self._stream:
            self._pieces.append(self._stream.finish())

    def new_text(self) -> str:
        """The text since the last time."""
        text = "".join(self._pieces[self._told:])
        self._told = len(self._pieces)
        return text

    def result(self) -> Generation:
        assert self.reason
        return Generation("".join(self._pieces) if self._stream else None, self.tokens, self.reason)


@jax.jit
def _logits(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return model.logits(model(tokens_BT)[0])


@jax.jit
def _where(length_B: jax.Array, new_BW: jax.Array, old_BW: jax.Array) -> jax.Array:
    return jnp.where((length_B > 0)[:, None], new_BW, old_BW)


def _power(num: int) -> int:
    """The power of two at or above num."""
    return 1 << (num - 1).bit_length()


def _quarter_power(num: int) -> int:
    """num rounded up to a quarter of the power of two below it, in steps of at least 32."""
    step = max(32, _power(num) // 8)
    return -(-num // step) * step
