"""Machines and models by name. Every figure has its source; what is no datasheet's figure is called an assumption."""
from __future__ import annotations

from edge_runtime.errors import InvalidRequestError
from edge_runtime.offload.hardware import (
    GPU_CALL,
    GPU_REACH,
    HOST_CALL,
    HOST_REACH,
    NPU_CALL,
    Machine,
    ModelShape,
    Processor,
)

GB, TFLOPS = 1e9, 1e12
PCIE3_X16, PCIE4_X8, PCIE4_X16, PCIE5_X16 = 15.75 * GB, 15.75 * GB, 31.5 * GB, 63.0 * GB  # PCI-SIG, one direction
LINK_REACH = 0.8  # of a link's peak, for copies of pinned memory (assumption)
LATENCY = 10e-6  # of a copy over PCIe, submission included (assumption)


def _gpu(name: str, memory: float, bandwidth: float, tflops: float, call: float = GPU_CALL) -> Processor:
    return Processor(name, memory * GB, bandwidth * GB, tflops * TFLOPS, call, GPU_REACH)


def _host(name: str, memory: float, bandwidth: float, gflops: float) -> Processor:
    return Processor(name, memory * GB, bandwidth * GB, gflops * 1e9, HOST_CALL, HOST_REACH)


def _t4(vcpus: int) -> Machine:
    # GPU: NVIDIA T4 datasheet: 16 GB, 320 GB/s, 65 TFLOPS fp16, PCIe 3.0 x16.
    # Host: Amazon g4dn, Xeon Platinum 8259CL (24 cores, six channels of DDR4-2933: 140.8 GB/s a socket), 2 vCPUs are a
    # core, 4 GB per vCPU (g4dn.xlarge 16, 2xlarge 32, 4xlarge 64). Assumption: neighbours are busy, so a core has its
    # share of the socket. 2.5 GHz x 32 fp32 products (two 512-bit units): 160 GFLOPS a core.
    cores = vcpus // 2
    return Machine(f"t4-{vcpus}", _gpu("NVIDIA T4", 16, 320, 65),
                   _host(f"Xeon 8259CL, {cores} cores", 4 * vcpus, 140.8 * cores / 24, 160 * cores),
                   PCIE3_X16 * LINK_REACH, LATENCY)


def _a10(vcpus: int) -> Machine:
    # GPU: NVIDIA A10G datasheet (Amazon g5): 24 GB, 600 GB/s, 70 TFLOPS fp16 on tensor cores, PCIe 4.0 x16. The A10
    # that is sold by itself has 125 TFLOPS.
    # Host: EPYC 7R32 (48 cores, eight channels of DDR4-3200: 204.8 GB/s), 2 vCPUs are a core, 4 GB per vCPU.
    # Assumption: a core has its share of the socket. 2.8 GHz x 32 fp32 products (two 256-bit units): 90 GFLOPS a core.
    cores = vcpus // 2
    return Machine(f"a10-{vcpus}", _gpu("NVIDIA A10G", 24, 600, 70),
                   _host(f"EPYC 7R32, {cores} cores", 4 * vcpus, 204.8 * cores / 48, 90 * cores),
                   PCIE4_X16 * LINK_REACH, LATENCY)


def _rtx4060() -> Machine:
    # NVIDIA GeForce RTX 4060 Laptop: 8 GB of GDDR6 at 16 Gbit/s on 128 bits: 256 GB/s; 3072 cores at 2.37 GHz; Ada's
    # tensor cores do 4 fp16 products a clock for each fp32 product with fp16 sums, half of it with fp32 sums: 29
    # TFLOPS; PCIe 4.0 x8. Host: Core i7-13700H (6 P cores, 8 E cores), DDR5-5200 in two channels: 83.2 GB/s (Intel
    # ARK); 6 P cores x 3.5 GHz x 32: 670 GFLOPS. 16 GB of memory (assumption).
    return Machine("rtx4060", _gpu("GeForce RTX 4060 Laptop", 8, 256, 29),
                   _host("Core i7-13700H", 16, 83.2, 670), PCIE4_X8 * LINK_REACH, LATENCY)


