"""The async twins of LLM's calls: they wait on asyncio, and cancelling the task cancels the request.

asyncio itself is imported with the first call: half of the programs that open a model never need it.
"""
from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from edge_runtime.arguments import (
    POOLINGS,
    begins_text,
    failed_reply,
    is_list_of_prompts,
    one_each,
    priority_of,
    stack,
)
from edge_runtime.errors import InvalidRequestError
from edge_runtime.outcome import Chunk
from edge_runtime.sampling import SamplingParams
from edge_runtime.sequence import Priority

if TYPE_CHECKING:
    from edge_runtime.async_generation import AsyncGeneration

T = TypeVar("T")


class AsyncCalls:
    """What LLM offers on asyncio. Text is tokenized on a worker thread, the rest waits for the engine's."""

    async def agenerate(self: Any, prompts: Any, params: Any = None, *, stream: bool = False, priority: Any = None,
                        **overrides: Any) -> Any:
        """`LLM.generate`: a Reply, a list of them, or with `stream` an `AsyncGeneration`."""
        import asyncio

        from edge_runtime.async_generation import AsyncMailbox, all_outcomes

        many = is_list_of_prompts(prompts)
        urgency = priority_of(priority, Priority.BATCH if many else Priority.INTERACTIVE)
        if many and stream:
            raise InvalidRequestError("stream", True, "used with one prompt, not with a list")
        count = len(prompts) if many else 1
        each = one_each(params, count, overrides)
        all_ids = await asyncio.to_thread(_prepared, self, each, lambda: [
            self._prompt_ids(prompt, f"prompts[{i}]" if many else "prompt")
            for i, prompt in enumerate(prompts if many else [prompts])])
        if stream:
            return _start(self, all_ids[0], each[0], priority=urgency)
        mailbox = AsyncMailbox(self.engine)
        requests = [self._request(ids, one, mailbox.put, priority=urgency, index=i)
                    for i, (ids, one) in enumerate(zip(all_ids, each))]
        outcomes = await all_outcomes(self.engine, requests, mailbox)
        if many:
            return [failed_reply(request, outcome) for request, outcome in zip(requests, outcomes)]
        return _raised(outcomes[0])

    async def astream(self: Any, prompt: Any, params: Any = None, *, priority: Any = None,
                      **overrides: Any) -> AsyncIterator[Chunk]:
        """`async for chunk in llm.astream(prompt)`."""
        async with await self.agenerate(prompt, params, stream=True, priority=priority, **overrides) as generation:
            async for chunk in generation:
                yield chunk

    async def achat(self: Any, messages: Any, params: Any = None, *, stream: bool = False,
                    tools: Sequence[Mapping[str, Any]] | None = None, template: Mapping[str, Any] | None = None,
                    priority: Any = None, **overrides: Any) -> Any:
        """`LLM.chat`: a Reply, or with `stream` an `AsyncGeneration`."""
        import asyncio

        from edge_runtime.async_generation import AsyncMailbox, all_outcomes

        one = one_each(params, 1, overrides)[0]
        urgency = priority_of(priority, Priority.INTERACTIVE)
        ids = await asyncio.to_thread(_prepared, self, [one], lambda: self._chat_ids(messages, tools, template))
        if stream:
            return _start(self, ids, one, priority=urgency, fresh=begins_text(template))
        mailbox = AsyncMailbox(self.engine)
        request = self._request(ids, one, mailbox.put, priority=urgency, fresh=begins_text(template))
        return _raised((await all_outcomes(self.engine, [request], mailbox))[0])

    async def aembed(self: Any, texts: Any, pooling: str = "mean", normalize: bool = True, *,
                     priority: Any = None) -> np.ndarray:
        """`LLM.embed`."""
        import asyncio

        from edge_runtime.async_generation import AsyncMailbox, all_outcomes

        if pooling not in POOLINGS:
            raise InvalidRequestError("pooling", pooling, " or ".join(POOLINGS))
        single = isinstance(texts, str)
        mailbox = AsyncMailbox(self.engine)
        requests = await asyncio.to_thread(
            self._embed_requests, [texts] if single else texts, pooling, priority, mailbox.put)
        outcomes = await all_outcomes(self.engine, requests, mailbox)
        return stack({i: _raised(outcome) for i, outcome in enumerate(outcomes)}, single, normalize)


    async def aclose(self: Any) -> None:
        """`LLM.close`, which waits for the step that runs now."""
        import asyncio

        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _prepared(llm: Any, params: Sequence[SamplingParams], ids: Callable[[], T]) -> T:
    """Token ids, once the grammars are compiled: a large one would hold up the event loop."""
    for one in params:
        if one.grammar is not None:
            llm._grammars.compile(one.grammar)
    return ids()


def _start(llm: Any, ids: np.ndarray, params: Any, **options: Any) -> AsyncGeneration:
    from edge_runtime.async_generation import AsyncGeneration, AsyncMailbox

    mailbox = AsyncMailbox(llm.engine)
    request = llm._request(ids, params, mailbox.put, streaming=True, **options)
    llm.engine.submit(request)
    return AsyncGeneration(llm.engine, request, mailbox)


def _raised(outcome: Any) -> Any:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
