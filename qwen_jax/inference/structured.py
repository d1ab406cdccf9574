"""Structured output: masks that let a text only become valid JSON, match a regular expression, follow a grammar, be one
of several texts, or be calls of tools. Built on llguidance.

A token is allowed if some valid text goes on with it, however that text is split into tokens. Control tokens, such as
`<|im_start|>`, are never text: they are not allowed inside a JSON string, say.
"""

import collections
import functools
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.inference.grammar_check import Checker
from qwen_jax.inference.matching import Matcher, Work, lexer_count, llguidance_module, readable
from qwen_jax.tokenizer import Tokenizer

MAX_TEXT = 256 * 1024
"""The longest schema, expression or grammar, in characters."""
MAX_CHOICES = 10_000
CALL_START, CALL_END = "<tool_call>", "</tool_call>"
_TAGS = ("call_start", "call_end")

# Bounds of llguidance. The fuel is of work on patterns: about 50,000 a millisecond to compile, 14,000 in a mask.
# A schema with 1,200 optional properties needs 5,000 items in a row and 20,000 in a step. With ambiguous rules the time
# grows with the square of the items, which the budget of a text bounds.
_LIMITS = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 20_000}
_LIMITS |= {"max_items_in_row": 5_000, "max_lexer_states": 250_000, "max_grammar_size": 500_000}
# llguidance would else allow only the usual tokens of a text that is certain.
_OPTIONS = '%llguidance {"no_forcing": true}'
# What further lexers of a grammar may take to compile, while texts that run wait. Usual schemas take 1 ms for each.
_LEXER_SECONDS = 0.02
# Compiled grammars that are kept.
_KEPT, _KEPT_TEXT = 256, 2 << 20


