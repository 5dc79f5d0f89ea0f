"""ISD again, for one request, in plain Python and without a KV cache: the definition the compiled loop must match.

Every forward runs the whole causal sequence [committed, drafts, MASK ...] from position 0. Keys and the order of draws
are those of the design, so greedy and sampled runs can both be compared token by token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idlm_jax.decoding.method import AR, ISD
from idlm_jax.decoding.placement import DISCOUNT
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.attention import causal_attend
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.model.transformer import Qwen3
from pallas_kernels.verify import Purpose


@dataclasses.dataclass
class TwinResult:
    token_ids: list[int]
    num_forwards: int


def padded(width: int) -> int:
    """A width that many sequences share, so that few programs are compiled."""
    return -(-width // 64) * 64


@functools.partial(jax.jit, static_argnums=0)
def outputs(
    graph: nnx.GraphDef[Qwen3], params: nnx.State, tokens: jax.Array, is_mask: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Hidden states and logits of one whole sequence."""
    module = nnx.merge(graph, params)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, _ = module.hidden_states(tokens, positions, causal_attend(visible), lora_gate=is_mask)
    return hidden[0], module.logits(hidden)[0]


def dense_probs(logits: np.ndarray, params: SamplingParams, mask_id: int | None) -> np.ndarray:
    """Temperature, top-k, top-p of one row, by sorting a Python list."""
    logits = logits.astype(np.float64).copy()
    if mask_id is not None:
        logits[mask_id] = -np.inf
    if params.temperature == 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    scaled = logits / params.temperature
    kept = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if params.top_k:
        kept = kept[: params.top_k]
    probs = np.zeros_like(scaled)
    probs[kept] = np.exp(scaled[kept] - scaled.max())
    probs /= probs.sum()
    nucleus, mass = [], 0.0
    for token in kept:
        nucleus.append(token)
        mass += probs[token]
        if mass >= params.top_p and params.top_p < 1:
            break
    final = np.zeros_like(probs)
    final[nucleus] = probs[nucleus]
    return final / final.sum()


def shaped(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], generated: list[int], stops: set[int]
) -> np.ndarray:
    """The logits of the token behind prompt and completion, one id after the other."""
    x = logits.astype(np.float64).copy()
    for token, bias in params.logit_bias:
        x[token] += bias
    for token in range(len(x)):
        times = generated.count(token)
        if times or token in prompt:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
        if token in stops and len(generated) < params.min_tokens:
            x[token] = -np.inf
    if params.temperature > 0 and params.min_p > 0:
        x[np.exp((x - x.max()) / params.temperature) < params.min_p] = -np.inf
    return x


def draw(probs: np.ndarray, params: SamplingParams, position: int, purpose: Purpose) -> int:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(params.seed), position), purpose)
    with np.errstate(divide="ignore"):
        return int(jax.random.categorical(key, jnp.log(jnp.asarray(probs, jnp.float32))))


def _uniform(params: SamplingParams, position: int) -> float:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(params.seed), position), Purpose.ACCEPT)
    return float(jax.random.uniform(key))


def run_twin(lm: LanguageModel, prompt: list[int], method: AR | ISD, params: SamplingParams) -> TwinResult:
    """Decodes one prompt by definition."""
    mask_id = lm.config.mask_token_id
    module = nnx.merge(lm.graph, lm.params)
    width = padded(len(prompt) + params.max_tokens + 2 * method.num_masks)
    causal = jnp.tril(jnp.ones((width, width), bool))[None]

    def rows(sequence: list[int], num_masks: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.zeros((1, width), np.int32)
        is_mask = np.zeros((1, width), bool)
        tokens[0, : len(sequence)] = sequence
        is_mask[0, len(sequence) : len(sequence) + num_masks] = True
        tokens[is_mask] = mask_id or 0
        hidden, logits = outputs(lm.graph, lm.params, jnp.asarray(tokens), jnp.asarray(is_mask), causal)
        return np.asarray(hidden), np.asarray(logits)

    def corrected(logits: np.ndarray, hidden: np.ndarray, before: int) -> np.ndarray:
        """What the MASK row says when the token before the one it predicts is known."""
        if lm.config.markov_rank is None:
            return logits
        both = np.concatenate([normed(hidden), normed(np.asarray(module.embedding[...])[before])])
        mix, shrink, columns = (
            np.asarray(each[...], np.float64)
            for each in (module.markov.mix, module.markov.shrink, module.markov.columns)
        )
        inner = both @ mix
        return logits + columns @ ((inner / (1 + np.exp(-inner))) @ shrink)

    def normed(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x / np.sqrt(np.mean(x**2) + lm.config.norm_eps)

    def probs(row: np.ndarray, before: list[int]) -> np.ndarray:
        return dense_probs(shaped(row, params, prompt, before[len(prompt) :], stops), params, mask_id)

    def masks_behind(confidence: list[float]) -> list[int]:
        """MASKs behind each prefix of the drafts; those that get a row are most likely to be of use."""
        every = range(len(confidence) + 1)
        if isinstance(method, AR):
            return [0]
        if not method.places_masks:
            return [method.num_masks * (method.branches != 1 or prefix == len(confidence)) for prefix in every]
        ends = [np.prod(confidence[:j]) * (1 - confidence[j]) for j in range(len(confidence))]
        ends.append(np.prod(confidence))
        masks = [(prefix, depth) for prefix in every for depth in range(method.num_masks)]
        survives = DISCOUNT * float(np.mean(confidence or 0.0))
        masks.sort(key=lambda mask: -ends[mask[0]] * survives ** mask[1])
        chosen = [prefix for prefix, _ in masks[: method.window_len - 1 - len(confidence)]]
        return [chosen.count(prefix) for prefix in every]

    committed, drafts, draft_probs, forwards = list(prompt), [], [], 0
    confidence: list[float] = []
    end, stops = len(prompt) + params.max_tokens, {*params.stop_token_ids, *lm.config.eos_token_ids}
    while True:
        _, logits = rows(committed + drafts, method.num_masks)
        forwards += 1
        before, lengths = list(committed), masks_behind(confidence)
        new: list[int] = []
        for draft, q in zip(drafts, draft_probs, strict=True):
            position = len(committed) + len(new)
            p = probs(logits[position - 1], committed + new)
            if _uniform(params, position) * q[draft] < p[draft]:
                new.append(draft)
                continue
            residual = np.maximum(p - q, 0)
            new.append(draw(residual / residual.sum(), params, position, Purpose.COMMIT))
            break
        else:
            position = len(committed) + len(drafts)
            p = probs(logits[position - 1], committed + new)
            new.append(draw(p, params, position, Purpose.COMMIT))
        accepted = drafts[: len(new) - 1]
        for token in new:
            committed.append(token)
            if token in stops or len(committed) == end:
                return TwinResult(committed[len(prompt) :], forwards)
        drafts, draft_probs, confidence = [], [], []
        if num_masks := lengths[len(accepted)]:
            hidden, behind = rows(before + accepted, method.num_masks)  # a forward of its own, which the window spares
            for k in range(num_masks):
                at = len(before) + len(accepted) + k
                row = corrected(behind[at], hidden[at], (committed + drafts)[-1])
                q = probs(row, committed)
                argmax = isinstance(method, ISD) and method.proposals == "argmax"
                draft = int(np.argmax(q)) if argmax else draw(q, params, len(committed) + k, Purpose.PROPOSE)
                drafts.append(draft)
                draft_probs.append(np.eye(len(q))[draft] if argmax else q)
                confidence.append(float(dense_probs(row, SamplingParams(temperature=1.0), mask_id)[draft]))
