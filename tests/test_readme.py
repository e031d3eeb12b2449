"""What README says: the example runs, and the commands and names it gives exist."""

import doctest
import pathlib
import re

import jaxinfra

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_learns():
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    test = doctest.DocTestParser().get_doctest(example, {}, "README", None, 0)
    lines = [line for e in test.examples for line in e.source.splitlines()]
    assert len(lines) <= 36
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0
    assert result.attempted > 20


def test_readme_is_short_and_its_files_exist():
    assert len(README.splitlines()) < 300
    named = re.findall(r"`((?:jaxinfra|scripts|configs)/[\w./]+\.(?:py|ipynb))", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).is_file()] == []
    commands = re.findall(r"python (scripts/\w+\.py)", README)
    assert [name for name in commands if not (ROOT / name).is_file()] == []


def test_every_public_name_resolves_and_has_a_docstring():
    for name in jaxinfra.__all__:
        assert getattr(jaxinfra, name).__doc__, name
