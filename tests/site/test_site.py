"""The built site, in the folder $SITE: nothing is fetched or left unread."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ["SITE"])
PAGES = {
    path.parent.relative_to(SITE).as_posix(): path.read_text("utf-8")
    for path in SITE.rglob("index.html")
}


@pytest.mark.parametrize("page", PAGES)
def test_a_reader_fetches_nothing_from_elsewhere(page):
    text = PAGES[page]
    loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', text)
    loaded += re.findall(
        r'<link[^>]* rel="(?:stylesheet|preconnect)"[^>]*>', text
    )
    assert loaded
    assert not [tag for tag in loaded if "//" in tag]
    # What would ask a server for the stars of a repository.
    assert 'data-md-component="source"' not in text


def test_every_page_is_built():
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert set(PAGES) - {"."} == pages - {"index"}


def test_the_reference_has_every_public_name():
    source = (ROOT / "keras_blockwise" / "__init__.py").read_text("utf-8")
    names = re.findall(r'^    "(\w+)",$', source, re.M)
    assert "BlockAdam" in names
    for name in names:
        assert f'id="keras_blockwise.{name}"' in PAGES["reference"]


def test_docstrings_are_read():
    """No title or session of Keras's form is left as plain text."""
    text = PAGES["reference"]
    assert "<strong>Example</strong>" in text
    assert "<blockquote>" not in text
    # The default of `**kwargs`.
    assert not re.search(r"default:.*\n.*<code>\{\}</code>", text)
    assert not re.search(r"<p>(Args|Raises|Returns|Example|Reference):", text)


def test_links_into_the_code_are_absolute():
    for text in PAGES.values():
        assert not re.findall(r'href="[^":]*\.(?:py|txt)"', text)
