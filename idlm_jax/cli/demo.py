"""`idlm demo`: the whole way through in five minutes on a CPU, on real text, with nothing downloaded.

Loads the tiny model of the repository, gives it a fresh gated adapter and a Markov head, trains both for introspective
consistency on the Python standard library, and shows what they buy: the same tokens in fewer forwards.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from tqdm import tqdm

import idlm_jax
from idlm_jax.cli.checkout import CHECKOUT, import_from_checkout
from idlm_jax.cli.evaluate import heldout_means
from idlm_jax.cli.plots import plot_demo
from idlm_jax.cli.tables import method_table
from idlm_jax.decoding.compare import compare_methods
from idlm_jax.decoding.generate import decode_text

PROMPTS = [
    "def __init__(self, ",
    "    if not isinstance(value, ",
    "for name in sorted(",
    "    try:\n        import ",
]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run, the plot and the exports; replaced.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(help="Training steps of the adapter.", min=1)] = 100,
    model: Annotated[Path, typer.Option(help="Folder of the base model.")] = CHECKOUT / "assets" / "tiny-qwen3-py",
    trained: Annotated[
        Path, typer.Option(help="Adapter trained longer by the committed recipe, shown beside the demo's own.")
    ] = CHECKOUT / "assets" / "tiny-qwen3-py-isd",
) -> None:
    """Converts the tiny model, trains it briefly, and compares AR with ISD. Five minutes on two cores.

    Everything runs from the checkout and on text that is at hand; README.md says what each line means.
    """
    started = time.perf_counter()
    console = Console()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - started:5.0f} s[/dim]  {text}", highlight=False)

    loop: Any = import_from_checkout("train.loop")
    shutil.rmtree(out, ignore_errors=True)
    base = idlm_jax.load(model, dtype="float32")
    say(f"loaded {model.name}: {base.config.num_params:,} parameters, a Qwen3 that has read Python")
    first = next(iter(idlm_jax.generate(base, PROMPTS[:1], idlm_jax.ISD(stride=4), _greedy(32))))
    say(f"it decodes by ISD before any training, at {first.tokens_per_forward:.2f} tokens per forward:")
    console.print(Panel(escape(PROMPTS[0] + first.text), expand=False))

    config = _train_config(out, model, steps)
    data: Any = import_from_checkout("train.data")
    report = data.build_dataset(data.DatasetSettings(**dataclasses.asdict(config.dataset.build)), config.dataset.path)
    say(f"read the standard library: {report.train.tokens:,} tokens to train on, {report.heldout.tokens:,} held out")
    untrained = heldout_means(base, Path(config.dataset.path), block_length=config.block_length, limit=4)["acceptance"]
    say(f"training a gated adapter and a Markov head for {steps} steps on its source (MASK rows only; base frozen)")
    losses, acceptance = _train(loop, config, steps)
    acceptance.insert(0, (0, untrained))
    say(f"held-out acceptance of a draft: {acceptance[0][1]:.3f} untrained, {acceptance[-1][1]:.3f} trained")

    adapter = out / config.run_name / "adapter"
    lm = idlm_jax.load(model, dtype="float32", adapter=adapter)
    prompts = data.heldout_prompts(config.dataset.path, 16, 32)
    methods = [idlm_jax.ISD(stride=2), idlm_jax.ISD(stride=4), idlm_jax.ISD(stride=4, branches=4)]
    reports = compare_methods(lm, prompts, methods, _greedy(64))
    console.print(
        method_table("with the adapter trained just now, 16 held-out prompts, greedy", reports, is_greedy=True)
    )
    shown = lm
    if trained.is_dir():
        shown = idlm_jax.load(model, dtype="float32", adapter=trained)
        reports = compare_methods(shown, prompts, methods, _greedy(64))
        console.print(
            method_table(f"with {trained.name}, trained longer by the committed recipe", reports, is_greedy=True)
        )
    console.print(
        "On a CPU every row of a forward costs time, so fewer forwards are no faster here; on an accelerator that "
        "waits for memory they are the cost. README.md says what has been measured.",
        style="dim",
    )
    _side_by_side(console, shown)

    exported = out / "hf"
    idlm_jax.export_hf(base, exported)
    again = idlm_jax.load(exported, dtype="float32", adapter=adapter)
    same = [c.token_ids for c in idlm_jax.generate(again, PROMPTS, sampling=_greedy(32))] == [
        c.token_ids for c in idlm_jax.generate(lm, PROMPTS, sampling=_greedy(32))
    ]
    say(f"exported safetensors to {exported} and loaded them back: completions {'identical' if same else 'DIFFER'}")
    plot = plot_demo(out / "demo.png", losses, acceptance, reports)
    say(f"plot: {plot}")
    if not same or any(report.num_identical != len(prompts) for report in reports):
        console.print("[red]ISD and AR, or the export and its source, differ: please report this[/red]")
        raise typer.Exit(1)


def _greedy(max_tokens: int) -> idlm_jax.SamplingParams:
    return idlm_jax.SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def _train_config(out: Path, model: Path, steps: int) -> Any:
    """The committed adapter recipe, shortened."""
    config: Any = import_from_checkout("train.config")
    recipe = config.load_config(CHECKOUT / "configs" / "tiny_markov_cpu.yaml")
    build = dataclasses.replace(recipe.dataset.build, vocab_size=None, tokenizer=str(model))
    return dataclasses.replace(
        recipe,
        run_name="adapter",
        output_dir=str(out),
        init_from=str(model),
        dataset=dataclasses.replace(recipe.dataset, path=str(out / "data"), build=build),
        steps=steps,
        save_every=steps,
        eval_every=max(1, steps // 5),
        batch_size=8,
        eval_batches=4,
        log_every=1,
    )


def _train(loop: Any, config: Any, steps: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Runs the training under a progress bar; returns noisy loss and held-out acceptance over steps."""
    with tqdm(total=steps, unit="step", desc="introspective training") as bar:

        def on_step(step: int, record: Any) -> None:
            bar.update(step - bar.n)
            bar.set_postfix_str(f"CE noisy {record['ce_noisy']:.3f}, clean {record['ce_clean']:.3f}")

        def echo(line: str) -> None:
            if "acceptance" in line:
                bar.write(f"         {line}")

        loop.run_training(config, on_step=on_step, echo=echo)
    records = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["step"], r["ce_noisy"]) for r in records if r["kind"] == "train"]
    return losses, [(r["step"], r["acceptance"]) for r in records if r["kind"] == "eval"]


def _side_by_side(console: Console, lm: idlm_jax.LanguageModel) -> None:
    """The same completions by AR and by ISD, ISD's coloured by forward: one colour, one forward."""
    colours, width = ["cyan", "yellow"], max(40, min(console.width // 2 - 1, 64))
    for prompt in PROMPTS:
        ar = idlm_jax.generate(lm, [prompt], idlm_jax.AR(), _greedy(40))[0]
        steps = list(idlm_jax.stream_tokens(lm, prompt, idlm_jax.ISD(stride=4), _greedy(40)))
        text = "".join(f"[{colours[i % 2]}]{escape(decode_text(lm, ids))}[/]" for i, ids in enumerate(steps))
        left = Panel(escape(prompt + ar.text), title=f"AR: {ar.num_forwards} forwards", width=width)
        right = Panel(escape(prompt) + text, title=f"ISD: {len(steps)} forwards", width=width)
        console.print(Columns([left, right]))
