"""`edge-runtime run`: one prompt, one reply, as it is written."""
from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.cli_common import (
    KV,
    Context,
    Device,
    DeviceMemory,
    Model,
    Offload,
    TbtMs,
    Threads,
    context_tokens,
    guarded,
    offload_options,
    open_model,
    prompt_from,
    say,
)
from edge_runtime.cli_exits import (
    ExitCriterion,
    ExitLayer,
    ExitLayers,
    ExitThresholds,
    ExitWay,
    early_exit_of,
    exit_layers_of,
    exits_text,
)
from edge_runtime.cli_explain import explained
from edge_runtime.errors import ChatTemplateError, InvalidRequestError

if TYPE_CHECKING:
    from edge_runtime.llm import LLM
    from edge_runtime.outcome import Stats

HELP = """Ask a model, and read the reply as it is written.

The prompt is the argument, or standard input. It is sent as a chat message where the model has a chat template,
and continued as it is with --raw.

Examples:

\b
  edge-runtime run "Where does the Danube begin?"
  edge-runtime run -m llama-3.2-1b-instruct-q4_0.gguf --stats "Write a haiku about rain."
  edge-runtime run --early-exit verify --temperature 0 --stats "What does early exit save?"
  edge-runtime run -m model.gguf --device webgpu --offload on --explain "What lives where?"
  cat report.md | edge-runtime run --system "Answer in one sentence." --temperature 0
  edge-runtime run -m base.gguf --raw --max-tokens 40 --stop "\\n" "The capital of France is"
"""


@guarded
def run(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing reads standard input.",
                                                 show_default=False)] = None,
    model: Model = None,
    chat: Annotated[bool | None, typer.Option("--chat/--raw", help="As a chat message, or as text to continue.",
                                              show_default="chat where the model has a template")] = None,
    system: Annotated[str | None, typer.Option(help="System message before the prompt.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens of the reply.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the fewest that hold this share; 1: all.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Drop what is less than this times as likely as the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, said tokens become less likely.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken off the logits of tokens in the reply.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once per occurrence.")] = 0.0,
    logit_bias: Annotated[list[str] | None, typer.Option(help="TOKEN_ID=VALUE added to a logit; repeatable.",
                                                         show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the reply; repeatable. \\n and \\t count.",
                                                   show_default=False)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Tokens, times and tokens/s afterwards, on stderr.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Who attended, how long it was predicted to take and took, "
                                                            "afterwards, on stderr.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="What lives where in memory, first, on stderr.")] = False,
    device: Device = "auto",
    context: Context = "auto",
    kv: KV = "auto",
    threads: Threads = None,
    offload: Offload = "auto",
    device_memory_gb: DeviceMemory = None,
    tbt_ms: TbtMs = None,
    early_exit: ExitWay = None,
    exit_layers: ExitLayers = None,
    exit_threshold: ExitThresholds = None,
    exit_criterion: ExitCriterion = "max_prob",
    exit_layer: ExitLayer = None,
) -> None:
    from edge_runtime.sampling import SamplingParams

    params = SamplingParams(
        early_exit=early_exit_of(early_exit, exit_criterion, exit_layer, exit_threshold),
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, logit_bias=_biases(logit_bias or []), seed=seed,
        stop=[_unescaped(text) for text in stop or []], ignore_eos=ignore_eos)
    if system is not None and chat is False:
        raise InvalidRequestError("system", system, "used in a chat: leave out --raw")
    text = prompt_from(prompt)
    with open_model(model, device=device, context=context_tokens(context), kv=kv, threads=threads,
                    exit_layers=exit_layers_of(exit_layers),
                    **offload_options(offload, device_memory_gb, tbt_ms)) as llm:
        if plan:
            say(f"{llm.plan}\n")
        with _start(llm, text, system, params, chat) as generation:
            for chunk in generation:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        if generation.reply is not None and not generation.reply.text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
        if stats and generation.reply is not None:
            say(_stats(generation.reply.stats, generation.reply.finish_reason))
            exits = exits_text(generation.reply.stats)
            if exits:
                say(exits)
        if explain:
            say(explained(llm))


def _start(llm: LLM, text: str, system: str | None, params: Any, chat: bool | None) -> Any:
    """The generation, as a chat where that was asked or the model has a template."""
    if chat is not False:
        messages = [{"role": "system", "content": system}] if system is not None else []
        try:
            return llm.chat([*messages, {"role": "user", "content": text}], params, stream=True)
        except ChatTemplateError:
            if chat or system is not None:
                raise
    return llm.stream(text, params)


def _stats(stats: Stats, reason: str) -> str:
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    return (f"prompt {stats.prompt_tokens} tokens{cached}, {stats.prompt_tokens_per_second:.1f} tokens/s | first token "
            f"after {stats.ttft:.2f} s | reply {stats.completion_tokens} tokens, {stats.tokens_per_second:.1f} "
            f"tokens/s | {stats.seconds:.2f} s | ended by {reason}")


def _biases(pairs: list[str]) -> dict[int, float]:
    biases = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise InvalidRequestError("logit_bias", pair, "TOKEN_ID=NUMBER, such as 128=-inf") from None
    return biases


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")
