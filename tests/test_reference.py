"""The page of all keys of params.yaml is what the code says."""

from pathlib import Path

from bnncore import reference


def test_the_page_is_made_from_this_code():
    page = Path(__file__).parents[1] / "docs" / "params.md"
    assert page.read_text() == reference.page(), reference.HEAD
