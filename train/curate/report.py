"""The page at the end of a curation: how many documents each stage kept, why others were removed, and what came out."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_jax.files import to_json
from train.curate.corpus import View
from train.data.shards import digest
from train.synthesize.report import page, share, table

# Documents that are shown of each reason, and characters of each.
_SHOWN, _CHARACTERS = 3, 600
_REASONS = 30


def samples(view: View, rows: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, list[dict[str, str]]]:
    """Documents that a stage has removed, a few of each reason, from shards chosen by a hash.

    Args:
      view: what the stage has read.
      rows: by shard and reason, rows of removed documents.
    """
    chosen: dict[str, list[tuple[str, int]]] = {}
    for shard in sorted(rows, key=digest):
        for reason, found in rows[shard].items():
            places = chosen.setdefault(reason, [])
            places += [(shard, row) for row in found[: _SHOWN - len(places)]]
    shown: dict[str, list[dict[str, str]]] = {}
    for reason in sorted(chosen)[:_REASONS]:
        for shard, row in chosen[reason]:
            (document,) = view.rows(shard, [row], ("id", "source", "text", "html"))
            page_bytes = document["html"] or b""
            text = document["text"] or page_bytes[: 4 * _CHARACTERS].decode("utf-8", "replace")
            one = {"id": document["id"], "source": document["source"], "text": text[:_CHARACTERS]}
            shown.setdefault(reason, []).append(one)
    return shown


def to_html(summary: Mapping[str, Any]) -> str:
    """The page, without scripts and without anything from elsewhere.

    Args:
      summary: of `train.curate.run.run`.
    """
    fault = html.escape(summary["fault"] or "It was stopped.")
    state = "Finished." if summary["finished"] else f"<span class=fault>Not finished. {fault}</span>"
    body = [
        f"<h1>{html.escape(summary['curation'])}</h1><p>{state} qwen_jax {html.escape(summary['qwen_jax'])}, "
        f"configuration {summary['config'][:12]}, {summary['seconds']:,.1f} s in this run.</p>",
        "<h2>Inputs</h2>",
        table(
            ("input", "files", "documents", "bytes", "unusable records", "skipped", "damaged files", "empty files"),
            (
                (
                    name,
                    one["files"],
                    one["documents"],
                    one["bytes"],
                    sum(one["bad"].values()),
                    sum(one["skipped"].values()),
                    len(one["broken"]) + len(one["damaged"]),
                    len(one["empty"]),
                )
                for name, one in summary["inputs"].items()
            ),
        ),
        *_unusable(summary["inputs"]),
        "<h2>Stages</h2>",
        table(
            ("stage", "in", "out", "yield", "seconds"),
            (
                (s["name"], s["in"], s["out"], share(s["out"], s["in"]), f"{s['seconds']:.1f}")
                for s in summary["stages"]
            ),
        ),
        *_found(summary["stages"]),
        "<h2>Removed</h2>",
        *_removed([*summary["stages"], {"name": "not written", **summary["writing"]}]),
        "<h2>Output</h2>",
        table(
            ("domain", "documents", "written", "bytes of text", "files"),
            (
                (name, one["documents"], one["written"], one["bytes"], one["files"])
                for name, one in summary["output"].items()
            ),
        ),
        "<h2>Lengths</h2>",
        *(_histogram(name, counts) for name, counts in summary["lengths"].items()),
    ]
    return page(summary["curation"], "".join(body))


def _unusable(inputs: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for name, one in inputs.items():
        for reason, count in one["bad"].items():
            places = "\n".join(f"{file}, {place}: {why}" for file, place, why in one["shown"].get(reason, ()))
            yield _details(f"{name}, unusable: {reason}: {count:,}", [places])
        for reason, count in one["skipped"].items():
            yield f"<p>{html.escape(name)}, skipped: {html.escape(reason)}: {count:,}</p>"
        if faults := [f"{file}: {reason}" for file, reason in {**one["broken"], **one["damaged"]}.items()]:
            yield _details(f"{name}: {len(faults):,} damaged files", ["\n".join(faults[:100])])
        if one["empty"]:
            yield _details(f"{name}: {len(one['empty']):,} files without documents", ["\n".join(one["empty"][:100])])


def _found(stages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """What stages of the whole corpus say about it."""
    for stage in stages:
        if stage["found"]:
            rows = (
                (name, value if isinstance(value, int) else to_json(value)) for name, value in stage["found"].items()
            )
            yield f"<h3>{html.escape(stage['name'])}</h3>{table(('measure', 'value'), rows)}"


def _removed(stages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for stage in stages:
        if not stage["removed"]:
            continue
        yield f"<h3>{html.escape(stage['name'])}</h3>"
        for reason, count in stage["removed"].items():
            shown = [f"{one['source']} {one['id']}\n{one['text']}" for one in stage["samples"].get(reason, ())]
            yield _details(f"{reason}: {count:,} ({share(count, stage['in'])})", shown)


def _details(title: str, texts: Iterable[str]) -> str:
    shown = "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
    return f"<details><summary>{html.escape(title)}</summary>{shown}</details>"


def _histogram(name: str, counts: Mapping[str, int]) -> str:
    most = max(counts.values(), default=1)
    rows = "".join(
        f'<tr><td>{int(at):,}</td><td>{count:,}</td><td style="text-align:left">'
        f'<span class="bar" style="width:{20 * count / most:.2f}em"></span></td></tr>'
        for at, count in counts.items()
    )
    return f"<h3>{html.escape(name)}</h3><table><tr><th>bytes from</th><th>documents</th><th></th></tr>{rows}</table>"
