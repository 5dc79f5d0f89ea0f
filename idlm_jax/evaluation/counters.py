"""Tokens per forward and acceptance, from what this project's server counts in `/metrics`."""

import dataclasses
import re

import httpx2

# Of all models together: the server has one.
_LINE = re.compile(r"^idlm:(?P<name>\w+)\{[^}]*\} (?P<value>\S+)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Counters:
    """What a server has done since it started.

    Attributes:
        tokens: committed.
        forwards: counted once for each request that took part.
        verified: drafts that were checked.
        accepted: drafts that were kept.
    """

    tokens: int
    forwards: int
    verified: int
    accepted: int

    def __sub__(self, earlier: "Counters") -> "Counters":
        names = [field.name for field in dataclasses.fields(self)]
        return Counters(*(getattr(self, name) - getattr(earlier, name) for name in names))

    @property
    def tokens_per_forward(self) -> float | None:
        """TPF; None without a forward."""
        return self.tokens / self.forwards if self.forwards else None

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the checked drafts that were kept; None where none was checked (AR)."""
        return self.accepted / self.verified if self.verified else None


def read_counters(url: str, api_key: str | None) -> Counters | None:
    """Asks a server; None if it does not count like ours, or cannot be asked.

    Args:
        url: of the server, up to and with `/v1`.
        api_key: None if it wants none.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        reply = httpx2.get(url.removesuffix("/v1") + "/metrics", headers=headers, timeout=30)
    except httpx2.HTTPError:
        return None
    values = {match["name"]: float(match["value"]) for match in _LINE.finditer(reply.text)}
    drafts = "spec_decode_num_{}_tokens_total"
    names = ["generation_tokens_total", "request_forwards_total", drafts.format("verified"), drafts.format("accepted")]
    if reply.status_code != 200 or any(name not in values for name in names):
        return None
    return Counters(*(int(values[name]) for name in names))
