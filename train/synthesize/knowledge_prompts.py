"""What models are asked for texts, questions, problems and exercises from documents, and to judge them."""

from collections.abc import Mapping
from typing import Literal

Kind = Literal["knowledge", "mathematics", "code"]
FORMS: Mapping[Kind, tuple[str, ...]] = {
    "knowledge": ("textbook", "questions"),
    "mathematics": ("textbook", "problem"),
    "code": ("textbook", "exercise"),
}
"""What is written of a document, by kind."""
STYLES = (
    "a chapter of a textbook for students", "an article of an encyclopedia", "a lesson for somebody new to the subject",
    "lecture notes with clear paragraphs", "an explanation by a patient teacher",
)  # fmt: skip

TEXTBOOK = """Write the content of this document anew, as {style}. Keep all that it teaches, in an order that makes it
easy to learn, and explain terms where they first appear. State only facts, names and numbers that the document has. Use
sentences of your own, do not mention the document, and leave menus, notices and references out.{kind}

Document:
{document}

Answer with the text and nothing else."""
TEXTBOOK_KIND = {
    "knowledge": "",
    "mathematics": " Work examples of the document out step by step, with all numbers.",
    "code": " Programs are whole: each block of Python runs by itself after those before it.",
}
QUESTIONS = """Write {count} questions that this document answers, and their answers. Each is understood by somebody who
does not have the document, and says nothing of it. Answers are one to four sentences, in words of your own, with facts,
names and numbers of the document only.

Document:
{document}

Answer with a JSON array and nothing else: [{{"question": "...", "answer": "..."}}, ...]"""
PROBLEM = r"""Write a mathematical problem that practises what this document teaches, with other quantities than its
examples, and solve it. The problem is complete, has exactly one final answer, and says nothing of the document. The
solution has numbered steps, 1., 2., 3. and so on, each on a line of its own, and ends with one line that gives the
final answer in \boxed{{}}.

Document:
{document}

Answer with a JSON object and nothing else: {{"problem": "...", "solution": "..."}}"""
SOLVE = r"""Solve this problem.

{problem}

Write numbered steps, 1., 2., 3. and so on, each on a line of its own. End with one line that gives the final answer in
\boxed{{}}, and write nothing after it."""
EXERCISE = """Write a programming exercise that practises what this document teaches: one Python function. The task says
its name, its arguments and what it returns, gives an example, and says nothing of the document. Write a solution, which
imports nothing but the standard library, and {count} tests, each one line of the form assert NAME(arguments) == value.

Document:
{document}

Answer with a JSON object and nothing else: {{"task": "...", "function": "its name", "solution": "code", "tests":
["assert ...", ...]}}"""
JUDGE = """Here are a document and a text that was written from it. Judge three things:
supported: all that the text states follows from the document. What is common knowledge need not.
whole: the text is understood without the document, and does not begin or break off in the middle.
teaches: somebody learns something from it. It is clear, and not a list of words, an advertisement or a notice.

Document:
{document}

Text:
{text}

First give your reasons in a few sentences. Then end with one line that is a JSON object:
{{"supported": true or false, "whole": true or false, "teaches": true or false}}"""
CRITERIA: Mapping[str, str] = {
    "supported": "not supported by the document", "whole": "not whole", "teaches": "it teaches nothing"
}  # fmt: skip
# What no document says, for the audit of the judge.
STRANGE = "The harbour of Kalderath was painted green by its council after a vote that only the ferrymen could attend."
