"""What plans say of ways to serve conversations."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltamem_vllm.cli import app
from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.planning import (
    Machine,
    MemoryShape,
    Plan,
    Workload,
    make_plan,
    read_backbone,
    turns_at_once,
)
from deltamem_vllm.planning.plot import plans_over_histories

BLOCK = 16


def machine(**changes: float) -> Machine:
    fields = {"memory_bytes": 1 << 30, "overhead_bytes": 0, "tflops": 1.0, "gb_per_s": 10.0}
    return Machine.model_validate({**fields, **changes})


def planned(machine: Machine, **work: float) -> Plan:
    memory = MemoryShape(DeltaMemConfig(rank=8), layers=4)
    fields = {"history": 4096, "window": 256, "question": 32, "reply": 32, **work}
    return make_plan(
        read_backbone(str(model_dir())), memory, Workload.model_validate(fields), machine, BLOCK
    )


def test_a_turn_with_memory_does_not_depend_on_the_history() -> None:
    short, long = (planned(machine(), history=length).way("memory") for length in (1024, 65536))
    assert long.prompt_tokens == short.prompt_tokens == 256 + 32
    assert long.blocks_per_turn == short.blocks_per_turn == (256 + 32 + 32) // BLOCK
    assert long.first_token_s == short.first_token_s
    assert long.turns_at_once == short.turns_at_once


def test_more_gpus_than_key_heads_keep_and_read_copies() -> None:
    # The model has two.
    two, four = (planned(machine(gpus=gpus)) for gpus in (2, 4))
    assert four.block.keys_values == two.block.keys_values
    assert four.way("full_warm").rest_bytes == 2 * two.way("full_warm").rest_bytes
    slow = [planned(machine(gpus=gpus, gb_per_s=1e-3, max_requests=1)) for gpus in (1, 2, 4)]
    one, two_s, four_s = (plan.way("full_cold").replica_s for plan in slow)
    assert one == two_s < four_s


def test_a_full_history_costs_more_than_in_proportion() -> None:
    short, long = (planned(machine(), history=length).way("full_cold") for length in (4096, 8192))
    assert long.first_token_s > 2 * short.first_token_s


def test_turns_at_once_fill_the_kv_cache() -> None:
    plan = planned(machine())
    for way in plan.ways:
        assert way.turns_at_once * way.blocks_per_turn <= way.blocks
        assert (way.turns_at_once + 1) * way.blocks_per_turn > way.blocks
    block = plan.block.total
    memory = plan.way("memory")
    assert memory.blocks + 1 == plan.kv_cache_bytes // block


def test_a_shared_prefix_is_held_once_without_memory_and_by_each_with_it() -> None:
    alone, shared = (planned(machine(), standing=length) for length in (0, 1600))
    assert shared.way("full_warm").computed_tokens == alone.way("full_warm").computed_tokens
    assert shared.way("memory").computed_tokens == alone.way("memory").computed_tokens + 1600
    assert shared.way("window").turns_at_once == pytest.approx(
        alone.way("window").turns_at_once, rel=0.05
    )
    assert shared.way("memory").turns_at_once < alone.way("memory").turns_at_once / 4


def test_memories_that_share_a_prefix_hold_and_compute_it_once() -> None:
    """As a window without memory does: whole blocks."""
    work = {"standing": 1605, "share_prefix": True}
    written, shared = (planned(machine(), **{**work, "share_prefix": share}) for share in (0, 1))
    memory, window = shared.way("memory"), shared.way("window")
    assert memory.computed_tokens == written.way("memory").computed_tokens - 1600
    assert memory.computed_tokens == window.computed_tokens == 5 + 256 + 32
    assert memory.shared_blocks == window.shared_blocks == 100
    assert written.way("memory").shared_blocks == 0
    each = memory.blocks_per_turn - 100
    assert memory.turns_at_once == (memory.blocks - 100) // each
    assert memory.turns_at_once > 4 * written.way("memory").turns_at_once
    assert memory.first_token_s < written.way("memory").first_token_s / 4
    assert {way.name: way for way in written.ways if way.name != "memory"} == {
        way.name: way for way in shared.ways if way.name != "memory"
    }


@pytest.mark.parametrize(
    ("blocks", "tokens", "shared", "turns"),
    [(110, 330, 0, 10), (110, 320, 0, 11), (110, 330, 5, 17), (4, 330, 5, 0), (110, 0, 0, 110)],
)
def test_turns_at_once_are_whole_ones(blocks: int, tokens: int, shared: int, turns: int) -> None:
    assert turns_at_once(blocks, tokens, 32, shared) == turns


def test_turns_share_no_blocks_of_a_prefix_that_each_computes() -> None:
    cold, warm = (
        planned(machine(), standing=1600).way(name) for name in ("full_cold", "full_warm")
    )
    assert cold.computed_tokens == cold.prompt_tokens
    assert cold.turns_at_once == cold.blocks // cold.blocks_per_turn < warm.turns_at_once


def test_what_keeps_all_conversations_warm_does_not_depend_on_their_turns() -> None:
    rare, often = (
        planned(machine(), conversations=1000, turns_per_hour=turns).way("full_warm")
        for turns in (0.01, 10)
    )
    assert rare.warm_conversations and rare.replicas < 1
    assert rare.replicas_to_keep_warm == often.replicas_to_keep_warm
    assert rare.replicas_to_keep_warm == -(-1000 // rare.warm_conversations) > 1


def test_a_prompt_by_itself_waits_for_the_weights_and_for_what_is_cached() -> None:
    # A machine that computes at once leaves what it has to read.
    plan = planned(machine(tflops=1e9), history=4096)
    weights = read_backbone(str(model_dir())).weight_bytes
    cached = 4096 * plan.kv_bytes_per_token
    assert plan.way("full_cold").first_token_s == pytest.approx(weights / 10e9)
    assert plan.way("full_warm").first_token_s == pytest.approx((weights + cached) / 10e9)


def test_a_reply_of_one_token_takes_no_decode_step() -> None:
    way = planned(machine(gb_per_s=1e9), reply=1).way("full_cold")
    assert way.replica_s == pytest.approx(way.first_token_s)


def test_price_is_that_of_the_hours_taken() -> None:
    cheap, dear = (planned(machine(price_per_hour=price)).way("memory") for price in (1, 3))
    assert cheap.price_per_1000_turns == pytest.approx(1000 * cheap.replica_s / 3600)
    assert dear.price_per_1000_turns == pytest.approx(3 * cheap.price_per_1000_turns)


def test_a_machine_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="no room for a KV cache"):
        planned(machine(memory_bytes=1 << 20))
    with pytest.raises(ConfigError, match="a turn of"):
        planned(machine(memory_bytes=1 << 23), history=100_000)


def test_histories_double_up_to_the_one_asked_for() -> None:
    memory = MemoryShape(DeltaMemConfig(rank=8), layers=4)
    backbone = read_backbone(str(model_dir()))
    plans = plans_over_histories(backbone, memory, Workload(history=4096), machine(), BLOCK)
    assert list(plans) == [512, 1024, 2048, 4096]


def test_an_adapter_that_cannot_be_is_refused_in_one_line() -> None:
    call = ["plan", str(model_dir()), "--gpu", "l4", "--rank", "65"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 2
    assert (
        result.stderr.strip()
        == "error: bad adapter config: rank = 65: expected less than or equal to 64"
    )


CALL = ["plan", str(model_dir()), "--adapter", str(adapter_dir("tsw")), "--history", "2048"]


def test_command_prints_tables_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plan.svg"
    result = CliRunner().invoke(app, [*CALL, "--gpu", "l4", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert "window + memory" in result.stdout
    assert plot.read_text().startswith("<?xml")


def test_command_prints_what_is_shared() -> None:
    flags = ["--gpu", "l4", "--standing", "1000"]
    found = []
    for more in ([], ["--share-prefix"]):
        result = CliRunner().invoke(app, [*CALL, *flags, *more], env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        (line,) = (one for one in lines if "of them held once" in one)
        found.append(line.split("│")[2:-1])
    assert [[cell.strip() for cell in row] for row in found] == [
        ["-", "62", "62", "-"],
        ["-", "62", "62", "62"],
    ]


def test_command_prints_json() -> None:
    numbers = ["--gpu-memory", "1", "--tflops", "1", "--gb-per-s", "10", "--overhead", "0"]
    result = CliRunner().invoke(app, [*CALL, *numbers, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["plan"]
    assert found["state_bytes"] == 1024
    assert {way["name"] for way in found["ways"]} == {"full_cold", "full_warm", "window", "memory"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --gpu"),
        (["--gpu", "abacus"], "abacus"),
        (["--gpu", "l4", "--plot", "plan.txt"], ".svg"),
        (["--gpu", "l4", "--dtype", "int3"], "int3"),
        (["--gpu", "l4", "--turns-per-hour", "0"], "--turns-per-hour: "),
        (["--gpu", "l4", "--gpu-memory", "0"], "--gpu-memory: "),
        (["--gpu", "l4", "--tflops", "0"], "--tflops: "),
        (["--gpu", "l4", "--gb-per-s", "inf"], "--gb-per-s: "),
        (["--gpu", "l4", "--overhead", "inf"], "--overhead: "),
        (["--gpu", "l4", "--tensor-parallel-size", "3"], "--tensor-parallel-size 3: "),
        (["--gpu", "l4", "--plot", "no/such/folder/plan.svg"], "--plot no/such/folder/plan.svg: "),
    ],
)
def test_what_cannot_be_planned_is_said(flags: list[str], message: str) -> None:
    result = CliRunner().invoke(app, [*CALL, *flags])
    assert result.exit_code == 2
    assert message in result.stderr
