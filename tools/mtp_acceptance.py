"""How often a model's MTP blocks foretell what the model itself will say, on held-out text, block by block.

    python tools/mtp_acceptance.py MODEL TEXT.jsonl...

At every place of a text block k's likeliest token, for the place k + 2 tokens on, is compared with the model's own
likeliest there. `alone` is the share of places where they are the same; `in turn` that where those of the blocks before
it are the same too, as greedy speculative decoding needs it; the last column is how many tokens a step would give.
"""
import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.axes import make_mesh
from jaxllm.checkpoint import open_source
from jaxllm.config import Config
from jaxllm.documents import read_documents
from jaxllm.generate.load import load_transformer
from jaxllm.generate.text import Tokenizer
from jaxllm.model import Transformer
from jaxllm.train.batch import Batch
from jaxllm.train.forward import hidden_states, mtp_states
from jaxllm.train.loss import targets

ROWS, CONTEXT = 8, 512


@partial(jax.jit, static_argnums=2)
def count(model: Transformer, batch: Batch, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32 [num] each: places, where block k is right, and where all blocks up to k are."""
    hidden_BTD, _ = hidden_states(model, batch, False)
    said_BT = model.head(model.norm(hidden_BTD)).argmax(-1)
    right = [model.head(state).argmax(-1) == jnp.roll(said_BT, -1 - k, axis=1)
             for k, state in enumerate(mtp_states(model, batch, hidden_BTD, False))]
    counted = [targets(batch, k + 2)[1] for k in range(num)]
    alone = [(x & y).sum() for x, y in zip(right, counted, strict=True)]
    in_turn = [(jnp.stack(right[:k + 1]).all(0) & counted[k]).sum() for k in range(num)]
    return jnp.stack([x.sum() for x in counted]), jnp.stack(alone), jnp.stack(in_turn)


def batches(documents: list[list[int]]) -> list[Batch]:
    windows = [tokens[i:i + CONTEXT] for tokens in documents for i in range(0, len(tokens), CONTEXT)]
    found = []
    for i in range(0, len(windows), ROWS):
        rows = windows[i:i + ROWS] + [[]] * (ROWS - len(windows[i:i + ROWS]))
        tokens_BT = np.array([row + [0] * (CONTEXT - len(row)) for row in rows], np.int32)
        place_T, length_B1 = np.arange(CONTEXT), np.array([[len(row)] for row in rows])
        begin_BT = np.where(place_T < length_B1, 0, CONTEXT).astype(np.int32)      # what is padding is its own
        found.append(Batch(tokens_BT, begin_BT, (place_T > 0) & (place_T < length_B1)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    args = parser.parse_args()
    config, source, mesh = Config.from_hub(args.model), open_source(args.model), make_mesh()
    num = len({path.split(".")[1] for path in source.params if path.startswith("mtp.")})
    model = load_transformer(source, config, mesh, jnp.dtype("float32"), num_mtp=num)
    tokenizer = Tokenizer.from_dir(args.model, config.vocab_size)
    if not num or tokenizer is None:
        raise SystemExit(f"{args.model} has {num} MTP blocks and {'a' if tokenizer else 'no'} tokenizer")
    print("text, then of each block: alone, in turn; tokens a step")
    for text in args.texts:
        documents = [tokenizer.encode(document) for document in read_documents(text)]
        with jax.set_mesh(mesh):
            places, alone, in_turn = np.sum([count(model, batch, num) for batch in batches(documents)], axis=0)
        shares = [f"{a:.1%} {b:.1%}" for a, b in zip(alone / places, in_turn / places, strict=True)]
        print(f"{text.name.split('.jsonl')[0]:16}{'   '.join(shares)}   {1 + (in_turn / places).sum():.2f}")


if __name__ == "__main__":
    main()
