"""`idlm generate`: complete prompts from the terminal."""

import json
import sys
import time
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

import idlm_jax
from idlm_jax import options


def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder of a Qwen3 or I-DLM checkpoint, or a hub id.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to complete; '-' or none reads standard input.")
    ] = None,
    adapter: options.Adapter = None,
    decoder: options.Decoder = "isd",
    stride: options.Stride = "4",
    max_stride: options.MaxStride = 4,
    proposals: options.Proposals = "sampled",
    branches: options.Branches = "1",
    rows: options.Rows = None,
    rule: options.Rule = "exact",
    block_length: options.BlockLength = 4,
    threshold: options.Threshold = 0.9,
    denoising_steps: options.DenoisingSteps = None,
    edit_threshold: options.EditThreshold = None,
    predicts_next: options.PredictsNext = False,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next ones count up.")] = 0,
    chat: Annotated[bool, typer.Option(help="Wrap each prompt as a user turn in the model's chat template.")] = False,
    dtype: options.Dtype = "bfloat16",
    quantize: options.Quantize = None,
    kernels: options.Kernels = "auto",
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
    method = options.chosen_method(
        decoder,
        stride=stride,
        max_stride=max_stride,
        proposals=proposals,
        branches=branches,
        rows=rows,
        rule=rule,
        block_length=block_length,
        threshold=threshold,
        denoising_steps=denoising_steps,
        edit_threshold=edit_threshold,
        predicts_next=predicts_next,
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
