"""The sections of a recording: initial weights, logits, gradients, curves, text, conversion, data and runs."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.regression.adapter import (
    STEPS,
    TOTAL,
    build_data,
    convert_checkpoint,
    curve,
    engine,
    forward,
    initial_params,
    load_checkpoint,
    make_tokenizer,
    pretrain,
    run_file,
    training_batches,
    training_gradient,
    upcycle_checkpoint,
)
from experiments.regression.material import CHECKPOINTS, counting, make_checkpoint, make_material, moved, rows_of
from experiments.regression.section import Section, attempt, file_hashes, hashes, orbax_arrays

STOP = 6  # The step after which a run is stopped.

MODELS = ("tiny", "tiny-untied", "tiny-moe", "mixed-every-other", "mixed-some-dense")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "full", "dots")
TIMES = 48  # Tokens in a row.
PACKED = rows_of([[20, 18], [TIMES], [5, 30, 13]], TIMES, 512, seed=1)
WHOLE = rows_of([[TIMES]] * 3, TIMES, 512, seed=2)


def initial(section: Section) -> None:
    """Initial parameters, as hashes."""
    for name in (*MODELS, "narrow", "narrow-moe", "run", "run-moe"):
        with attempt(section, name):
            section.add(name, sha256=hashes(initial_params(name)))


def logits(section: Section) -> None:
    """Logits and gradients of the model by itself, with packed documents and with whole rows."""
    for name in MODELS:
        params = moved(initial_params(name))
        for dtype in DTYPES:
            for stacked in (True, False):
                item = f"{name} {dtype} {'stacked' if stacked else 'apart'}"
                with attempt(section, item):
                    run = forward(name, dtype, stacked)
                    for kind, batch, causal in (("packed", PACKED, False), ("whole", WHOLE, True)):
                        found, gradients = run(params, batch, causal)
                        section.add(f"{item} {kind}: logits", {"logits": found})
                        section.add(f"{item} {kind}: gradients", gradients)


def gradients(section: Section) -> None:
    """Gradients of the training step: all dtypes, ways to recompute and ways to run the layers."""
    for name in ("tiny", "tiny-moe", "mixed-every-other"):
        params = moved(initial_params(name))
        for dtype in DTYPES:
            for scan in (True, False):
                for remat in REMATS if dtype == "float32" else REMATS[2:] if scan else ():
                    item = f"{name} {dtype} remat={remat} scan_layers={scan}"
                    with attempt(section, item):
                        how: dict[str, Any] = dict(dtype=dtype, remat=remat, scan_layers=scan)
                        run = training_gradient(name, **how, loss_chunk=64, z_loss=1e-3, moe={"router_z_loss": 1e-3})
                        for kind, batch in (("packed", PACKED), ("whole", WHOLE)):
                            gradient, numbers = run(params, batch)
                            section.add(f"{item} {kind}", {"gradient": gradient, "numbers": numbers})


_BALANCE = {"balance_loss": 0.05, "router_z_loss": 1e-3}
# Model, mesh, and what else is set.
CURVES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "dense, one device": ("narrow", {}, {}),
    "dense, one device, bfloat16, layers apart": ("narrow", {}, dict(dtype="bfloat16", scan_layers=False)),
    "dense, fsdp=2 tensor=2 data=2": ("narrow", dict(fsdp=2, tensor=2, data=2), dict(remat="dots")),
    "dense, context=2 fsdp=2, accumulation=2": (
        "narrow",
        dict(context=2, fsdp=2),
        dict(accumulation=2, remat="full"),
    ),
    "dense, context=2 fsdp=2, accumulation=2, ring": (
        "narrow",
        dict(context=2, fsdp=2),
        dict(accumulation=2, ring=True),
    ),
    "moe, one device": ("narrow-moe", {}, dict(moe=_BALANCE)),
    "moe, expert=2 fsdp=2": ("narrow-moe", dict(expert=2, fsdp=2), dict(moe=_BALANCE, remat="dots")),
    "moe, expert=2, accumulation=2, capacity": (
        "narrow-moe",
        dict(expert=2),
        dict(accumulation=2, moe={**_BALANCE, "capacity_factor": 1.25}),
    ),
}


def curves(section: Section) -> None:
    """Training on several layouts: the numbers of every step, and the state at the end."""
    batches = training_batches(counting(64), 16, 32, STEPS)
    section.add("batches", sha256=hashes(batches))
    for item, (name, axes, settings) in CURVES.items():
        with attempt(section, item):
            how = {"dtype": "float32", "remat": "none", "loss_chunk": 16, "z_loss": 1e-3, **settings}
            metrics, state = curve(name, initial_params(name), batches, axes, **how)
            steps = {key: np.stack([numbers[key] for numbers in metrics]) for key in metrics[0]}
            readable = {key: [float(x).hex() for x in steps[key]] for key in ("loss", "grad_norm")}
            final = {"metrics": steps, "params": state["params"]}
            section.add(item, final, sha256=hashes(state), **readable)


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.8, top-k 20, top-p 0.9": dict(temperature=0.8, top_k=20, top_p=0.9, seed=7),
    "whole vocabulary, repetition penalty 1.1": dict(temperature=1.0, top_k=0, repetition_penalty=1.1, seed=3),
}


def text(section: Section) -> None:
    """What is generated: token ids and log-probabilities."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 160, length).tolist() for length in (17, 3, 40)]
    cases = [(kind, axes, dtype) for kind in ("untied", "moe") for axes in ({}, {"tensor": 2}) for dtype in DTYPES]
    cases += [("mixed", {}, "float32"), ("moe", {"expert": 2}, "float32"), ("untied", {"data": 2}, "float32")]
    with tempfile.TemporaryDirectory() as scratch:
        for kind, axes, dtype in cases:
            folder, mesh = Path(scratch) / kind, " ".join(f"{axis}={n}" for axis, n in axes.items()) or "one device"
            if not folder.exists():
                make_checkpoint(folder, **CHECKPOINTS[kind])
            few = kind == "mixed" or not axes.keys() <= {"tensor"}
            with attempt(section, f"{kind}, {mesh}, {dtype}"):
                generate = engine(folder, axes, dtype)
                for name, sampling in SAMPLINGS.items():
                    for batch in (3,) if few else (1, 3):
                        found = generate(prompts[:batch], sampling, 20)
                        section.add(
                            f"{kind}, {mesh}, {dtype}, batch of {batch}, {name}",
                            {f"row{i}": np.array(row["logprobs"]) for i, row in enumerate(found)},
                            tokens=[row["tokens"] for row in found],
                            finish=[row["finish"] for row in found],
                        )


