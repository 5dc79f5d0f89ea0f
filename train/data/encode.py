"""Documents -> chunks: pieces of at most `max_seq_len` tokens, each a document of its own to the model."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from train.data.corpus import Document, TextFile
from train.data.records import Conversation, TokenSequence
from train.data.settings import TooLong
from train.data.tokenizer import end_of_document_id, special_texts

# Documents handed to the tokenizer's threads at a time: enough to keep them busy, few enough to move a bar.
ENCODE_BATCH = 128


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of one document.

    Attributes:
        tokens: ids, at most `max_seq_len` of them.
        is_response: True where the token may be masked and is supervised.
    """

    tokens: Int[np.ndarray, " T"]
    is_response: Bool[np.ndarray, " T"]


@dataclasses.dataclass(frozen=True)
class EncodedDocuments:
    """Chunks in the order of their documents. `num_tokens` = tokens of the chunks + `sum(lost_tokens.values())`.

    Attributes:
        chunks: see `Chunk`.
        num_tokens: of all documents; of a conversation, up to the end of its last answer.
        truncated: conversations and other half-supervised documents cut at `max_seq_len`.
        dropped: documents of which nothing is left, by reason.
        lost_tokens: tokens that are in no chunk, by reason.
    """

    chunks: tuple[Chunk, ...]
    num_tokens: int
    truncated: int
    dropped: dict[str, int]
    lost_tokens: dict[str, int]


def encode_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_seq_len: int,
    too_long: TooLong = "cut",
    show_progress: bool = False,
    title: str = "encode",
) -> EncodedDocuments:
    """Encodes all kinds of documents: files first, then conversations, then token sequences.

    A file becomes its ids and the end-of-document id, all of it supervised. One that is too long is cut into
    consecutive pieces, and so is a token sequence that is supervised throughout. Everything else is truncated
    instead, since a later piece would have lost its prompt.

    Args:
        documents: of one side of the split.
        tokenizer: its special tokens are not recognised inside files: text that spells one stays text.
        max_seq_len: longest chunk.
        too_long: what becomes of a longer document: "cut" as above, "drop" it, or raise an "error".
        show_progress: draw a bar.
        title: its label.

    Raises:
        ValueError: a token sequence holds an id that the tokenizer lacks, or MASK; a document is too long and
            that is an error; or there are conversations and the tokenizer has no chat template, or one that
            rewrites a conversation's past when a turn is added.
    """
    chunks: list[Chunk] = []
    num_tokens = truncated = 0
    dropped, lost = Counter[str](), Counter[str]()
    with tqdm(total=len(documents), desc=title, unit="doc", disable=not show_progress) as bar:
        for name, chunk, is_text in _encode_each(documents, tokenizer):
            bar.update()
            if chunk is None:
                dropped["special token in text"] += 1
                continue
            length = len(chunk.tokens)
            num_tokens += length
            if length > max_seq_len and too_long == "error":
                raise ValueError(f"{name}: {length} tokens do not fit {max_seq_len=}; give more, or cut or drop")
            if length > max_seq_len and too_long == "drop":
                dropped["too long"] += 1
                lost["too long"] += length
                continue
            if is_text:
                pieces = _pieces(chunk, max_seq_len)
                chunks += pieces
                # A last piece of one token has nothing to predict it from, and predicts nothing.
                lost["last token alone"] += length - sum(len(piece.tokens) for piece in pieces)
                dropped["one token"] += not pieces
                continue
            truncated += length > max_seq_len
            chunk = Chunk(chunk.tokens[:max_seq_len], chunk.is_response[:max_seq_len])
            lost["cut off"] += length - len(chunk.tokens)
            if chunk.is_response.any():
                chunks.append(chunk)
            else:
                dropped["no answer"] += 1
                lost["no answer"] += len(chunk.tokens)
    # Unary plus: without the reasons that did not occur.
    return EncodedDocuments(tuple(chunks), num_tokens, truncated, dict(+dropped), dict(+lost))


def _pieces(chunk: Chunk, max_seq_len: int) -> list[Chunk]:
    cuts = [slice(start, start + max_seq_len) for start in range(0, len(chunk.tokens), max_seq_len)]
    return [Chunk(chunk.tokens[cut], chunk.is_response[cut]) for cut in cuts if len(chunk.tokens[cut]) > 1]


