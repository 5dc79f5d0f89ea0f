"""Time left for a run: a section that may not finish is skipped and says so, rather than being cut off."""

import dataclasses
import time

SKIPPED = "skipped (time)"


@dataclasses.dataclass(frozen=True)
class Budget:
    """Seconds from the start of the run.

    Attributes:
        total_s: what the whole run may take.
        started_s: monotonic clock at the start.
    """

    total_s: float
    started_s: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def left_s(self) -> float:
        return max(0.0, self.total_s - self.elapsed_s)

    def allows(self, seconds: float) -> bool:
        """Whether a section that may take this long can start."""
        return seconds <= self.left_s
