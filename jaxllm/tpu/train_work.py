"""What a training step makes on each device beside what it is given, what it multiplies, and what it sends.

Counted as the product's own step does it: each layer is computed, once more for its gradient (rematerialised: of its
first pass its input and what its router chose are kept), and its gradient, in the order of the layers; parameters are
gathered over `data` in each of the first two, and gradients scattered. Letters: M tokens of a place along `data`.
"""
import dataclasses
import math

from jax.sharding import AbstractMesh

from jaxllm.axes import degree, expert_dims, splits_rows
from jaxllm.config import LayerSpec
from jaxllm.experts_in_turns import TURN_BACK
from jaxllm.model import stored_layer
from jaxllm.tpu.sent import gather, reduce
from jaxllm.tpu.train_held import ADAPTERS, Part, Trained
from jaxllm.train.cross_entropy import PLACES

FLOAT32 = 4


def flops_of_token(trained: Trained) -> dict[str, float]:
    """FLOPs of a token: what its forward pass needs (two for each number of the matrices that it meets, and attention
    to what it sees, on average of a whole row), what its gradients need, and what rematerialisation makes again."""
    config, work, count = trained.held.config, trained.work, trained.held.count
    table = config.vocab_size * config.hidden_size
    in_layers = config.count_parameters().active - table * (1 if config.tie_word_embeddings else 2)
    attention = sum(times * layer.num_heads * (layer.head_dim + layer.v_head_dim) * mean_seen(layer, work.context)
                    for layer, times in count.items())
    layers, head, adapters = 2.0 * (in_layers + attention), 2.0 * table, 2.0 * adapter_numbers(trained)
    ahead = layers + head + adapters
    of_frozen = layers + head + 2.0 * attention      # of activations, two products of scores and of values each
    back = of_frozen + 2 * adapters if work.rank else 2 * ahead
    return {"forward": ahead, "gradients": back, "again": layers + adapters}


def mean_seen(layer: LayerSpec, context: int) -> float:
    """Keys that a token of a row sees, on average."""
    window = min(layer.window or context, context)
    return window - window * (window - 1) / (2 * context)


def adapter_numbers(trained: Trained) -> float:
    """Of the adapters that a token meets."""
    rank, config = trained.work.rank or 0, trained.held.config
    D, A, I = config.hidden_size, config.num_experts_per_tok or 0, config.moe_intermediate_size or 0
    total = 0
    for layer, times in trained.held.count.items():
        N, K, H, V = layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim
        attention = (D + N * H) + (D + K * H) + (D + K * V) + (N * V + D)
        total += times * (attention + (3 * A * (D + I) if layer.is_moe else 3 * (D + config.intermediate_size)))
    return rank * total


@dataclasses.dataclass(frozen=True)
class Shares:
    """Numbers of a device's share, of the values that a layer makes for M tokens."""
    stream: int          # M D: of what runs between the layers
    heads: int           # of q, k and v together
    values: int          # of attention's output
    scores: int          # of the router; 0 in a dense layer
    chosen: int          # M A
    hidden: int          # of the dense MLP


def shares(trained: Trained, mesh: AbstractMesh, layer: LayerSpec) -> Shares:
    config, M = trained.held.config, trained.work.num_tokens // mesh.shape["data"]
    stored, tensor = stored_layer(layer, mesh), mesh.shape["tensor"]
    rows = M // (mesh.shape["expert"] if splits_rows(trained.work.batch, mesh) else 1)      # where attention works
    N, K = stored.num_heads // tensor, stored.num_kv_heads // tensor
    experts, chosen = (config.n_routed_experts or 0, config.num_experts_per_tok or 0) if layer.is_moe else (0, 0)
    hidden = 0 if layer.is_moe else M * config.intermediate_size // degree(mesh, "mlp")
    return Shares(M * config.hidden_size, rows * (N * layer.head_dim + K * (layer.head_dim + layer.v_head_dim)),
                  rows * N * layer.v_head_dim, M * experts, M * chosen, hidden)


def kept_bytes(trained: Trained, mesh: AbstractMesh, remat: bool = True) -> int:
    """Of what the layers leave for the backward pass: what goes into each, and the router's scores and choice; without
    rematerialisation also what goes into its products. And what goes into the head, with its gradient."""
    size, total = trained.held.dtype.itemsize, 0
    for layer, times in trained.held.count.items():
        part = shares(trained, mesh, layer)
        inside = size * (3 * part.stream + part.heads + part.values) + part.hidden * (2 * FLOAT32 + size)
        total += times * (size * part.stream + FLOAT32 * (part.scores + part.chosen) + (0 if remat else inside))
    return total + 2 * size * part.stream


def most_bytes(trained: Trained, mesh: AbstractMesh) -> dict[str, int]:
    """What a step makes beside its state, at each of its times: gradients grow as what is kept is used up, and the
    layer in work has none yet."""
    kept, gradients = kept_bytes(trained, mesh), FLOAT32 * trained.num_trained(mesh)

    def at_layer(layer: LayerSpec) -> int:
        own = FLOAT32 * sum(part.trained for part in trained.parts(mesh)[layer])
        return max(kept, gradients - own) + layer_bytes(trained, mesh, layer)
    return {"head": kept + head_bytes(trained, mesh), "layers": max(map(at_layer, trained.held.count)),
            "update": gradients}


