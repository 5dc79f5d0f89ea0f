"""`python -m serve --model-path FOLDER`: an OpenAI-compatible server. SGLang's flags, with vLLM's as aliases."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import typer
import uvicorn
from pythonjsonlogger.json import JsonFormatter
from tqdm import tqdm

import idlm_jax
from idlm_jax import cluster, options
from serve.config import EngineConfig
from serve.device import Device
from serve.engine import Engine
from serve.hosts import Leader, follow, meet_followers, meet_leader
from serve.http.app import HttpConfig, make_app
from serve.launch import keep_compiled, listen, num_pages
from serve.mesh import serving_mesh
from serve.official import ALGORITHM, Defaults, read_official

DEFAULT_STRIDE = 4


def serve(
    model_path: Annotated[
        str, typer.Option("--model-path", "--model", help="Hugging Face folder of a Qwen3 or I-DLM model, or a hub id.")
    ],
    adapter: options.Adapter = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.", min=0, max=65535)] = 30000,
    served_model_name: Annotated[str | None, typer.Option(help="By default the model's path as given.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="IDLM_API_KEY", help="Required of clients; may be given several times.")
    ] = None,
    decoder: options.Decoder = "isd",
    stride: Annotated[
        str | None,
        typer.Option(help="Most tokens per forward, 1..16, default 4; 1 is plain AR; auto: chosen for each step."),
    ] = None,
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
    dllm_algorithm: Annotated[
        str | None, typer.Option(help=f"The reference server's flag; {ALGORITHM} is the one algorithm here.")
    ] = None,
    dllm_algorithm_config: Annotated[
        Path | None, typer.Option(help="The reference server's YAML: stride, and sampling of requests that name none.")
    ] = None,
    tp_size: Annotated[
        int, typer.Option("--tp-size", "--tensor-parallel-size", help="Devices that share the model.", min=1)
    ] = 1,
    max_running_requests: Annotated[
        int, typer.Option("--max-running-requests", "--max-num-seqs", help="Requests that run at once.")
    ] = 32,
    max_queued_requests: Annotated[int, typer.Option(help="Requests that may wait; more are answered 429.")] = 1024,
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context-length", "--max-model-len", help="Longest prompt and completion; default: the model's."
        ),
    ] = None,
    max_total_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the KV pool holds; by default what fits (65,536 on a CPU).")
    ] = None,
    mem_fraction_static: Annotated[
        float,
        typer.Option(
            "--mem-fraction-static",
            "--gpu-memory-utilization",
            help="Share of the device's memory for weights and KV pool; activations need the rest.",
            min=0.05,
            max=0.99,
        ),
    ] = 0.85,
    chunked_prefill_size: Annotated[int, typer.Option(help="Most prompt tokens per step.")] = 512,
    disable_radix_cache: Annotated[
        bool, typer.Option("--disable-radix-cache", "--no-enable-prefix-caching", help="Forget finished requests.")
    ] = False,
    max_logprobs: Annotated[int, typer.Option(help="Most alternatives per token, 0..20; -1 serves none.")] = 20,
    extras: Annotated[
        bool,
        typer.Option(help="Serve penalties, biases, min_p and constrained output; without them start-up is shorter."),
    ] = True,
    max_body_mb: Annotated[int, typer.Option(help="Largest request; more is answered 413.", min=1)] = 16,
    shutdown_timeout: Annotated[int, typer.Option(help="Seconds that running requests get after SIGTERM.")] = 60,
    watchdog_timeout: Annotated[
        float, typer.Option(help="Seconds without a step after which /health answers 503 while requests wait.")
    ] = 300.0,
    compilation_cache_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="JAX_COMPILATION_CACHE_DIR",
            help="Where compiled programs are kept for the next start. Default: ~/.cache/idlm-jax/compiled",
        ),
    ] = None,
    dtype: options.Dtype = "bfloat16",
    quantization: Annotated[
        Literal["int8", "fp8"] | None, typer.Option(help="Hold the blocks' projections in 8 bits (one device).")
    ] = None,
    deterministic: Annotated[
        Literal["bitwise"] | None, typer.Option(help="Bits that depend on neither stride nor load; one device; slower.")
    ] = None,
    kernels: options.Kernels = "auto",
    coordinator: Annotated[
        str | None,
        typer.Option(
            "--dist-init-addr", "--coordinator", help="HOST:PORT of process 0, if several hosts share the model."
        ),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option("--nnodes", "--num-processes", help="How many processes there are.")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option("--node-rank", "--process-id", help="Which this one is; 0 is the one that serves.")
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="JAX finds the processes: SLURM, Kubernetes, Cloud TPU.")
    ] = False,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option()] = "info",
    log_format: Annotated[Literal["text", "json"], typer.Option(help="json: an object per line.")] = "text",
) -> None:
    """Serves a model by introspective strided decoding, exactly: the tokens are those of plain AR.

    Block diffusion, there to be compared with, serves neither log-probabilities nor penalties nor constrained output.

    Example: python -m serve --model-path assets/tiny-qwen3-py --adapter assets/tiny-qwen3-py-isd --dtype float32
    """
    _set_up_logging(log_level, log_format)
    if api_key is not None and "" in api_key:
        raise ValueError("--api-key must not be empty: leave it out to let everyone in")
    if dllm_algorithm not in (None, ALGORITHM):
        raise ValueError(f"--dllm-algorithm {dllm_algorithm} is not known: {ALGORITHM} is the one algorithm here")
    official_stride, defaults = None, Defaults()
    if dllm_algorithm_config is not None:
        official_stride, defaults = read_official(dllm_algorithm_config)
    if None not in (stride, official_stride) and stride != str(official_stride):
        raise ValueError(f"--stride {stride} and the stride {official_stride} of {dllm_algorithm_config} differ")
    method = options.chosen_method(
        decoder,
        stride=stride or str(official_stride or DEFAULT_STRIDE),
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
    if decoder == "block-diffusion":
        extras, max_logprobs = False, -1  # which need to know what stands before a token
    cluster.join(coordinator, num_processes, process_id, is_detected=distributed)
    if cluster.is_first():
        # A port that is taken is said before minutes of loading and compiling; until then, clients are refused.
        listen(host, port).close()
    keep_compiled(compilation_cache_dir)
    mesh = serving_mesh(tp_size)
    lm = idlm_jax.load(model_path, dtype=dtype, quantize=quantization, adapter=adapter, kernels=kernels, mesh=mesh)
    memory = max_total_tokens, mem_fraction_static, tp_size
    config = EngineConfig(
        method=method,
        max_running=max_running_requests,
        max_queued=max_queued_requests,
        max_len=context_length,
        num_pages=int(cluster.from_first("pages", lambda: f"{num_pages(lm.config, *memory)}")),
        chunk_rows=chunked_prefill_size,
        caches_prefixes=not disable_radix_cache,
        max_logprobs=None if max_logprobs < 0 else max_logprobs,
        shapes=extras,
        deterministic=deterministic,
    )
    with tqdm(unit="program", desc="compiling", disable=not cluster.is_first()) as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        device = Device(lm, config, show)
    if not cluster.is_first():
        follow(device, meet_leader(config))
        return
    followers = meet_followers(config) if jax.process_count() > 1 else []
    engine = Engine(lm, config, device=Leader(device, followers) if followers else device, pacer=device.pacer)
    http = HttpConfig(
        model=served_model_name or model_path,
        model_path=model_path,
        api_keys=tuple(api_key or ()),
        max_body_bytes=max_body_mb * 2**20,
        watchdog_s=watchdog_timeout,
        defaults=defaults,
    )
    app = make_app(engine, lm, config, http)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=shutdown_timeout, log_config=None)
    )
    with listen(host, port) as listener:
        where = f"http://{host}:{listener.getsockname()[1]}/v1"
        logging.getLogger("serve").info("ready: %s, model %r, %d pages", where, http.model, config.num_pages)
        # uvicorn raises again the signal that it has obeyed; a server that has drained ends well.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            server.run(sockets=[listener])
        finally:
            for follower in followers:
                follower.close()


def _set_up_logging(level: str, layout: str) -> None:
    handler = logging.StreamHandler()
    names = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(JsonFormatter(names) if layout == "json" else logging.Formatter(names))
    logging.basicConfig(handlers=[handler], level=level.upper())


def main() -> int:
    """Runs; a refused input ends in one line on stderr and exit code 2, never in a traceback."""
    # Process 1 of a container has no handler of its own, and a start can take minutes. An exception could get lost in a
    # callback of the compiler.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    try:
        typer.run(serve)
    except SystemExit as ended:
        return int(ended.code or 0)
    except (ValueError, NotImplementedError, FileNotFoundError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cluster.end_promptly(main))
