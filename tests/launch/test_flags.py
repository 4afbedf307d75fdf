"""Flags of a configuration: what is read, what is refused and how it is said."""

from dataclasses import dataclass, replace

import pytest

from jaxspark.configuration import Configuration, ConfigurationError, option
from jaxspark.launch.flags import parse


@dataclass(frozen=True, kw_only=True)
class Config(Configuration):
    """One option of every kind."""

    out: str = option("Folder.")
    text: str | None = option("Text.", None, may_be_empty=True)
    kind: str = option("Kind.", "a", choices=("a", "b"), renamed={"old": "b"})
    count: int = option("Count.", 3, at_least=1)
    share: float = option("Share.", 0.5, at_least=0, at_most=1)
    sizes: tuple[int, ...] = option("Sizes.", (1, 2), at_least=1)
    names: tuple[str, ...] | None = option("Names.", None, formerly="labels")
    dry: bool = option("Dry.", False)


def read(*arguments: str) -> Config:
    return parse(Config, ["--out=x", *arguments], "some")


def test_what_is_not_given_has_its_default():
    assert read() == Config(out="x")


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("--text=", {"text": ""}),
        ("--count=7", {"count": 7}),
        ("--share=1", {"share": 1.0}),
        ("--sizes=4,8", {"sizes": (4, 8)}),
        ('--names=a,"b,c"', {"names": ("a", "b,c")}),
        ("--dry", {"dry": True}),
        ("--dry=true", {"dry": True}),
        ("--nodry", {"dry": False}),
        ("--kind=b", {"kind": "b"}),
    ],
)
def test_a_flag_changes_its_option(argument, changes):
    assert read(argument) == replace(Config(out="x"), **changes)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--count=0", "--count=0: expected at least 1"),
        ("--count=many", "--count=many: expected a whole number"),
        ("--share=1.5", "--share=1.5: expected 0 to 1"),
        ("--share=nan", "--share=nan: expected 0 to 1"),
        ("--sizes=1,0", "--sizes=1,0: expected at least 1"),
        ("--sizes=1,x", "--sizes=1,x: expected a whole number, got 'x'"),
        ("--sizes=", "--sizes has an empty value"),
        ("--names=a,", "--names has an empty value"),
        ("--kind=", "--kind has an empty value"),
        ("--kind=c", "--kind=c: expected one of a, b"),
        ("--cuont=1", "flag 'cuont'. Did you mean: count .*see jaxspark some --help"),
        ("more", "unexpected argument 'more'; all are --flags"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_can(argument, message):
    with pytest.raises(ValueError, match=message):
        read(argument)


def test_what_must_be_given_is_named():
    with pytest.raises(ValueError, match="--out must be given .see jaxspark some"):
        parse(Config, [], "some")


def test_an_earlier_name_is_read_with_a_notice(capsys):
    assert read("--labels=a,b").names == ("a", "b")
    assert capsys.readouterr().err == "--labels is now called --names\n"


def test_an_earlier_choice_is_read_with_a_notice():
    with pytest.warns(UserWarning, match="^kind=old is now called b$"):
        assert read("--kind=old").kind == "b"


def test_programs_and_people_are_refused_alike():
    with pytest.raises(ConfigurationError, match="^count=0: expected at least 1$"):
        Config(out="x", count=0)
    with pytest.raises(ConfigurationError, match="^names has an empty value"):
        Config(out="x", names=())
