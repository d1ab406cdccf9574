"""The progress of a run on the console."""

import io
import math

from rich.console import Console

from train.observe.display import Display, Stretch, duration


def test_time_left_and_mfu_follow_what_a_stage_costs():
    """At a constant speed in FLOP/s, time left is FLOPs left over that speed, also for stages not reached."""
    stretches = [Stretch(10, 100, 1e6), Stretch(14, 300, 30e6)]
    for evaluation in (0.0, 100.0):
        out = io.StringIO()
        with Display(Console(file=out, width=200), 14, 0, 14, stretches, 1e6, evaluate_every=4) as display:
            for step in range(1, 15):
                seconds = 2.0 if step <= 10 else 60.0  # Both are half of the peak.
                display.step(step, 3.0, stretches[step > 10].tokens, seconds)
                if evaluation and (step % 4 == 0 or step in (10, 14)):
                    display.evaluation(step, {"held_out_loss": 1.0}, evaluation)
        lines = [line for line in out.getvalue().splitlines() if "held-out" not in line]
        assert all("MFU 50.0%" in line for line in lines)
        assert "50 tokens/s" in lines[8]
        # Of the evaluations at 4, 8, 10, 12 and 14 the first tells how long one takes.
        assert f"{duration(5 * 2 + 4 * 60 + 4 * evaluation)} left" in lines[4]
        assert f"{duration(2 * 60 + 2 * evaluation)} left" in lines[11]
        assert "left" not in lines[-1]
    assert [duration(s) for s in (9.4, 61, 3720, 200_000)] == ["9 s", "1 min 01 s", "1 h 02 min", "2 d 7 h"]


def test_lines_come_at_least_every_five_minutes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("train.observe.display.time.perf_counter", lambda: clock[0])
    out = io.StringIO()
    with Display(Console(file=out, width=200), 100_000) as display:
        for step in range(1, 101):
            clock[0] += 20.0
            display.step(step, 3.0, 10, 20.0)
    assert 5 <= len(out.getvalue().splitlines()) <= 7


def test_a_loss_that_is_not_finite_leaves_the_mean_and_is_told():
    out = io.StringIO()
    with Display(Console(file=out, width=200), 4, lines=4) as display:
        for step, loss in enumerate((2.0, math.nan, 4.0, math.inf), 1):
            display.step(step, loss, 10, 1.0)
    assert [line.split("  ")[1] for line in out.getvalue().splitlines()] == ["loss 2.000"] * 2 + ["loss 3.000"] * 2
