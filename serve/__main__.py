"""`python -m serve --model-path FOLDER`: an OpenAI-compatible server. SGLang's flags, with vLLM's as aliases."""

import logging
import socket
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
import uvicorn
from tqdm import tqdm

import idlm_jax
from serve.config import EngineConfig
from serve.engine import Engine
from serve.http.app import HttpConfig, make_app


def serve(
    model_path: Annotated[
        str, typer.Option("--model-path", "--model", help="Hugging Face folder of a Qwen3 or I-DLM model, or a hub id.")
    ],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a gated LoRA adapter (R-ISD).")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.", min=0, max=65535)] = 30000,
    served_model_name: Annotated[str | None, typer.Option(help="By default the model's path as given.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="IDLM_API_KEY", help="Required of clients; may be given several times.")
    ] = None,
    stride: Annotated[int, typer.Option(help="Most tokens per forward, 1..16; 1 is plain AR.")] = 4,
    proposals: Annotated[
        Literal["sampled", "argmax"], typer.Option(help="How drafts are taken; both are exact.")
    ] = "sampled",
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
    max_total_tokens: Annotated[int, typer.Option(help="Tokens that the KV pool holds.")] = 65536,
    chunked_prefill_size: Annotated[int, typer.Option(help="Most prompt tokens per step.")] = 512,
    disable_radix_cache: Annotated[
        bool, typer.Option("--disable-radix-cache", "--no-enable-prefix-caching", help="Forget finished requests.")
    ] = False,
    max_logprobs: Annotated[int, typer.Option(help="Most alternatives per token, 0..20; -1 serves none.")] = 20,
    max_body_mb: Annotated[int, typer.Option(help="Largest request; more is answered 413.", min=1)] = 16,
    shutdown_timeout: Annotated[int, typer.Option(help="Seconds that running requests get after SIGTERM.")] = 60,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of weights and matrix products.")] = "bfloat16",
    kernels: Annotated[str, typer.Option(help="auto (by device), reference, triton, tpu, jax_triton.")] = "auto",
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option()] = "info",
) -> None:
    """Serves a model by introspective strided decoding, exactly: the tokens are those of plain AR.

    Example: python -m serve --model-path assets/tiny-qwen3-py --adapter assets/tiny-qwen3-py-isd --dtype float32
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=log_level.upper())
    if api_key is not None and "" in api_key:
        raise ValueError("--api-key must not be empty: leave it out to let everyone in")
    config = EngineConfig(
        method=idlm_jax.AR() if stride == 1 else idlm_jax.ISD(stride=stride, proposals=proposals),
        max_running=max_running_requests,
        max_queued=max_queued_requests,
        max_len=context_length,
        num_pages=_num_pages(max_total_tokens),
        chunk_rows=chunked_prefill_size,
        caches_prefixes=not disable_radix_cache,
        max_logprobs=None if max_logprobs < 0 else max_logprobs,
    )
    # A port that is taken is said before minutes of loading and compiling; until these are over, clients are refused.
    _listen(host, port).close()
    lm = idlm_jax.load(model_path, dtype=dtype, adapter=adapter, kernels=kernels)
    http = HttpConfig(
        model=served_model_name or model_path,
        model_path=model_path,
        api_keys=tuple(api_key or ()),
        max_body_bytes=max_body_mb * 2**20,
    )
    with tqdm(unit="program", desc="compiling") as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        engine = Engine(lm, config, progress=show)
    app = make_app(engine, lm, config, http)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=shutdown_timeout, log_config=None)
    )
    with _listen(host, port) as listener:
        where = f"http://{host}:{listener.getsockname()[1]}/v1"
        logging.getLogger("serve").info("ready: %s, model %r", where, http.model)
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _num_pages(max_total_tokens: int) -> int:
    size = EngineConfig.page_size
    return -(-max_total_tokens // size) + 1  # one page is never given out


def main() -> None:
    """Runs; a refused input ends in one line on stderr and exit code 2, never in a traceback."""
    try:
        typer.run(serve)
    except (ValueError, NotImplementedError, FileNotFoundError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
