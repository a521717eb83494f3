"""The benchmark of serving costs: what conditions send, what is measured, what is said of it."""

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conversations import HEADING, Conversation, make_conversation, token_counter
from benchmarks.replay import CONDITIONS, WITH_MEMORY, connected, request_of
from benchmarks.serving_cost import NAME, Cell, Maker, Plan, largest, measure_cells, server
from benchmarks.serving_cost_results import Capacity, figures, plot, summarise
from deltamem_vllm.demo.assets import adapter_dir, model_dir

WINDOW = 2


@pytest.fixture(scope="module")
def conversation() -> Conversation:
    count = token_counter(str(model_dir()))
    made = make_conversation(seed=1, history=700, turns=2, count=count, standing=100)
    assert 500 < count(made.full()) < 1000
    return made


def contents(request: dict[str, Any]) -> list[str]:
    return [message["content"] for message in request["messages"]]


def test_conditions_show_what_they_say(conversation: Conversation) -> None:
    sent = {name: request_of(copy.deepcopy(conversation), name, WINDOW) for name in CONDITIONS}
    full = contents(sent["full_warm"])
    assert len(full) == 2 * len(conversation.exchanges) + 2
    assert contents(sent["full_cold"]) == contents(sent["memory"]) == full
    assert contents(sent["window"]) == [full[0], *full[-2 * WINDOW - 1 :]]
    without = [name for name in CONDITIONS if name not in WITH_MEMORY]
    assert len({sent[name]["extra_body"]["cache_salt"] for name in without}) == len(without)
    memories = [sent[name]["extra_body"]["memory"] for name in WITH_MEMORY]
    assert memories[1] == {**memories[0], "share_prefix": True}
    again = request_of(conversation, "full_cold", WINDOW)
    assert again["extra_body"]["cache_salt"] != sent["full_cold"]["extra_body"]["cache_salt"]
    assert sent["memory"]["extra_body"]["memory"]["window"] == {"messages": 2 * WINDOW + 1}


def test_retrieval_finds_the_past_turn_that_the_question_repeats(
    conversation: Conversation,
) -> None:
    pytest.importorskip("bm25s")
    asked = copy.deepcopy(conversation)
    told = asked.exchanges[1]
    asked.coming[0] = told.user
    shown = contents(request_of(asked, "retrieval", WINDOW))
    assert HEADING in shown[0] and told.text in shown[0]
    assert shown[1:] == contents(request_of(asked, "window", WINDOW))[1:]


@pytest.mark.parametrize("guess", [1, 5, 12])
def test_the_largest_number_is_found_from_any_guess(guess: int) -> None:
    async def fits(number: int) -> bool:
        return number <= 7

    assert asyncio.run(largest(fits, guess)) == 7


def made_up() -> list[dict[str, Any]]:
    """Full histories cost in proportion to their length, all else costs the same."""
    samples = []
    for condition in CONDITIONS:
        for history in (1000, 4000):
            share = history / 1000 if condition == "full_cold" else 1
            for number in range(3):
                samples.append(
                    {
                        "condition": condition,
                        "history": history,
                        "concurrency": 1,
                        "prefix": 0,
                        "round": number,
                        # What brings a history in does not count.
                        "first_s": [0.1 * share if number else 100.0],
                        "per_token_s": [0.02],
                        "total_s": [0.1 * share + 0.3],
                        "prompt_tokens": [100 * share],
                        "wall_s": share,
                        "used_cpu_s": share,
                        "used_computed": 100 * share,
                        "used_preemptions": 0,
                        # One round was too short to be seen.
                        "peak_running": 0 if number == 1 else 1,
                        "peak_blocks": 0 if number == 1 else round(10 * share),
                        "text_bytes": history,
                    }
                )
    return samples


def test_figures_are_those_of_the_samples() -> None:
    capacities = [
        Capacity("full_warm", 4000, 2, 100, 40, 4000),
        Capacity("memory", 256, 9, 100, 10, 100),
    ]
    summary = summarise(made_up(), capacities)
    assert summary["memory_ttft_growth"] == pytest.approx(0)
    assert summary["long_context_ttft_growth"] == pytest.approx(3)
    assert summary["long_context_cpu_growth"] == pytest.approx(3)
    assert summary["kv_blocks_ratio"] == pytest.approx(4)
    assert summary["conversations_ratio"] == pytest.approx(4.5)
    one = figures(made_up())["full_cold", 4000, 1, 0]
    assert one.turns_per_s == pytest.approx(1 / 4)
    assert one.price(price_per_hour=3.6) == pytest.approx(4)


def test_the_plot_of_costs_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(made_up(), "title", 1.0, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_a_cell_is_measured_on_a_real_server(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    plan = Plan(
        backbone="demo model", model=str(model_dir()), adapter=str(adapter_dir("tsw")),
        dtype="float32", histories=(300, 400), concurrency=(2,), prefixes=(128,), rounds=1,
        output_tokens=4, threads=1, block_size=32, kv_gib=1,
    )  # fmt: skip

    async def measured() -> list[dict[str, Any]]:
        with server(plan, tmp_path, "server") as (url, pid):
            async with connected(url, pid, NAME, WINDOW, plan.output_tokens) as served:
                cells = [Cell(400, 2, 128)]
                async for found in measure_cells(served, plan, Maker(plan), cells):
                    samples = found
                return samples

    counted = {one["condition"]: one for one in asyncio.run(measured()) if one["round"]}
    cold, warm, window, memory, shared = (
        counted[name] for name in ("full_cold", "full_warm", "window", "memory", "memory_shared")
    )
    # The system prompt's blocks: cached for both sessions, of whatever memory.
    assert shared["used_cached"] >= 2 * (128 // plan.block_size - 1) * plan.block_size
    assert shared["used_cached"] > memory["used_cached"]
    assert cold["used_cached"] == 0
    assert cold["used_computed"] == sum(cold["prompt_tokens"])
    assert warm["prompt_tokens"] == cold["prompt_tokens"]
    assert warm["used_cached"] > warm["used_computed"]
    # Replies differ between conditions, and with them their tokens.
    assert memory["prompt_tokens"] == pytest.approx(window["prompt_tokens"], abs=8)
    assert max(memory["prompt_tokens"]) < min(cold["prompt_tokens"])
    assert memory["rest_bytes"] == 2 * 1024  # two versions of its state
