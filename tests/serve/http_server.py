"""The server on loopback, with clients."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import openai
import uvicorn

import idlm_jax
from idlm_jax.decoding import ISD
from idlm_jax.model.language_model import LanguageModel
from serve.config import EngineConfig
from serve.engine import Engine
from serve.http.app import HttpConfig, make_app
from serve.runs import Runs

MODEL = Path(__file__).parents[2] / "assets" / "tiny-qwen3-py"
KEY = "a key"
MAX_BODY = 100_000
CONFIG = EngineConfig(
    method=ISD(stride=4),
    max_running=2,
    max_queued=8,
    max_len=256,
    num_pages=40,
    decode_batches=(2,),
    prefill_shapes=((1, 64),),
    specialised=False,
    max_logprobs=5,
)


class Running(NamedTuple):
    engine: Engine
    lm: LanguageModel
    url: str
    client: openai.OpenAI
    http: httpx2.Client
    uvicorn: uvicorn.Server


@contextlib.contextmanager
def serving(
    config: EngineConfig,
    chat_template: str | None = None,
    *,
    lm: LanguageModel | None = None,
    device: Runs | None = None,
    shutdown_s: int = 5,
    watchdog_s: float = 300.0,
    health_timeout_s: float = 20.0,
    close_timeout_s: float = 10.0,
) -> Iterator[Running]:
    """A server of the tiny model, possibly with another chat template, or on a device of the caller's."""
    lm = idlm_jax.load(MODEL, dtype="float32") if lm is None else lm
    assert lm.tokenizer is not None
    if chat_template is not None:
        lm.tokenizer.chat_template = chat_template
    engine = Engine(lm, config, device=device)
    http_config = HttpConfig(
        model="tiny",
        model_path=str(MODEL),
        api_keys=("other", KEY),
        max_body_bytes=MAX_BODY,
        watchdog_s=watchdog_s,
        health_timeout_s=health_timeout_s,
        close_timeout_s=close_timeout_s,
    )
    app = make_app(engine, lm, config, http_config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=shutdown_s))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        headers = {"authorization": f"Bearer {KEY}"}
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
            httpx2.Client(base_url=url, headers=headers, timeout=60) as http,
        ):
            yield Running(engine, lm, url, client, http, server)
        server.should_exit = True
        thread.join()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_pages == config.num_pages - 1
