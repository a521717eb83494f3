"""A server is killed while conversations run: no answered turn is lost, doubled or wrong."""

import pytest

from benchmarks.kill_sessions import measure


@pytest.mark.timeout(600)
def test_answered_turns_survive_two_kills_exactly_once() -> None:
    """One right before a COMMIT, one of the whole server at a random moment."""
    samples, summary = measure("sqlite", kills=2, seconds=None, mutant=None)
    assert [sample["target"] for sample in samples] == ["before_commit", "group"]
    assert summary["acknowledged_turns"] >= 24
    assert summary["lost_turns"] == 0
    assert summary["duplicated_turns"] == 0
    assert summary["wrong_states"] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_reply_before_its_commit_is_caught() -> None:
    _, summary = measure("sqlite", kills=1, seconds=None, mutant="reply_before_commit")
    assert summary["lost_turns"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commits_without_compare_and_set_are_caught() -> None:
    _, summary = measure("sqlite", kills=0, seconds=None, mutant="no_cas")
    assert summary["lost_turns"] + summary["duplicated_turns"] > 0
    assert summary["wrong_states"] > 0
