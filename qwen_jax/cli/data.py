"""`qwen-jax data build`: documents to packed rows of tokens."""

import dataclasses
import json
from collections.abc import Sequence

from qwen_jax.cli.common import parse, sibling


def build(argv: Sequence[str]) -> int:
    """Runs `train.data.build`, with the fields of `BuildConfig` and `--json` as options.

    Args:
      argv: arguments after `data build`.
    """
    module = sibling("train.data.build")
    fields = [("json", bool, dataclasses.field(default=False))]
    options_type = dataclasses.make_dataclass("Options", fields, bases=(module.BuildConfig,), frozen=True)
    options_type.__doc__ = (
        f"{module.BuildConfig.__doc__.rstrip()}\n      json: print the summary as one JSON object.\n    "
    )
    options = parse(options_type, "data build", argv)
    names = [f.name for f in dataclasses.fields(module.BuildConfig)]
    manifest = module.build(module.BuildConfig(**{name: getattr(options, name) for name in names}))
    if options.json:
        keys = ("rows", "length", "tokens", "documents", "padding", "empty", "bad", "fingerprint")
        summary = {"domain": manifest.domain, "output": str(options.output)}
        print(json.dumps(summary | {key: getattr(manifest, key) for key in keys}))
        return 0
    left_out = manifest.left_out(options.output)
    print(
        f"{manifest.tokens:,} tokens of {manifest.documents:,} documents in {manifest.rows:,} rows of "
        f"{manifest.length:,} ({manifest.padding:.2%} padding) in {options.output}"
        + (f"; {left_out}" if left_out else "")
    )
    return 0