class Grammars:
    """Makes grammars, and keeps the ones used last. Threads may share it.

    llguidance (extra `serve`) is imported with the first grammar, and the vocabulary read, which takes a second for
    150,000 tokens: see `prepare`.

    Args:
      tokenizer: of the model.
      vocab_size: of the model's logits. Ids beyond the tokenizer's are never allowed.
      end_ids: ids that end a text. They are allowed where the text is complete, and nowhere else.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        if vocab_size < tokenizer.vocab_size:
            raise InputError(f"vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, got {vocab_size}.")
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_ids = tuple(dict.fromkeys(i for i in end_ids if 0 <= i < vocab_size))
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._checker = Checker()
        # What was compiled, or why it could not be; the one used last is at the end.
        self._cache: collections.OrderedDict[tuple[str, str, tuple[str, ...]], Grammar | str] = (
            collections.OrderedDict()
        )

    def prepare(self) -> None:
        """Reads the vocabulary now. Raises InputError if llguidance is not installed."""
        self._get_vocabulary()

    def json_schema(self, schema: Mapping[str, Any] | str) -> "Grammar":
        """A JSON text that a schema accepts. Properties come in the schema's order, between any white space.

        Args:
          schema: of draft 2020-12, an object or its JSON text. Keywords that cannot be enforced are an error.
        """
        return self._make("The JSON schema", "lark", f"start: %json {_schema_text(schema, 'The JSON schema')}")

    def json_object(self) -> "Grammar":
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> "Grammar":
        """A text that matches a regular expression from its beginning to its end, in the syntax of Rust's `regex`."""
        what = "The regular expression"
        library = llguidance_module()
        quoted = library.LLMatcher.grammar_from_regex(_check_text(pattern, what))
        return self._make(what, "lark", json.loads(quoted)["grammars"][0]["lark_grammar"])

    def ebnf(self, text: str) -> "Grammar":
        """A text that follows a grammar: in Lark's syntax as llguidance extends it, or GBNF (`root ::= ...`)."""
        if isinstance(text, str) and text.lstrip().startswith("{"):
            raise InputError("The grammar must be in the notation of Lark or GBNF, got JSON.")
        kind = "gbnf" if "::=" in _check_text(text, "The grammar") else "lark"
        if kind == "lark" and (found := _REFERENCE.search(_LITERAL.sub(" ", text))):
            raise InputError(
                f"The grammar names the control token {found[0]}, which a text may not have. Put it in quotes if it is "
                "plain text. The end of the text needs no token."
            )
        return self._make("The grammar", kind, text)

    def choice(self, choices: Sequence[str]) -> "Grammar":
        """One of several texts."""
        what = "The list of choices"
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise InputError(f"{what} must be a list of texts, at least one; got {choices!r:.80}.")
        if len(choices) > MAX_CHOICES:
            raise InputError(f"{what} has {len(choices)} texts; at most {MAX_CHOICES} are allowed.")
        texts = [_check_text(text, f"Choice {i}") for i, text in enumerate(choices)]
        pattern = "|".join(map(_quoted, dict.fromkeys(texts)))
        return self._make(what, "lark", f"start: CHOICE\nCHOICE: /({pattern})/")

    def tool_calls(
        self, tools: Sequence[tuple[str, Mapping[str, Any]]], named: str | None, parallel: bool
    ) -> "Grammar":
        """One or more calls in Hermes format, as the chat template of Qwen2.5 writes them.

        Args:
          tools: name and JSON schema of the arguments of each.
          named: the tool that must be called, or None for any of them.
          parallel: whether there may be several calls.
        """
        names = [name for name, _ in tools]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise InputError(f"There are two tools named {repeated[0]!r}. Give each a name of its own.")
        if named is not None and named not in names:
            raise InputError(f"There is no tool named {named!r}; the tools are {', '.join(names) or 'none'}.")
        chosen = [(name, schema) for name, schema in tools if named in (None, name)]
        if not chosen:
            raise InputError("A call of a tool needs at least one tool.")
        rules = []
        for i, (name, schema) in enumerate(chosen):
            what = f"The parameters of tool {name!r}"
            if isinstance(schema, Mapping) and schema.get("type", "object") != "object":
                raise InputError(f"{what} must be a JSON schema of type object, got type {schema['type']!r}.")
            text = _schema_text({"type": "object", **schema} if isinstance(schema, Mapping) else schema, what)
            head = f'{{"name": {json.dumps(_check_text(name, "The name of a tool"), ensure_ascii=False)}, "arguments": '
            rules.append(f"t{i}: {_terminal(head)} %json {text} {_terminal('}')}")
        body = " | ".join(f"t{i}" for i in range(len(rules)))
        rules.append(f"start: call{' (NEWLINE call)*' if parallel else ''}")
        rules.append(f"call: call_start NEWLINE ({body}) NEWLINE call_end\nNEWLINE: /\\n/\n")
        return self._make("The tools", "lark", "\n".join(rules), tags=(CALL_START, CALL_END))

    def _get_vocabulary(self) -> "_Vocabulary":
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._end_ids)
            return self._vocabulary

    def _make(self, what: str, kind: str, text: str, tags: tuple[str, ...] = ()) -> "Grammar":
        """Compiles a grammar, or finds it.

        Args:
          what: the beginning of errors.
          kind, text: as for `Checker.check`.
          tags: what the names call_start and call_end in it stand for.
        """
        if len(text) > 2 * MAX_TEXT:
            raise InputError(f"{what} is too large: {len(text)} characters. At most {MAX_TEXT} are allowed.")
        vocabulary = self._get_vocabulary()
        key = kind, text, tags
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
        if found is None:
            found = self._compile(vocabulary, kind, text, tags)
            with self._lock:
                self._cache[key] = found
                self._forget()
        if isinstance(found, str):
            raise InputError(f"{what} cannot be used: {found}.")
        return found

    def _compile(self, vocabulary: "_Vocabulary", kind: str, text: str, tags: Sequence[str]) -> "Grammar | str":
        """The grammar, or why there is none."""
        # The checker knows no control tokens: there, tags are plain text.
        named = list(zip(_TAGS, tags, strict=False))
        plain = "".join(f"\n{name}: {_terminal(tag)}" for name, tag in named)
        checked, problem = self._checker.check(kind, text + plain, _LIMITS)
        if problem is not None:
            return readable(problem)
        lark = checked if kind == "gbnf" else text
        for name, tag in named:
            token = vocabulary.control.get(tag)
            lark += f"\n{name}: {_terminal(tag) if token is None else f'<[{token}]>'}"
        allowed_W = vocabulary.allowed(tags)

        def compiled() -> Any:
            # The options are at the end, so that line numbers in errors are the user's.
            matcher = vocabulary.matcher(f"{lark}\n{_OPTIONS}\n")
            try:
                # Finds that nothing matches, and makes the states that every copy begins with.
                Matcher(matcher, allowed_W, work=Work(limited=False)).fill(np.zeros_like(allowed_W))
            except InputError:
                raise InputError(readable(matcher.get_error() or "no text matches it")) from None
            return matcher

        try:
            return Grammar(compiled, allowed_W, self._end_ids)
        except InputError as error:
            return str(error)

    def _forget(self) -> None:
        """Drops what was used longest ago, beyond the numbers to keep."""
        size = sum(len(text) for _, text, _ in self._cache)
        while len(self._cache) > 1 and (len(self._cache) > _KEPT or size > _KEPT_TEXT):
            (_, text, _), _ = self._cache.popitem(last=False)
            size -= len(text)


