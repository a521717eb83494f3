"""Hooks of MkDocs: pages that live outside of docs/, and no page that fetches anything."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

OUTSIDE = ("benchmarks/*.md", "patches/*", "serving/**/*", "deltamem_vllm/engine/compat.py")
"""What pages link to, beside docs/."""

FETCHES = re.compile(
    r"<(?:script|img|iframe|source|audio|video)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon))[^>]*"
    r"\bhref=[\"']?(?:https?:)?//"
    r"|@import\s+[\"'(]|url\([\"']?https?:"
)
"""What a browser would load from another host by itself."""


def on_files(files: Files, config: Any) -> Files:
    """Add the files of OUTSIDE under the paths that they have in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                uri = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links between docs/ and its neighbours lead to where these are on the site."""
    if (ROOT / "docs" / page.file.src_uri).exists():
        return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown
    return markdown.replace("](../docs/", "](../")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from another host.

    Raises:
        PluginError: it would.
    """
    found = FETCHES.search(output)
    if found is not None:
        raise PluginError(f"{page.file.src_uri} fetches from elsewhere: {found.group()}")
    return output
