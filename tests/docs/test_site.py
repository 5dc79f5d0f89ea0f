"""The site builds without a warning, asks no other host for anything, and holds what its pages link to."""

import re
import subprocess

import pytest

from tests.docs.blocks import ROOT

# What a browser fetches by itself; a link to a paper is the reader's own step.
FETCHED = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//|url\(["']?https?:|@import""")


@pytest.mark.proof
def test_the_site_builds_strictly_and_is_whole():
    subprocess.run(["make", "docs"], cwd=ROOT, check=True, timeout=600)
    pages = sorted((ROOT / "site").rglob("*.html"))
    assert len(pages) > 30
    fetching = [path for path in (*pages, *(ROOT / "site").rglob("*.css")) if FETCHED.search(path.read_text("utf-8"))]
    assert fetching == []
    reference = (ROOT / "site" / "reference" / "index.html").read_text("utf-8")
    for name in ("load.load", "generate.generate", "method.ISD", "sampling.SamplingParams", "trace.Forward"):
        assert f'{name}"' in reference, name
    assert (ROOT / "site" / "repository" / "train" / "flops.py").is_file()