def layer_bytes(trained: Trained, mesh: AbstractMesh, layer: LayerSpec) -> int:
    """In work for a layer's gradient: its parameters as gathered and the largest gradient of one of them, of experts in
    several turns float32 sums of all; what comes in and goes out; and the larger of what attention and what the experts
    or the dense MLP make. The sums of q, k and v over parts of D are of all rows and in float32, and so is the gradient
    of attention's input."""
    config, size, part = trained.held.config, trained.held.dtype.itemsize, shares(trained, mesh, layer)
    rows, parts = turn_rows(trained, mesh, part.chosen), trained.parts(mesh)[layer]
    weights = sum(x.used for x in parts if x.is_gathered) + max(x.used for x in parts if x.trained)
    if rows < part.chosen:
        weights += sum(x.used for x in parts if x.trained and x.kind in ("experts", ADAPTERS)) * FLOAT32 // size
    rows_apart = mesh.shape["expert"] if splits_rows(trained.work.batch, mesh) else 1
    attention = rows_apart * part.heads * (size + FLOAT32) + 2 * FLOAT32 * part.stream
    if layer.is_moe:
        assert config.n_routed_experts is not None and config.moe_intermediate_size is not None
        _, hidden = expert_dims(config.n_routed_experts, mesh)
        D, I = config.hidden_size, config.moe_intermediate_size // degree(mesh, hidden)
        # The rows' x and their gradients, coming in and going out. A loop keeps them all; packed weights then have x
        # by even and odd columns too, and adapters a gradient of x of their own.
        of_adapters, in_loop = size + FLOAT32 if trained.work.rank else 0, rows < part.chosen
        of_D = 2 * size + 2 * FLOAT32 + in_loop * (FLOAT32 + of_adapters)
        inner = rows * (D * of_D + I * (3 * FLOAT32 + 2 * size))
    else:
        inner = part.hidden * (3 * FLOAT32 + 2 * size)
    return weights + 2 * size * part.stream + max(attention, inner)


def turn_rows(trained: Trained, mesh: AbstractMesh, chosen: int) -> int:
    """Rows of experts that are in work at once."""
    config = trained.held.config
    weights = (config.n_routed_experts or 0) // mesh.shape["expert"] * (config.moe_intermediate_size or 0)
    return min(chosen, TURN_BACK if trained.work.rank else max(TURN_BACK, weights // mesh.shape["tensor"]))


def head_bytes(trained: Trained, mesh: AbstractMesh) -> int:
    """In work for the head: itself as gathered, its gradient in float32, and a piece's logits with their gradient."""
    config, size = trained.held.config, trained.held.dtype.itemsize
    W = config.vocab_size // degree(mesh, "vocab")
    pieces = min(PLACES, trained.work.num_tokens // mesh.shape["data"])
    return W * config.hidden_size * (size + (0 if trained.work.rank else FLOAT32)) + pieces * W * (FLOAT32 + size)


def moved_bytes(trained: Trained, mesh: AbstractMesh) -> dict[str, int]:
    """At least, between HBM and the core: parameters as they are computed with, in both passes and for the gradients;
    what is trained and the optimizer's state read and written; gradients and what is kept written and read."""
    used, numbers = sum(times * part.used for times, part in trained.every(mesh)), trained.num_trained(mesh)
    state = trained.state(mesh)["optimizer"] + FLOAT32 * numbers
    return {"weights": 3 * used + 2 * state, "activations": 2 * (FLOAT32 * numbers + kept_bytes(trained, mesh))}


def sent_bytes(trained: Trained, mesh: AbstractMesh) -> dict[str, int]:
    """Bytes that a device sends in a step, as rings do it: over `data`, and over `expert` and `tensor` together."""
    data = sum(trained.times(layer) * part_sent(part, mesh.shape["data"], 1 if layer is None else 2)
               for layer, parts in trained.parts(mesh).items() for part in parts)
    size, D = trained.held.dtype.itemsize, trained.held.config.hidden_size
    both = mesh.shape["expert"] * mesh.shape["tensor"]
    M = trained.work.num_tokens // mesh.shape["data"]
    ends = reduce(both, M * (2 * D * size + 2 * FLOAT32))      # of embedding, and of the head with its softmax
    layers = sum(times * layer_sent(trained, mesh, layer) for layer, times in trained.held.count.items())
    return {"data": math.ceil(data), "model": math.ceil(ends + layers)}


def part_sent(part: Part, data: int, passes: int) -> float:
    """A parameter is gathered in each pass, and its gradient scattered."""
    return gather(data, part.used * passes + part.summed) if part.is_gathered else reduce(data, part.summed)


def layer_sent(trained: Trained, mesh: AbstractMesh, layer: LayerSpec) -> float:
    """Over `expert` and `tensor`: attention's products are summed over parts of D, its output over heads, what the
    router and the experts give over both; in the second pass the last is not made; and the gradients of all these."""
    part, size = shares(trained, mesh, layer), trained.held.dtype.itemsize
    expert, tensor, both = mesh.shape["expert"], mesh.shape["tensor"], mesh.shape["expert"] * mesh.shape["tensor"]
    stream = size * part.stream
    if splits_rows(trained.work.batch, mesh):      # rows of attention go where they are worked on, and come back
        moved = gather(expert, expert * part.heads * FLOAT32) + gather(expert, expert * part.values * size)
        back = gather(expert, expert * part.heads * size) + gather(expert, expert * part.values * FLOAT32)
    else:
        moved, back = reduce(expert, size * part.heads), reduce(expert, size * part.values)
    attention = moved + reduce(tensor, stream / expert) + gather(expert, stream)
    router, experts = reduce(both, FLOAT32 * part.scores), reduce(both, stream)
    gradients = back + reduce(tensor, stream / expert) + gather(expert, stream) + experts
    # Of a router the weights of what was chosen, and its input; of a dense MLP's input gate and up, each for itself.
    gradients += reduce(both, FLOAT32 * part.chosen) + gather(both, stream) if layer.is_moe else experts
    return 2 * (attention + router) + experts + gradients
