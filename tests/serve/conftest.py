"""One compiled device for the whole folder; engines on top of it are cheap."""

from collections.abc import Callable, Iterator

import pytest

from idlm_jax.decoding import ISD
from idlm_jax.model.language_model import LanguageModel, from_module
from serve.config import EngineConfig
from serve.device import Device
from serve.engine import Engine
from tests.support.tiny_model import sharpen, tiny_module

CONFIG = EngineConfig(
    method=ISD(stride=4),
    max_running=4,
    num_pages=65,
    page_size=8,
    max_len=96,
    decode_batches=(2, 4),
    prefill_shapes=((1, 16), (2, 8)),
    specialised=False,
)


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    """Eleven real ids, so that a random model's drafts are right often enough to exercise acceptance."""
    return from_module(sharpen(tiny_module(3, vocab_size=12, mask_token_id=11), 4.0))


@pytest.fixture(scope="session")
def device(lm: LanguageModel) -> Device:
    return Device(lm, CONFIG)


@pytest.fixture
def start(lm: LanguageModel, device: Device) -> Iterator[Callable[..., Engine]]:
    """Starts engines whose invariants are checked after every step, and wants all their pages back."""
    engines = []

    def start(config: EngineConfig = CONFIG, **how) -> Engine:
        device.reset()
        engines.append(Engine(lm, config, **({"device": device, "after_step": lambda it: it.check()} | how)))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close(drain=False)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        pool = engine._scheduler.pool
        pool.check([])
        assert stats.num_free_pages == pool.num_usable
