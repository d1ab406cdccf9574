"""Evaluation of long contexts: retrieval tasks of an exact length, and loss by position. See docs/evaluation.md.

`tasks` makes prompts, `runner` lets an engine answer them, `perplexity` measures losses, `pictures` draws both.
`synthetic_ids` has tasks on bare token ids, for small models that were trained without text.
"""
