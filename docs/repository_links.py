"""A hook of MkDocs: what pages lead to beside pages, such as ../README.md and the pictures of benchmarks/results.

Pictures go into the site. Other links lead to `extra.repository` of mkdocs.yml; without it their text stays, which
names the file.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs with the files of the site."""
    root = Path(config.config_file_path).parent
    for picture in sorted(root.glob("benchmarks/results/*.svg")):
        files.append(File.generated(config, picture.relative_to(root).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for each page."""
    root = Path(config.config_file_path).parent
    here = Path(page.file.abs_src_path).parent

    def replaced(link: re.Match[str]) -> str:
        target = (here / link["target"]).resolve()
        if target.is_relative_to(config.docs_dir):
            return link[0]
        path = target.relative_to(root).as_posix()
        if link["picture"]:
            return f"![{link['text']}]({get_relative_url(path, page.file.src_uri)})"
        address = config.extra["repository"]
        return f"[{link['text']}]({address.rstrip('/')}/{path})" if address else link["text"]

    return _LINK.sub(replaced, markdown)