def conversion(section: Section) -> None:
    """The files of converted checkpoints, and the arrays in them."""

    def look_at(item: str, folder: Path) -> None:
        loaded = load_checkpoint(folder)
        values: dict[str, Any] = {"files": file_hashes(folder), "loaded": hashes(loaded)}
        if (folder / "params").is_dir():
            values["restored by Orbax"] = hashes(orbax_arrays(folder / "params"))
        section.add(item, **values)

    with tempfile.TemporaryDirectory() as scratch:
        for kind, settings in CHECKPOINTS.items():
            source = Path(scratch) / kind
            make_checkpoint(source, **settings)
            section.add(f"{kind}: what transformers wrote", files=file_hashes(source))
            for dtype in (None, "bfloat16"):
                item, middle, back = f"{kind}, dtype {dtype}", source / f"orbax-{dtype}", source / f"hf-{dtype}"
                with attempt(section, item):
                    convert_checkpoint(source, middle, dtype)
                    look_at(f"{item}: to orbax", middle)
                    convert_checkpoint(middle, back, None)
                    look_at(f"{item}: and back", back)
            with attempt(section, f"{kind}: orbax to hf in bfloat16"):
                convert_checkpoint(source / "orbax-None", source / "narrowed", "bfloat16")
                look_at(f"{kind}: orbax to hf in bfloat16", source / "narrowed")
        for kind in ("tied", "untied"):
            with attempt(section, f"{kind}: upcycled"):
                upcycle_checkpoint(Path(scratch) / kind, Path(scratch) / f"{kind}-upcycled")
                look_at(f"{kind}: upcycled", Path(scratch) / f"{kind}-upcycled")


