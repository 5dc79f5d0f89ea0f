"""Our adapters in `peft`, which applies them to every row: equal to ours with the gate open on every row."""

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from idlm_jax.model.attention import causal_attend
from idlm_jax.weights import export_adapter, export_hf, load
from tests.weights.test_adapter import adapted_lm

pytestmark = [
    pytest.mark.torch,
    # peft asks transformers for a property by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def gated_logits(lm, tokens, gate):
    batch, rows = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (batch, rows))
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((rows, rows), bool)), (batch, rows, rows))
    hidden, _ = lm.module.hidden_states(jnp.asarray(tokens), positions, causal_attend(visible), lora_gate=gate)
    return np.asarray(lm.module.logits(hidden))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    lm = adapted_lm()
    export_hf(lm, folder / "base")
    export_adapter(lm, folder / "adapter", base_model_name_or_path=str(folder / "base"))
    return folder


def test_peft_reads_our_adapter_and_computes_the_ungated_model(folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    base_logits = lambda tokens: model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()  # noqa: E731
    tokens = np.random.default_rng(0).integers(0, 97, (2, 13), dtype=np.int32)
    lm = load(folders / "base", dtype="float32", adapter=folders / "adapter")
    with torch.no_grad():
        plain = base_logits(tokens)
        model = peft.PeftModel.from_pretrained(model, folders / "adapter").eval()
        adapted = base_logits(tokens)
    scale = np.abs(adapted).max()
    assert np.abs(adapted - plain).max() > 0.1 * scale
    # Float32 on both sides, summed in another order; see the logits test for the margin.
    everywhere = gated_logits(lm, tokens, jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(everywhere, adapted, rtol=0, atol=1e-4 * scale)
    nowhere = gated_logits(lm, tokens, jnp.zeros(tokens.shape, bool))
    np.testing.assert_allclose(nowhere, plain, rtol=0, atol=1e-4 * scale)


def test_an_adapter_saved_by_peft_needs_only_the_marker_to_be_ours(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    peft.PeftModel.from_pretrained(model, folders / "adapter").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ungated"):
        load(folders / "base", dtype="float32", adapter=tmp_path)
    (tmp_path / "idlm_gate.json").write_text((folders / "adapter" / "idlm_gate.json").read_text())
    ours = (tmp_path / "adapter_model.safetensors", folders / "adapter" / "adapter_model.safetensors")
    theirs_tensors, our_tensors = (
        {name: tensor.tobytes() for name, tensor in load_file(file).items()} for file in ours
    )
    assert theirs_tensors == our_tensors
    assert load(folders / "base", dtype="float32", adapter=tmp_path).config.lora is not None
