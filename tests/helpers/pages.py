"""README.md and the pages of docs/: their code, and where links lead."""

import re

from helpers.processes import ROOT

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.glob("*.md"))


def read(path):
    return path.read_text("utf-8")


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def run_in_order(path, names, capsys):
    """Runs the Python of a page; what it prints has to be there."""
    text = read(path)
    printed_in_page = code_blocks(text, "text")
    for code in code_blocks(text, "python"):
        exec(compile(code, path.name, "exec"), names)
        printed = re.sub(r" +$", "", capsys.readouterr().out, flags=re.M)
        assert not printed or printed in printed_in_page, printed


def prose(text):
    """All but the blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text):
    """What a link to a part of the page can name."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.M)
    plain = (re.sub(r"[^\w\s-]", "", title).strip() for title in titles)
    return {re.sub(r"\s", "-", title.lower()) for title in plain}


def links(text):
    """Where links and pictures lead, but for other hosts."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    found += re.findall(r'(?:src|href)="([^"]+)"', prose(text))
    return [link for link in found if "://" not in link]
