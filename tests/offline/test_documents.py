"""The programs in README and `docs/offline.md` do what is written beside them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_program(document: str, folder: Path) -> str:
    """What a document's Python prints, all of its pieces in a row."""
    text = (ROOT / document).read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert "MemoryLLM(" in program
    script = folder / "program.py"
    script.write_text(program, encoding="utf-8")
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TMPDIR": str(folder),
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_program_of_the_readme(tmp_path: Path) -> None:
    printed = run_program("README.md", tmp_path)
    assert "Your match is on Tuesday.\nMemorySnapshot(version=1, tokens_written=20," in printed


def test_the_programs_of_the_offline_document(tmp_path: Path) -> None:
    for _ in range(2):  # again beside what the first run left
        printed = run_program("docs/offline.md", tmp_path)
        assert "1 False\n1 True\nYour match is on Tuesday. 21\nMemorySnapshot(version=3," in printed
        assert "9 True\n" in printed
