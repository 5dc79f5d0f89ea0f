"""The objective against PyTorch: transformers' Qwen3, one document at a time, a dense mask, all logits."""

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from idlm_jax.weights import load
from train.batch import Batch
from train.layout import LabelRows, ObjectiveSettings
from train.objective import introspective_loss

pytestmark = pytest.mark.torch

MASK, VOCAB = 96, 97
# Roles of the tokens of each document, and its block phase. The third fits no whole number of blocks.
DOCUMENTS = [("ppppaaaaaaa", 0), ("ppaaappaaap", 4), ("aaaaaaaaaaaaa", 2)]


def documents():
    random = np.random.default_rng(5)
    return [(random.integers(0, MASK, len(roles)), np.array([r == "a" for r in roles]), at) for roles, at in DOCUMENTS]


def packed():
    """The documents in two rows of 24: two of them and padding, then the third and padding."""
    fields = {name: np.zeros((2, 24), np.int32) for name in Batch._fields}
    for (tokens, is_response, phase), row, start, segment in zip(
        documents(), (0, 0, 1), (0, 11, 0), (1, 2, 1), strict=True
    ):
        here = (row, slice(start, start + len(tokens)))
        fields["tokens"][here], fields["is_response"][here] = tokens, is_response
        fields["segment_ids"][here], fields["block_phase"][here] = segment, phase
        fields["positions"][here] = np.arange(len(tokens))
    return Batch(**fields | {"is_response": fields["is_response"].astype(bool)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    folder = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(folder)
    return folder


def torch_loss(model, block_length, label_rows, alpha):
    """CE_noisy + alpha CE_clean, both of them, and the number of their rows."""
    sums, counts = {"noisy": 0.0, "clean": 0.0}, {"noisy": 0, "clean": 0}
    for tokens, is_response, phase in documents():
        length = len(tokens)
        x0, response = torch.tensor(tokens), torch.tensor(is_response)
        xt = torch.where(response, MASK, x0)
        position = torch.arange(length)
        block = (position + phase % block_length) // block_length
        causal = position[None, :] <= position[:, None]
        sees = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
        sees[:length, :length] = causal & (block[None, :] == block[:, None])
        sees[:length, length:] = block[None, :] < block[:, None]
        sees[length:, length:] = causal
        bias = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        logits = model(
            input_ids=torch.cat([xt, x0])[None],
            position_ids=position.repeat(2)[None],
            attention_mask=bias[None, None],
        ).logits[0]
        here, following = response[:-1], response[1:]
        noisy_rows = {"mask_rows": here & following, "official": here, "automodel": following}[label_rows]
        for name, half, rows in (("noisy", logits[:length], noisy_rows), ("clean", logits[length:], following)):
            ce = torch.nn.functional.cross_entropy(half[:-1], x0[1:], reduction="none")
            sums[name] = sums[name] + (ce * rows).sum()
            counts[name] += int(rows.sum())
    noisy, clean = (sums[name] / counts[name] for name in ("noisy", "clean"))
    weight = (noisy / clean).detach() if alpha is None else alpha
    return noisy + weight * clean, noisy, clean, counts


@pytest.mark.parametrize(
    ("block_length", "label_rows", "alpha"),
    [(3, "mask_rows", 0.2), (3, "mask_rows", None), (1, "official", None), (4, "automodel", 0.2)],
)
def test_loss_and_gradients_of_packed_rows_are_those_of_single_documents_in_torch(
    folder, block_length, label_rows, alpha
):
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    wanted, noisy, clean, counts = torch_loss(model, block_length, label_rows, alpha)
    wanted.backward()

    lm = load(folder, dtype="float32", mask_token_id=MASK)
    settings = ObjectiveSettings(
        block_length=block_length,
        clean_weight=0.0 if alpha is None else alpha,
        auto_balance=alpha is None,
        label_rows=LabelRows(label_rows),
    )

    def loss_of(params):
        return introspective_loss(nnx.merge(lm.graph, params), jax.tree.map(jax.numpy.asarray, packed()), settings)

    (loss, terms), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(lm.params)
    assert (int(terms["ce_noisy"].num_rows), int(terms["ce_clean"].num_rows)) == (counts["noisy"], counts["clean"])
    for got, want in ((loss, wanted), (terms["ce_noisy"].mean, noisy), (terms["ce_clean"].mean, clean)):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=2e-5)
    # Float32 on both sides, summed in another order; 1e-4 of the largest element is some ten times what is seen.
    pairs = [(grads["embedding"][...], model.model.embed_tokens), (grads["head"][...], model.lm_head)]
    for number, layer in enumerate(model.model.layers):
        blocks = grads["blocks"]
        for name, linear in (("q", layer.self_attn.q_proj), ("k", layer.self_attn.k_proj)):
            kernel = blocks["attention"][name]["kernel"][...][number]
            pairs.append((kernel.reshape(kernel.shape[0], -1).T, linear))
        pairs.append((blocks["mlp"]["down"]["kernel"][...][number].T, layer.mlp.down_proj))
    for got, module in pairs:
        want = module.weight.grad.numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
