"""`idlm regenerate`: a model's own answers to the prompts of a chat file."""

import functools
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx2
import typer
from rich.console import Console

import idlm_jax
from idlm_jax import options
from idlm_jax.cli.checkout import import_from_checkout
from idlm_jax.decoding.method import ISD


def regenerate(
    source: Annotated[Path, typer.Argument(help='Chat JSONL: {"messages": [{"role", "content"}, ...]} a line.')],
    out: Annotated[Path, typer.Argument(help="JSONL to write; the same command again continues it.")],
    model: Annotated[str, typer.Option(help="Model folder or hub id; with --endpoint the model's name there.")],
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible server, as in http://localhost:8000/v1; the key is read from OPENAI_API_KEY."
        ),
    ] = None,
    adapter: options.Adapter = None,
    stride: Annotated[int, typer.Option(help="Most tokens per forward, 1..16; 1 is plain AR.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Every answer's own seed follows from this, its line and its turn.")] = 0,
    on_length: Annotated[
        Literal["drop", "keep"],
        typer.Option(help="What becomes of a chat with an answer that --max-tokens cut off; kept ones are flagged."),
    ] = "drop",
    limit: Annotated[int | None, typer.Option(help="Answer the first so many chats only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Chats per compiled loop.", min=1)] = 16,
    threads: Annotated[int, typer.Option(help="Chats asked of the endpoint at a time.", min=1)] = 16,
    retries: Annotated[int, typer.Option(help="Repetitions of a failed request, after 1, 2, 4, ... s.", min=0)] = 5,
    dtype: options.Dtype = "bfloat16",
    kernels: options.Kernels = "auto",
) -> None:
    """Replaces the answers of chats by the model's own, which is what introspective training should imitate.

    Every assistant turn is answered anew, in order, after the model's own earlier answers; a chat that ends with
    the user is answered too. What was left out, and why, is in OUT.run beside OUT. Exits with 1 if a request
    failed to the end; the same command tries those again.

    Example: idlm regenerate chats.jsonl answers.jsonl --model Qwen3-8B --endpoint http://localhost:8000/v1
    """
    module: Any = import_from_checkout("train.data.regenerate")
    answerers: Any = import_from_checkout("train.data.answerers")
    settings = module.RegenerateSettings(
        model=model,
        adapter=None if adapter is None else str(adapter),
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        keep_unfinished=on_length == "keep",
    )
    if endpoint is not None:
        if adapter is not None or stride != 1:
            raise ValueError("--adapter and --stride belong to this project's decoder; leave them out with --endpoint")
        _check_url(endpoint)
        answer = functools.partial(
            answerers.answer_with_endpoint,
            url=endpoint,
            api_key=os.environ.get("OPENAI_API_KEY"),
            threads=threads,
            retries=retries,
        )
    else:
        module.read_chats(source)  # a broken line is named before minutes of loading
        lm = idlm_jax.load(model, dtype=dtype, adapter=adapter, kernels=kernels)
        answer = functools.partial(answerers.answer_with_model, lm=lm, method=ISD(stride), batch_size=batch_size)
    report = module.regenerate(source, out, answer, settings, limit=limit, show_progress=True)
    _print_report(out, report)
    if module.FAILED in report.reasons:
        raise typer.Exit(1)


def _check_url(endpoint: str) -> None:
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL as error:
        raise ValueError(f"--endpoint {endpoint!r}: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"--endpoint {endpoint!r} must start with http:// or https:// and name a host")


def _print_report(out: Path, report: Any) -> None:
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in report.reasons.items()) or "none"
    flagged = f" ({report.unfinished:,} of them unfinished)" if report.unfinished else ""
    Console().print(
        f"{out}: {report.answered:,} of {report.chats:,} chats answered{flagged}, {report.resumed:,} of them dealt "
        f"with before; left out: {left_out}",
        highlight=False,
        soft_wrap=True,
    )
