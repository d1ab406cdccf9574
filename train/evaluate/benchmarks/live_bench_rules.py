"""LiveBench's rules: the score of an answer by the ground truth of its question, from 0 to 1.

A rule gets the fields of a question (`truth`, `question`, `release`, ...) and an answer. It raises InputError if the
truth has not the form that it needs. Sources are the published scorers of each task (arXiv:2406.19314).
"""

import difflib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.benchmarks import live_bench_tables as tables
from train.rewards.instructions import check_instruction
from train.rewards.text import last_box

Rule = Callable[[Mapping[str, Any], str], float]

# The first release whose puzzles are answered in tags, and have parts.
_TAGGED = "2024-11-25"
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
)
_NUMBERS += "seventeen eighteen nineteen twenty".split()
_REPLIES = ("yes", "no", "unknown")

WITHOUT_RULE: Mapping[str, str] = {
    "temporal": "no rule was written for it",
    "code_generation": "its unit tests need libraries that the sandbox does not have",
    "code_completion": "its unit tests need libraries that the sandbox does not have",
    "javascript": "an agent changes a repository in a container",
    "typescript": "an agent changes a repository in a container",
    "python": "an agent changes a repository in a container",
    "consecutive_events": "no rule was written for it",
    "integrals_with_game": "no rule was written for it",
    "logic_with_navigation": "no rule was written for it",
    "sudoku": "no rule was written for it",
    "theory_of_mind": "no rule was written for it",
}
"""Tasks of LiveBench whose questions are read and not scored, and why."""


def rule_of(task: str, subtask: str, category: str) -> Rule | None:
    """The rule of a question, or None if there is none here.

    Args:
      task, subtask, category: of the question; subtask is "" if it has none.
    """
    if category == "instruction_following":
        return instructions
    name = subtask or task
    parts = name.lower().split("_")
    if parts[0] in ("amc", "smc") or parts[1:2] == ["amc"]:
        return letter
    if parts[0] == "aime":
        return number_at_end
    if parts[0] in ("imo", "usamo"):
        return order_of_formulas
    return _RULES.get(name) or _RULES.get(task)


def without_thoughts(answer: str) -> str:
    """An answer without what stands in think tags."""
    return re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The least number of insertions, deletions and replacements that make one sequence of the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def letter(fields: Mapping[str, Any], answer: str) -> float:
    """Options of contests: the letter in tags, four times in a row or in a box, or the option's value at the end."""
    truth = _truth(fields)
    if not re.fullmatch("[A-E]", truth):
        raise InputError(f"expected ground_truth, a letter from A to E; found {truth!r:.40}.")
    tagged = _tagged(answer)
    if tagged and set(tagged[-1].lower()) == {truth.lower()}:
        return 1.0
    if truth * 4 in answer or (_boxed(answer) or "").lower() == truth.lower():
        return 1.0
    options = dict(re.findall(r"\\textbf{\(([A-E])\)\s?}(.*?)(?:\\qquad|\$)", fields["question"]))
    value = options.get(truth, "").strip().strip("$").strip("~")
    return float(bool(value) and value in answer[-20 - len(value) :])


def number_at_end(fields: Mapping[str, Any], answer: str) -> float:
    """AIME: the number stands in the last 50 characters."""
    return float(_truth(fields) in answer[-50:])


def order_of_formulas(fields: Mapping[str, Any], answer: str) -> float:
    """Proofs with holes: one minus the edit distance of the numbers of formulas, as a share of the longer list."""
    try:
        right = [int(number) for number in _truth(fields).split(",")]
    except ValueError:
        raise InputError(f"expected ground_truth, numbers such as 2,1,3; found {_truth(fields)!r:.40}.") from None
    found = _order(answer)
    return 1 - edit_distance(found, right) / max(len(found), len(right))


