"""Parameters of a module tree by their dotted paths, as checkpoints call them."""
from typing import Any

import jax


def parameters(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted path -> leaf of a module tree, abstract or real."""
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def parameter_path(path: tuple) -> str:
    """The dotted path of a leaf, "layers.3.moe.gate_EDI", from its key path in the tree."""
    names = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path]
    return ".".join(name for name in names if name not in ("", "value"))
