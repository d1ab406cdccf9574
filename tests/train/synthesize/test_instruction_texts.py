"""The built-in kinds of instructions in words."""

import json
import random

from tests.helpers.runs import print_seed
from train.rewards.instruction_kinds import KINDS
from train.rewards.instructions import check_instruction
from train.synthesize.instruction_texts import TEXTS, draw


def test_every_built_in_kind_has_a_right_and_a_wrong_answer() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    assert set(KINDS) - set(TEXTS) == {"detectable_format:constrained_response"}
    for kind in TEXTS:
        for _ in range(20):
            drawn = draw(kind, rng, "How do I bake bread?")
            assert check_instruction(kind, drawn.arguments, drawn.right), drawn
            assert not check_instruction(kind, drawn.arguments, drawn.wrong), drawn
            assert check_instruction(kind, json.loads(json.dumps(drawn.arguments)), drawn.right)
