"""Axis letters shared by every array hint, einsum and comment in this project.

B batch (or slot) · T query positions · S key positions (cache capacity) · D model width · N query heads ·
K key/value heads · G = N // K · H head width · F mlp width · V vocabulary · L layers · R LoRA rank.

In decoding, `M` is the number of MASK positions a group holds (`num_masks`, the stride minus one) and `W` the
number of query rows in one forward (`window_len`). The stride itself never gets a letter.
"""

from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B T"]
Positions = Int[Array, "B T"]
Hidden = Float[Array, "B T D"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]
Logits = Float[Array, "B T V"]
RowGate = Bool[Array, "B T"]
