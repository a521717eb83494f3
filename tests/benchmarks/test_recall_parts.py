"""What the recall benchmarks are made of: cells, intervals, results that go on, retrieval."""

import json
import random
from pathlib import Path

import pytest

from benchmarks.common import parser
from benchmarks.conditions import CONDITIONS, retrieved, turns_of
from benchmarks.recall import TEXT, fingerprints, jobs_of, summary_of
from benchmarks.recall_groups import FURTHER, MAIN, Group, cases_of
from benchmarks.records import Estimate, Records, bootstrap
from deltamem_vllm.adapter import load_adapter, save_adapter
from deltamem_vllm.demo.assets import adapter_dir
from deltamem_vllm.demo.facts import split_of
from deltamem_vllm.demo.vocabulary import SLOTS


def test_the_interval_of_a_share_is_near_the_known_one() -> None:
    """Of 400 answers with 100 right, 0.25 +- 1.96 * sqrt(0.25 * 0.75 / 400)."""
    estimate = bootstrap([1.0] * 100 + [0.0] * 300)
    assert estimate.mean == 0.25
    assert estimate.low == pytest.approx(0.2076, abs=0.01)
    assert estimate.high == pytest.approx(0.2924, abs=0.01)
    assert estimate.count == 400
    assert bootstrap([1.0] * 5) == Estimate(1.0, 1.0, 1.0, 5)
    with pytest.raises(ValueError, match="no scores"):
        bootstrap([])


def test_questions_that_share_a_conversation_widen_the_interval() -> None:
    chance = random.Random(0)
    values = [float(chance.random() < 0.5) for _ in range(20)]
    repeated = [value for value in values for _ in range(20)]
    owners = [row for row in range(20) for _ in range(20)]
    alone, together = bootstrap(repeated), bootstrap(repeated, owners)
    assert together.high - together.low > 3 * (alone.high - alone.low)
    assert together.mean == alone.mean


def test_results_of_an_adapter_are_not_taken_for_those_of_another_in_its_place(
    tmp_path: Path,
) -> None:
    folder, lines = tmp_path / "adapter", tmp_path / "lines.jsonl"
    for name in ("tsw", "msw"):
        save_adapter(load_adapter(adapter_dir(name)), folder, overwrite=True)
        settings = {"fingerprints": fingerprints([str(folder)])}
        if name == "tsw":
            Records(lines, settings).add({"key": "a"})
            assert "a" in Records(lines, settings)
    with pytest.raises(SystemExit, match="other settings"):
        Records(lines, settings)


def test_an_adapter_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--adapters: .*missing"):
        fingerprints([str(tmp_path / "missing")])


def test_results_go_on_where_they_stopped(tmp_path: Path) -> None:
    path = tmp_path / "some" / "lines.jsonl"
    first = Records(path, {"questions": 5})
    first.add({"key": "a", "right": "101"}, {"key": "b", "right": "0"})
    with path.open("a") as file:
        file.write('{"key": "c", "ri')  # killed while it wrote
    again = Records(path, {"questions": 5})
    assert "a" in again and "c" not in again
    again.add({"key": "c", "right": "1"})
    assert [record["key"] for record in Records(path, {"questions": 5}).all()] == ["a", "b", "c"]
    assert Records(path, {"questions": 5})["a"]["right"] == "101"
    with pytest.raises(SystemExit, match="other settings"):
        Records(path, {"questions": 6})


@pytest.mark.parametrize(
    "content",
    ["notes, and no newline", "a line\nand one without its end", '{"key": 1}\n{"a"', "1\n"],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"notes\.txt is no file of results"):
        Records(path, {"questions": 5})
    assert path.read_text() == content


def test_a_first_line_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"settings": {"quest')
    assert Records(path, {"questions": 5}).all() == []
    assert json.loads(path.read_text()) == {"settings": {"questions": 5}}


def test_one_conversation_has_no_interval() -> None:
    estimate = bootstrap([0.0, 1.0, 1.0, 0.0], ["one"] * 4)
    assert str(estimate) == "0.500 (no interval)"
    assert estimate.figures("f1") == {"f1": 0.5}
    assert set(bootstrap([0.0, 1.0], ["one", "two"]).figures("f1")) == {"f1", "f1_low", "f1_high"}


def test_a_result_that_could_not_be_written_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(SystemExit):
            parser("A benchmark.").parse_args(["--json", str(name)])
        assert "cannot be written" in capsys.readouterr().err
    assert parser("A benchmark.").parse_args(["--json", str(tmp_path / "a" / "r.json")]).json


def test_retrieval_finds_the_turn_that_tells_and_keeps_the_order() -> None:
    history = [
        {"role": "user", "content": "My cat is called Miro."},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": "The weather is nice today."},
        {"role": "assistant", "content": "That is good to hear."},
        {"role": "user", "content": "My cat likes tuna."},
        {"role": "assistant", "content": "Okay."},
    ]
    assert [len(turn) for turn in turns_of(history)] == [2, 2, 2]
    assert turns_of([history[0], history[2], history[3]]) == [[history[0]], history[2:4]]
    assert retrieved(history, "What is my cat called?", 2) == [*history[:2], *history[4:]]
    assert retrieved(history, "anything", 3) == history


@pytest.mark.parametrize("group", [*MAIN, *FURTHER], ids=str)
def test_asked_pairs_are_held_out_and_told_where_the_group_says(group: Group) -> None:
    by_noun = {slot.noun: slot for slot in SLOTS}
    cases, expected = cases_of(group, 12, seed=5)
    assert cases == cases_of(group, 12, seed=5)[0] != cases_of(group, 12, seed=6)[0]
    for case, answer, conversation in zip(cases, expected, group.conversations(12, 5), strict=True):
        (question,) = conversation.questions
        assert case.questions == [question.text]
        told = [m["content"] for m in case.history if m["role"] == "user"]
        if group.kind == "untold":
            assert answer == "I do not know."
            continue
        assert question.value is not None and question.value in answer
        (noun,) = (each for each in by_noun if f"my {each}" in question.text)
        assert split_of(by_noun[noun], question.value) == "test"
        if group.kind == "distance":
            assert question.value in told[0]
            assert len(told) == 1 + group.size
        else:
            assert len(conversation.facts) == group.size
        if group.kind == "distractors":
            assert len(told) == 2 * group.size + 1


def test_only_the_first_adapter_asks_without_memory() -> None:
    (first, jobs), (second, fewer) = jobs_of(["msw", "tsw"], MAIN, seeds=3)
    assert (first, second) == ("msw", "tsw")
    assert len(jobs) == len({job.key for job in jobs}) == len(MAIN) * len(CONDITIONS) * 3
    assert {job.adapter for job in jobs} == {TEXT, "msw"}
    assert {job.condition for job in fewer} == {"memory", "other"}
    assert not {job.key for job in jobs} & {job.key for job in fewer}


def test_the_summary_names_the_first_adapters_figures() -> None:
    cell = Estimate(0.9, 0.8, 0.95, 500)
    found = {
        (TEXT, "full", "told/4"): cell,
        ("msw", "memory", "told/4"): cell._replace(mean=0.88),
        ("tsw", "memory", "told/4"): cell._replace(mean=0.77),
    }
    summary = summary_of(found, ["msw", "tsw"])
    assert summary["full_history_4_facts"] == 0.9
    assert summary["memory_4_facts"] == 0.88
    assert summary["memory_4_facts_low"] == 0.8
    assert summary["tsw_memory_4_facts"] == 0.77
    assert summary["questions_per_cell"] == 500
    assert "tsw_full_history_4_facts" not in summary
