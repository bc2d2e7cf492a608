"""What the planner knows of hardware: chips, the slices they come in, and where each number is from.

Sizes in bytes, rates in bytes/s and FLOP/s, all of a whole chip unless a name says device or link; peaks, not what
programs reach. None is what a chip lacks or nobody says; `Chip.lacks` tells which. `slice_of` turns the name a
user types into a `Slice`: "v6e:8x8" is also what `jax.experimental.topologies.get_topology_desc` takes, "h100:8" is one
host, and "gpu:8x24GB" stands for the card with that memory.
"""
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NoReturn

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Fact:
    """One number, and the page it stands on or the command that measured it."""
    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    name: str
    platform: Literal["tpu", "gpu"]
    fabric: Literal["torus", "switch", "bridge", "host"]   # neighbours, all to all, pairs of cards, only the host's bus
    devices: Fact                      # JAX devices of a chip; the memory and the units of a chip are split evenly
    hbm: Fact                          # bytes, as published
    usable_hbm: Fact                   # bytes of one device: the TPU compiler's limit; the total by a GPU's driver
    bandwidth: Fact                    # bytes/s to that memory
    bf16_flops: Fact                   # FLOP/s, dense, accumulated in float32
    fp8_flops: Fact | None             # the same for fp8 x fp8; None: no unit for it, it is widened and runs as bf16
    int8_flops: Fact | None            # op/s, dense, accumulated in int32
    ici: Fact | None                   # bytes/s, both ways on all links together, as vendors publish it; GPU: NVLink
    links: Fact | None                 # links of a chip
    host_bus: Fact | None              # bytes/s between host and chip, one way
    lacks: Mapping[str, str] = field(default_factory=dict, hash=False)     # why each None is None

    @property
    def link_bandwidth(self) -> float | None:
        """bytes/s of one link, one way."""
        if self.ici is None or self.links is None:
            return None
        return self.ici.value / (2 * self.links.value)


@dataclass(frozen=True)
class Slice:
    """Chips that a program may have together: a TPU slice, or the GPUs of one host or of several."""
    name: str
    chip: Chip
    shape: tuple[int, ...]             # chips along each axis of the torus; for GPUs (count,)

    @property
    def dims(self) -> int:
        return len(self.shape)

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * int(self.chip.devices.value)

    @property
    def is_networked(self) -> bool:
        """Whether it is GPUs of several hosts."""
        return self.chip.platform == "gpu" and self.num_chips > MAX_GPUS

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which axes are rings; a line takes twice as long for most collectives.

        3D: switches close the rings of whole cubes of 4x4x4 and no others (V5P; taken to hold for TPU7x too).
        2D: only an axis of 16 is one, the edge of the pod (BOOK_TPU).
        """
        if self.chip.fabric != "torus":
            return (False,) * self.dims
        if self.dims == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)


V5E = "https://docs.cloud.google.com/tpu/docs/v5e"
V5P = "https://docs.cloud.google.com/tpu/docs/v5p.md.txt"
V6E = "https://docs.cloud.google.com/tpu/docs/v6e"
TPU7X = "https://docs.cloud.google.com/tpu/docs/tpu7x?authuser=0000"
BOOK_TPU = "https://github.com/jax-ml/scaling-book/blob/54e2c439744ac33b9b8883a42b891b121c48f981/tpus.md"
BOOK_GPU = "https://github.com/jax-ml/scaling-book/blob/1a55377affc9ee8f10b549f689ad57e813623a7e/gpus.md"
H100 = "https://glennklockwood.com/garden/processors/h100"
A100 = "https://glennklockwood.com/garden/processors/A100"
H200 = "https://github.com/meta-pytorch/tritonbench/issues/78"
B200 = "https://zdszero.github.io/Computer/Artificial_Intelligence/Hardware.html (a copy of NVIDIA's table, HGX B200)"
RTX3090 = ("https://github.com/stillwater-sc/KPU-Simulator/blob/HEAD/docs/external-knowledge/"
           "rtx_30_series_specs_table.md")
GA102 = ("https://hf-mirror.492719920.workers.dev/spaces/Ahmadzei/RAG/blame/9007c8ed72f6554e38e2bad98fbbba8e72e72f22/"
         "chunked/content_aware_chunking/_perf_hardware/chunk_10.txt")
RTX4090 = "https://waredb.com/processor/nvidia-geforce-rtx-4090"
RTX5090 = "https://main-horse.github.io/posts/5090-mm-perf"
RTX5090_MEMORY = "https://www.spheron.network/blog/nvidia-rtx-5090-specs/"
MODAL = "https://github.com/modal-labs/modal-client/pull/2797"

# NVIDIA's own datasheets and white papers were not among the pages that could be searched: the GPU numbers come from
# pages that quote them. "80 GB" of a card or a chip is 80 GiB, as the memory that drivers and compilers report shows.


def compiled(name: str, said: str) -> str:
    """Source of a memory limit: the compiler's refusal of a program that needs more."""
    return (f"measured with jax 0.10.2, libtpu 0.0.42.1, JAX_PLATFORMS=cpu: jax.jit(lambda x: x + 1).lower(jax."
            f"ShapeDtypeStruct((120, 10**9), 'int8', sharding=SingleDeviceSharding(topologies.get_topology_desc("
            f"'{name}', platform='tpu').devices[0]))).compile() raises 'exceeds available HBM ({said})'")


