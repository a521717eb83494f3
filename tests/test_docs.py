"""What the documents say is tested has its test."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def functions_of(path: Path) -> set[str]:
    if not path.exists():
        return set()
    found = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in found if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_that_the_compatibility_table_names_exists() -> None:
    named = NAMED.findall((ROOT / "docs" / "compatibility.md").read_text())
    assert named
    missing = [f"{path}::{name}" for path, name in named if name not in functions_of(ROOT / path)]
    assert not missing


def test_every_row_that_claims_a_test_names_it() -> None:
    rows = (ROOT / "docs" / "compatibility.md").read_text().splitlines()
    claims = [row for row in rows if re.match(r"\|[^|]*\| tested", row)]
    assert claims
    assert all(NAMED.search(row) for row in claims)
