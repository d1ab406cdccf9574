"""The HTTP server: OpenAI's API, metrics and a chat page over an engine. See docs/serving.md.

Its modules need the packages of the extra `serve`: nothing else imports them before `qwen-jax serve` runs.
"""
