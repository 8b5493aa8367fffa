"""The table of supported pipelines says yes where marked tests passed, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest
import support_table

TESTS = '''
import pytest

proves = pytest.mark.supports

@proves(family="Drawn", feature="any text")
def test_passes(): pass

@proves(family="Drawn", feature="token")
def test_fails(): assert False

@proves(family="Drawn", feature="lone word")
def test_is_skipped(): pytest.skip("no such library")

@proves(feature="save and load", note="slowly")
@pytest.mark.parametrize("one", [pytest.param(1, marks=proves(family="Drawn")), pytest.param(0, marks=proves(family="Painted"))])
@pytest.mark.parametrize("other", [0, 1])
def test_of_several(one, other): assert one or other

@pytest.fixture(params=[pytest.param(name, marks=proves(family=name)) for name in ("Drawn", "Sung")])
def pipe(request): return request.param

@proves(feature="real images")
def test_of_a_fixture(pipe): pass

def test_of_no_feature(pipe): assert False

@pytest.fixture
def broken():
    yield
    raise ValueError("at its end")

@proves(family="Drawn", feature="store=maps")
def test_ends_badly(broken): pass

@proves(family="Danced", feature="refused", note="it moves")
def test_refused(): pass
'''  # fmt: skip  # noqa: E501


def run(*arguments):
    script = Path(support_table.__file__)
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_committed_table_is_of_the_tests_that_there_are():
    code, printed = run("--check")
    assert code == 0, printed


def test_only_what_passed_is_supported(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = supports(family, feature): proves\n")
    tests, table = tmp_path / "test_marked.py", tmp_path / "supported.md"
    tests.write_text(TESTS)
    code, printed = run(tests, "--table", table)
    assert code == 1, printed  # tests failed
    cells = {("Drawn", name) for name in ("any text", "save and load", "real images")}
    cells |= {("Sung", "real images"), ("Danced", "refused")}
    text = table.read_text()
    assert support_table.read(text) == cells
    assert "| Drawn |  | yes |  |  |  | yes |  |  | yes [^1] |\n" in text
    assert "[^1]: slowly\n" in text and "| Danced | it moves |\n" in text

    code, printed = run(tests, "--table", table, "--check")
    assert code == 1 and "('Painted', 'save and load')" in printed and "any text" not in printed.split("differ in")[1]


def test_a_feature_that_has_no_column(tmp_path):
    tests = tmp_path / "test_marked.py"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = supports(family, feature): proves\n")
    tests.write_text("import pytest\n@pytest.mark.supports(family='Drawn', feature='tokens')\ndef test_it(): pass\n")
    code, printed = run(tests, "--table", tmp_path / "supported.md")
    assert code != 0 and "'tokens'" in printed
    assert not (tmp_path / "supported.md").exists()
