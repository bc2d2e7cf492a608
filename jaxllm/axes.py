"""Names: the letters of array dims, the logical axes of parameters and activations, and the mesh axes they map onto.

Letters, one meaning in the whole package, upper case for a logical size and lower case for this device's share:
B batch, T tokens in this call, S cache slots, D model, N query heads, K kv heads, G = N/K, H qk head dim, V value head
dim, F dense hidden, E experts, A experts per token, I expert hidden, M = B*T flat tokens, R = M*A routed rows,
W vocabulary, L layers. "axis" is a mesh axis, "dim" an array dimension.

The mesh always has the three axes `data` (batch), `expert` (experts) and `tensor` (heads and hidden dims). The
vocabulary and the dense hidden dim are large and belong to no head and no expert, so they use both of the latter.
Attention has no experts, and a router neither heads nor experts of its own: along what is left of the two, they are
split by D, and the partial products are added. What attention computes, and its cache, is split by rows along `expert`
too, where their number divides. Where it does not, a full layer's cache is split there by slots: each place attends to
its part of the context (context parallelism). Between the products a token's row is on one device, where that divides
(`stream`), and so is an expert on a mesh with an axis `expert`, where experts divide (`expert_dims`).
"""
import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

MESH_AXES = ("data", "expert", "tensor")
LEAST_STREAM = 2**18       # bytes: a v6e chip sends as many in 0.7 us, about what it takes to begin

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "batch": "data",
    "attention_batch": ("data", "expert"),
    "slots": "expert",
    "stream_batch": ("data", "tensor", "expert"),
    "stream_seq": ("tensor", "expert"),
    "vocab": ("expert", "tensor"),
    "embed": None,
    "attention_embed": "expert",
    "router_embed": ("tensor", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": ("expert", "tensor"),
    "experts": "expert",
    "whole_experts": ("tensor", "expert"),
    "moe_mlp": "tensor",
}


def spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose dims have these logical names (None: not split)."""
    return PartitionSpec(*(RULES[name] for name in names))


def attention_rows(num: int) -> str:
    """The logical name of attention's batch dim, for so many rows on the mesh in context."""
    return "attention_batch" if splits_rows(num, jax.sharding.get_abstract_mesh()) else "batch"


def splits_rows(num: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether so many rows are split over `expert` too where attention works on them."""
    return num % (mesh.shape["data"] * mesh.shape["expert"]) == 0


def stream(batch: int, tokens: int, token_bytes: int, mesh: Mesh | AbstractMesh) -> tuple[str, str | None]:
    """The logical names of the residual stream's dims B and T: over all devices go rows of the batch, or else a row's
    tokens, or else neither, and what `data` does not split is then the same along the other axes.

    That sends least, in more messages; where a place along `data` has less than LEAST_STREAM bytes, it is neither.
    """
    places = degree(mesh, "stream_seq")
    if places == 1 or batch * tokens * token_bytes < LEAST_STREAM * mesh.shape["data"]:
        return "batch", None
    if batch % degree(mesh, "stream_batch") == 0:
        return "stream_batch", None
    return "batch", "stream_seq" if tokens % places == 0 else None


def expert_dims(num: int, mesh: Mesh | AbstractMesh) -> tuple[str, str | None]:
    """The logical names of the dims E and I of so many experts: on a mesh with an axis `expert` each is whole on one of
    all devices, if they divide. With `tensor` alone all devices have a part of each, and as much to read whatever few
    tokens choose."""
    is_whole = mesh.shape["expert"] > 1 and num % degree(mesh, "whole_experts") == 0
    return ("whole_experts", None) if is_whole else ("experts", "moe_mlp")


def along(spec: PartitionSpec, *axes: str) -> PartitionSpec:
    """The spec of an array that is split along no other mesh axes than these."""
    return PartitionSpec(*(tuple(axis for axis in ((dim,) if isinstance(dim, str) else dim or ()) if axis in axes)
                           or None for dim in spec))


def parse_mesh(text: str | Mapping[str, int] | None) -> dict[str, int]:
    """Sizes of the three mesh axes from "data=2,tensor=4", a mapping, or None (all 1); absent axes are 1."""
    if text is None:
        sizes: dict[str, int] = {}
    elif isinstance(text, Mapping):
        sizes = dict(text)
    elif not isinstance(text, str):
        raise ValueError(f"mesh {text!r}: expected text as in \"data=2,expert=2,tensor=2\", a mapping, or None")
    else:
        sizes = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, size = part.partition("=")
            if name in sizes:
                raise ValueError(f"mesh {text!r}: axis {name!r} is given twice")
            if not size.isdecimal():
                raise ValueError(f"mesh {text!r}: {part!r} is not axis=size, as in \"data=2,expert=2,tensor=2\"")
            sizes[name] = int(size)
    for name, value in sizes.items():
        if name not in MESH_AXES:
            raise ValueError(f"mesh {text!r}: unknown axis {name!r}; the axes are {', '.join(MESH_AXES)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"mesh {text!r}: axis {name!r} has size {value!r}; it must be a positive whole number")
    return {name: sizes.get(name, 1) for name in MESH_AXES}


def make_mesh(mesh: str | Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """An explicit mesh (`data`, `expert`, `tensor`) over the first devices; ValueError when there are too few.

    `mesh` is "data=2,expert=2,tensor=2", a mapping, or None for one device; `devices` defaults to all of this job.
    """
    sizes = parse_mesh(mesh)
    devices = jax.devices() if devices is None else devices
    num = math.prod(sizes.values())
    if num > len(devices):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"the mesh {shape} needs {num} devices, but there are {len(devices)} "
                         f"({devices[0].platform}); make it smaller, or on CPU set "
                         f"XLA_FLAGS=--xla_force_host_platform_device_count={num} before JAX starts")
    if num < len(devices) and jax.process_count() > 1:
        raise ValueError(f"the mesh has {num} devices, but this job's {jax.process_count()} processes have "
                         f"{len(devices)}: every process must take part, so their product must be {len(devices)}")
    # A torus of 4 x 4 has no axis of 8: one that there is may be split between two axes of ours.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices[:num], allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * 3)


def make_abstract_mesh(mesh: str | Mapping[str, int] | None = None) -> AbstractMesh:
    """The same mesh without devices: shapes, shardings and bytes for machines that are not here."""
    sizes = parse_mesh(mesh)
    return AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Explicit,) * 3)


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """The mesh axes that split a dim with this logical name."""
    axes = RULES[name]
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def degree(mesh: Mesh | AbstractMesh, name: str | None) -> int:
    """Into how many parts the mesh splits a dim with this logical name."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(name))
