"""A window of steps under JAX's profiler, for TensorBoard's profile plugin, XProf or Perfetto."""

from typing import Any

import jax

from train.config import TrainConfig


class ProfileWindow:
    """Records steps `profile_start` to `profile_start + profile_steps - 1` into `profile/` of the run folder.

    A session that starts after the first of them records nothing, and one that ends inside closes the trace.
    """

    def __init__(self, config: TrainConfig):
        self._first, self._num_steps = config.profile_start, config.profile_steps
        self._folder = str(config.run_dir / "profile")
        self._is_open = False

    def before(self, step: int) -> None:
        if self._num_steps and step == self._first:
            jax.profiler.start_trace(self._folder)
            self._is_open = True

    def after(self, step: int, outputs: Any) -> None:
        """Closes the window after its last step, once the devices are done with `outputs`."""
        if self._is_open and step == self._first + self._num_steps - 1:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            jax.profiler.stop_trace()
