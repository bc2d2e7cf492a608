"""The bytes that a device sends to others in a step, counted as the compiled programs send them (docs/tpu.md).

Of n devices a ring that gathers or scatters moves (n - 1) / n of the whole, one that sums everywhere twice that, and an
exchange (n - 1) / n of what a device has. Activations go in the model's dtype; sums of which a device keeps a part
(rows of q, k and v, and of what attention gives) and the router's scores in float32. To experts go as many rows as on
average if all choices are equally likely, or where no rows can be left out, all.
"""
import math

from jax.sharding import AbstractMesh

from jaxllm.axes import MESH_AXES, expert_dims, splits_rows, stream
from jaxllm.config import LayerSpec
from jaxllm.dispatch import expected_places, sends_ragged
from jaxllm.model import stored_layers
from jaxllm.tpu.chips import Slice
from jaxllm.tpu.held import Held
from jaxllm.tpu.steps import Work

F32, INT32 = 4, 4
FEW = 2**21       # bytes, above which XLA gathers single rows: 2 MiB the most that it did not, 3 the least that it did


def sent_bytes(held: Held, on: Slice, mesh: AbstractMesh, work: Work) -> int:
    """That a device sends in a step; 0 on one device."""
    sent = Sent(held, on, mesh, work)
    layers = sum(sent.by_attention(layer) + (sent.by_experts() if layer.is_moe else sent.by_mlp())
                 for layer in stored_layers(held.config, mesh))
    weights = sum(held.weights(mesh).values())
    return math.ceil(sent.around_layers() + layers + (mesh.shape["data"] - 1) * weights)


class Sent:
    """`whole`: bytes of the residual stream at one place along `data`; `apart`: each device has some rows of it."""

    def __init__(self, held: Held, on: Slice, mesh: AbstractMesh, work: Work):
        self.config, self.on, self.mesh, self.size = held.config, on, mesh, held.dtype.itemsize
        data, self.expert, self.tensor = (mesh.shape[axis] for axis in MESH_AXES)
        self.both, self.rows = self.expert * self.tensor, work.num_tokens // data
        self.D = held.config.hidden_size
        self.whole = self.rows * self.D * self.size
        self.splits_rows = splits_rows(work.batch, mesh)
        self.apart = stream(work.batch, work.tokens, self.D * self.size, mesh) != ("batch", None)

    def around_layers(self) -> float:
        """The embedding's rows, and all of them again for the head."""
        return reduce(self.both, self.whole) + self.together()

    def together(self) -> float:
        """To have all rows on each device."""
        if not self.apart:
            return 0.0
        is_one = self.rows == self.both and self.whole <= FEW      # is then summed with zeros for those of others
        return (reduce if is_one else gather)(self.both, self.whole)

    def by_attention(self, layer: LayerSpec) -> float:
        rows, expert, tensor = self.rows, self.expert, self.tensor
        N, K, H, V = layer.num_heads // tensor, layer.num_kv_heads // tensor, layer.head_dim, layer.v_head_dim
        if self.splits_rows:
            total = gather(expert, rows * (N * H + K * (H + V)) * F32) + gather(expert, rows * N * V * self.size)
        else:
            total = reduce(expert, rows * ((N * H + K * H) * self.size + K * V * F32))
            if layer.window is None:      # what each place found in its slots: output, sum and maximum
                total += reduce(expert, rows * N * (V + 2) * F32)
        if not self.apart:      # summed over heads, then all of D
            return total + reduce(tensor, self.whole / expert) + gather(expert, self.whole)
        exchanged = gather(expert, self.whole / self.both)      # rows for parts of D, and back
        return total + 2 * exchanged + gather(tensor, self.whole / expert * (1 + F32 / self.size))

    def by_mlp(self) -> float:
        return self.together() + reduce(self.both, self.whole)

    def by_experts(self) -> float:
        E, A, both = self.config.n_routed_experts, self.config.num_experts_per_tok, self.both
        assert E is not None and A is not None
        scores = reduce(both, self.rows * E * F32)
        if not self.apart:
            return scores + reduce(both, self.whole)
        routing = scores + gather(both, self.whole / both) + reduce(both, self.rows * A * (INT32 + F32))
        if expert_dims(E, self.mesh)[0] == "whole_experts":
            places = expected_places(E, A, both) if sends_ragged(self.on.chip.name, self.on.num_devices) else both
            return routing + 2 * gather(both, self.whole / both) * places
        return routing + self.together() + gather(both, self.rows * self.D * F32)


def gather(num: int, nbytes: float) -> float:
    return nbytes * (num - 1) / num


def reduce(num: int, nbytes: float) -> float:
    return 2 * gather(num, nbytes)
