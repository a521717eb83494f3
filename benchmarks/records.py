"""Results of long runs as JSON lines, which go on where they stopped, and their intervals."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
LOW, HIGH = 2.5, 97.5
"""Percentiles of the resampled means: a 95 % interval."""


class Estimate(NamedTuple):
    """A mean with its 95 % interval.

    Both ends are the mean where all scores are equal: resampling cannot tell how rare others are.
    """

    mean: float
    low: float
    """NaN, as `high`, where one conversation has all questions, so that there is no interval."""

    high: float
    count: int

    def figures(self, name: str) -> dict[str, float]:
        """For a summary: the mean under a name, and the ends of the interval if there is one."""
        found = {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}
        return {key: round(value, 4) for key, value in found.items() if not math.isnan(value)}

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3f} (no interval)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], clusters: Sequence[object] | None = None) -> Estimate:
    """The mean of scores, with the interval that resampling gives.

    Args:
        values: a score per question.
        clusters: what each question belongs to (a conversation), where several share one: whole
            clusters are resampled then, because their questions rise and fall together. None: each
            question by itself.

    Raises:
        ValueError: there are no scores.
    """
    if not values:
        raise ValueError("no scores")
    labels = list(range(len(values))) if clusters is None else list(clusters)
    rows: dict[object, list[float]] = {}
    for label, value in zip(labels, values, strict=True):
        rows.setdefault(label, []).append(value)
    mean = float(np.mean(values))
    if clusters is not None and len(rows) < 2:
        return Estimate(mean, math.nan, math.nan, len(values))
    sums = np.array([sum(each) for each in rows.values()])
    sizes = np.array([len(each) for each in rows.values()])
    chosen = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[chosen].sum(1) / sizes[chosen].sum(1)
    low, high = np.percentile(means, [LOW, HIGH])
    return Estimate(mean, float(low), float(high), len(values))


class Records:
    """A file of results, each under a key of its own.

    The first line says what was asked for; a run of other settings is not mixed in. A last line
    that was cut off by a kill is dropped.

    Args:
        path: is made, or gone on with.
        settings: that make the results, as JSON values.

    Raises:
        SystemExit: the file holds results of other settings, or what is no result; or it cannot be
            written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._found: dict[str, dict[str, Any]] = {}
        wanted = json.loads(json.dumps(settings))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(path)
            if not lines:
                path.write_text(json.dumps({"settings": wanted}) + "\n", encoding="utf-8")
                return
        except OSError as error:
            raise SystemExit(f"--lines {path}: cannot be written: {error}") from None
        if lines[0]["settings"] != wanted:
            raise SystemExit(
                f"{path} holds results of other settings ({lines[0]['settings']}); name "
                "another file"
            )
        self._found = {line["key"]: line for line in lines[1:]}

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._found[key]

    def add(self, *records: Mapping[str, Any]) -> None:
        """Keep results, each with its `key`."""
        with self._path.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                self._found[record["key"]] = dict(record)

    def all(self) -> list[dict[str, Any]]:
        """Every result, in the order in which they came."""
        return list(self._found.values())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The file's lines; one that was cut off at its end is removed from it.

    Raises:
        SystemExit: they are not those of such a file, which is left as it is.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in content[:end].splitlines() if line.strip()]
        is_ours = all(("key" if place else "settings") in line for place, line in enumerate(lines))
    except (ValueError, TypeError):
        is_ours = False
    if not is_ours or (content.strip() and not end and not content.startswith(b'{"settings"')):
        raise SystemExit(f"{path} is no file of results; name another one")
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return lines
