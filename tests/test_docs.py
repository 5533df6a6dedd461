"""What the documents show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["theory.md"])
def test_snippets_run(name: str) -> None:
    """All of a document's, one after the other, in one namespace; a line that fails is named by its own number."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    found = list(SNIPPET.finditer(text))
    assert len(found) == text.count("```python") >= 10 and text.count("same(") >= 25
    space: dict[str, object] = {}
    for snippet in found:
        before = text[: snippet.start(1)].count("\n")
        exec(compile("\n" * before + snippet[1], str(ROOT / "docs" / name), "exec"), space)