def _encode_each(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, Chunk | None, bool]]:
    """Yields (name, tokens of any number, whether it is text that may be cut into pieces)."""
    files = [document for document in documents if isinstance(document, TextFile)]
    for file, tokens in zip(files, _encode_files(files, tokenizer), strict=True):
        yield file.name, Chunk(tokens, np.ones(len(tokens), np.bool_)), True
    special = special_texts(tokenizer)
    for document in documents:
        if isinstance(document, Conversation):
            is_clean = not any(text in message["content"] for text in special for message in document.messages)
            yield document.name, encode_conversation(document, tokenizer) if is_clean else None, False
    for document in documents:
        if isinstance(document, TokenSequence):
            _check_ids(document, tokenizer)
            chunk = Chunk(document.tokens, document.is_response)
            yield document.name, chunk, bool(document.is_response.all())


def _check_ids(document: TokenSequence, tokenizer: PreTrainedTokenizerFast) -> None:
    largest = int(document.tokens.max())
    if largest >= len(tokenizer):
        raise ValueError(
            f"{document.name}: token id {largest} is outside the tokenizer's vocabulary of {len(tokenizer)}; "
            "give the tokenizer that made these tokens"
        )
    if tokenizer.mask_token_id is not None and (document.tokens == tokenizer.mask_token_id).any():
        raise ValueError(f"{document.name}: holds the MASK id {tokenizer.mask_token_id}, which only training may feed")


def _encode_files(files: Sequence[TextFile], tokenizer: PreTrainedTokenizerFast) -> Iterator[Int[np.ndarray, " T"]]:
    if not files:
        return  # a tokenizer without an end-of-document token still serves chats
    end = end_of_document_id(tokenizer)
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True
    for start in range(0, len(files), ENCODE_BATCH):
        texts = [file.text for file in files[start : start + ENCODE_BATCH]]
        for encoding in plain.encode_batch_fast(texts, add_special_tokens=False):
            yield np.asarray([*encoding.ids, end], np.int32)


def encode_conversation(chat: Conversation, tokenizer: PreTrainedTokenizerFast) -> Chunk:
    """Renders a conversation and marks what the assistant says, its end token included.

    The text is encoded in the pieces in which decoding meets it (prompt up to the generation prompt; answer),
    so no token straddles the point where generation starts. What follows the last answer is left out: no
    supervised position sees it.

    Args:
        chat: no message may spell a special token.
        tokenizer: with a chat template that closes a turn with a special token.

    Returns:
        The whole conversation, of any length; empty when the assistant says nothing.

    Raises:
        ValueError: the tokenizer has no chat template; adding a turn changes how the turns before it are
            rendered; or an answer is not closed by a special token.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"{chat.name}: the tokenizer has no chat template, which conversations need")
    messages = list(chat.messages)
    rendered = _render(tokenizer, messages, add_generation_prompt=False)
    special = re.compile("|".join(map(re.escape, special_texts(tokenizer))) or r"(?!)")
    tokens: list[int] = []
    is_response: list[bool] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:index], add_generation_prompt=True)
        if not rendered.startswith(prompt) or len(prompt) < done:
            raise ValueError(
                f"{chat.name}: the chat template renders the first {index} messages differently once the "
                f"answer follows, so its start cannot be found: {prompt[-60:]!r} against "
                f"{rendered[max(0, len(prompt) - 60) : len(prompt)]!r}"
            )
        turn_end = special.search(rendered, len(prompt))
        if turn_end is None:
            raise ValueError(f"{chat.name}: no special token closes message {index}; the chat template must add one")
        for text, is_answer in (
            (rendered[done : len(prompt)], False),
            (rendered[len(prompt) : turn_end.end()], True),
        ):
            ids = tokenizer.encode(text, add_special_tokens=False)
            tokens += ids
            is_response += [is_answer] * len(ids)
        done = turn_end.end()
    return Chunk(np.asarray(tokens, np.int32), np.asarray(is_response, np.bool_))


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    if not messages and not add_generation_prompt:
        return ""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text
