"""The documentation site: what its hooks refuse, and that results are on their page."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
PAGE = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.invalid/mermaid.js"></script>',
        '<link rel="stylesheet" href="//fonts.invalid/css">',
        '<link href="https://fonts.invalid" rel="preconnect">',
        '<img alt="" src="https://img.invalid/a.png">',
        "<style>@import 'https://fonts.invalid/css'</style>",
    ],
)
def test_a_page_that_fetches_from_elsewhere_is_refused(hooks: ModuleType, html: str) -> None:
    from mkdocs.exceptions import PluginError

    with pytest.raises(PluginError, match=r"page\.md"):
        hooks.on_post_page(f"<p>{html}</p>", PAGE)


@pytest.mark.parametrize(
    "html",
    [
        '<script src="assets/a.js"></script>',
        '<a href="https://arxiv.org/abs/2605.12357">paper</a>',
        '<link rel="canonical" href="https://example.invalid/">',
    ],
)
def test_a_page_of_its_own_files_and_links_passes(hooks: ModuleType, html: str) -> None:
    assert hooks.on_post_page(html, PAGE) == html


def test_links_between_folders_lead_to_pages_of_the_site(hooks: ModuleType) -> None:
    def changed(text: str, uri: str) -> str:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
        return hooks.on_page_markdown(text, page=page)

    assert changed("[a](../patches/README.md)", "gpu.md") == "[a](patches/README.md)"
    assert changed("[a](../docs/stores.md)", "serving/hardening.md") == "[a](../stores.md)"
    assert changed("[a](../sessions.md)", "reference/ops.md") == "[a](../sessions.md)"


def test_results_are_on_their_page_and_the_page_names_no_others() -> None:
    named = set(re.findall(r"results/(\w+\.json)", (ROOT / "docs" / "benchmarks.md").read_text()))
    kept = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert kept
    assert named == kept
