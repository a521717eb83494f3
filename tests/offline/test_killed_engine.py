"""The engine's process is killed, as the system does when memory is short, and a batch says so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys, threading, time
from pathlib import Path
import psutil
from deltamem_vllm.batch.job import BatchSpec, run
from deltamem_vllm.batch.output import read_results
from deltamem_vllm.batch.rows import Sampling

def kill_the_engine(output):
    while not any(part.stat().st_size for part in output.glob("part-*")):
        time.sleep(0.02)
    children = psutil.Process().children(recursive=True)
    (engine,) = [one for one in children if "EngineCore" in " ".join(one.cmdline())]
    engine.kill()

def main(folder):
    demo = "deltamem_vllm/demo/"
    rows = [
        {"id": str(number), "session": str(number), "turns": ["My match is on Friday."] * 4}
        for number in range(200)
    ]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + chr(10) for row in rows))
    engine_args = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    sampling = Sampling(temperature=0, max_tokens=16)
    store = f"sqlite://{folder}/sessions.db"
    spec = BatchSpec(
        demo + "model", demo + "adapters/tsw", store, sampling=sampling, engine_args=engine_args
    )
    output = folder / "out"
    threading.Thread(target=kill_the_engine, args=(output,), daemon=True).start()
    try:
        run(source, output, spec)
    except Exception as error:
        results = list(read_results(output))
        failed = [result.id for result in results if result.error]
        print("ended", type(error).__name__, failed, 0 < len(results) < len(rows))

if __name__ == "__main__":
    main(Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_batch_whose_engine_is_killed_ends(tmp_path: Path) -> None:
    """vLLM would wait for the engine's answer for ever."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=880,
        check=False,
    )
    assert re.search(r"ended (BrokenOffError|EngineDeadError) \[\] True", done.stdout)
