"""Links from the pages to files of the repository that are no pages.

In the sources they are relative, so that they work in a clone; the site leads
them to the repository.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, config: Any, **kwargs: Any) -> str:
    repository = config.extra["social"][0]["link"]

    def absolute(link: re.Match[str]) -> str:
        path = link[1]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"No file of the repository: {path}")
        return f"]({repository}/blob/main/{path}"

    return re.sub(r"\]\(\.\./([^)#]+)", absolute, markdown)
