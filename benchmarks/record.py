"""Where results go: JSON with every figure, Markdown to read."""

import json
from pathlib import Path
from typing import Any

from idlm_jax.cli.provenance import origin as origin
from idlm_jax.cli.provenance import provenance as provenance


def write(folder: Path, name: str, record: dict[str, Any], markdown: str) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown)
