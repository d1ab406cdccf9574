"""Texts that are spoilt in a known way, for trying checks on them. A text that might stay right is left out."""

import itertools
import random
import re

# Between two words of a line, or two characters of scripts without spaces: no sentence ends here.
_WITHIN = re.compile("(?<=\\w) (?=\\w)|(?<=[\u3040-\u30ff\u3400-\u9fff])(?=[\u3040-\u30ff\u3400-\u9fff])")
_SEPARATORS = re.compile(r"[,;:|\n\u3001]")
_LEAST_WORDS, _LEAST_DISTINCT, _MOST_LEFT, _TRIES = 12, 8, 0.8, 20


def broken_off(text: str, share: float) -> str | None:
    """The beginning of a text, which ends within a sentence; None if there is no such place.

    Args:
      text: any.
      share: of its characters that are left, roughly; at most 0.8 are.
    """
    places = [match.start() for match in _WITHIN.finditer(text, 0, int(_MOST_LEFT * len(text)))]
    return text[: min(places, key=lambda place: abs(place - share * len(text)))] if places else None


def out_of_order(text: str, rng: random.Random) -> str | None:
    """The words of a text in another order, in which none is followed by the same one as before.

    Args:
      text: any.
      rng: of the order.

    Returns:
      None for a text of few words, or a list, which may say the same in another order.
    """
    words = text.split()
    few = len(words) < _LEAST_WORDS or len({word.casefold() for word in words}) < _LEAST_DISTINCT
    if few or 4 * len(_SEPARATORS.findall(text)) > len(words):
        return None
    followers = set(itertools.pairwise(words))
    for _ in range(_TRIES):
        # Words go one by one to a place where they follow another one than before.
        rest, made = words[:], list[str]()
        rng.shuffle(rest)
        while rest:
            fit = next((i for i, word in enumerate(rest) if not made or (made[-1], word) not in followers), None)
            if fit is None:
                break
            made.append(rest.pop(fit))
        if not rest:
            return " ".join(made)
    return None
