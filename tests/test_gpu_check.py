"""The GPU check notes what each part became, stops what runs too long, and makes its table of what is there."""

import sys

import gpu_check
import pytest

PRINTS = [sys.executable, "-c", "print('as expected')"]


@pytest.mark.parametrize(
    "code, limit, outcome",
    [("print('done')", 60, "passed"), ("raise SystemExit(1)", 60, "failed"), ("1 / 0", 60, "failed"),
     ("import time; print('begun', flush=True); time.sleep(60)", 6, "out of time")],
)  # fmt: skip
def test_the_outcome_of_a_part(code, limit, outcome):
    done = gpu_check.run(gpu_check.Part("a part", [sys.executable, "-c", code], 60), limit)
    assert done.outcome == outcome and done.seconds < 60
    if outcome in ("passed", "out of time"):
        assert done.said in ("done", "begun")


def test_a_part_for_which_no_time_is_left_is_not_begun():
    assert gpu_check.run(gpu_check.Part("a part", PRINTS, 60), 1).outcome == "not begun"


def test_the_table_holds_the_parts_and_the_rows_that_were_written(tmp_path):
    (tmp_path / "sdxl.csv").write_text(
        "what,against,ours,theirs,unit,ratio,peak_bytes\nmap,loop,0.5,1.0,s,2,2147483648\nbytes,all,1048576,0,bytes,0,\n"
    )
    table = gpu_check.table(tmp_path, [gpu_check.Outcome("environment", "passed", 3.2, "")])
    assert "| environment | passed | 3 |" in table
    assert "| map | sdxl | loop | 0.5 s | 1 s | 2 | 2.0 |" in table
    assert "| bytes | sdxl | all | 1 MiB | 0 MiB | 0 |  |" in table


@pytest.mark.parametrize("rehearse", [False, True])
def test_all_parts_fit_into_the_limit_of_a_machine(rehearse, tmp_path):
    parts = gpu_check.parts(tmp_path, rehearse=rehearse)
    assert [part.name for part in parts][:2] == ["environment", "tests of the core"]
    assert {*gpu_check.SHAPES} <= {part.name for part in parts}
    assert all(part.limit <= gpu_check.LIMIT / 2 for part in parts)