def web_of_lies(fields: Mapping[str, Any], answer: str) -> float:
    """Three replies in tags, in bold, in a box, or anywhere: all are right."""
    truth = _truth(fields).lower()
    tagged = _tagged(answer) or re.findall("</solution>(.*?)</solution>", answer)
    found = tagged[-1] if tagged else None
    if found is None:
        bold = [word for part in re.findall(r"\*\*(.*?)\*\*", answer) for word in part.lower().split()]
        replies = [word for word in (re.sub("[,.]", "", each) for each in bold) if word in _REPLIES]
        found = ", ".join(replies[-3:]) or None
    found = _replies(found, answer)
    if found is None:
        return 0.0
    # As published, where "unknown" counts as a "no" too: with it, replies are right only without other text.
    three = sum(map(found.count, _REPLIES)) == 3
    return float(found == truth or (three and truth in found))


def web_of_lies_3(fields: Mapping[str, Any], answer: str) -> float:
    """Replies in tags, in a box, or anywhere: half for all of them, half for the share that is right."""
    right = [reply.strip() for reply in _truth(fields).lower().split(",")]
    tagged = _tagged(answer)
    found = [reply.strip() for reply in (_replies(tagged[-1] if tagged else None, answer) or "").lower().split(",")]
    return _half(sum(a == b for a, b in zip(right, found, strict=False)), len(right))


def zebra(fields: Mapping[str, Any], answer: str) -> float:
    """Puzzles. Until November 2024 one word, `***in bold***` or the last one; then parts in tags, as `_half` counts."""
    truth = _truth(fields)
    if fields["release"] < _TAGGED:
        bold = re.findall(r"\*\*\*(\w+)\*\*\*", answer)
        word = (bold or re.findall(r"\w+", answer) or [""])[-1].lower()
        spelled = _NUMBERS[int(word)] if word in map(str, range(1, 10)) else word
        return float(truth.lower() in (word, spelled, f"{word} movies"))
    right = truth.split(",")
    found = _tagged(answer) or re.findall("</solution>(.*?)</solution>", answer)
    if not found and (box := _boxed(answer)):
        found = [box]
    last = answer.strip().split("\n")[-1]
    if not found and last.count(",") == len(right) - 1:
        found = [last]
    parts = _last_parts(found, len(right))
    pairs = zip(map(_simple, right), (_simple(part).replace("position", "") for part in parts), strict=False)
    return _half(sum(a in b for a, b in pairs), len(right)) if found else 0.0


def spatial(fields: Mapping[str, Any], answer: str) -> float:
    """One of the last three texts in bold is the answer, as a word or a number."""
    truth = _truth(fields).strip().lower()
    for bold in re.findall(r"\*\*([^*]+)\*\*", answer)[-3:]:
        word = bold.strip().lower()
        shape = truth in ("tetrahedra", "tetrahedron", "triangle", "square")
        if (
            word == truth
            or (word in _NUMBERS and str(_NUMBERS.index(word)) == truth)
            or (shape and truth in word and len(word) < 2 * len(truth) + 5)
        ):
            return 1.0
    return 0.0


def houses(fields: Mapping[str, Any], answer: str) -> float:
    """All names in order: the last texts in bold, or inside the last one."""
    names = _truth(fields).lower().split(" ")
    bold = [text for _, text in re.findall(r"(\*{2,})(.*?)\1", answer.lower())]
    if not bold:
        return 0.0
    if bold[-len(names) :] == names:
        return 1.0
    places = [bold[-1].find(name) for name in names]
    return float(min(places) >= 0 and all(a < b for a, b in itertools.pairwise(places)))


def typos(fields: Mapping[str, Any], answer: str) -> float:
    """The right text stands in the answer, whose lines are joined."""
    return float(_truth(fields) in " ".join(filter(None, answer.split("\n"))))


