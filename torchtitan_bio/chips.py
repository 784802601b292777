"""What the makers of accelerators and the authors of kernels publish about them: the rates by which plan.py predicts seconds.

None of these was measured here; docs/benchmarks.md has what was.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as torch counts them, and its share of the machine around it. Rates are in units a second."""

    memory_gib: float
    """As torch reports it, which is less than on the box."""
    peak: float
    """Dense bf16 FLOP/s, as metrics.PEAK_FLOPS."""
    matmul: float
    """The share of the peak that matrix products of a transformer reach, all that is not attention included."""
    attention: dict[str, tuple[float, float]]
    """Kernel -> FLOP/s of causal forward and backward at head dimension 128, counting half of the scores; best first."""
    host_link: float
    """Bytes to or from the host."""
    host_memory: float
    """Bytes of the host's memory bandwidth, for an optimizer that runs there."""
    host_gib: float
    """Host memory of a usual node, divided by its GPUs."""
    gpus_per_node: int
    peer_link: float
    """Bytes to the other GPUs of the node."""
    network: float
    """Bytes to other nodes."""


# Hopper's kernels as in FlashAttention-3's paper, within its reading error; A100's as in FlashAttention-2's. AMD's and
# Blackwell's are the order of magnitude that vendors state.
H100 = Chip(
    memory_gib=79.1,
    peak=989e12,
    matmul=0.657,
    attention={"fa3": (643e12, 549e12), "cudnn": (593e12, 519e12), "flash": (369e12, 323e12)},
    host_link=50e9,
    host_memory=150e9,
    host_gib=256,
    gpus_per_node=8,
    peer_link=450e9,
    network=50e9,
)
GH200 = replace(H100, memory_gib=94.5, host_link=350e9, host_memory=400e9, host_gib=120, gpus_per_node=4, network=25e9)
A100 = Chip(
    memory_gib=79.2,
    peak=312e12,
    matmul=0.70,
    attention={"flash": (195e12, 165e12)},
    host_link=25e9,
    host_memory=100e9,
    host_gib=128,
    gpus_per_node=8,
    peer_link=300e9,
    network=25e9,
)
MI250X = Chip(
    memory_gib=64.0,
    peak=191.5e12,
    matmul=0.55,
    attention={"flash": (75e12, 55e12)},
    host_link=30e9,
    host_memory=25e9,
    host_gib=64,
    gpus_per_node=8,
    peer_link=50e9,
    network=12.5e9,
)
MI300X = replace(
    H100,
    memory_gib=191.5,
    peak=1307e12,
    matmul=0.45,
    attention={"flash": (450e12, 330e12)},
    peer_link=400e9,
)
B200 = replace(
    H100,
    memory_gib=178.0,
    peak=2.25e15,
    matmul=0.65,
    attention={"cudnn": (1.4e15, 1.0e15), "flash": (450e12, 380e12)},
    peer_link=900e9,
)

CHIPS = {
    "h100": H100,
    "h200": replace(H100, memory_gib=139.8),
    "gh200": GH200,
    "a100": A100,
    "mi250x": MI250X,
    "mi300x": MI300X,
    "b200": B200,
}
"""By the names of plan.py's --gpu."""
