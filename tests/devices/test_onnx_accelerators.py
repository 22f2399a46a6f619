"""The conformance suite on real accelerator code paths without an accelerator: WebGPU on software Vulkan, OpenVINO on
its CPU device."""
from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime import LLM, SamplingParams, hybrid_model
from edge_runtime.devices.onnx import PROVIDERS, OnnxAccelerator, OnnxDevice
from edge_runtime.devices.onnx.providers import hardware, register, runtime
from edge_runtime.devices.onnx.sessions import Session, SessionSettings
from edge_runtime.errors import PlacementError
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.graph.decoder import DecoderGraphs
from edge_runtime.offload import profile_store
from edge_runtime.offload.choices import Mode
from tests.devices.conformance import AcceleratorConformance, DeviceConformance
from tests.devices.software_vulkan import use_software_vulkan
from tests.devices.test_onnx_operators import OperatorTests
from tests.edge_runtime.test_onnx_model import check_greedy
from tests.gguf_factory import write_model
from tests.offload.generations import Opened
from tests.offload.scripted import DEVICE, HOST

pytestmark = pytest.mark.accelerators
KV = 8 << 20


@pytest.fixture(scope="class")
def webgpu():
    use_software_vulkan()


@pytest.fixture(scope="class")
def openvino():
    """OpenVINO's plugin offers its CPU device on Intel's processors alone; nothing of it can run on others."""
    pytest.importorskip("onnxruntime_ep_openvino")
    register(PROVIDERS["openvino"])
    if not hardware(PROVIDERS["openvino"]):
        vendors = {device.device.vendor for device in runtime().get_ep_devices()}
        assert not any("intel" in vendor.lower() for vendor in vendors), "no device on an Intel machine"
        pytest.skip(f"OpenVINO's plugin finds no device on a processor of {', '.join(vendors)}")


@pytest.fixture
def device_of(request):
    """The device that a test is about, set up."""
    request.getfixturevalue(request.node.callspec.params.get("device") or request.node.callspec.params["provider"])


@pytest.mark.usefixtures("webgpu")
class TestWebGpuWholeModel(DeviceConformance):
    provider, form = "webgpu", "whole"
    models, tokens = ("llama Q4_0, llama3 rope", "qwen3 Q4_K, QK norm"), 4  # software Vulkan compiles for seconds

    def open(self, file, config, max_rows=512):
        return OnnxDevice(OnnxAccelerator(file, config, self.provider, kv_budget_bytes=KV, forms=(self.form,),
                                          max_rows=max_rows), self.form)


@pytest.mark.usefixtures("webgpu")
class TestWebGpuAccelerator(AcceleratorConformance):
    def open(self, file, config, **options):
        return OnnxAccelerator(file, config, "webgpu", **options)


@pytest.mark.usefixtures("webgpu")
class TestWebGpuOperators(OperatorTests):
    provider = "webgpu"


@pytest.mark.usefixtures("openvino")
class TestOpenVinoSegments(TestWebGpuWholeModel):
    provider, form = "openvino", "segments"


@pytest.mark.usefixtures("openvino")
class TestOpenVinoAccelerator(AcceleratorConformance):
    def open(self, file, config, **options):
        return OnnxAccelerator(file, config, "openvino", hardware="CPU", **options)


@pytest.mark.usefixtures("openvino")
class TestOpenVinoFixedRows(AcceleratorConformance):
    """The shapes that an NPU is compiled for."""

    def open(self, file, config, **options):
        return OnnxAccelerator(file, config, "openvino", fixed_rows=True, **options)


@pytest.mark.usefixtures("openvino")
class TestOpenVinoOperators(OperatorTests):
    provider, attention = "openvino", False


@pytest.mark.usefixtures("openvino")
def test_a_node_that_the_provider_does_not_take_is_an_error(tmp_path):
    with GGUFFile(write_model(tmp_path / "m.gguf")) as file:
        graph = DecoderGraphs(file, config_from_gguf(file)).attention()
        with pytest.raises(PlacementError, match="OpenVINOExecutionProvider does not take GroupQuery") as caught:
            Session(graph, SessionSettings(PROVIDERS["openvino"]), {})
        assert caught.value.nodes and caught.value.elsewhere == "CPUExecutionProvider"


@pytest.mark.usefixtures("device_of")
@pytest.mark.parametrize("device", ["webgpu", "openvino"])
def test_generation_through_the_whole_runtime(device, tmp_path):
    path = write_model(tmp_path / "m.gguf", architecture="qwen2", types="Q4_K", width=256)
    prompts = [list(map(int, np.random.default_rng(i).integers(0, 260, 10 + 40 * i))) for i in range(4)]
    with LLM(path, device=device, context=256, max_batch=4) as llm:
        assert llm.plan is not None and llm.plan.device == f"onnx:{device}"
        for prompt, reply in zip(prompts, llm.generate(prompts, SamplingParams(max_tokens=10, temperature=0))):
            check_greedy(path, prompt, list(reply.token_ids))


@pytest.mark.usefixtures("device_of")
@pytest.mark.parametrize("device", ["webgpu", "openvino"])
def test_offload_through_the_whole_runtime(device, tmp_path, monkeypatch):
    """Profile, scheduler and all, with a pool for two of four sequences; half precision on the host rounds at 1e-3."""
    monkeypatch.setattr(hybrid_model, "PROFILE_SECONDS", 2.0)
    monkeypatch.setattr(profile_store, "folder", lambda: tmp_path)
    path = write_model(tmp_path / "m.gguf", architecture="qwen2", types="Q4_K", width=256)
    prompts = [list(map(int, np.random.default_rng(i).integers(0, 260, 10 + 40 * i))) for i in range(4)]
    options = {"device": device, "context": 256, "max_batch": 4, "kv": "fp16", "offload": "on"}
    there = LLM.plan_for(path, **options).on_device
    room = there.weights_bytes + there.working_bytes + 2 * there.kv_least_bytes
    with LLM(path, **options, device_memory=room) as llm:
        assert llm.plan.on_device.sequences == 2 and llm.plan.device == f"onnx:{device}"
        for prompt, reply in zip(prompts, llm.generate(prompts, max_tokens=10, temperature=0)):
            check_greedy(path, prompt, list(reply.token_ids), gap=1e-2)
        assert any(lap.on_host for lap in llm.status().placement.laps)


@pytest.mark.usefixtures("device_of")
@pytest.mark.parametrize("provider, options", [("webgpu", {}), ("openvino", {"hardware": "CPU"})])
def test_kv_on_either_side_and_on_its_way_changes_no_token(provider, options, tmp_path):
    """Every mode; every third token the sequences change sides; and split between both."""
    opened = Opened(write_model(tmp_path / "m.gguf"), "fp16", provider, lengths=(70, 130), tokens=5, **options)
    for mode in (Mode.SYNCHRONOUS, Mode.PIPELINED, Mode.OVERLAP, Mode.STREAMING):
        ran = opened.check(mode, lambda key, tokens: (HOST, DEVICE)[(key + tokens // 3) % 2]).ran
        assert ran[HOST] and ran[DEVICE]
    assert opened.check(Mode.DEVICE_ONLY, lambda key, tokens: DEVICE).ran[HOST] == 0
    assert opened.check(Mode.SYNCHRONOUS, lambda key, tokens: 64 if tokens > 64 else HOST).ran["split"]
    opened.close()
