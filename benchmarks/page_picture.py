"""A picture of the page of a running server, for the docs.

python -m serve --model-path assets/tiny-qwen3-py --adapter assets/tiny-qwen3-py-isd --dtype float32
.venv/bin/pip install -e '.[browser]' && python -m benchmarks.page_picture
"""

from pathlib import Path
from typing import Annotated

import typer

PROMPTS = (
    "import os\nimport sys\n\n\ndef read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "from collections import OrderedDict\n\n\nclass Cache:\n",
    "import re\n\n\ndef main(argv):\n    if len(argv) != 2:\n",
)
# Nothing of Chromium's own may ask the network.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def take_picture(
    url: Annotated[str, typer.Option(help="Of the server.")] = "http://127.0.0.1:30000",
    output: Annotated[Path, typer.Option(help="A PNG file.")] = Path("docs/images/page.png"),
    chromium: Annotated[str, typer.Option(envvar="CHROMIUM")] = "/usr/bin/chromium",
) -> None:
    """Lets the model continue a piece of code, some times, and saves what the page shows then."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]  (an extra)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 760}, device_scale_factor=2)
        page.goto(url)
        page.check("[value=complete]")
        page.click("#settings summary")
        page.fill("[name=temperature]", "0.5")
        page.fill("[name=seed]", "4")
        page.fill("[name=max_tokens]", "160")
        page.click("#settings summary")
        for count, prompt in enumerate(PROMPTS * 4, start=1):
            page.fill("#prompt", prompt)
            page.press("#prompt", "Enter")
            while page.locator(".summary").count() < count:
                page.wait_for_timeout(200)
            page.wait_for_timeout(1500)
        page.screenshot(path=output)
        browser.close()


if __name__ == "__main__":
    typer.run(take_picture)
