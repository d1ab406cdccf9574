"""GGUF, the single-file format of llama.cpp: its header, and the config and the tokenizer that are in it.

The weights are read and written by `convert.gguf`. Format: github.com/ggml-org/ggml, docs/gguf.md.
"""
