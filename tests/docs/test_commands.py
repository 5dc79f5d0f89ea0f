"""Every command that the documents print is one that its program takes; every block says whether it is run."""

import pytest

from tests.docs.blocks import Command, blocks, commands, pages, simple_commands
from tests.docs.parsing import fault

LANGUAGES = {"bash", "sh", "python", "py", "text"}
TITLES = {"", 'title="in another terminal"'}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_every_command_of_a_page_parses(page):
    faults = {" ".join(each.words): f"{each.where}: {said}" for each in commands(page) if (said := fault(each))}
    assert faults == {}


def test_every_block_says_what_it_is():
    every = [block for page in pages() for block in blocks(page)]
    assert {block.language for block in every} <= LANGUAGES, [b for b in every if b.language not in LANGUAGES]
    assert {block.options for block in every} <= TITLES
    assert sum(block.language == "bash" for block in every) >= 5


def test_python_blocks_compile():
    for page in pages():
        for block in blocks(page):
            if block.language in ("python", "py"):
                compile(block.body, f"{block.page}:{block.line}", "exec")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["idlm", "generat"], "No such command"),
        (["idlm", "generate", "m", "--strid", "4"], "No such option"),
        (["idlm", "generate"], "Missing argument"),
        (["idlm", "generate", "m", "--max-tokens", "many"], "--max-tokens"),
        (["python", "-m", "serve", "--modelpath", "m"], "No such option"),
        (["python", "-m", "servr"], "no such module"),
        (["python", "-m", "train", "configs/tiny_ar_cpu.yaml", "stepz=5"], "stepz"),
        (["python", "-m", "train", "configs/tiny_ar_cpu.yaml", "--plans"], "unrecognized arguments"),
        (["python", "-m", "train", "configs/none.yaml"], "no such file"),
        (["python", "-m", "benchmarks.compiled", "--fast"], "takes no arguments"),
        (["benchmarks/device/run.sh", "kernel"], "invalid choice"),
        (["make", "tests"], "no such target"),
        (["pip", "install", ".[gpus]"], "no such extra"),
        ([".venv/bin/pytest", "tests/nothing"], "no such"),
        (["frobnicate"], "does not know"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_is_found(words, said):
    assert said in (fault(Command("here", words, True)) or "")


def test_a_command_inside_the_text_may_be_a_part_but_not_wrong():
    assert fault(Command("here", ["idlm", "generate", "--stride"], False)) is None
    assert fault(Command("here", ["idlm", "generate", "--strid"], False)) is not None


def test_shell_text_is_split_into_its_commands():
    text = "A=1 x 'a b' \\\n  --c | y > file; z &  # no\n# all of it\nw -c \"two\nlines\" && v\n"
    assert simple_commands(text) == [["x", "a b", "--c"], ["y"], ["z"], ["w", "-c", "two\nlines"], ["v"]]
