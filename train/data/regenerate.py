"""Chats -> the same chats with a model's own answers: what introspective training wants to be supervised by.

Every assistant turn is answered anew, in order, each after the model's own earlier answers, because packing
supervises all of them. A chat that ends with a user's turn is answered too.

`OUT.jsonl` gets a line per answered chat; `OUT.jsonl.run` the settings and a line per chat left out, with the
reason. Both are appended to line by line, so a killed command goes on where it was.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from train.data.records import Conversation, parse_record, read_lines

FAILED = "failed"
UNFINISHED = "unfinished"
# A server that is down fails every line: better to stop than to report the rest of the file as failed.
MAX_FAILED_IN_A_ROW = 20

Message = dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegenerateSettings:
    """What decides the answers; one output file has one of these.

    Attributes:
        model: folder, hub id, or the endpoint's name of the model.
        adapter: folder of a gated adapter; None without one.
        temperature: 0 is greedy.
        max_tokens: most tokens of one answer.
        seed: of the whole file; every answer draws from its own, which follows from this, its line and its turn.
        keep_unfinished: keep chats with an answer that `max_tokens` cut off; else they are left out.
    """

    model: str
    adapter: str | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    keep_unfinished: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1 or not 0 <= self.seed < 2**32:
            raise ValueError(
                f"{self.temperature=} must not be negative, {self.max_tokens=} must be positive and {self.seed=} "
                "lie in [0, 2**32)"
            )

    def seed_of(self, line: int, turn: int) -> int:
        """A seed in [0, 2**31) of its own for each answer, whatever is answered before or beside it."""
        return seed_of(self.seed, line, turn)


class Chat(NamedTuple):
    """A chat to answer.

    Attributes:
        line: its line in the input, from 1.
        prompts: for each answer, the messages between it and the answer before.
    """

    line: int
    prompts: tuple[tuple[Message, ...], ...]


class Answer(NamedTuple):
    """One answer: its text, and whether the model ended it (or `max_tokens` did)."""

    text: str
    is_finished: bool


class LeftOut(NamedTuple):
    """Why a chat has no answer."""

    reason: str
    detail: str


class Dialogue:
    """A chat on its way through its turns. Ask while `is_open`; then `left_out` or `messages` is the result."""

    def __init__(self, chat: Chat, settings: RegenerateSettings) -> None:
        self.line = chat.line
        self.messages: list[Message] = []
        self.is_finished = True
        self.left_out: LeftOut | None = None
        self.turn = 0
        self._prompts = chat.prompts
        self._settings = settings
        self._extend()

    @property
    def is_open(self) -> bool:
        return self.left_out is None and self.turn < len(self._prompts)

    @property
    def seed(self) -> int:
        return self._settings.seed_of(self.line, self.turn)

    def take(self, answer: Answer | LeftOut) -> None:
        """Continues with the answer to `messages`."""
        if isinstance(answer, LeftOut):
            self.left_out = answer
        elif not answer.is_finished and not self._settings.keep_unfinished:
            self.left_out = LeftOut(UNFINISHED, f"answer {self.turn + 1} reached max_tokens")
        elif not answer.text.strip():
            self.left_out = LeftOut("empty answer", f"answer {self.turn + 1}")
        else:
            self.messages.append({"role": "assistant", "content": answer.text})
            self.is_finished &= answer.is_finished
            self.turn += 1
            self._extend()

    def _extend(self) -> None:
        if self.turn < len(self._prompts):
            self.messages += self._prompts[self.turn]


# Answers chats and yields every one of them, closed, in the order given.
Answerer = Callable[[Iterable[Chat], RegenerateSettings], Iterator[Dialogue]]


@dataclasses.dataclass(frozen=True)
class RegenerateReport:
    """What became of the chats of the input (the first `limit` of them).

    Attributes:
        chats: of the input.
        answered: in the output file.
        unfinished: those of them with an answer cut off by `max_tokens`.
        resumed: chats that an earlier call had dealt with.
        left_out: line -> reason, of those not in the output file.
    """

    chats: int
    answered: int
    unfinished: int
    resumed: int
    left_out: dict[int, str]

    @property
    def reasons(self) -> dict[str, int]:
        return dict(sorted(Counter(self.left_out.values()).items()))


def regenerate(
    source: Path,
    out: Path,
    answer: Answerer,
    settings: RegenerateSettings,
    *,
    limit: int | None = None,
    show_progress: bool = False,
) -> RegenerateReport:
    """Answers every chat of `source` that `out` does not hold yet.

    Chats that failed earlier are tried again; all others that were left out are not. Lines are written in the
    order of the input, so an uninterrupted run and a resumed one write the same file (where the model itself
    repeats its answers), except that what failed first comes last.

    Args:
        source: chat JSONL.
        out: JSONL with `line`, `messages` and `finish_reason`; `idlm pack` reads it.
        answer: see `Answerer`.
        settings: must be those that `out` was begun with.
        limit: answer the first so many chats only.
        show_progress: draw a bar.

    Raises:
        ValueError: a line of the input is broken; `out` is something else or was begun with other settings; or
            `MAX_FAILED_IN_A_ROW` chats failed one after the other.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be positive")
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the input; choose another file for the answers")
    chats = read_chats(source)[:limit]
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_name(out.name + ".run")
    header = dataclasses.asdict(settings) | {"input_sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    finished, left_out = _resume(out, log, header)
    todo = [chat for chat in chats if chat.line not in finished and left_out.get(chat.line, FAILED) == FAILED]
    resumed, failed_in_a_row = len(chats) - len(todo), 0
    with (
        out.open("a", encoding="utf-8") as out_file,
        log.open("a", encoding="utf-8") as log_file,
        tqdm(total=len(chats), initial=resumed, desc="regenerate", unit="chat", disable=not show_progress) as bar,
    ):
        for dialogue in answer(todo, settings):
            bar.update()
            line = dialogue.line
            if dialogue.left_out is None:
                finish_reason = "stop" if dialogue.is_finished else "length"
                append_record(out_file, {"line": line, "messages": dialogue.messages, "finish_reason": finish_reason})
                finished[line], failed_in_a_row = dialogue.is_finished, 0
                left_out.pop(line, None)
                continue
            reason, detail = dialogue.left_out
            append_record(log_file, {"line": line, "reason": reason, "detail": detail})
            left_out[line] = reason
            failed_in_a_row = failed_in_a_row + 1 if reason == FAILED else 0
            if failed_in_a_row == MAX_FAILED_IN_A_ROW:
                raise ValueError(
                    f"{failed_in_a_row} chats in a row failed, the last with: {detail}; what is answered is in {out}, "
                    "and the same command goes on from there"
                )
    wanted = {chat.line for chat in chats}
    unfinished = [line for line, is_finished in finished.items() if not is_finished and line in wanted]
    return RegenerateReport(
        chats=len(chats),
        answered=len(wanted & finished.keys()),
        unfinished=len(unfinished),
        resumed=resumed,
        left_out={line: reason for line, reason in sorted(left_out.items()) if line in wanted},
    )


def read_chats(source: Path) -> list[Chat]:
    """All chats of a JSONL file; its answers, if it has any, are not kept.

    Raises:
        ValueError: a line is no chat, or has an answer to nothing; names it.
    """
    chats = []
    for line, text in read_lines(source):
        where = f"{source}:{line}"
        conversation = parse_record(text, name=where, where=where)
        if not isinstance(conversation, Conversation):
            raise ValueError(f"{where}: holds tokens; only chats (messages) can be answered anew")
        prompts: list[list[Message]] = [[]]
        for message in conversation.messages:
            if message["role"] != "assistant":
                prompts[-1].append(message)
            elif not prompts[-1]:
                raise ValueError(f"{where}: an assistant's turn follows no other turn, so there is nothing to answer")
            else:
                prompts.append([])
        chats.append(Chat(line, tuple(tuple(prompt) for prompt in prompts if prompt)))
    if not chats:
        raise ValueError(f"{source} holds no chat")
    return chats


def _resume(out: Path, log: Path, header: dict[str, Any]) -> tuple[dict[int, bool], dict[int, str]]:
    """What is done: line -> whether finished, and line -> why it was left out. Begins the log if there is none."""
    answered, logged = complete_records(out), complete_records(log)
    if not logged:
        if answered:
            raise ValueError(f"{out} exists and {log.name} beside it does not: choose another output file")
        log.write_text(json.dumps(header) + "\n", encoding="utf-8")
    elif logged[0] != header:
        changed = [f"{key}={logged[0].get(key)!r} (now {value!r})" for key, value in header.items()]
        changed = [text for text, key in zip(changed, header, strict=True) if logged[0].get(key) != header[key]]
        raise ValueError(f"{out} was begun with {', '.join(changed)}: choose another output file, or delete both")
    finished = {record["line"]: record["finish_reason"] == "stop" for record in answered}
    left_out = {record["line"]: record["reason"] for record in logged[1:] if record["line"] not in finished}
    return finished, left_out


def seed_of(seed: int, line: int, turn: int) -> int:
    """A seed in [0, 2**31) of its own for each line and turn of a file."""
    digest = hashlib.sha256(f"{seed} {line} {turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def complete_records(path: Path) -> list[dict[str, Any]]:
    """Records of a file that a kill may have torn; the torn end is cut off."""
    if not path.exists():
        return []
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        path.write_bytes(whole + newline)
    try:
        return [json.loads(line) for line in whole.split(b"\n") if line]
    except ValueError as error:
        raise ValueError(f"{path} was not written by this command: {error}") from None


def append_record(file: Any, record: dict[str, Any]) -> None:
    """Adds a line, at once."""
    # ASCII escapes: a server may send half a surrogate pair, which UTF-8 cannot encode.
    file.write(json.dumps(record) + "\n")
    file.flush()
