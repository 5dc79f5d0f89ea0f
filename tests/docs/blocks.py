"""What the documents print: fenced blocks by language, and commands inside the text. CONTRIBUTING.md has the rules."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
# With one of these words a piece of inline code is a command.
PROGRAMS = ("idlm", "make", "python", "benchmarks/device/run.sh", ".venv/bin/pytest", ".venv/bin/pre-commit", "sbatch")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: file, relative to the repository.
        line: of the opening fence.
        language: first word behind the fence.
        options: the rest.
        body: what stands between the fences.
    """

    page: str
    line: int
    language: str
    options: str
    body: str


class Command(NamedTuple):
    """One simple command: no pipes, no redirections.

    Attributes:
        where: file and line, for messages.
        words: as the shell splits them, without variables set for it.
        is_whole: it stands in a block, so nothing may be missing; inside the text a command may be a part of one.
    """

    where: str
    words: list[str]
    is_whole: bool


def pages() -> list[Path]:
    """Everything that a reader is told to type from."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
    return [*files, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, options = match["info"].partition(" ")
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(str(page.relative_to(ROOT)), line, language, options, match["body"]))
    return found


def commands(page: Path) -> Iterator[Command]:
    """The commands of `bash` and `sh` blocks, and those inside the text."""
    name = page.relative_to(ROOT)
    for block in blocks(page):
        if block.language in ("bash", "sh"):
            for words in simple_commands(block.body):
                yield Command(f"{name}:{block.line}", words, True)
    text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
    for match in INLINE.finditer(text):
        code = " ".join(match[1].split())
        if code.split(" ")[0] in PROGRAMS and " " in code:
            for words in simple_commands(code):
                yield Command(f"{name}:{text.count(chr(10), 0, match.start()) + 1}", words, False)


def simple_commands(text: str) -> list[list[str]]:
    """Splits shell text at newlines, `;`, `&`, `|`; drops comments, redirections and `NAME=value` before a command."""
    found = []
    # A backslash at the end of a line continues it; a newline inside quotes is kept.
    for line in _logical_lines(text.replace("\\\n", " ")):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        pending = iter([*lexer, ";"])
        for word in pending:
            if word in (";", "&", "|", "&&", "||"):
                if words:
                    found.append(words)
                words = []
            elif word in (">", "<", ">>"):
                next(pending)
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)
    return found


def _logical_lines(text: str) -> Iterator[str]:
    line = ""
    for part in text.splitlines():
        line = f"{line}\n{part}" if line else part
        try:
            shlex.split(line, comments=True)
        except ValueError:  # a quote is open
            continue
        yield line
        line = ""
    assert not line, f"a quote is not closed: {line!r}"
