"""LLMs on the fake device, for tests."""
from __future__ import annotations

from typing import Any

from edge_runtime.chat_template import ChatTemplate
from edge_runtime.errors import DeviceLostError
from edge_runtime.llm import LLM
from edge_runtime.loading import LoadedModel
from tests.fake_device import FakeDevice, byte_tokenizer

TEMPLATE = ChatTemplate("{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
                        "{% if add_generation_prompt %}[assistant] {% endif %}")


def fake_llm(*, context: int = 4096, pages: int = 2000, max_batch: int = 32, bos: bool = True,
             chat_template: ChatTemplate | None = TEMPLATE, fingerprint: str = "fake", **device) -> LLM:
    """An LLM on `FakeDevice(**device)`."""
    fake = FakeDevice(**device)
    return LLM.from_loaded(LoadedModel(
        fake, byte_tokenizer(bos), context, pages * fake.kv_layout.page_bytes, max_batch,  # type: ignore[arg-type]
        chat_template=chat_template, fingerprint=lambda: fingerprint))


def fake_of(llm: LLM) -> FakeDevice:
    return llm._loaded.device  # type: ignore[return-value]


def settled(llm: LLM) -> None:
    """Assert that the engine holds nothing any more but caches."""
    engine = llm.engine

    def check() -> None:
        assert engine.batcher.idle and not engine._requests
        engine.cache.check_integrity([])

    engine.call(check)
    assert not engine._open


def lose_device(llm: LLM, segments: int) -> None:
    """The accelerator that an offloading LLM has now is lost once it has computed so many segments."""
    accelerator: Any = llm._loaded.device.accelerator  # type: ignore[attr-defined]
    segment, calls = accelerator.segment, 0

    def fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > segments:
            raise DeviceLostError("the device was lost")
        return segment(*arguments)

    accelerator.segment = fails
