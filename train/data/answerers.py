"""Who answers chats: a model of this project, or a server that speaks the OpenAI protocol."""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2

from idlm_jax.decoding import SamplingParams, generate
from idlm_jax.decoding.method import Method
from idlm_jax.decoding.prompts import encode_prompt
from idlm_jax.model.language_model import LanguageModel
from train.data.regenerate import FAILED, Answer, Chat, Dialogue, LeftOut, RegenerateSettings
from train.data.tokenizer import IM_END

# Wrong address, wrong key: no request can succeed.
_HOPELESS = (401, 403, 404, 405)
# Busy or broken for now; every other status below 500 speaks of this one request.
_TRANSIENT = (408, 409, 425, 429)
_LONGEST_WAIT_S = 30.0


def answer_with_model(
    chats: Iterable[Chat], settings: RegenerateSettings, *, lm: LanguageModel, method: Method, batch_size: int
) -> Iterator[Dialogue]:
    """Answers by this project's decoder, `batch_size` chats at a time, turn by turn.

    Raises:
        ValueError: the model has no chat template.
    """
    tokenizer = lm.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(f"{settings.model} has no chat template, which answering chats needs")
    # Some base models list only <|endoftext|> as their end.
    stop_ids = tuple(token_id for text, token_id in tokenizer.get_vocab().items() if text == IM_END)
    remaining = iter(chats)
    while batch := [Dialogue(chat, settings) for chat in itertools.islice(remaining, batch_size)]:
        while asked := [dialogue for dialogue in batch if dialogue.is_open]:
            fitting: list[tuple[Dialogue, list[int]]] = []
            for dialogue in asked:
                text = tokenizer.apply_chat_template(dialogue.messages, tokenize=False, add_generation_prompt=True)
                ids = encode_prompt(lm, str(text), dialogue.line)
                if len(ids) + settings.max_tokens <= lm.config.max_position:
                    fitting.append((dialogue, ids))
                    continue
                detail = f"{len(ids)} tokens and max_tokens={settings.max_tokens} exceed {lm.config.max_position}"
                dialogue.take(LeftOut("prompt too long", detail))
            params = [
                SamplingParams(
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    seed=dialogue.seed,
                    stop_token_ids=stop_ids,
                )
                for dialogue, _ in fitting
            ]
            completions = generate(lm, [ids for _, ids in fitting], method, params, batch_size=batch_size)
            for (dialogue, _), completion in zip(fitting, completions, strict=True):
                dialogue.take(Answer(completion.text, completion.finish_reason == "stop"))
        yield from batch


def answer_with_endpoint(
    chats: Iterable[Chat],
    settings: RegenerateSettings,
    *,
    url: str,
    api_key: str | None,
    threads: int,
    retries: int = 5,
    first_wait_s: float = 1.0,
    timeout_s: float = 600.0,
) -> Iterator[Dialogue]:
    """Answers by `POST <url>/chat/completions`, `threads` chats at a time.

    A request that meets a dead connection, a timeout, 429 or 5xx is repeated after a wait that doubles. A chat
    whose request is refused, or fails to the end, is left out as failed.

    Raises:
        ValueError: the address or the key is wrong, so that no request can succeed.
    """
    url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def answer(chat: Chat) -> Dialogue:
        dialogue = Dialogue(chat, settings)
        while dialogue.is_open:
            body = {
                "model": settings.model,
                "messages": dialogue.messages,
                "temperature": settings.temperature,
                "max_tokens": settings.max_tokens,
                "seed": dialogue.seed,
            }
            dialogue.take(_ask(client, url, body, retries, first_wait_s))
        return dialogue

    remaining = iter(chats)
    waiting: deque[Future[Dialogue]] = deque()
    timeout, limits = httpx2.Timeout(timeout_s, connect=10.0), httpx2.Limits(max_connections=threads)
    with httpx2.Client(headers=headers, timeout=timeout, limits=limits) as client:
        pool = ThreadPoolExecutor(threads)
        try:
            # More are begun than run at once, so that one long answer does not hold up the others.
            for chat in itertools.islice(remaining, 4 * threads):
                waiting.append(pool.submit(answer, chat))
            while waiting:
                yield waiting.popleft().result()
                for chat in itertools.islice(remaining, 1):
                    waiting.append(pool.submit(answer, chat))
        finally:
            pool.shutdown(cancel_futures=True)


def _ask(client: httpx2.Client, url: str, body: dict[str, Any], retries: int, wait_s: float) -> Answer | LeftOut:
    problem = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(wait_s * 2 ** (attempt - 1), _LONGEST_WAIT_S))
        try:
            response = client.post(url, json=body)
        except httpx2.RequestError as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if response.is_success:
            return _read(response)
        problem = f"status {response.status_code}: {response.text[:200]}"
        if response.status_code in _HOPELESS:
            raise ValueError(
                f"{url} answered with {problem}; check the address, the key (OPENAI_API_KEY) and the model"
            )
        if response.status_code < 500 and response.status_code not in _TRANSIENT:
            return LeftOut(FAILED, problem)
    return LeftOut(FAILED, f"{retries + 1} attempts, the last: {problem}")


def _read(response: httpx2.Response) -> Answer | LeftOut:
    try:
        choice = response.json()["choices"][0]
        content = choice["message"]["content"]
        if not isinstance(content, str | None):
            raise TypeError("content is no text")
        return Answer(content or "", choice["finish_reason"] != "length")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return LeftOut(FAILED, f"no chat completion ({type(error).__name__}): {response.text[:200]}")
