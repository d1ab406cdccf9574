"""Fields of a run by their paths: nested ones, old flat names, null, allowed values, and ranges."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from qwen_jax.lora import LoRA
from tests.helpers.runs import configuration, without
from train.config import CAME_LATER, MOVED, RunConfig, Stage, as_json, set_fields, with_new_names
from train.fields import call, differences
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import AdamW, Schedule
from train.pretrain import PretrainConfig
from train.resume import changed_since_last_launch, describe
from train.step import StepConfig

CONFIG = configuration("material", "run")


def at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_nested_fields_are_set_by_their_path() -> None:
    config = set_fields(CONFIG, "optimizer.beta2=0.99", "step.remat=full", "checkpoints.every=100")
    assert (config.optimizer.beta2, config.step.remat, config.checkpoints.every) == (0.99, "full", 100)
    assert set_fields(CONFIG, "objective.moe.balance_loss=0.5").objective.moe.balance_loss == 0.5


def test_a_part_is_an_object_of_its_fields() -> None:
    """Those that are left out have their defaults, whatever the configuration had."""
    config = set_fields(CONFIG, "optimizer.eps=1e-6", 'optimizer={"beta2": 0.99}', 'step.lora={"rank": 4}')
    assert (config.optimizer, config.step.lora) == (AdamW(beta2=0.99), LoRA(rank=4))
    # Also in lists, and where there was nothing.
    stages = [as_json(stage) for stage in CONFIG.stages] * 2
    assert set_fields(CONFIG, f"stages={json.dumps(stages)}").stages == CONFIG.stages * 2
    for wrong in (
        'optimizer={"beta": 1}',
        'optimizer={"beta1": "x"}',
        "optimizer=5",
        "stages=[{}]",
        'stages=[{"x": 1}]',
    ):
        with pytest.raises(InputError, match=r"expected (an object with fields of AdamW \(beta1, |a JSON list)"):
            set_fields(CONFIG, wrong)
    with pytest.raises(InputError, match="rank"):
        set_fields(CONFIG, 'step.lora={"rank": 0}')


@pytest.mark.parametrize("name", MOVED)
def test_a_flat_name_of_the_past_is_an_error_that_gives_the_new_path(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}.* is now '{MOVED[name]}'"):
        set_fields(CONFIG, f"{name}=1")
    with pytest.raises(InputError, match=rf"{name!r}.*{MOVED[name]}"):
        dataclasses.replace(CONFIG, **{name: 1})
    assert at(CONFIG, MOVED[name]) is not ...  # The new path exists.


def test_a_flat_name_with_something_below_it_too() -> None:
    with pytest.raises(InputError, match=r"objective\.moe\.balance_loss=0\.1"):
        set_fields(CONFIG, "moe.balance_loss=0.1")


def test_no_field_is_in_two_places() -> None:
    """Stages may override a setting of the run by a field of the same name; they have no default of their own."""
    parts = (RunConfig, StepConfig, LoopConfig, CheckpointConfig, AdamW, PretrainConfig)
    names = [field.name for part in parts for field in dataclasses.fields(part)]
    assert sorted(set(names)) == sorted(names)
    for field in dataclasses.fields(Stage):
        assert field.name not in names or field.default is None


@pytest.mark.parametrize("path", ["export", "initial", "wandb_project", "profile", "stages.0.rope_theta"])
def test_null_is_none(path: str) -> None:
    assert at(set_fields(CONFIG, "export=x", "export=null"), "export") is None
    config = set_fields(CONFIG, f"{path}=null")
    value = config.stages[0].rope_theta if path.startswith("stages") else at(config, path)
    assert value is None


def test_what_is_not_null_stays_text() -> None:
    assert set_fields(CONFIG, "output=null").output == "null"  # Null is no folder's name, and no other text.
    assert set_fields(CONFIG, "export=7").export == "7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("step.dtype=fp32", "expected one of 'bfloat16', 'float32', 'float16', got 'fp32'"),
        ("stages.0.schedule.schedule=cos", "expected one of 'cosine', 'linear', 'wsd', got 'cos'"),
        ("stages.0.remat=all", "expected one of 'none', 'full', 'dots' or null, got 'all'"),
        ("verify_data=yes", "expected true or false, got 'yes'"),
        ("optimizer.beta2=high", "expected a number, got 'high'"),
        ("mesh=4", "expected a JSON object"),
        ("step.lora.rank=8", r"step.lora is null. Set the whole part, as in step.lora='\{\"rank\": ...\}'"),
        ("output=", "output is empty"),
        ("tokenizer=", "tokenizer is empty"),
        ("export=", "export is empty"),
        ("initial=", "initial is empty"),
        ("mesh.fsdp=0", "must be at least 1, got 0"),
        ("stages.0.rope_theta=-1", "rope_theta must be positive"),
        ("max_raw_megabytes=-1", "max_raw_megabytes must be at least 0"),
    ],
)
def test_a_value_that_cannot_be_says_what_can(change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        set_fields(CONFIG, change)


def integers(value: Any, path: str = "") -> list[str]:
    """The paths of all integers in a configuration, but those of the model."""
    if isinstance(value, tuple):
        return [found for index, inner in enumerate(value) for found in integers(inner, f"{path}{index}.")]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.name not in ("model", "seed")]
        return [found for name in names for found in integers(getattr(value, name), f"{path}{name}.")]
    return [path[:-1]] if isinstance(value, int) and not isinstance(value, bool) else []


@pytest.mark.parametrize("path", [*integers(CONFIG), "stages.0.accumulation"])
def test_no_integer_may_be_negative(path: str) -> None:
    with pytest.raises(InputError, match=rf"{path.rpartition('.')[2]}.* must be at least \d, got -3"):
        set_fields(CONFIG, f"{path}=-3")


def test_a_record_of_an_old_launch_is_read_with_new_names() -> None:
    record = as_json(CONFIG)
    # Fields that came later are in no old record.
    for path in ("step.lora", *CAME_LATER):
        without(record, path)
    old = {name: value for name, value in record.items() if name not in ("step", "objective", "optimizer", "loop")}
    old |= {**record["step"], **record["objective"], **record["optimizer"], **record["loop"]}
    old |= {"checkpoint_every": 3, "keep_last": 3, "keep_every": 0}
    del old["checkpoints"], old["accumulation"]
    new = with_new_names(old)
    assert new == record


def test_changes_since_the_last_launch_skip_records_that_are_cut(tmp_path: Path) -> None:
    import json

    before = set_fields(CONFIG, f"output={tmp_path}")
    assert changed_since_last_launch(before) == {}
    records = json.dumps({"config": as_json(before)}) + "\n" + '{"config": {"see\n' + "\0" * 9
    (tmp_path / "launches.jsonl").write_text(records)
    assert changed_since_last_launch(before) == {}
    # What is stated is what was the default.
    stated = "stages.0.accumulation=1", "stages.0.remat=none", "stages.0.rope_theta=10000"
    assert changed_since_last_launch(set_fields(before, *stated)) == {}
    now = set_fields(before, "optimizer.beta2=0.99", "stages.0.schedule.learning_rate=0.5", "export=x", "mesh.data=1")
    changes = changed_since_last_launch(now)
    assert describe(changes) == [
        "stages.0.schedule.learning_rate 0.01 -> 0.5",
        "optimizer.beta2 0.95 -> 0.99",
        "mesh.data none -> 1",
    ]


def test_what_an_old_record_lacks_is_what_was_the_default(tmp_path: Path) -> None:
    import json

    config = set_fields(CONFIG, f"output={tmp_path}")
    record = as_json(config)
    for path in ("step.products", "objective.compact_loss", "objective.moe.expert_exchange", "optimizer.moments"):
        without(record, path)
    (tmp_path / "launches.jsonl").write_text(json.dumps({"config": record}) + "\n")
    assert changed_since_last_launch(config) == {}
    changes = changed_since_last_launch(set_fields(config, "step.products=fp8"))
    assert describe(changes) == ["step.products bfloat16 -> fp8"]


def test_products_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="expected one of 'bfloat16', 'fp8', 'fp8-blocks', 'int8', got 'int4'"):
        set_fields(CONFIG, "step.products=int4")
    with pytest.raises(InputError, match="products must be one of bfloat16, fp8, fp8-blocks, int8, got 'fp4'"):
        StepConfig(products="fp4")  # type: ignore[arg-type]
    for products in ("fp8", "fp8-blocks", "int8"):
        with pytest.raises(InputError, match=rf"'{products}' may overflow in float16. Use dtype='bfloat16'"):
            StepConfig("float16", products=products)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"LoRA keeps.*Use products='bfloat16', or lora=None"):
            StepConfig(products=products, lora=LoRA())  # type: ignore[arg-type]


def test_differences_are_those_of_leaves() -> None:
    a, b = {"x": {"y": 1, "z": [1, 2]}, "w": 0}, {"x": {"y": 2, "z": [1]}, "v": {"u": 3}, "w": 0}
    assert differences(a, b) == {"x.y": (1, 2), "x.z.1": (2, None), "v.u": (None, 3)}
    assert differences(a, a) == {}


def test_a_schedule_needs_steps() -> None:
    with pytest.raises(InputError, match="steps must be at least 1"):
        Schedule(-5)


def test_of_several_functions_one_must_be_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def small():\n    return 1\n\n\ndef large():\n    return 2\n")
    with pytest.raises(
        InputError, match=r"no function 'config'; there are 'small', 'large'. Name one of them: .*:small"
    ):
        call(str(file))
    assert call(f"{file}:large") == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("def config(:\n", r"cannot be run: SyntaxError: .*line 1"),
        ("import no_such_module\n", "cannot be run: line 1: ModuleNotFoundError: No module named 'no_such_module'$"),
        ("\n\ndef config():\n    return 1 / 0\n", "cannot be run: line 4: ZeroDivisionError: division by zero$"),
        ("def config(a):\n    pass\n", "cannot be run: TypeError: config.. missing 1 required"),
        ("def config():\n    from qwen_jax.errors import InputError\n    raise InputError('ours')\n", "^ours$"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(InputError, match=says.replace("$", r"\.$" if says[0] != "^" else "$")):
        call(str(tmp_path / "mine.py"))
