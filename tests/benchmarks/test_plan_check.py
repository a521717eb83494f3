"""The comparison of a plan with what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_check import lines, machine_of, read
from benchmarks.replay import CONDITIONS
from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.demo.assets import model_dir
from deltamem_vllm.planning import MemoryShape, read_backbone

HISTORIES = (512, 1024)
WINDOW, QUESTION, REPLY, BLOCK = 200, 64, 16, 32


def sample(condition: str, history: int) -> dict[str, Any]:
    full = condition.startswith("full")
    shown = (history if full else WINDOW) + QUESTION
    computed = QUESTION + BLOCK / 2 if condition == "full_warm" else shown
    return {
        "condition": condition, "history": history, "concurrency": 1, "prefix": 0, "round": 1,
        "first_s": [0.001 * computed], "per_token_s": [0.01],
        "total_s": [0.001 * computed + 0.15], "prompt_tokens": [shown],
        "wall_s": 1.0, "used_cpu_s": 1.0, "used_computed": computed, "used_preemptions": 0,
        "peak_running": 1, "peak_blocks": -(-(shown + REPLY) // BLOCK), "text_bytes": 1000,
        # Three versions of 1 KiB are planned.
        "rest_bytes": 3072 * history / 512 if condition == "memory" else None,
    }  # fmt: skip


def test_plan_and_measurement_stand_side_by_side(tmp_path: Path) -> None:
    samples = [sample(condition, history) for condition in CONDITIONS for history in HISTORIES]
    capacity = {
        "condition": "memory", "history": 256, "conversations": 10, "blocks": 111,
        "blocks_each": 10.5, "prompt_tokens": 264,
    }  # fmt: skip
    settings = {
        "histories": HISTORIES,
        "block_size": BLOCK,
        "output_tokens": REPLY,
        "kv_gib": 1,
        "rounds": 2,
        "dtype": "float32",
    }
    file = tmp_path / "result.json"
    content = {"environment": {"settings": settings}, "samples": [*samples, capacity]}
    file.write_text(json.dumps(content))
    backbone = read_backbone(str(model_dir()))
    memory = MemoryShape(DeltaMemConfig(rank=8), backbone.shape.num_layers, steps_in_flight=1)
    measured = read(file)
    machine = machine_of(measured, backbone, memory)
    found = {
        (one.what, one.condition, one.history): one
        for one in lines(measured, backbone, memory, machine)
    }
    for history in HISTORIES:
        for condition in ("full_cold", "window", "memory"):
            assert found["blocks of a turn", condition, history].error == 0
            assert found["tokens computed", condition, history].error == 0
    assert found["states kept, bytes", "memory", 512].error == 0
    assert found["states kept, bytes", "memory", 1024].error == -0.5
    assert found["turns at once", "memory", 256].planned == 10  # 110 blocks, 11 each
    # Calibrated by the shortest full history; attention makes the longer one's tokens dearer.
    assert found["first token, ms", "full_cold", 512].error == pytest.approx(0)
    assert found["first token, ms", "full_cold", 1024].error > 0
    # The window's own time per token is what its steps are planned by: 15 follow the first token.
    assert found["turn, ms", "window", 512].error == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "is no result of"),
        ('{"environment": {"settings": {}}, "samples": [{"key": "a"}]}', "is no result of"),
        (
            '{"environment": {"settings": {"histories": [1], "output_tokens": 1}}, "samples": []}',
            "one conversation at a time",
        ),
    ],
)
def test_a_result_of_something_else_is_refused_in_one_line(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "result.json"
    file.write_text(content)
    with pytest.raises(SystemExit, match=message):
        read(file)
