"""A hook of MkDocs: links from a page to files of the repository that are no pages, such as ../README.md.

With `extra.repository` in mkdocs.yml they lead there; without it their text stays, which names the file.
"""

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for each page."""
    root = Path(config.config_file_path).parent
    here = Path(page.file.abs_src_path).parent

    def replaced(link: re.Match[str]) -> str:
        target = (here / link["target"]).resolve()
        if target.is_relative_to(config.docs_dir):
            return link[0]
        address = config.extra["repository"]
        path = target.relative_to(root).as_posix()
        return f"[{link['text']}]({address.rstrip('/')}/{path})" if address else link["text"]

    return _LINK.sub(replaced, markdown)
