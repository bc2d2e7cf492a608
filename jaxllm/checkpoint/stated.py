"""The parameters of a checkpoint that is not here, as its config.json alone states them."""
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from jaxllm.checkpoint.kinds import EXPERTS, MXFP4, allowed_kinds, fp8, int4
from jaxllm.checkpoint.names import leaves_of, model
from jaxllm.config import Config


def stated_params(config: Config, experts: str | None = None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Leaf -> (shape, dtype) of the text model, as `Source.params` of the released layout has them.

    Attention rows are read as the releases have them. What may be packed or not (output projections, head) counts as
    plain; plain leaves have the config's dtype. `experts`: "mxfp4", "fp8" or "int4" as if `convert` had packed them so,
    whatever the config states.
    """
    quantization = config.quantization_config
    ignored = frozenset((quantization or {}).get("ignored_layers") or ())
    forms = {"fp8": fp8(quantization), "mxfp4": MXFP4, "int4": int4((quantization or {}).get("group_size") or 32)}
    kinds = {}
    for entry in model(config, 0):
        name = allowed_kinds(entry.path, entry.tensors[0], quantization, ignored)[0]
        if experts and entry.path.rpartition(".")[2] in EXPERTS:
            name = experts
        if name in forms:
            kinds[entry.path] = forms[name]
    is_fused = config.attention_projection_layout == "fused_qkv"
    entries, _ = leaves_of(config, 0, kinds, f"ranks={config.num_key_value_heads}" if is_fused else "stacked")
    dtype = np.dtype(config.dtype)
    return {leaf: (entry.shape, kinds[path].codes if leaf.endswith(".codes") else kinds[path].scale
                   if leaf.endswith(".scale") else dtype)
            for leaf, entry in entries.items()
            for path in [leaf.removesuffix(".codes").removesuffix(".scale")]}
