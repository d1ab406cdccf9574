"""`qwen-jax data build`: documents to packed rows of tokens."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from qwen_jax.cli.common import parse, sibling


def build(argv: Sequence[str]) -> int:
    """Runs `train.data.build`, with its options and `--json`."""
    module = sibling("train.data.build")
    fields: list[Any] = [("json", bool, dataclasses.field(default=False))]
    options_type = dataclasses.make_dataclass("Options", fields, bases=(module.BuildConfig,), frozen=True)
    options_type.__doc__ = (
        f"{module.BuildConfig.__doc__.rstrip()}\n      json: print the summary as one JSON object.\n    "
    )
    options = parse(options_type, "data build", argv)
    names = [f.name for f in dataclasses.fields(module.BuildConfig)]
    manifest = module.build(module.BuildConfig(**{name: getattr(options, name) for name in names}))
    summary = {
        "domain": manifest.domain,
        "output": str(options.output),
        "rows": manifest.rows,
        "length": manifest.length,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "padding": manifest.padding,
        "empty": manifest.empty,
        "bad": manifest.bad,
        "fingerprint": manifest.fingerprint,
    }
    if options.json:
        print(json.dumps(summary))
    else:
        print(
            f"{manifest.tokens:,} tokens of {manifest.documents:,} documents in {manifest.rows:,} rows of "
            f"{manifest.length:,} ({manifest.padding:.2%} padding) in {options.output}"
        )
    return 0
