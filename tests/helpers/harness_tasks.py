"""Ten tasks of lm-eval of every type, over small data of our own."""

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = "the river stone bird under green house walks slowly because seven lamps never sleep and Anna counts".split()

# By name: what the YAML file adds to the data files. The data has the fields of `write_tasks`.
_LIST = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
TASKS: dict[str, dict[str, Any]] = {
    # Letters, few-shot: the answers to a question are one token each, and all prompts begin alike.
    "tiny_letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": "{{label}}",
        "description": "Questions on small things.\n\n",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 2,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "brier_score"}],
    },
    # Endings of several tokens, normalised by their bytes.
    "tiny_endings": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        **_LIST,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    # The alternatives are contexts, and the continuation is one.
    "tiny_contexts": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "acc"}],
    },
    # Also without a context.
    "tiny_mutual": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} ",
        **_LIST,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}],
    },
    # Prompts that are longer than the model's context.
    "tiny_long": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} {{text}} {{question}}",
        **_LIST,
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{' ' + answer}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_generate": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "e", " t"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True}],
    },
    # Few-shot, with filters that find the answer.
    "tiny_filters": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "fewshot_split": "train",
        "num_fewshot": 1,
        "generation_kwargs": {"until": ["Q:"], "max_gen_toks": 10, "temperature": 0.0},
        "filter_list": [
            {
                "name": "first-letter",
                "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}],
            },
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match"}],
    },
    # A prompt that must be cut. The stop string is no control token: the hf backend of lm-eval removes control tokens
    # from a text before it looks for stop strings, and so goes on after one that the model has written.
    "tiny_long_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}} {{text}} {{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n\n\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def sentence(rng: np.random.Generator, words: int) -> str:
    """Some words."""
    return " ".join(rng.choice(WORDS, words))


def write_tasks(tasks: Path, data: Path, rng: np.random.Generator, items: int = 3) -> list[str]:
    """Writes a YAML file for each task, and their data, whose paths are relative to its folder; returns their names.

    Args:
      tasks: folder of the YAML files.
      data: folder of the data.
      rng: of the questions.
      items: of each task.
    """
    tasks.mkdir(parents=True)
    (data / "tiny").mkdir(parents=True)
    for split in ("train", "test"):
        rows = []
        for _ in range(items):
            choices = [sentence(rng, int(rng.integers(1, 5))) for _ in range(3)]
            row = {"question": sentence(rng, 6), "choices": choices, "label": int(rng.integers(3))}
            rows.append({**row, "answer": sentence(rng, 1), "text": sentence(rng, int(rng.integers(45, 70)))})
        (data / "tiny" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: f"tiny/{split}.jsonl" for split in ("train", "test")}
    for name, settings in TASKS.items():
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        # YAML reads JSON.
        (tasks / f"{name}.yaml").write_text(json.dumps({**common, **settings, "metadata": {"version": 1.0}}))
    return list(TASKS)
