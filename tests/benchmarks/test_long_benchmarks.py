"""LoCoMo and MemoryAgentBench: scores against cases by hand, and the way through the engine."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import locomo, memory_agent_bench
from benchmarks import locomo_protocol as protocol

SAMPLE = {
    "sample_id": "made-up",
    "conversation": {
        "speaker_a": "Ann",
        "speaker_b": "Bob",
        "session_1_date_time": "1 May 2023",
        "session_1": [
            {"speaker": "Ann", "dia_id": "D1:1", "text": "I moved to Bern."},
            {"speaker": "Bob", "dia_id": "D1:2", "text": "Nice!", "blip_caption": "a red house"},
        ],
        "session_10_date_time": "9 May 2023",
        "session_10": [{"speaker": "Ann", "dia_id": "D10:1", "text": "I run on Sundays."}],
        "session_2_date_time": "2 May 2023",
        "session_2": [{"speaker": "Bob", "dia_id": "D2:1", "text": "I bought two kayaks."}],
    },
    "qa": [
        {"question": "Where did Ann move to?", "answer": "Bern", "category": 4},
        {"question": "When did Bob buy kayaks?", "answer": 2023, "category": 2},
        {"question": "What does Ann do?", "answer": "running, cooking", "category": 1},
        {"question": "Is Ann sporty?", "answer": "Yes; she runs", "category": 3},
        {"question": "Who sold Ann a car?", "adversarial_answer": "Bob", "category": 5},
    ],
}


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("Bern", "Bern", 1.0),
        ("The house, in Bern!", "a house in Bern", 1.0),  # articles, commas, punctuation, case
        ("She runs", "running", 2 / 3),  # stems
        ("red blue", "red green", 0.5),
        ("red red", "red", 2 / 3),  # as bags: one of two is common
        ("Zürich", "Zu\u0308rich", 1.0),  # one letter or two code points
        ("7 May 2023", 2023, 0.5),
        ("", "Bern", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_token_f1(answer: str, expected: Any, f1: float) -> None:
    assert protocol.token_f1(answer, str(expected)) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("category", "expected", "answer", "score"),
    [
        (4, "Bern", "in Bern", 2 / 3),
        (2, 2023, "2023", 1.0),
        (3, "Yes; she runs", "Yes", 1.0),
        (1, "running, cooking", "runs", 0.5),  # of two items one was given
        (1, "running, cooking", "cooking, runs", 1.0),  # in any order
        (1, "running", "running, cooking", 1.0),  # of what is expected, all
        (1, "running", " , ", 0.0),
        (5, None, "No information available", 1.0),
        (5, None, "It is not mentioned.", 1.0),
        (5, None, "Bob", 0.0),
    ],
)
def test_each_category_is_scored_in_its_own_way(
    category: int, expected: Any, answer: str, score: float
) -> None:
    question = {"category": category, "answer": expected}
    assert protocol.score(question, answer) == pytest.approx(score)


def test_an_adversarial_question_has_two_options_whose_order_changes() -> None:
    question = SAMPLE["qa"][4]
    asked = [protocol.asked(question, f"made-up/{number}") for number in range(40)]
    assert {one.options for one in asked} == {
        ("Bob", protocol.NO_INFORMATION),
        (protocol.NO_INFORMATION, "Bob"),
    }
    for one in asked:
        assert one.options is not None
        assert f"(a) {one.options[0]} (b) {one.options[1]}" in one.text
        assert protocol.cleaned("(b)", one) == one.options[1]
        assert protocol.cleaned(" A) because", one) == one.options[0]
        assert protocol.cleaned("b", one) == one.options[1]
        for words in ("Bob did", "A friend of Ann's", "a, I think"):
            assert protocol.cleaned(words, one) == words
    plain = protocol.asked(SAMPLE["qa"][0], "made-up/0")
    for reply in ("\n Answer: Bern\nAnn said so.", "Answer:\nBern\nAnn said so.", "Bern"):
        assert protocol.cleaned(reply, plain) == "Bern"
    for reply in ("", "Answer:", "answer :\n"):
        assert protocol.cleaned(reply, plain) == ""
    assert protocol.DATE_HINT in protocol.asked(SAMPLE["qa"][1], "made-up/1").text


def test_sessions_become_messages_in_order_with_dates_and_pictures() -> None:
    history = locomo.history_of(SAMPLE["conversation"])
    assert [message["content"].splitlines()[0] for message in history] == [
        "Conversation of 1 May 2023:",
        "Conversation of 2 May 2023:",
        "Conversation of 9 May 2023:",
    ]
    assert "Bob: Nice! [shares a picture: a red house]" in history[0]["content"]
    assert len(locomo.history_of(SAMPLE["conversation"], by_turn=True)) == 4


def test_answers_of_memory_agent_bench_are_scored_by_hand() -> None:
    scores = memory_agent_bench.scores("It was the Red House.", ["red house", "Bern"])
    assert scores == {
        "exact_match": 0.0,
        "substring_match": 1.0,
        "f1": pytest.approx(2 / 3),  # two of four words, both of the expected ones
        "recall": 0.5,
    }
    assert memory_agent_bench.scores("the Bern!", ["Bern"])["exact_match"] == 1.0
    assert not any(memory_agent_bench.scores("", ["Bern"]).values())


def test_chunks_end_with_sentences_where_they_can() -> None:
    text = "One two three. Four five.\nSix seven eight nine ten eleven twelve. End."
    assert memory_agent_bench.chunks(text, 5) == [
        "One two three. Four five.",
        "Six seven eight nine ten",
        "eleven twelve. End.",
    ]
    words = " ".join(memory_agent_bench.chunks(text, 4)).split()
    assert words == text.split()


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *(str(each) for each in arguments)])
    module.main()


def test_locomo_runs_under_all_conditions_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, lines, result = (tmp_path / name for name in ("data.json", "lines.jsonl", "out.json"))
    data.write_text(json.dumps([SAMPLE, {**SAMPLE, "sample_id": "again"}]))
    conditions = "full,nothing,window,retrieval,memory,other,window+memory"
    arguments = ("--data", data, "--lines", lines, "--json", result, "--eager")
    arguments += ("--conditions", conditions)
    run_main(locomo, monkeypatch, *arguments)
    written = lines.read_text()
    summary = json.loads(result.read_text())["summary"]
    assert summary["memory_all_f1_questions"] == 8  # category 5 is not asked
    assert len(written.splitlines()) == 1 + 7 * 8
    assert summary["full_left_out"] == summary["window+memory_left_out"] == 0
    tokens = {
        condition: sum(
            record["prompt_tokens"]
            for record in map(json.loads, written.splitlines()[1:])
            if record["condition"] == condition
        )
        for condition in conditions.split(",")
    }
    assert tokens["nothing"] == tokens["memory"] == tokens["other"] < tokens["retrieval"]
    assert tokens["retrieval"] < tokens["full"]
    # Of three messages all are in the window; what folding takes away of it is the same text.
    assert tokens["window"] == tokens["window+memory"] == tokens["full"]
    # All is done: no engine is started, and the same is summed up.
    run_main(locomo, monkeypatch, *arguments)
    assert lines.read_text() == written
    assert json.loads(result.read_text())["summary"] == summary


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--question-template", "no place"),
        ("--question-template", "{question} {other}"),
        ("--categories", "1,6"),
        ("--categories", "a"),
        ("--questions", "-1"),
        ("--window", "0"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([SAMPLE]))
    with pytest.raises(SystemExit) as stopped:
        run_main(locomo, monkeypatch, "--data", data, f"{flag}={value}")
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err


def test_a_window_that_does_not_fit_is_cut_with_a_memory_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"speaker": "Ann", "dia_id": "D1:1", "text": "I moved to Bern. " * 60}
    told = {**SAMPLE["conversation"], "session_1": [long], "session_2": [long]}
    data, lines = tmp_path / "data.json", tmp_path / "lines.jsonl"
    data.write_text(json.dumps([{**SAMPLE, "conversation": told}]))
    arguments = ("--data", data, "--lines", lines, "--eager", "--questions", 2)
    arguments += ("--max-model-len", 512, "--conditions", "full,window,window+memory")
    run_main(locomo, monkeypatch, *arguments)
    assert "full: 2.0 messages of the history did not fit" in capsys.readouterr().out
    tokens: dict[str, list[int]] = {}
    for record in map(json.loads, lines.read_text().splitlines()[1:]):
        tokens.setdefault(record["condition"], []).append(record["prompt_tokens"])
    assert tokens["window+memory"] == tokens["window"] == tokens["full"]
    assert max(tokens["full"]) < 512


def test_data_that_is_not_the_benchmarks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.json"
    data.write_text('[{"text": "a"}]')
    with pytest.raises(SystemExit, match="sample_id, conversation and qa"):
        run_main(locomo, monkeypatch, "--data", data)
    rows = tmp_path / "rows.jsonl"
    row = {"context": "A.", "questions": ["?"], "answers": [["A"]], "metadata": {"source": "some"}}
    rows.write_text(json.dumps(row))
    with pytest.raises(SystemExit, match=r"--source other: .* has some"):
        run_main(memory_agent_bench, monkeypatch, "--data", rows, "--source", "other")
    for other, message in (
        ("1\n", "row 1 has not"),
        (json.dumps({**row, "answers": []}), "as many answers as questions"),
        (json.dumps({**row, "metadata": "some"}), "metadata is no object"),
        ("", "has no rows"),
    ):
        (tmp_path / "other.jsonl").write_text(other)
        with pytest.raises(SystemExit, match=message):
            memory_agent_bench.load(tmp_path / "other.jsonl", None)
    assert memory_agent_bench.load(rows, "some") == [row]
    (scored,) = memory_agent_bench.scored_cases([row], None, memory_agent_bench.QUESTION, 10)
    assert scored.grade(0, "A")["exact_match"] == 1.0
    assert [message["content"] for message in scored.case.history] == ["Remember this:\nA."]
