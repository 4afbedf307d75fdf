"""A stop string is found wherever it ends, and nothing of it or behind it gets out."""

import pytest

from jaxspark.text.stops import StopFinder


def first_end(text, stops, armed_from=0):
    """The rule, character by character: (characters before the stop, up to its end)."""
    for end in range(armed_from + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end - len(stop), end
    return None


def passed(text, stops, cuts, include=False):
    """What got out piece by piece, what came last, and the finder."""
    finder, pieces = StopFinder(stops, include=include), []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        pieces.append(finder.push(text[start:end]))
    return pieces, finder.finish(), finder


def test_what_could_become_a_stop_is_held_back():
    finder = StopFinder(["STOP", "end"])
    assert finder.push("a ST") == "a " and finder.held == 2
    assert finder.push("ON ST") == "STON " and finder.held == 2
    assert finder.push("OP and more") == "" and finder.held == 0
    assert finder.found.stop == "STOP"
    assert finder.push("more") == finder.finish() == ""


def test_the_stop_that_ends_first_counts():
    assert passed("xabcd", ["abcd", "bc"], [])[0] == ["xa"]
    # Both end with the same character: the one named first.
    assert passed("xabc", ["abc", "bc"], [])[0] == ["x"]
    assert passed("xabc", ["bc", "abc"], [])[0] == ["xa"]


def test_a_stop_can_be_part_of_the_text():
    pieces, rest, finder = passed("one. two", ["."], [2, 5], include=True)
    assert ("".join(pieces), rest) == ("one.", "")
    assert (finder.found.start, finder.found.end) == (3, 4)


def test_a_stop_that_does_not_count_yet_is_text():
    finder = StopFinder(["aa"])
    assert finder.push("xaa", armed=False) == "xa"
    assert finder.push("b", armed=True) == "ab"
    assert finder.push("aa") == "" and finder.found.start == 4
    # It may begin in text that did not count.
    finder = StopFinder(["aa"])
    assert finder.push("xaa", armed=False) == "xa"
    assert finder.push("a") == "" and finder.found.start == 2


def test_the_end_of_the_text_frees_what_was_held():
    finder = StopFinder(["\n\n"])
    assert finder.push("a\n") == "a" and finder.finish() == "\n"


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="stop string is empty"):
        StopFinder(["x", ""])


def test_any_cut_gives_what_the_whole_text_gives(random):
    """Few letters, so that stops overlap, repeat and begin in each other."""
    for _ in range(400):
        text = "".join(random.choice(list("ab.")) for _ in range(random.integers(30)))
        stops = [
            "".join(random.choice(list("ab."), size=random.integers(1, 5)))
            for _ in range(random.integers(4))
        ]
        cuts = sorted(random.integers(len(text) + 1, size=random.integers(8)).tolist())
        pieces, rest, finder = passed(text, stops, cuts)
        expected = first_end(text, stops)
        if expected is None:
            assert finder.found is None and "".join(pieces) + rest == text
        else:
            assert (finder.found.start, finder.found.end) == expected
            assert "".join(pieces) == text[: expected[0]] and rest == ""