def counted(name: str, num_devices: int, num_chips: int) -> str:
    """Source of the devices in a chip."""
    return (f"measured with jax 0.10.2, libtpu 0.0.42.1, JAX_PLATFORMS=cpu: topologies.get_topology_desc('{name}', "
            f"platform='tpu').devices has {num_devices} devices at {num_chips} different coords")


def pcie(generation: int, page: str) -> Fact:
    """Sixteen lanes, one way, after encoding: the rate of the generation that the page says the chip has."""
    rate = {4: 31.5e9, 5: 63.0e9}[generation]
    return Fact(rate, f"PCIe {generation}.0 x16 by https://hpc-notes.pages.dev/reference/pcie; generation by {page}")


def smi(mib: int, page: str) -> str:
    """Source of a GPU's memory. CUDA and JAX do not leave all of it to arrays: JAX takes 75% first and may grow, see
    https://docs.jax.dev/en/latest/gpu_memory_allocation.html."""
    return f"nvidia-smi says {mib} MiB in {page}"


ONE = Fact(1, "no page cited: jax.devices() lists each GPU once")
BUS = "https://huggingface.co/spaces/lambdabrendan/Lambda-LLM-Calculator/blame/main/data/gpu_specs.csv"
NO_FP8 = "the page has no faster rate for fp8 than for bf16: "
NO_NVLINK = "has no NVLink: https://craftrigs.pages.dev/glossary/nvlink"
AMPERE_FP8 = "Ampere has no fp8: https://nvidia.github.io/TransformerEngine/support_matrix.html"