def data(section: Section) -> None:
    """A tokenizer, and data sets of text."""
    rng = np.random.default_rng(0)
    words = "the of <|im_end|> été 你好 \t\n\n def return  12,345 x🙂y I'm Ω".split(" ")
    texts = [f"{i} " + " ".join(rng.choice(words, rng.integers(1, 40)).tolist()) for i in range(120)]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch), attempt(section, "data build"):
        lines = "".join(json.dumps({"text": text}, ensure_ascii=i % 3 == 0) + "\n" for i, text in enumerate(texts))
        Path("texts.jsonl").write_text(lines, encoding="utf-8")
        make_tokenizer(texts, 400, Path("tokenizer"))
        section.add("tokenizer", files=file_hashes(Path("tokenizer")))
        status = build_data([Path("texts.jsonl")], Path("tokenizer"), 32, Path("rows"))
        section.add("data build", status=status, files=file_hashes(Path("rows")))


def runs(section: Section) -> None:
    """The pre-training command: a whole run, and one that is stopped and goes on."""
    with tempfile.TemporaryDirectory() as scratch:
        material = make_material(Path(scratch) / "material")
        section.add("material", files=file_hashes(material))
        for kind in ("dense", "moe"):
            for way in ("whole", "stopped, then resumed"):
                with attempt(section, f"{kind}, {way}"):
                    folder = Path(scratch) / kind / way.split(",")[0]
                    statuses = [launch(kind, material, folder, STOP)] if way != "whole" else []
                    statuses += [launch(kind, material, folder)]
                    look_at_run(section, f"{kind}, {way}", folder, statuses)


def launch(kind: str, material: Path, folder: Path, stop: int | None = None) -> int:
    """Runs the command; configuration, output (`run`) and export (`export`) are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.py"
    file.write_text(run_file(kind, material, folder / "run", folder / "export"))
    return pretrain(file, stop)


# Of a record in the log: speed, and where time went.
_TIMED = ("seconds", "tokens_per_second", "mfu")


def look_at_run(section: Section, item: str, folder: Path, statuses: list[int]) -> None:
    """Records what a run has left: its numbers, its last state, its checkpoints' checksums, its export."""
    run = folder / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if any(key == "loss" or key.startswith("held_out") for key in r)]
    records = [{key: value for key, value in r.items() if key not in _TIMED} for r in records]
    loads = run / "experts.jsonl"
    last = run / "checkpoints" / str(TOTAL)
    about = json.loads((last / "about" / "metadata").read_text())
    section.add(
        f"{item}: log",
        {f"{i:02d} at step {r['step']}": {k: np.float64(v) for k, v in r.items()} for i, r in enumerate(records)},
        statuses=statuses,
        expert_loads=[json.loads(line) for line in loads.read_text().splitlines()] if loads.exists() else None,
    )
    section.add(f"{item}: weights", orbax_arrays(last / "params"))
    optimizer = orbax_arrays(last / "optimizer")
    section.add(f"{item}: optimizer", optimizer, sha256=hashes(optimizer))
    kept = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
    section.add(f"{item}: about the last checkpoint", about=about, kept=kept)
    section.add(f"{item}: export", files=file_hashes(folder / "export"))


SECTIONS: dict[str, Callable[[Section], None]] = {
    "initial": initial,
    "logits": logits,
    "gradients": gradients,
    "curves": curves,
    "text": text,
    "conversion": conversion,
    "data": data,
    "runs": runs,
}
