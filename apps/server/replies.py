"""The replies to one request: n of them, together or as a stream of pieces, counted when they end."""
from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from edge_runtime.outcome import Chunk, Reply, Stats
from edge_runtime.sampling import TokenLogprob

if TYPE_CHECKING:
    from edge_runtime.apps.server.metrics import Metrics
    from edge_runtime.async_generation import AsyncGeneration
    from edge_runtime.llm import LLM

Ask = Callable[[bool], Awaitable[Any]]  # whether to stream -> a Reply or an AsyncGeneration
FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


async def whole(asks: Sequence[Ask], metrics: Metrics) -> list[Reply]:
    """All replies. They are submitted together, so that what their prompts share is computed once."""
    if len(asks) == 1:
        replies = [await asks[0](False)]
    else:
        tasks = [asyncio.ensure_future(ask(False)) for ask in asks]
        try:
            replies = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
    for reply in replies:
        metrics.note(reply.stats)
        metrics.drawn(reply.token_times)
    return replies


async def streams(asks: Sequence[Ask], interval: float) -> list[AsyncGeneration]:
    """Replies being written. What is wrong with the request is raised here, before anything is answered."""
    found: list[AsyncGeneration] = []
    try:
        for ask in asks:
            generation = await ask(True)
            generation.interval = interval
            found.append(generation)
    except BaseException:
        for generation in found:
            await generation.aclose()
        raise
    return found


async def pieces(generations: list[AsyncGeneration], metrics: Metrics) -> AsyncIterator[tuple[int, Chunk]]:
    """(index of the reply, chunk), as they come. Closing it cancels what is not done."""
    drawn: list[float | None] = [None] * len(generations)

    def note(i: int, chunk: Chunk) -> None:
        drawn[i] = metrics.drawn(chunk.token_times, drawn[i])
        if chunk.stats is not None:
            metrics.note(chunk.stats)

    try:
        if len(generations) == 1:
            async for chunk in generations[0]:
                note(0, chunk)
                yield 0, chunk
            return
        nexts = {asyncio.ensure_future(anext_of(generation)): i for i, generation in enumerate(generations)}
        try:
            while nexts:
                done, _ = await asyncio.wait(nexts, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    i = nexts.pop(task)
                    chunk = task.result()
                    note(i, chunk)
                    if chunk.stats is None:
                        nexts[asyncio.ensure_future(anext_of(generations[i]))] = i
                    yield i, chunk
        finally:
            for task in nexts:
                task.cancel()
            with contextlib.suppress(BaseException):
                await asyncio.gather(*nexts, return_exceptions=True)
    finally:
        for generation in generations:
            await generation.aclose()


async def anext_of(generation: AsyncGeneration) -> Chunk:
    return await generation.__anext__()


def usage(stats: list[Stats]) -> dict[str, Any]:
    """Tokens of a request; the prompt of n replies counts once."""
    prompt = stats[0].prompt_tokens if stats else 0
    completion = sum(one.completion_tokens for one in stats)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": min((one.cached_tokens for one in stats), default=0)}}


def measured(stats: list[Stats]) -> dict[str, Any]:
    """Our extension of answers: seconds, rates, and where tokens left the network."""
    first = stats[0] if stats else Stats()
    out: dict[str, Any] = {
        "queued": first.queued, "ttft": first.ttft, "seconds": max((one.seconds for one in stats), default=0.0),
        "tokens_per_second": sum(one.tokens_per_second for one in stats),
        "prompt_tokens_per_second": first.prompt_tokens_per_second}
    if any(getattr(one, "exits", None) for one in stats):
        layers: dict[str, int] = {}
        for one in stats:
            for layer, count in one.exits.items():
                layers[str(layer)] = layers.get(str(layer), 0) + count
        out["early_exit"] = {"tokens_by_layer": layers, "layers_run": sum(one.layers_run for one in stats),
                             "drafted": sum(one.drafted for one in stats),
                             "accepted": sum(one.accepted for one in stats)}
    return out


def token_logprobs(llm: LLM, logprobs: tuple[TokenLogprob, ...], top: int) -> list[dict[str, Any]]:
    """As chat completions report them: token, its bytes, and the likeliest beside it."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = llm.tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return [{**one(p.token_id, p.logprob), "top_logprobs": [one(*pair) for pair in p.top[:top]]} for p in logprobs]