CHIPS = {chip.name: chip for chip in (
    Chip("v5e", "tpu", "torus", devices=Fact(1, counted("v5e:2x2", 4, 4)),
         hbm=Fact(16 * GIB, f"{V5E} (16 GB)"),
         usable_hbm=Fact(15.75 * GIB, compiled("v5e:2x2", "15.75G")),
         bandwidth=Fact(819e9, f"{V5E} (819 GBps; other snapshots of it say 800 GiBps)"),
         bf16_flops=Fact(197e12, V5E), fp8_flops=None, int8_flops=Fact(393e12, f"{V5E}?authuser=6"),
         ici=Fact(400e9, f"{V5E} (bidirectional, per chip; {BOOK_TPU} counts 4.5e10 a link and way)"),
         links=Fact(4, f"{V5E}?authuser=6 (ICI ports per chip)"),
         host_bus=Fact(16e9, f"{BOOK_TPU} (typical PCIe bandwidth per TPU)"),
         lacks={"fp8_flops": f"{NO_FP8}{V5E}"}),
    Chip("v5p", "tpu", "torus", devices=Fact(1, counted("v5p:2x2x1", 4, 4) + ": two cores as one"),
         hbm=Fact(96 * GIB, f"{V5P} (its table says 95 GiB, its note that 96 are there and 95 left by the runtime)"),
         usable_hbm=Fact(95.74 * GIB, compiled("v5p:2x2x1", "95.74G")),
         bandwidth=Fact(2765e9, V5P),
         bf16_flops=Fact(459e12, V5P), fp8_flops=None, int8_flops=Fact(918e12, BOOK_TPU),
         ici=Fact(1200e9, f"{V5P} (bidirectional, per chip; {BOOK_TPU} counts 9e10 a link and way)"),
         links=Fact(6, f"two neighbours on each axis of the 3D torus of {V5P}"),
         host_bus=Fact(16e9, f"{BOOK_TPU} (typical PCIe bandwidth per TPU)"),
         lacks={"fp8_flops": f"{NO_FP8}{V5P} (459 TFLOPs for both)"}),
    Chip("v6e", "tpu", "torus", devices=Fact(1, counted("v6e:2x2", 4, 4)),
         hbm=Fact(32 * GIB, TPU7X),
         usable_hbm=Fact(31.25 * GIB, compiled("v6e:2x2", "31.25G")),
         bandwidth=Fact(1638e9, f"{TPU7X} (snapshots of {V6E} say 1600 and 1640)"),
         bf16_flops=Fact(918e12, V6E), fp8_flops=None, int8_flops=Fact(1836e12, V6E),
         ici=Fact(800e9, f"{TPU7X} (bidirectional, per chip; {BOOK_TPU} counts 9e10 a link and way)"),
         links=Fact(4, f"{V6E} (ICI ports per chip)"),
         host_bus=Fact(32e9, f"{BOOK_TPU} (PCIe bandwidth per TPU v6e)"),
         lacks={"fp8_flops": f"{NO_FP8}{TPU7X} (918 TFLOPs for both)"}),
    Chip("tpu7x", "tpu", "torus", devices=Fact(2, counted("tpu7x:2x2x1", 8, 4)),
         hbm=Fact(192 * GIB, TPU7X),
         usable_hbm=Fact(94.75 * GIB, compiled("tpu7x:2x2x1", "94.75G")),
         bandwidth=Fact(7380e9, TPU7X),
         bf16_flops=Fact(2307e12, TPU7X), fp8_flops=Fact(4614e12, TPU7X), int8_flops=None,
         ici=Fact(1200e9, f"{TPU7X} (bidirectional, per chip, without the link between its two devices)"),
         links=Fact(6, f"two neighbours on each axis of a 3D torus, as on v5p, with which {TPU7X} compares it"),
         host_bus=None,
         lacks={"int8_flops": f"{TPU7X} lists none, and https://github.com/yangwhale/gpu-tpu-pedia/blob/HEAD/tpu/"
                              "v7_perf/README.md measured less for int8 (712 TOPS a device) than for bf16 (758)",
                "host_bus": "no public page found"}),
    Chip("h100", "gpu", "switch", devices=ONE,             # SXM5
         hbm=Fact(80 * GIB, H100), usable_hbm=Fact(81559 * MIB, smi(81559, MODAL)),
         bandwidth=Fact(3.35e12, BOOK_GPU),
         bf16_flops=Fact(989.4e12, H100), fp8_flops=Fact(1978.9e12, H100), int8_flops=Fact(1978.9e12, H100),
         ici=Fact(900e9, H100), links=Fact(18, BOOK_GPU), host_bus=pcie(5, H100)),
    Chip("h200", "gpu", "switch", devices=ONE,             # SXM5
         hbm=Fact(141 * GIB, BOOK_GPU),
         usable_hbm=Fact(143771 * MIB, smi(143771, "public logs; no page found to cite")),
         bandwidth=Fact(4.8e12, H200),
         bf16_flops=Fact(989.5e12, H200), fp8_flops=Fact(1979e12, H200), int8_flops=Fact(1979e12, H200),
         ici=Fact(900e9, f"18 links of 25 GB/s each way: {BOOK_GPU}"), links=Fact(18, BOOK_GPU),
         host_bus=pcie(5, "https://www.saulelectric.com/nvidia-h200.html")),
    Chip("b200", "gpu", "switch", devices=ONE,             # HGX, 1000 W
         hbm=Fact(180 * GIB, B200),
         usable_hbm=Fact(178.35 * GIB, "the driver's total in https://github.com/pytorch/ao/pull/4002"),
         bandwidth=Fact(7.7e12, f"{B200}; 7.672e12 by bus and clock in https://github.com/pytorch/ao/pull/4002"),
         bf16_flops=Fact(2250e12, f"half of the sparse 4.5 PFLOPS of {B200}"),
         fp8_flops=Fact(4500e12, f"half of the sparse 9 PFLOPS of {B200}"),
         int8_flops=Fact(4500e12, f"half of the sparse 9 POPS of {B200}"),
         ici=Fact(1800e9, B200), links=Fact(18, BOOK_GPU), host_bus=pcie(5, B200)),
    Chip("a100", "gpu", "switch", devices=ONE,             # SXM4, 80 GB
         hbm=Fact(80 * GIB, A100), usable_hbm=Fact(81920 * MIB, smi(81920, MODAL)),
         bandwidth=Fact(2039e9, A100),
         bf16_flops=Fact(312e12, A100), fp8_flops=None, int8_flops=Fact(624e12, A100),
         ici=Fact(600e9, A100), links=Fact(12, BOOK_GPU), host_bus=pcie(4, A100),
         lacks={"fp8_flops": AMPERE_FP8}),
    Chip("rtx3090", "gpu", "bridge", devices=ONE,
         hbm=Fact(24 * GIB, RTX3090),
         usable_hbm=Fact(24576 * MIB, smi(24576, "https://github.com/noonghunna/club-3090/issues/390")),
         bandwidth=Fact(936e9, RTX3090),
         bf16_flops=Fact(71.2e12, "https://ctc.archdevil.net/blog/23/674d47808ec559d480fae6d8 (weak; no better found)"),
         fp8_flops=None, int8_flops=Fact(285e12, RTX3090),
         ici=Fact(112.5e9, f"NVIDIA's GA102 white paper, quoted in {GA102}"),
         links=Fact(4, f"four links of 14.0625 GB/s each way: {GA102}"), host_bus=pcie(4, BUS),
         lacks={"fp8_flops": AMPERE_FP8}),
    Chip("rtx4090", "gpu", "host", devices=ONE,
         hbm=Fact(24 * GIB, RTX4090),
         usable_hbm=Fact(24564 * MIB, smi(24564, "https://github.com/RLinf/RLinf/issues/255")),
         bandwidth=Fact(1008e9, RTX4090),
         bf16_flops=Fact(165.2e12, RTX4090),
         fp8_flops=Fact(330.3e12, f"{RTX4090} (660.6 with fp16 accumulation: https://gigagpu.com/?p=34220)"),
         int8_flops=Fact(660.6e12, RTX4090),
         ici=None, links=None,
         host_bus=pcie(4, "https://www.pugetsystems.com/parts/Video-Card/NVIDIA-GeForce-RTX-4090-24GB-14644/"),
         lacks={"ici": NO_NVLINK, "links": NO_NVLINK}),
    Chip("rtx5090", "gpu", "host", devices=ONE,
         hbm=Fact(32 * GIB, RTX5090_MEMORY),
         usable_hbm=Fact(32607 * MIB, smi(32607, "https://github.com/noonghunna/club-3090/issues/1229")),
         bandwidth=Fact(1792e9, RTX5090_MEMORY),
         bf16_flops=Fact(209.5e12, f"{RTX5090}, column Spec"),
         fp8_flops=Fact(419e12, f"{RTX5090}, column Spec (838 with fp16 accumulation)"),
         int8_flops=Fact(838e12, f"{RTX5090}, column Spec"),
         ici=None, links=None, host_bus=pcie(5, RTX5090_MEMORY),
         lacks={"ici": NO_NVLINK, "links": NO_NVLINK}),
)}

