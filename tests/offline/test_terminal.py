"""Ctrl-C as a terminal sends it: to the engine's processes, too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys, threading
from vllm import SamplingParams
from deltamem_vllm import Memory, MemoryLLM

def main():
    demo = "deltamem_vllm/demo/"
    llm = MemoryLLM(
        demo + "model", adapter=demo + "adapters/tsw", dtype="float32", enforce_eager=True
    )
    llm.generate("a", SamplingParams(max_tokens=2), memory=Memory(session="a"), use_tqdm=False)
    endless = SamplingParams(max_tokens=1900, ignore_eos=True)
    threading.Timer(3, lambda: print("running", flush=True)).start()
    try:
        memories = [Memory(session=name) for name in "abcd"]
        llm.generate(["a"] * 4, endless, memory=memories, use_tqdm=False)
    except KeyboardInterrupt:
        print("interrupted", {name: one.version for name, one in llm.sessions.items()}, flush=True)
        llm._service.store.acquire(llm._service.key("a", None), "another", seconds=5)
        print("free", flush=True)

if __name__ == "__main__":
    main()
"""


def test_an_interrupt_at_the_terminal_ends_the_call(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("running"):
                break
        os.killpg(process.pid, signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "interrupted {'a': 1}\nfree" in printed