class Grammar:
    """What a text must match. Requests share it; each has a matcher of its own.

    Copies of a matcher of llguidance share a lexer, which is locked while one of them makes a mask or takes a token. So
    the first texts have lexers of their own, which later ones share in turns.

    Args:
      compiled: makes a matcher of llguidance at the beginning of a text, with a lexer of its own.
      allowed_W, end_ids: as for `Matcher`.
    """

    def __init__(self, compiled: Callable[[], Any], allowed_W: np.ndarray, end_ids: tuple[int, ...] = ()) -> None:
        self._compiled, self._allowed_W, self._end_ids = compiled, allowed_W, end_ids
        start = time.thread_time()
        self._matchers, self._texts = [compiled()], itertools.count()
        self._most = min(lexer_count(), 1 + int(_LEXER_SECONDS / max(time.thread_time() - start, 1e-9)))

    def matcher(self) -> Matcher:
        """A matcher at the beginning of a text."""
        text = next(self._texts)
        if 0 < text < self._most:
            self._matchers.append(self._compiled())
        chosen = self._matchers[text % len(self._matchers)]
        return Matcher(chosen.deep_copy(), self._allowed_W, self._end_ids, lexer=id(chosen))


class _Vocabulary:
    """The tokens as llguidance knows them: their bytes, and which of them are no text.

    It has the attributes that `llguidance.LLTokenizer` asks for.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._library = llguidance_module()
        # White space among the added tokens of some vocabularies is text.
        self.control = {text: i for text, i in tokenizer.control_ids.items() if text.strip()}
        special = {*self.control.values(), *tokenizer.special_ids, tokenizer.eos_id, *end_ids}
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.tokens += [b""] * (vocab_size - tokenizer.vocab_size)
        self.special_token_ids = sorted(special)
        self.eos_token_id = end_ids[0] if end_ids else tokenizer.eos_id
        words = -(-vocab_size // 32)
        bits = np.zeros(words * 32, bool)
        bits[: tokenizer.vocab_size] = [bool(token) for token in self.tokens[: tokenizer.vocab_size]]
        bits[self.special_token_ids] = False
        bits[list(end_ids)] = True
        self._allowed = bits
        self._allowed_with = functools.cache(self._make_allowed)
        self._tokenizer = self._library.LLTokenizer(self, eos_token=list(end_ids) or [tokenizer.eos_id])
        self._limits = self._library.LLParserLimits(**_LIMITS, verbose_errors=False)

    def __call__(self, text: str) -> list[int]:
        # Only asked for where tokens are forced.
        raise NotImplementedError

    def matcher(self, text: str) -> Any:
        return self._library.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)

    def allowed(self, tags: Sequence[str]) -> np.ndarray:
        """Bit mask of the ids that may be allowed: text, end ids, and the control tokens of tags. Not to be changed."""
        return self._allowed_with(tuple(tags))

    def _make_allowed(self, tags: tuple[str, ...]) -> np.ndarray:
        bits = self._allowed.copy()
        bits[[self.control[tag] for tag in tags if tag in self.control]] = True
        return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


# What Lark takes literally: texts, regular expressions, comments. A name of a control token in them is plain text.
_LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?!/)(?:[^/\\\n]|\\.)+/|(?://|#)[^\n]*')
_REFERENCE = re.compile(r"<[^<>\s]+>")


def _check_text(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{what} must be a text, got {type(text).__name__}.")
    if len(text) > MAX_TEXT:
        raise InputError(f"{what} is too large: {len(text)} characters. At most {MAX_TEXT} are allowed.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} has a lone surrogate, which is no character.") from None
    return text


def _schema_text(schema: Mapping[str, Any] | str, what: str) -> str:
    """A schema on one line, without options of llguidance."""
    try:
        value = json.loads(_check_text(schema, what)) if isinstance(schema, str) else schema
        if not isinstance(value, Mapping):
            raise InputError(f"{what} must be a JSON object, got {type(value).__name__}.")
        value = {key: item for key, item in value.items() if key != "x-guidance"}
        return _check_text(json.dumps(value, allow_nan=False), what)
    except RecursionError:
        raise InputError(f"{what} is nested too deeply.") from None
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} is not JSON: {error}.") from None


def _quoted(text: str) -> str:
    """A regular expression for a text, within slashes of Lark."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\u{{{ord(c):x}}}" for c in text)


def _terminal(text: str) -> str:
    return f"/{_quoted(text)}/"
