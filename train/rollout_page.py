"""A page to browse what a GRPO run has sampled: prompts, responses and their rewards, sorted and filtered."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.episodes import Episode, read_episode

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Rollouts</title>
<style>
body { font-family: sans-serif; margin: 1.5em auto; max-width: 72em; padding: 0 1em; color: #222; }
form { position: sticky; top: 0; background: #fff; padding: .6em 0; display: flex; flex-wrap: wrap; gap: .8em; }
article { border-top: 1px solid #ddd; padding: .6em 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .7em; margin: .4em 0; }
pre.prompt { background: #eef3fa; max-height: 9em; overflow: auto; }
.good { color: #19692c; } .bad { color: #a32020; } small { color: #666; }
</style>
</head>
<body>
<h1>Rollouts</h1>
<form>
<label>Episode <select id="episode"></select></label>
<label>Sort by <select id="sort">
<option value="order">prompt</option><option value="reward">reward, highest first</option>
<option value="-reward">reward, lowest first</option><option value="tokens">tokens, most first</option>
<option value="gap">log-probability gap, largest first</option>
</select></label>
<label>Show <select id="kind">
<option value="all">all</option><option value="cut">cut by the length</option>
<option value="missing">without a reward</option><option value="failed">with a failed tool</option>
</select></label>
<label>Text <input id="text" type="search" placeholder="in prompt or response"></label>
</form>
<p id="summary"></p>
<main id="list"></main>
<script type="application/json" id="data">DATA</script>
<script>
const episodes = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const number = value => value === null ? "none" : value.toFixed(3);
for (const e of episodes) {
  const option = document.createElement("option");
  option.value = e.number; option.textContent = e.number + 1; by("episode").append(option);
}
by("episode").value = episodes[episodes.length - 1].number;
function add(parent, tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text; if (name) made.className = name;
  parent.append(made); return made;
}
function show() {
  const episode = episodes.find(e => e.number == by("episode").value);
  const text = by("text").value.toLowerCase(), kind = by("kind").value, sort = by("sort").value;
  let rows = episode.rollouts.filter(r =>
    (kind == "all" || (kind == "cut" && !r.finished) || (kind == "missing" && r.reward === null) ||
     (kind == "failed" && r.failure !== null)) &&
    (!text || (r.prompt + r.completion).toLowerCase().includes(text)));
  const low = -Infinity, value = r => r.reward === null ? low : r.reward;
  if (sort == "reward") rows.sort((a, b) => value(b) - value(a));
  if (sort == "-reward") rows.sort((a, b) => value(a) - value(b));
  if (sort == "tokens") rows.sort((a, b) => b.tokens - a.tokens);
  if (sort == "gap") rows.sort((a, b) => b.gap - a.gap);
  by("summary").textContent = `${rows.length} of ${episode.rollouts.length} responses by the policy after step ` +
    `${episode.version}; mean reward ${number(episode.mean)}`;
  const list = by("list"); list.replaceChildren();
  for (const r of rows.slice(0, 500)) {
    const item = document.createElement("article");
    const head = add(item, "div", "");
    add(head, "b", `reward ${number(r.reward)}`, r.advantage > 0 ? "good" : r.advantage < 0 ? "bad" : "");
    const parts = Object.entries(r.scores).map(([name, score]) => `${name} ${number(score)}`);
    add(head, "small", `  advantage ${number(r.advantage)}; ${parts.join(", ")}; ` +
      `${r.tokens} tokens, ${r.turns} turn(s), gap ${r.gap === null ? "none" : r.gap.toExponential(1)}` +
      (r.finished ? "" : ", cut") + (r.failure === null ? "" : `, tool failed: ${r.failure}`) + `; prompt ${r.number}`);
    add(item, "pre", r.prompt, "prompt"); add(item, "pre", r.completion);
    list.append(item);
  }
  if (rows.length > 500) add(list, "p", "The first 500 are shown. Filter by text to see others.");
}
for (const id of ["episode", "sort", "kind"]) by(id).addEventListener("change", show);
by("text").addEventListener("input", show);
document.querySelector("form").addEventListener("submit", e => e.preventDefault());
show();
</script>
</body>
</html>
"""


def read_episodes(output: Path, newest: int) -> list[Episode]:
    """Reads the newest episodes of a run, in order.

    Args:
      output: folder of the run.
      newest: how many, at most.

    Raises:
      InputError: there is none.
    """
    files = sorted((output / "rollouts").glob("*.parquet"))
    if not files:
        raise InputError(f"{output} has no rollouts. Give the output folder of `qwen-jax train grpo`.")
    return [read_episode(path) for path in files[-newest:]]


def to_html(episodes: Sequence[Episode]) -> str:
    """A page that needs nothing else. Texts of models are shown as text; nothing in them is run.

    Args:
      episodes: to show, at least one.
    """
    content = json.dumps([_shown(episode) for episode in episodes], ensure_ascii=False)
    # Nothing in the data may end the element that holds it.
    return _PAGE.replace("DATA", content.replace("<", "\\u003c"))


def _shown(episode: Episode) -> dict[str, Any]:
    size, rollouts = len(episode.groups[0]), []
    for i, rollout in enumerate(episode.rollouts):
        prompt = episode.prompts[i // size]
        rollouts.append(
            {
                "number": prompt.number,
                "prompt": _as_text(prompt.text_or_messages),
                "completion": rollout.earlier + (rollout.text or ""),
                "reward": _number(episode.rewards[i]),
                "advantage": float(episode.advantages[i]),
                "gap": _number(episode.gaps[i]),
                "scores": {name: _number(episode.scores[i, n]) for n, name in enumerate(episode.names)},
                "finished": rollout.finished,
                "tokens": int(rollout.trained.sum()),
                "turns": rollout.turns,
                "failure": rollout.failure,
            }
        )
    mean = episode.metrics().get("reward/mean")
    return {"number": episode.number, "version": episode.version, "mean": mean, "rollouts": rollouts}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _as_text(prompt: Any) -> str:
    """Messages as one text with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)
