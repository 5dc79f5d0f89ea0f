"""Whatever is sent, in the shape that the server's own OpenAPI document asks for or not, nothing breaks."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serve.http_server import CONFIG, KEY, Running, serving

pytestmark = pytest.mark.slow

# Answers are short, and all there is can be asked for.
SMALL = dataclasses.replace(CONFIG, max_len=40, shapes=True)
# Valid bodies and, where there is something to get wrong, invalid ones; how many of each.
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS: list[tuple[str, str, GenerationMode, int]] = [
    ("POST", "/v1/completions", POSITIVE, 60),
    ("POST", "/v1/completions", NEGATIVE, 25),
    ("POST", "/v1/chat/completions", POSITIVE, 60),
    ("POST", "/v1/chat/completions", NEGATIVE, 25),
    ("POST", "/tokenize", POSITIVE, 30),
    ("POST", "/tokenize", NEGATIVE, 15),
    ("POST", "/detokenize", POSITIVE, 20),
    ("POST", "/detokenize", NEGATIVE, 20),
    ("POST", "/abort_request", POSITIVE, 20),
    ("POST", "/abort_request", NEGATIVE, 20),
    ("POST", "/flush_cache", POSITIVE, 2),
    ("GET", "/v1/models", POSITIVE, 2),
    ("GET", "/v1/models/{name}", POSITIVE, 20),
    ("GET", "/health", POSITIVE, 2),
    ("GET", "/health_generate", POSITIVE, 2),
    ("GET", "/metrics", POSITIVE, 2),
    ("GET", "/get_model_info", POSITIVE, 2),
    ("GET", "/get_server_info", POSITIVE, 2),
    ("GET", "/server_info", POSITIVE, 2),
]


def has_null(value: Any) -> bool:
    """Null counts as absent everywhere, which the document does not say."""
    if isinstance(value, dict | list):
        return any(map(has_null, value.values() if isinstance(value, dict) else value))
    return value is None


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def schema(server) -> BaseSchema:
    return schemathesis.openapi.from_dict(server.http.get("/openapi.json").raise_for_status().json())


def test_every_path_of_the_document_is_tried(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    documented = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert documented == {(method, path) for method, path, _, _ in OPERATIONS}


# What the server's threads draw in this very process, hypothesis takes for the strategy's doing.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize(
    ("method", "path", "mode", "num_tries"),
    [pytest.param(*each, id=f"{each[0]} {each[1]} {each[2].value}") for each in OPERATIONS],
)
def test_no_input_breaks_the_server_or_is_answered_as_the_document_does_not_say(
    server, schema, method, path, mode, num_tries
):
    """Statuses, content types and bodies are those declared, none is 5xx, and what breaks the document is refused."""

    @settings(
        max_examples=num_tries,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        assume(mode is POSITIVE or not has_null(case.body))
        case.call_and_validate(
            base_url=server.url,
            headers={"authorization": f"Bearer {KEY}"},
            excluded_checks=[positive_data_acceptance],  # a schema cannot say that ids lie within the vocabulary
        )

    send()
    assert httpx2.get(f"{server.url}/health").status_code == 200
