"""What a training step reads: rows of packed documents."""
import dataclasses

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of T tokens, each of whole or cut documents one after the other."""
    tokens_BT: jax.Array | np.ndarray      # int32
    begin_BT: jax.Array | np.ndarray       # int32: where in the row the token's document begins; it sees nothing before
    counted_BT: jax.Array | np.ndarray     # bool: to be predicted; not padding, a prompt, or the first of a document
