"""What a suite is: benchmarks, who runs each of them, and how answers are sampled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from omegaconf import OmegaConf

FOLDER = Path(__file__).parent
Model = TypeVar("Model", bound=pydantic.BaseModel)


class Strict(pydantic.BaseModel):
    """Fields as written; an unknown one is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Sampling(Strict):
    """How every answer is sampled; names and meanings are the server's."""

    temperature: float = pydantic.Field(ge=0)
    top_k: int | None = pydantic.Field(None, ge=1)
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    max_tokens: int = pydantic.Field(ge=1)


class Benchmark(Strict):
    """One row of the table.

    Attributes:
        name: for `--tasks`.
        title: as the literature writes it.
        harness: who runs it; None if none of them can.
        task: the harness's own name for it.
        metric: key of the score in lm-eval's results; evalscope's reports name their own.
        num_fewshot: examples in the prompt; None for the task's own.
        dataset_args: evalscope's `--dataset-args` for the task.
        runs_code: programs that the model writes are executed.
        note: what a reader must know to compare the score.
    """

    name: str = pydantic.Field(pattern=r"^[a-z0-9_]+$")
    title: str
    harness: Literal["lm_eval", "evalscope"] | None
    task: str = ""
    metric: str = ""
    num_fewshot: int | None = pydantic.Field(None, ge=0)
    dataset_args: dict[str, Any] = {}
    runs_code: bool = False
    note: str = ""

    @pydantic.model_validator(mode="after")
    def _is_complete(self) -> "Benchmark":
        if self.harness is not None and not self.task:
            raise ValueError(f"{self.name}: a harness needs its name for the task")
        if self.harness == "lm_eval" and not self.metric:
            raise ValueError(f"{self.name}: lm-eval reports several metrics, name one")
        if self.runs_code and self.harness != "evalscope":
            raise ValueError(f"{self.name}: programs that a model writes run under evalscope only")
        return self


class Suite(Strict):
    """Benchmarks that are sampled alike.

    Attributes:
        name: in the table's title.
        api: chat applies the model's template; completions sends prompts as they are, for base models.
        include: folder of task definitions of one's own, for lm-eval.
    """

    name: str
    api: Literal["chat", "completions"] = "chat"
    include: Path | None = None
    sampling: Sampling
    benchmarks: tuple[Benchmark, ...] = pydantic.Field(min_length=1)

    def choose(self, names: Sequence[str] | None) -> list[Benchmark]:
        """The benchmarks of these names, in the suite's order; all without names.

        Raises:
            ValueError: the suite has no such benchmark.
        """
        known = [each.name for each in self.benchmarks]
        if unknown := sorted(set(names or ()) - set(known)):
            raise ValueError(f"suite {self.name} has no {', '.join(unknown)}; it has {', '.join(known)}")
        return [each for each in self.benchmarks if names is None or each.name in names]


def load_suite(name_or_path: str) -> Suite:
    """Reads a suite of this package by name, or a YAML file of one's own.

    Raises:
        ValueError: neither, or the file is no suite.
    """
    ours = {path.stem: path for path in sorted((FOLDER / "suites").glob("*.yaml"))}
    path = ours.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise ValueError(f"--suite {name_or_path!r} is neither a YAML file nor one of {', '.join(ours)}")
    suite = read_yaml(path, Suite)
    names = [each.name for each in suite.benchmarks]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two benchmarks have the same name")
    if suite.include is not None:
        suite = suite.model_copy(update={"include": (path.parent / suite.include).resolve()})
    return suite


def read_yaml(path: Path, kind: type[Model]) -> Model:
    """Reads a YAML file as `kind`.

    Raises:
        ValueError: it is none; the message names the file and the key.
    """
    try:
        return kind.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