# Each of these was accepted by get_topology_desc (libtpu 0.0.42.1); it refuses what is not made of hosts of 2x2 chips.
TPU_SHAPES = {
    "v5e": "2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "v5p": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8",
    "v6e": "2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "tpu7x": "2x2x1 2x2x2 2x2x4 2x4x2 4x4x1 2x4x4 4x4x4 4x4x8",
}
GPUS_OF_GB = {24: "rtx4090", 32: "rtx5090", 80: "h100", 141: "h200", 180: "b200"}     # "gpu:8x24GB": newest of a size
MAX_GPUS = 8                           # of a host
NETWORKS = {                           # bytes/s between a GPU and those of other hosts, one way
    "h100": Fact(50e9, "400 Gbps for each GPU, of 511 hosts of 8: https://magicalbits.net/?p=230748 (of Imbue)")}


def tpu_slices() -> tuple[Slice, ...]:
    return tuple(Slice(f"{chip}:{shape}", CHIPS[chip], tuple(map(int, shape.split("x"))))
                 for chip, shapes in TPU_SHAPES.items() for shape in shapes.split())


def gpu_slice(chip: str, count: int) -> Slice:
    return Slice(f"{chip}:{count}", CHIPS[chip], (count,))


def all_slices() -> tuple[Slice, ...]:
    """Every TPU slice, and each GPU alone and in twos, fours and eights."""
    gpus = [name for name, chip in CHIPS.items() if chip.platform == "gpu"]
    return tpu_slices() + tuple(gpu_slice(name, count) for name in gpus for count in (1, 2, 4, 8))


