"""What a machine would take for the parts of a layer, from its datasheet: rooflines of bandwidth and arithmetic, a
link, and a price per call. `describe` makes the same `Curves` of it that a profile measures."""
from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.errors import InvalidRequestError
from edge_runtime.offload.curves import Curves

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TOKENS = (64, 1024, 8192, 131072)
PROMPT_ROWS = (16, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST = 1e18  # of any figure
SHARE = 0.9  # of the device's memory for weights and KV, vLLM's gpu_memory_utilization
WORKSPACE = 500_000_000  # bytes for activations, kernels and the driver


def _above_zero(of: object, *names: str, most: float = LARGEST) -> None:
    for name in names:
        if not 0 < getattr(of, name) <= most:
            raise InvalidRequestError(name, getattr(of, name), f"above 0, {most:.0e} at most" if most > 1 else
                                      "above 0, 1 at most")


def _not_negative(of: object, name: str) -> None:
    if not 0 <= getattr(of, name) < LARGEST:
        raise InvalidRequestError(name, getattr(of, name), "seconds, 0 or more")


@dataclass(frozen=True)
class Processor:
    """memory: bytes that it may use. bandwidth: bytes per second of its memory; flops: of fp16 products, per second;
    call: seconds of submitting what a layer needs before its attention. Datasheet values; `reach` says what of them
    programs get: of bandwidth in products and in attention, and of arithmetic. InvalidRequestError: a figure that is
    not above 0, here and below."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    call: float
    reach: Reach

    def __post_init__(self) -> None:
        _above_zero(self, "memory", "bandwidth", "flops")
        _not_negative(self, "call")


@dataclass(frozen=True)
class Reach:
    """Shares of a processor's peak, all above 0 and up to 1."""

    linear: float
    attention: float
    flops: float

    def __post_init__(self) -> None:
        _above_zero(self, "linear", "attention", "flops", most=1.0)


# Assumptions, the same for all machines of a kind; docs/simulator.md shows what results owe to them.
GPU_REACH = Reach(linear=0.8, attention=0.7, flops=0.5)
HOST_REACH = Reach(linear=0.8, attention=0.65, flops=0.5)
GPU_CALL = 40e-6  # some ten kernels a layer at 4 us each
NPU_CALL = 200e-6  # a request to the driver of an NPU
HOST_CALL = 5e-6  # waking a pinned thread
ROW_CALL = 2e-6  # of one row's attention on the host


@dataclass(frozen=True)
class Machine:
    """A device and its host. link: bytes per second between them; latency: seconds of one copy; shared: they share one
    memory, so that nothing is copied and both draw on the device's bandwidth."""

    name: str
    device: Processor
    host: Processor
    link: float
    latency: float
    shared: bool = False

    def __post_init__(self) -> None:
        _above_zero(self, "link")
        _not_negative(self, "latency")


@dataclass(frozen=True)
class ModelShape:
    """weight_bits: of a weight, scales included. tied_head: the embedding is the head, too. Sizes as in
    `models.config.ModelConfig`."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab_size: int
    weight_bits: float
    tied_head: bool = False

    def __post_init__(self) -> None:
        _above_zero(self, "layers", "width", "heads", "kv_heads", "head_size", "ffn", "vocab_size", "weight_bits")

    @property
    def layer_weights(self) -> int:
        attention = 2 * self.width * self.heads * self.head_size + 2 * self.width * self.kv_heads * self.head_size
        return attention + 3 * self.width * self.ffn

    @property
    def head_weights(self) -> int:
        return self.width * self.vocab_size

    @property
    def weight_bytes(self) -> float:
        """Of the whole model."""
        ends = 1 if self.tied_head else 2
        return (self.layers * self.layer_weights + ends * self.head_weights) * self.weight_bits / 8

    def kv_bytes(self, bits: float) -> int:
        """Of one token, all layers."""
        return int(self.layers * 2 * self.kv_heads * self.head_size * bits / 8)


KV_BITS = {"fp16": 16.0, "int8": 8.5}  # int8 with a float32 scale for every 64 values


def describe(machine: Machine, model: ModelShape, kv: str = "fp16") -> Curves:
    """kv: type of the host's pages; the device keeps fp16. InvalidRequestError."""
    if kv not in KV_BITS:
        raise InvalidRequestError("kv", kv, " or ".join(KV_BITS))
    device, host = machine.device, machine.host
    on_device, on_host = model.kv_bytes(16) / model.layers, model.kv_bytes(KV_BITS[kv]) / model.layers
    products = 4 * model.heads * model.head_size  # of one row and one token

    def linear(weights: float, rows: int, calls: float) -> float:
        reads = weights * model.weight_bits / 8 / (device.bandwidth * device.reach.linear)
        return calls * device.call + max(reads, 2 * weights * rows / (device.flops * device.reach.flops))

    def attention(by: Processor, pairs: float, nbytes: float) -> float:
        return max(nbytes / (by.bandwidth * by.reach.attention), products * pairs / (by.flops * by.reach.flops))

    def prompt(by: Processor, rows: int, before: int, nbytes: float) -> float:
        return attention(by, rows * (before + rows / 2), nbytes * (before + rows))

    def copied(nbytes: int) -> float:
        return 0.0 if machine.shared else machine.latency + nbytes / machine.link

    sizes = tuple(1 << n for n in range(10, 33, 2))
    copies = tuple((size, copied(size)) for size in sizes)
    drawn = device.bandwidth * device.reach.attention + host.bandwidth * host.reach.attention
    slower = max(drawn / device.bandwidth, 1.0) if machine.shared else 1.0
    # Between places that are powers of two a roofline's corner would be cut off: it is a place, too.
    corner = device.flops * device.reach.flops * model.weight_bits / 16 / (device.bandwidth * device.reach.linear)
    rows = tuple(sorted({*ROWS, max(round(corner), 1)}))
    return Curves(
        layers=model.layers,
        linear=tuple((n, linear(model.layer_weights, n, 1)) for n in rows),
        head=tuple((n, linear(model.head_weights, n, 1)) for n in rows),
        device_attention=tuple((n, t, device.call / 4 + attention(device, n * t, n * t * on_device))
                               for n in ROWS for t in TOKENS),
        host_attention=tuple((n, t, n * ROW_CALL + attention(host, n * t, n * t * on_host))
                             for n in ROWS for t in TOKENS),
        device_prompt=tuple((n, t, device.call / 4 + prompt(device, n, t, on_device))
                            for n in PROMPT_ROWS for t in (0, *TOKENS)),
        host_prompt=tuple((n, t, n * ROW_CALL + prompt(host, n, t, on_host))
                          for n in PROMPT_ROWS for t in (0, *TOKENS)),
        upload=copies, download=copies, handover=host.call + (0.0 if machine.shared else machine.latency),
        kv_bytes_device=model.kv_bytes(16), kv_bytes_host=model.kv_bytes(KV_BITS[kv]),
        q_bytes=2 * (model.heads + 2 * model.kv_heads) * model.head_size, o_bytes=2 * model.heads * model.head_size,
        contention_device=slower, contention_host=slower)


def device_pool(machine: Machine, model: ModelShape) -> int:
    """KV tokens that the device holds beside the weights; 0 where these leave no room. A shared memory is the device's
    up to half, the rest is the host's."""
    memory = machine.device.memory / (2 if machine.shared else 1)
    left = SHARE * memory - model.weight_bytes - WORKSPACE
    return max(int(left / model.kv_bytes(16)), 0)


def host_pool(machine: Machine, model: ModelShape, kv: str = "fp16") -> int:
    """KV tokens that three quarters of the host's memory hold."""
    memory = machine.device.memory / 2 if machine.shared else machine.host.memory
    return int(0.75 * memory / model.kv_bytes(KV_BITS[kv]))