def plot(fields: Mapping[str, Any], answer: str) -> float:
    """One minus the edit distance between the orders of sentences, as a share of their number.

    Each sentence of the truth stands where the most similar one of the answer does.
    """
    text = answer.partition("<PLOT_SUMMARY>")[2] if "<PLOT_SUMMARY>" in answer else answer
    right, found = ([part.strip() for part in each.split(".") if part.strip()] for each in (_truth(fields), text))
    if not right:
        raise InputError("expected ground_truth, sentences; found none.")
    nearest = [difflib.get_close_matches(sentence, found, n=1, cutoff=0.0) for sentence in right]
    order = [found.index(near[0]) for near in nearest if near]
    return 1 - edit_distance(range(len(right)), order) / len(right)


def connections(fields: Mapping[str, Any], answer: str) -> float:
    """The share of groups of four words that are right: in bold until November 2024 (the best list), then in tags."""
    words = _truth(fields).split(",")
    right = _fours(words)
    if fields["release"] < _TAGGED:
        lists = [_fours(bold.split(",")) for bold in re.findall(r"\*\*(.*?)\*\*", answer.replace("\n", ""))]
        return max((sum(any(a <= b for b in groups) for a in right) / len(right) for groups in lists), default=0.0)
    found: list[str] = []
    for tag in ("<solution>", "</solution>"):
        found = found or re.findall(f"{tag}(.*?)</solution>", answer)
        found = found or re.findall(f"{tag}(.*?)</solution>", answer.replace("\n", ""))
    if not found and (box := _boxed(answer)):
        found = [box.replace("\n", "")]
    return sum(group in right for group in _fours(_last_parts(found, len(words)))) / len(right)


def column_type(fields: Mapping[str, Any], answer: str) -> float:
    """The type of a column: the whole answer or the last box, as letters and digits."""
    box = _boxed(answer)
    left, right = (re.sub(r"\W", "", text.lower()) for text in (_truth(fields), answer if box is None else box))
    return float(left == right)


def table_join(fields: Mapping[str, Any], answer: str) -> float:
    """F1 of the map of columns; see `live_bench_tables.join_score`."""
    truth = fields["truth"]
    right = truth if isinstance(truth, Mapping) else tables.joined_columns(_truth(fields))
    if not right:
        raise InputError(f"expected ground_truth, a map of columns; found {truth!r:.60}.")
    return tables.join_score(tables.joined_columns(answer), right)


def table_form(fields: Mapping[str, Any], answer: str) -> float:
    """The table of the answer is the right one; see `live_bench_tables.is_same_table`."""
    form = tables.target_format(fields["question"])
    if form not in tables.FORMATS:
        raise InputError(f"expected a question that asks for one of {', '.join(tables.FORMATS)}; found {form}.")
    right = tables.read_table(_truth(fields), form)
    if right is None:
        raise InputError(f"expected ground_truth, a table in {form}; found {_truth(fields)!r:.60}.")
    return float(tables.has_table(answer, right, form))


def instructions(fields: Mapping[str, Any], answer: str) -> float:
    """Half for all instructions, half for the share that is followed, strict."""
    kinds, given = fields["instruction_id_list"], fields["kwargs"]
    if not isinstance(kinds, list) or not isinstance(given, list) or not 0 < len(kinds) == len(given):
        raise InputError("expected the lists instruction_id_list and kwargs, as long as one another.")
    followed = 0
    for kind, one in zip(kinds, given, strict=True):
        if not isinstance(kind, str) or not isinstance(one, Mapping):
            raise InputError("expected texts in instruction_id_list, and objects in kwargs.")
        # Tables of many kinds have empty columns.
        known = {name: value for name, value in one.items() if value is not None}
        followed += check_instruction(kind, known, answer.strip())
    return _half(followed, len(kinds))


