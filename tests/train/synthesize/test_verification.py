"""Functions and test cases that validate one another."""

from train.synthesize import verification


def test_cross_validation_is_that_of_autoif() -> None:
    """A case needs a function that gets it right, a function the given share of these, and answers for all."""
    follows = [True, True, False, False, True]
    found = verification.cross_validate(["11000", "11000", "00110", "1100t", "11100"], follows, 0.8)
    # The last case has the word of no sound function; the first two functions have all others.
    assert (found.cases, found.functions) == ([0, 1, 2, 3], [0, 1])
    assert found.certain == [0, 1, 2, 3]
    assert found.faults == {"takes too long": 1}
    assert verification.cross_validate(["ee"], [True, False], 0.8).functions == []
    assert verification.one_sided([True] * 4 + [False], 0.8)
    assert not verification.one_sided([True] * 3 + [False] * 2, 0.8)


def test_a_function_that_is_wrong_in_one_rare_way_is_outvoted() -> None:
    """It gets 90% of the test cases right; a wrong test case outvotes nobody."""
    follows = [True] * 5 + [False] * 5
    right, rare, harmed = "1111100000", "1111100001", [*follows[:9], True]
    assert verification.cross_validate([right, right, rare], follows, 0.8).functions == [0, 1]
    found = verification.cross_validate([right, right, rare], harmed, 0.8)
    assert (found.functions, found.certain) == ([0, 1, 2], list(range(9)))
