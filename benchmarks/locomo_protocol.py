"""LoCoMo's questions and scores (Maharana et al., arXiv 2402.17753): F1 over stemmed tokens.

The prompts say what the published ones say, in our words. To ask in the published words, give them
as a template: `--question-template`.
"""

import hashlib
import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

CATEGORIES: Final = {
    1: "multi-hop",
    2: "temporal",
    3: "open-domain",
    4: "single-hop",
    5: "adversarial",
}

SYSTEM: Final = (
    "You answer questions about conversations between two people. Say only what the conversations "
    "say; if they do not tell the answer, say that you do not know."
)

QUESTION: Final = (
    "Answer this question about the conversations with a few words, taken from them wherever that "
    "is possible, and not with a whole sentence.\n\nQuestion: {question}"
)

DATE_HINT: Final = " Answer with an approximate date, by the dates of the conversations."
NO_INFORMATION: Final = "No information available"
OPTIONS: Final = " (a) {a} (b) {b} Answer with (a) or (b)."

_OPTION: Final = re.compile(r"\(([ab])\)|([ab])(?:[).:]|$)", flags=re.IGNORECASE)
"""A letter that names an option, and not the article of an answer."""

_ARTICLES: Final = re.compile(r"\b(a|an|the|and)\b")
_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Asked:
    """A question as it is asked; `options` are those of an adversarial one."""

    text: str
    category: int
    options: tuple[str, str] | None = None


def asked(question: dict[str, Any], key: str, template: str = QUESTION) -> Asked:
    """How a question of the data is asked.

    Args:
        question: with `question`, `category`, and `answer` or `adversarial_answer`.
        key: names it; decides which of the two options of an adversarial one comes first.
        template: with a place for `{question}`.
    """
    category, text = int(question["category"]), str(question["question"])
    options = None
    if category == 2:
        text += DATE_HINT
    if category == 5:
        wrong = str(question.get("adversarial_answer", question.get("answer", "")))
        flipped = hashlib.sha256(key.encode()).digest()[0] % 2
        options = (wrong, NO_INFORMATION) if flipped else (NO_INFORMATION, wrong)
        text += OPTIONS.format(a=options[0], b=options[1])
    return Asked(template.format(question=text), category, options)


def cleaned(reply: str, question: Asked) -> str:
    """The answer in a reply: its first line, and of an adversarial question the chosen option."""
    said = re.sub(r"^\s*answer\s*:", "", reply, flags=re.IGNORECASE)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    answer = lines[0] if lines else ""
    if question.options is not None:
        chosen = _OPTION.match(answer)
        if chosen is not None:
            return question.options["ab".index((chosen[1] or chosen[2]).lower())]
    return answer


def score(question: dict[str, Any], answer: str) -> float:
    """An answer's score from 0 to 1, as LoCoMo defines it for each category.

    Single-hop and temporal questions: F1. Open-domain ones: F1 with the answer before the first
    semicolon. Multi-hop ones: answers are lists with commas; of each expected item the best F1 with
    an item given, averaged. Adversarial ones: whether it was said that there is no information.
    """
    category = int(question["category"])
    if category == 5:
        lowered = answer.lower()
        return float("no information available" in lowered or "not mentioned" in lowered)
    expected = str(question["answer"])
    if category == 3:
        expected = expected.split(";")[0]
    if category != 1:
        return token_f1(answer, expected)
    items = [item for item in answer.split(",") if item.strip()]
    wanted = [item for item in expected.split(",") if item.strip()]
    if not items or not wanted:
        return 0.0
    return sum(max(token_f1(item, one) for item in items) for one in wanted) / len(wanted)


def token_f1(answer: str, expected: str) -> float:
    """F1 of two texts as bags of stemmed tokens, articles and punctuation left out."""
    given, wanted = tokens(answer), tokens(expected)
    common = sum((Counter(given) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def tokens(text: str) -> list[str]:
    """What F1 compares: lower case, no commas, punctuation, articles or `and`, Porter stems."""
    plain = unicodedata.normalize("NFD", text).replace(",", "").lower().translate(_PUNCTUATION)
    return [_stem(word) for word in _ARTICLES.sub(" ", plain).split()]


@cache
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))


@cache
def _stemmer() -> Any:
    from nltk.stem import PorterStemmer

    return PorterStemmer()
