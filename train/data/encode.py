"""Documents -> chunks: pieces of at most `max_seq_len` tokens, each a document of its own to the model."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from train.data.corpus import Conversation, Document, TextFile
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
    """Chunks in the order of their documents.

    Attributes:
        chunks: see `Chunk`.
        truncated: conversations cut at `max_seq_len`.
        dropped: documents of which nothing supervised is left, by reason.
    """

    chunks: tuple[Chunk, ...]
    truncated: int
    dropped: dict[str, int]


def encode_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_seq_len: int,
    show_progress: bool = False,
    title: str = "encode",
) -> EncodedDocuments:
    """Encodes both kinds of documents; files first, then conversations.

    A file becomes its ids and the end-of-document id, cut into consecutive pieces, all of it supervised. A
    conversation is never cut into pieces, since a later piece would have lost its prompt: it is truncated.

    Args:
        documents: of one side of the split.
        tokenizer: its special tokens are not recognised inside files: text that spells one stays text.
        max_seq_len: longest chunk.
        show_progress: draw a bar.
        title: its label.

    Raises:
        ValueError: there are conversations and the tokenizer has no chat template, or one that rewrites a
            conversation's past when a turn is added.
    """
    files = [document for document in documents if isinstance(document, TextFile)]
    chats = [document for document in documents if isinstance(document, Conversation)]
    chunks: list[Chunk] = []
    truncated, dropped = 0, dict.fromkeys(("no answer", "special token in text"), 0)
    with tqdm(total=len(documents), desc=title, unit="doc", disable=not show_progress) as bar:
        for tokens in _encode_files(files, tokenizer):
            bar.update()
            pieces = [tokens[start : start + max_seq_len] for start in range(0, len(tokens), max_seq_len)]
            # A last piece of one token has nothing to predict it from, and predicts nothing.
            chunks += [Chunk(piece, np.ones(len(piece), np.bool_)) for piece in pieces if len(piece) > 1]
        for chat in chats:
            bar.update()
            if any(text in message["content"] for text in special_texts(tokenizer) for message in chat.messages):
                dropped["special token in text"] += 1
                continue
            chunk = encode_conversation(chat, tokenizer)
            truncated += len(chunk.tokens) > max_seq_len
            chunk = Chunk(chunk.tokens[:max_seq_len], chunk.is_response[:max_seq_len])
            if chunk.is_response.any():
                chunks.append(chunk)
            else:
                dropped["no answer"] += 1
    return EncodedDocuments(tuple(chunks), truncated, {reason: count for reason, count in dropped.items() if count})


def _encode_files(files: Sequence[TextFile], tokenizer: PreTrainedTokenizerFast) -> Iterable[Int[np.ndarray, " T"]]:
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
