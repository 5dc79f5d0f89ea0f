"""`idlm generate`: complete prompts from the terminal."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

import idlm_jax
from idlm_jax.decoding.method import make_baseline, make_method, read_choice


def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder of a Qwen3 or I-DLM checkpoint, or a hub id.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to complete; '-' or none reads standard input.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a gated LoRA adapter (R-ISD).")] = None,
    decoder: Annotated[
        Literal["isd", "two-pass", "block-diffusion"],
        typer.Option("--method", help="What decodes: introspective strided decoding, or what it is compared with."),
    ] = "isd",
    stride: Annotated[
        str, typer.Option(help="Most tokens per forward, 1..16; 1 is plain AR; auto: chosen while it runs.")
    ] = "4",
    max_stride: Annotated[int, typer.Option(help="The largest that --stride auto may choose, 2..16.")] = 4,
    proposals: Annotated[
        Literal["sampled", "argmax"], typer.Option(help="How drafts are taken; both are exact.")
    ] = "sampled",
    branches: Annotated[
        str, typer.Option(help="Groups of MASKs per forward, 1..stride or auto: more rows, fewer forwards.")
    ] = "1",
    rule: Annotated[
        Literal["exact", "coupled"],
        typer.Option(help="coupled: a seed gives plain AR's own text, whatever is drafted; always so where auto."),
    ] = "exact",
    block_length: Annotated[int, typer.Option(help="Block diffusion: tokens of a block, as trained.")] = 4,
    threshold: Annotated[
        float, typer.Option(help="Block diffusion: a MASK is filled at a probability above this; 1: by the share.")
    ] = 0.9,
    denoising_steps: Annotated[
        int | None, typer.Option(help="Block diffusion: forwards that fill a block at the latest.", show_default="L")
    ] = None,
    edit_threshold: Annotated[
        float | None, typer.Option(help="Block diffusion: a token gives way to one above this (LLaDA2.1).")
    ] = None,
    predicts_next: Annotated[
        bool, typer.Option(help="Block diffusion: row i predicts token i + 1, as in models made from AR ones.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next ones count up.")] = 0,
    chat: Annotated[bool, typer.Option(help="Wrap each prompt as a user turn in the model's chat template.")] = False,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of weights and matrix products.")] = "bfloat16",
    quantize: Annotated[
        Literal["int8", "fp8"] | None, typer.Option(help="Hold the blocks' projections in 8 bits.")
    ] = None,
    kernels: Annotated[str, typer.Option(help="auto (by device), reference, triton, tpu, jax_triton.")] = "auto",
    deterministic: Annotated[
        Literal["bitwise"] | None, typer.Option(help="Bits that depend on neither stride nor batch; slower.")
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print text as it is committed (one prompt).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per completion.")] = False,
) -> None:
    """Completes prompts by introspective strided decoding, or by what it is compared with.

    Example: idlm generate assets/tiny-qwen3-py --adapter assets/tiny-qwen3-py-isd 'def main():'
    """
    texts = [sys.stdin.read()] if not prompts or prompts == ["-"] else prompts
    lm = idlm_jax.load(model, dtype=dtype, quantize=quantize, adapter=adapter, kernels=kernels)
    if chat:
        if lm.tokenizer is None or lm.tokenizer.chat_template is None:
            raise ValueError(f"--chat needs a chat template, and {model} has none")
        turns = [[{"role": "user", "content": prompt}] for prompt in texts]
        texts = [
            str(lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns
        ]
    chosen = read_choice("--stride", stride)
    method = (
        make_method(chosen, proposals, read_choice("--branches", branches), rule, max_stride)
        if decoder == "isd"
        else make_baseline(
            decoder,
            stride=chosen,
            block_length=block_length,
            threshold=threshold,
            steps=denoising_steps,
            edit_threshold=edit_threshold,
            predicts_next=predicts_next,
        )
    )
    params = [
        idlm_jax.SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed + index
        )
        for index in range(len(texts))
    ]
    if stream:
        if len(texts) != 1:
            raise ValueError(f"--stream prints one completion, and there are {len(texts)} prompts")
        for piece in idlm_jax.generate_stream(lm, texts[0], method, params[0], deterministic=deterministic):
            print(piece, end="", flush=True)
        print()
        return
    start = time.perf_counter()
    completions = idlm_jax.generate(lm, texts, method, params, deterministic=deterministic)
    elapsed_s = time.perf_counter() - start
    if as_json:
        for prompt, completion in zip(texts, completions, strict=True):
            record = {
                "prompt": prompt,
                "text": completion.text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "num_forwards": completion.num_forwards,
                "tokens_per_forward": completion.tokens_per_forward,
                "acceptance_rate": completion.acceptance_rate if sum(completion.verified_by_depth) else None,
            }
            if completion.logit_checksums is not None:
                record["logit_checksums"] = completion.logit_checksums
            print(json.dumps(record))
        return
    for prompt, completion in zip(texts, completions, strict=True):
        print(prompt + completion.text)
    Console(stderr=True).print(_summary(completions, elapsed_s))


def _summary(completions: list[idlm_jax.Completion], elapsed_s: float) -> Table:
    table = Table(
        "prompt",
        "tokens",
        "forwards",
        "TPF",
        "acceptance",
        "ended by",
        caption=f"{elapsed_s:.1f} s, compilation included",
    )
    for index, completion in enumerate(completions):
        table.add_row(
            str(index),
            str(len(completion.token_ids)),
            str(completion.num_forwards),
            f"{completion.tokens_per_forward:.2f}",
            f"{completion.acceptance_rate:.2f}",
            completion.finish_reason,
        )
    return table