def expression(answer: str) -> str | None:
    """The final expression of an answer: its last box, or the last formula of its last line.

    Returns:
      What follows the last equals sign, without a constant of integration; None if there is no formula.
    """
    box = last_box(answer.replace(r"\fbox{", r"\boxed{"))
    if box is not None:
        found = box[1]
    else:
        formulas = re.findall(r"\$([^$]+)\$", answer.strip().split("\n")[-1])
        if not formulas:
            return None
        found = formulas[-1].split(r"\quad \text{or} \quad")[-1]
    return re.sub(r"\+ ?[Cc](?![a-z])", "", found.split("=")[-1]).strip()


def _truth(fields: Mapping[str, Any]) -> str:
    truth = fields["truth"]
    if not isinstance(truth, str) or not truth.strip():
        raise InputError(f"expected ground_truth, a text; found {truth!r:.40}.")
    return truth


def _tagged(answer: str) -> list[str]:
    return re.findall("<solution>(.*?)</solution>", answer)


def _boxed(answer: str) -> str | None:
    """The content of the last box, without marks of text."""
    box = last_box(answer.replace(r"\fbox{", r"\boxed{"))
    return None if box is None else re.sub(r"[}\\]", "", box[1].replace(r"\text{", ""))


def _half(right: int, of: int) -> float:
    """Half for all parts, half for the share that is right."""
    return ((right == of) + right / of) / 2


def _simple(text: str) -> str:
    return text.strip().lower().replace("-", " ")


def _last_parts(found: Sequence[str], count: int) -> list[str]:
    """The parts of one text, or the last ones of several together."""
    parts = [part for text in found for part in text.split(",")]
    return parts if len(found) < 2 else parts[-count:]


def _fours(words: Sequence[str]) -> list[set[str]]:
    """Groups of four different words, in the order of the words."""
    groups: list[set[str]] = [set()]
    for word in words:
        if len(groups[-1]) == 4:
            groups.append(set())
        groups[-1].add(word.strip().lower())
    return groups


def _replies(found: str | None, answer: str) -> str | None:
    """The replies that were found, or those of the last box, or the three in a row whose first occurrence is last."""
    if found is None or not found.strip():
        box = last_box(answer.replace(r"\fbox{", r"\boxed{").replace(r"\textbf{", r"\boxed{"))
        # A box around bold text.
        while box is not None and (inner := last_box(box[1])) is not None:
            box = inner
        found = found if box is None else box[1]
    if found is None:
        triples = [", ".join(three) for three in itertools.product(_REPLIES, repeat=3)]
        places = {three: answer.lower().find(three) for three in triples}
        last = max(triples, key=places.__getitem__)
        found = last if places[last] >= 0 else None
    return found


def _order(answer: str) -> list[int | None]:
    """The numbers of formulas: after the last `Answer:`, in the last box, or in the last line. None is no number."""
    lines = answer.strip().lower().split("\n")
    marked = [i for i, line in enumerate(lines) if "answer:" in line]
    if marked:
        after = [lines[marked[-1]].split("answer:")[1], *lines[marked[-1] + 1 :][:1]]
        texts = [text.replace("**", "").replace(".", "").strip() for text in after]
        found = [_int(re.sub(r"[${}\\<>]|boxed", "", part.strip().split(" ")[-1])) for part in _first(texts).split(",")]
        if set(found) != {None}:
            return found
    if box := _boxed(answer):
        found = [_int(part) for part in box.split(",")]
        if set(found) != {None}:
            return found
    digits = [re.search("[0-9]+", part) for part in lines[-1].split(",")]
    return [int(match[0]) for match in digits if match]


def _first(texts: Sequence[str]) -> str:
    """The first text that is not empty."""
    return next(filter(None, texts), "")


def _int(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*[0-9]+\s*", text) else None


_RULES: Mapping[str, Rule] = {
    "web_of_lies_v2": web_of_lies,
    "web_of_lies_v3": web_of_lies_3,
    "zebra_puzzle": zebra,
    "spatial": spatial,
    "house_traversal": houses,
    "typos": typos,
    "plot_unscrambling": plot,
    "connections": connections,
    "cta": column_type,
    "tablejoin": table_join,
    "tablereformat": table_form,
}