def slice_of(name: str) -> Slice:
    """The slice of that name, as "v6e:8x8", "h100:8" or "gpu:8x32GB", in any case; ValueError lists what there is."""
    key = name.strip().lower()
    for known in tpu_slices():
        if known.name == key:
            return known
    if match := re.fullmatch(r"gpu:(\d{1,6})x(\d{1,6})gb", key, re.ASCII):
        gigabytes = int(match[2])
        if gigabytes not in GPUS_OF_GB:
            sizes = ", ".join(f"{size}GB ({chip})" for size, chip in GPUS_OF_GB.items())
            closest = min(GPUS_OF_GB, key=lambda size: abs(size - gigabytes))      # as numbers, not as letters
            refuse(name, f"no GPU with {gigabytes}GB is known; known are {sizes}", like=f"gpu:{match[1]}x{closest}gb")
        return counted_gpus(name, GPUS_OF_GB[gigabytes], int(match[1]))
    match = re.fullmatch(r"(\w+):(\d{1,6})", key, re.ASCII)
    if match and match[1] in CHIPS and CHIPS[match[1]].platform == "gpu":
        return counted_gpus(name, match[1], int(match[2]))
    refuse(name, "unknown")


def counted_gpus(name: str, chip: str, count: int) -> Slice:
    if count > MAX_GPUS and chip in NETWORKS and count % MAX_GPUS == 0:
        return gpu_slice(chip, count)
    if not 1 <= count <= MAX_GPUS:
        refuse(name, f"a host has 1 to {MAX_GPUS} GPUs, not {count}; whole hosts may be more, of {', '.join(NETWORKS)}")
    return gpu_slice(chip, count)


def refuse(name: str, why: str, like: str = "") -> NoReturn:
    """Says what is wrong, the nearest name, and every name there is, a line for each chip."""
    names = [known.name for known in all_slices()]
    by_memory = [f"gpu:{MAX_GPUS}x{size}gb" for size in GPUS_OF_GB]
    nearest = difflib.get_close_matches(like or name.strip().lower(), names + by_memory, n=1, cutoff=0.0)[0]
    lines = [" ".join(known for known in names if known.startswith(f"{chip}:")) for chip in CHIPS]
    raise ValueError(f"slice {name!r}: {why}; nearest is {nearest!r}. Slices:\n  " + "\n  ".join(lines)
                     + f"\n  gpu:COUNTxMEMORYGB, as gpu:{MAX_GPUS}x24GB")