def _core_ultra(part: str) -> Machine:
    # Intel Core Ultra 7 258V (Intel ARK): 32 GB of LPDDR5X-8533 on 128 bits: 136.5 GB/s, shared by all; GPU 64 TOPS and
    # NPU 47 TOPS of int8, half of that in fp16; 4 P cores and 4 E cores. Assumptions: the GPU alone can draw all of the
    # bandwidth, the NPU and the CPU two thirds each; P cores at 3.7 GHz x 32: 470 GFLOPS.
    gpu, memory, peak = part == "gpu", 32, 136.5
    device = (_gpu("Intel Arc 140V", memory, peak, 32) if gpu else
              _gpu("Intel AI Boost NPU 4", memory, peak * 2 / 3, 23.5, NPU_CALL))
    return Machine(f"core-ultra-{part}", device, _host("Core Ultra 7 258V, 4 P cores", memory, peak * 2 / 3, 470),
                   peak * GB, 0.0, shared=True)


def _apple() -> Machine:
    # Apple M1 Max (Apple's press release of 18 October 2021): 400 GB/s, 10.4 TFLOPS of fp32, which its GPU does not
    # exceed in fp16 products; 8 performance cores, up to 64 GB. Assumption: the CPU draws half of the bandwidth.
    # 3.2 GHz x 4 units of 4 fp32 products, 8 cores: 820 GFLOPS.
    return Machine("apple-m1-max", _gpu("Apple M1 Max GPU", 64, 400, 10.4, GPU_CALL),
                   _host("Apple M1 Max, 8 cores", 64, 200, 820), 400 * GB, 0.0, shared=True)


def _h200() -> Machine:
    # NVIDIA H200 SXM datasheet: 141 GB, 4.8 TB/s, 1,979 TFLOPS fp16 with sparsity, half of it dense; PCIe 5.0 x16.
    # Host: 16 cores of a Xeon Platinum 8480+ (56 cores, eight channels of DDR5-4800: 307.2 GB/s, Intel ARK), their
    # share of the socket; 2.0 GHz x 64: 128 GFLOPS a core. 128 GB of memory (assumption).
    return Machine("h200", _gpu("NVIDIA H200", 141, 4800, 989),
                   _host("Xeon 8480+, 16 cores", 128, 307.2 * 16 / 56, 2048), PCIE5_X16 * LINK_REACH, LATENCY)


_BUILT = [*(_t4(n) for n in (4, 8, 16)), *(_a10(n) for n in (8, 16, 32)), _rtx4060(), _core_ultra("gpu"),
          _core_ultra("npu"), _apple(), _h200()]
MACHINES: dict[str, Machine] = {machine.name: machine for machine in _BUILT}
# NEO's strongest host, g5.16xlarge, is one of the paper's settings.
MACHINES["a10-64"] = _a10(64)

# Hugging Face configs of meta-llama/Llama-2-7b-hf, Llama-3.1-8B and Llama-3.2-1B. Q4_0: 4 bits and a 16-bit scale for
# every 32 weights.
Q4_0 = 4.5
MODELS: dict[str, ModelShape] = {shape.name: shape for shape in (
    ModelShape("llama2-7b", 32, 4096, 32, 32, 128, 11008, 32000, 16),
    ModelShape("llama3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, 16),
    ModelShape("llama3.1-8b-q4", 32, 4096, 32, 8, 128, 14336, 128256, Q4_0),
    ModelShape("llama1b-q4", 16, 2048, 32, 8, 64, 8192, 128256, Q4_0, tied_head=True),
)}


def machine(name: str) -> Machine:
    if name not in MACHINES:
        raise InvalidRequestError("preset", name, f"one of {', '.join(MACHINES)}")
    return MACHINES[name]


def model(name: str) -> ModelShape:
    if name not in MODELS:
        raise InvalidRequestError("model", name, f"one of {', '.join(MODELS)}")
    return MODELS[name]
