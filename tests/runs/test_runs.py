"""The headless runner, on small notebooks of its own."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from daamlib_lab.runs import find_notebooks, main, timing, write_metrics

PARAMETERS = """MODEL = None  # the model
DEVICE = None  # cpu or cuda
SEED = 0  # the seed
OUTPUT_DIR = 'outputs'  # where results go"""
METRICS = """from daamlib_lab.runs import write_metrics
write_metrics(OUTPUT_DIR, {"seed": SEED, "nested": {"half": 0.5}})"""


def write_notebook(path, *cells, parameters=PARAMETERS):
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"name": "some-other-kernel", "display_name": "Python", "language": "python"}
    content = [new_markdown_cell("# Title"), tagged, *map(new_code_cell, cells)]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=content, metadata={"kernelspec": kernel}), path)


@pytest.fixture
def launch(tmp_path):
    """Run the command line on tmp_path/notebooks; return its exit code and its run folder or None."""

    def launch(*arguments):
        folders = ["--notebooks-dir", str(tmp_path / "notebooks"), "--runs-dir", str(tmp_path / "runs")]
        try:
            code = main([*arguments, *folders])
        except SystemExit as stopped:
            code = stopped.code
        made = list((tmp_path / "runs").glob("*"))
        assert len(made) <= 1
        return code, made[0] if made else None

    return launch


@pytest.fixture
def without_kernels(monkeypatch):
    """Let cells run in this process, which takes no time; what they print is lost."""

    def execute(notebook, executed, *, parameters, **_):
        shutil.copy(notebook, executed)
        cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
        names = {}
        exec(cells[0], names)
        names |= parameters  # papermill adds a second cell for them
        for number, source in enumerate(cells[1:], start=3):
            try:
                exec(source, names)
            except ValueError as error:
                raise PapermillExecutionError(number, number, source, "ValueError", str(error), []) from error

    monkeypatch.setattr("daamlib_lab.runs.run.papermill.execute_notebook", execute)


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_metrics_and_reports_of_a_run_are_gathered(tmp_path, launch, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("daamlib_lab.runs.run._cores", lambda: 6)
    where = "import os, sys\nprint(sys.executable, MODEL, os.environ['OMP_NUM_THREADS'], os.getcwd())"
    write_notebook(tmp_path / "notebooks/00_one.ipynb", where, METRICS)
    write_notebook(tmp_path / "notebooks/01_two.ipynb", "1 / 0", METRICS)
    folder = os.getcwd()
    code, run_dir = launch("--seed", "7", "-p", "MODEL", "some/model v1", "--device", "cpu")
    assert code == 1
    assert os.getcwd() == folder
    assert run_dir.name.endswith("Z-model-v1")
    metrics = {"seed": 7, "nested": {"half": 0.5}}
    assert json.loads((run_dir / "metrics.json").read_text()) == {"00_one": metrics}
    assert json.loads((run_dir / "00_one/metrics.json").read_text()) == metrics
    assert json.loads((run_dir / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    assert printed(run_dir / "00_one.ipynb") == f"{sys.executable} some/model v1 3 {tmp_path / 'notebooks'}\n"
    summary = (run_dir / "summary.md").read_text()
    assert "| [00_one](00_one.ipynb) | passed |" in summary
    assert "| 00_one | nested.half | 0.5 |" in summary
    assert "| SEED | 7 |" in summary
    assert "| cores | " in summary
    out, error = capfd.readouterr()
    assert "2 notebooks, 6 at a time" in out
    assert re.search(r"\[\d/2\] 00_one.ipynb passed after", out)
    assert "01_two.ipynb: In [3] raised ZeroDivisionError" in error
    assert "[IPKernelApp] WARNING" not in error  # such as one of every kernel that it listens to the network


HEADLINE = """from daamlib_lab.runs import write_metrics
metrics = {"best": {"car, DAAM": 1 / 3, "tree": 0.5}, "images": 12000, "verdict": "holds"}
tables = {"mIoU (%)": {"thesis": {"DAAM": "53.2", "LDAAM": "38.3"}, "here": {"DAAM": "7.0"}}}
write_metrics(OUTPUT_DIR, metrics, headline=["best.car, DAAM", "images", "verdict"], tables=tables)"""


@pytest.mark.usefixtures("without_kernels")
def test_a_run_ends_in_a_line_for_each_notebook_the_tables_and_where_the_rest_is(tmp_path, launch, capsys):
    write_notebook(tmp_path / "notebooks/00_one.ipynb", METRICS)
    write_notebook(tmp_path / "notebooks/01_tables.ipynb", HEADLINE)
    write_notebook(tmp_path / "notebooks/02_bad.ipynb", "raise ValueError('two\\nlines')")
    write_notebook(tmp_path / "notebooks/03_good.ipynb", METRICS)
    code, run_dir = launch("--jobs", "3")
    assert code == 1
    end = capsys.readouterr().out.split("\n\n", 1)[1]
    assert re.sub(r" +\d+\.\d s", " N s", end).splitlines() == [
        "00_one     passed N s",
        "01_tables  passed N s  best.car, DAAM = 0.3333; images = 12000; verdict = holds",
        "02_bad     failed N s  In [3] raised ValueError: two lines",
        "03_good    passed N s",
        "",
        "mIoU (%)",
        "        DAAM LDAAM",
        "thesis  53.2  38.3",
        "here     7.0      ",
        "",
        f"3 of 4 notebooks passed; in {run_dir}:",
        "  summary.md     all metrics, then the notebooks without their code, on one page",
        "  metrics.json   every number",
        "  NN_name.ipynb  the notebooks as they ran; NN_name/ what they wrote",
    ]
    head = (run_dir / "summary.md").read_text().split("## Metrics")[0]
    assert re.search(
        r"01_tables.ipynb\) \| passed \| [\d.]+ \| best.car, DAAM = 0.3333; images = 12000; verdict = h", head
    )
    assert head.endswith(
        "**mIoU (%)**\n\n|  | DAAM | LDAAM |\n| --- | --- | --- |\n| thesis | 53.2 | 38.3 |\n| here | 7.0 |  |\n\n"
    )
    # what is compared between runs is what was measured
    assert json.loads((run_dir / "metrics.json").read_text())["01_tables"].keys() == {"best", "images", "verdict"}


@pytest.mark.usefixtures("without_kernels")
def test_metrics_written_by_other_means_have_no_headline(tmp_path, launch, capsys):
    own = "import pathlib\npathlib.Path(OUTPUT_DIR, 'metrics.json').write_text('{\"iou\": 1}')"
    write_notebook(tmp_path / "notebooks/00_own.ipynb", own)
    code, run_dir = launch()
    assert code == 0
    assert re.search(r"^00_own  passed +[\d.]+ s$", capsys.readouterr().out, re.MULTILINE)


def test_an_installed_package_says_where_the_notebooks_are(monkeypatch, capsys):
    monkeypatch.setattr("daamlib_lab.runs.run.CLONE", None)
    with pytest.raises(SystemExit):
        main([])
    assert "--notebooks-dir CLONE/notebooks" in capsys.readouterr().err


@pytest.mark.usefixtures("without_kernels")
def test_a_failed_notebook_is_named_and_kept_and_hides_no_other(tmp_path, launch, capsys):
    write_notebook(tmp_path / "notebooks/00_good.ipynb", METRICS)
    write_notebook(tmp_path / "notebooks/01_bad.ipynb", "print('before')", "raise ValueError('why')", METRICS)
    write_notebook(tmp_path / "notebooks/02_good.ipynb", METRICS)
    code, run_dir = launch("--jobs", "1")
    assert code == 1
    assert "01_bad.ipynb: In [4] raised ValueError: why" in capsys.readouterr().err
    summary = (run_dir / "summary.md").read_text()
    assert "| [00_good](00_good.ipynb) | passed |" in summary
    assert "| [01_bad](01_bad.ipynb) | failed |" in summary and "In [4] raised ValueError: why" in summary
    assert "| [02_good](02_good.ipynb) | passed |" in summary
    assert list(json.loads((run_dir / "metrics.json").read_text())) == ["00_good", "02_good"]


@pytest.mark.usefixtures("without_kernels")
def test_so_many_run_at_a_time_as_asked_for_and_the_slowest_start_first(tmp_path, launch):
    together = "import pathlib, time\nstarts = pathlib.Path(OUTPUT_DIR).parent / 'starts'\n"
    together += "with open(starts, 'a') as file: file.write(pathlib.Path(OUTPUT_DIR).name + '\\n')\n"
    together += "while len(starts.read_text().split()) < 2: time.sleep(0.01)"
    for name in ("00_quick", "05_slow", "06_slowest"):
        write_notebook(tmp_path / f"notebooks/{name}.ipynb", together, METRICS)
    code, run_dir = launch("--jobs", "2")  # one alone would wait for ever
    assert code == 0
    assert sorted((run_dir / "starts").read_text().split()[:2]) == ["05_slow", "06_slowest"]


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize(
    "device, cuda, jobs", [("cpu", True, 5), ("cuda:1", True, 1), (None, True, 1), (None, False, 5)]
)
def test_a_gpu_runs_one_notebook_at_a_time(tmp_path, launch, monkeypatch, capsys, device, cuda, jobs):
    monkeypatch.setattr("daamlib_lab.runs.run._cores", lambda: 5)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    write_notebook(tmp_path / "notebooks/00_one.ipynb", METRICS)
    assert launch(*(["--device", device] if device else []))[0] == 0
    assert f"1 notebook, {jobs} at a time" in capsys.readouterr().out


@pytest.mark.usefixtures("without_kernels")
def test_two_runs_in_one_second_have_a_folder_each(tmp_path, monkeypatch):
    class Now(datetime):
        @classmethod
        def now(cls, zone):
            return datetime(2026, 1, 2, 3, 4, 5, tzinfo=zone)

    monkeypatch.setattr("daamlib_lab.runs.run.datetime", Now)
    write_notebook(tmp_path / "notebooks/00_one.ipynb", METRICS)
    folders = ["--notebooks-dir", str(tmp_path / "notebooks"), "--runs-dir", str(tmp_path / "runs")]
    assert [main(folders), main(folders)] == [0, 0]
    assert sorted(os.listdir(tmp_path / "runs")) == ["20260102T030405Z-urban-tiny", "20260102T030405Z-urban-tiny-2"]


@pytest.mark.slow
def test_ctrl_c_stops_all_and_keeps_what_is_done(tmp_path):
    forever = "import os, pathlib, time\nprint('begun', flush=True)\n"
    forever += "pathlib.Path(OUTPUT_DIR, 'pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    cells = {"06_done": [METRICS], "05_long": ["print('before')", forever], "02_long": [forever], "00_never": [METRICS]}
    for name, of_notebook in cells.items():
        write_notebook(tmp_path / f"notebooks/{name}.ipynb", *of_notebook)
    folders = ["--notebooks-dir", tmp_path / "notebooks", "--runs-dir", tmp_path / "runs"]
    command = [sys.executable, "-m", "daamlib_lab.runs", "--jobs", "2", "--device", "cpu", *folders]
    # a background job of a shell ignores SIGINT, and so would its children
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, preexec_fn=heed, **pipes)
    while len(pids := list(tmp_path.glob("runs/*/0?_long/pid"))) < 2 and run.poll() is None:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    out, error = run.communicate(timeout=60)
    assert run.returncode == 130, error
    (run_dir,) = (tmp_path / "runs").iterdir()
    states = re.findall(r"^0\d_\w+ +(passed|interrupted|not run)", out, re.MULTILINE)
    assert states == ["not run", "interrupted", "interrupted", "passed"]
    assert "1 of 4 notebooks passed" in out
    assert printed(run_dir / "05_long.ipynb").startswith("before\n")
    assert json.loads((run_dir / "metrics.json").read_text()).keys() == {"06_done"}
    for pid in (int(path.read_text()) for path in pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("import os\nos._exit(1)", "after the cell 'import os'"),
        ("print('no metrics')", "no metrics.json"),
        ("open(OUTPUT_DIR + '/metrics.json', 'w').write('{\"iou\": NaN}')", "metrics['iou'] is nan"),
    ],
)
def test_a_dead_kernel_and_missing_or_wrong_metrics_are_failures(tmp_path, launch, capsys, cell, message):
    write_notebook(tmp_path / "notebooks/00_bad.ipynb", cell)
    code, run_dir = launch()
    assert code == 1
    assert message in capsys.readouterr().err
    assert (run_dir / "00_bad.ipynb").is_file()
    assert "| [00_bad](00_bad.ipynb) | failed |" in (run_dir / "summary.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["-p", "SED", "1"], "SED"),
        (["--steps", "5"], "STEPS"),
        (["-p", "TOP_K", "1"], "TOP_K"),  # only the other notebook has it
        (["--seed", "1", "-p", "SEED", "2"], "twice"),
        (["-p", "OUTPUT_DIR", "x"], "OUTPUT_DIR"),
        (["07"], "07"),
        (["-p", "N", "3"], "01_two.ipynb needs N of at least 4, got 3"),
        (["--jobs", "0"], "1 or more"),
    ],
)
def test_a_wrong_choice_is_an_error_before_anything_runs(tmp_path, launch, capsys, arguments, word):
    write_notebook(tmp_path / "notebooks/00_one.ipynb", METRICS)
    more = PARAMETERS + "\nTOP_K = 1  # more\nN = 9  # at least 4"
    write_notebook(tmp_path / "notebooks/01_two.ipynb", METRICS, parameters=more)
    code, run_dir = launch(*arguments)
    assert (code, run_dir) == (2, None)
    assert word in capsys.readouterr().err.split("error:")[1]


@pytest.mark.usefixtures("without_kernels")
def test_relative_paths_of_a_model_and_of_masks_are_made_absolute(tmp_path, launch, monkeypatch):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "masks.json").touch()
    monkeypatch.chdir(tmp_path)
    parameters = PARAMETERS + "\nMASKS = None  # the masks"
    store = "import pathlib\npathlib.Path(OUTPUT_DIR, 'paths').write_text(MODEL + ' ' + MASKS)"
    write_notebook(tmp_path / "notebooks/00_one.ipynb", store, METRICS, parameters=parameters)
    code, run_dir = launch("--model", "my-model", "-p", "MASKS", "masks.json")
    assert code == 0
    assert (run_dir / "00_one/paths").read_text() == f"{tmp_path / 'my-model'} {tmp_path / 'masks.json'}"


def test_notebooks_are_chosen_by_number_in_order(tmp_path):
    for name in ("00_a", "01_b", "10_c"):
        write_notebook(tmp_path / f"{name}.ipynb")
    (tmp_path / "draft.ipynb").touch()
    assert [path.stem for path in find_notebooks(tmp_path)] == ["00_a", "01_b", "10_c"]
    assert [path.stem for path in find_notebooks(tmp_path, ["10", "0"])] == ["00_a", "10_c"]
    write_notebook(tmp_path / "10_d.ipynb")
    with pytest.raises(ValueError, match="number"):
        find_notebooks(tmp_path)
    with pytest.raises(ValueError, match="NN_"):
        find_notebooks(tmp_path / "elsewhere")


def test_metrics_are_written_as_plain_json(tmp_path):
    metrics = {"iou": np.float32(0.5), "n": np.int64(3), "exact": True, "by": {"car": 1, "name": "é"}}
    path = tmp_path / "new/folder/metrics.json"
    write_metrics(path.parent, metrics)
    expected = {"iou": 0.5, "n": 3, "exact": True, "by": {"car": 1, "name": "é"}}
    assert json.loads(path.read_text(encoding="utf-8")) == expected
    assert sorted(os.listdir(path.parent)) == ["headline.json", "metrics.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, [1.0], {}, {1: 2.0}, {"a": np.zeros(2)}, 1j])
def test_other_metrics_are_refused_and_the_old_file_stays(tmp_path, bad):
    write_metrics(tmp_path, {"old": 1})
    with pytest.raises(ValueError, match=r"metrics\['bad'\]"):
        write_metrics(tmp_path, {"bad": bad})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"old": 1}


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"headline": ["by.cars"]}, "by.cars"),
        ({"headline": ["by"]}, "headline"),  # it is not one number
        ({"tables": {"mIoU": {"here": {"DAAM": float("nan")}}}}, "mIoU.*here.*DAAM.*nan"),
    ],
)
def test_a_headline_that_is_no_metric_is_refused_before_anything_is_written(tmp_path, choice, message):
    with pytest.raises(ValueError, match=message):
        write_metrics(tmp_path, {"by": {"car": 1}, "n": 2}, **choice)
    assert os.listdir(tmp_path) == []


FIGURE = """import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()"""
TABLE = """import pandas as pd
pd.DataFrame({"DAAM": [53.2], "LDAAM": [38.3]})"""


@pytest.mark.slow
def test_the_summary_shows_the_notebooks_without_their_code(tmp_path, launch):
    bar = "from tqdm.auto import tqdm\nfor i in tqdm(range(3)):\n    print(i / 8)"
    warning = "import sys\nprint('warned', file=sys.stderr)"
    write_notebook(tmp_path / "notebooks/00_one.ipynb", FIGURE, TABLE, bar, warning, METRICS)
    code, run_dir = launch()
    assert code == 0
    page = (run_dir / "summary.md").read_text().split("\n# Title\n")[1]
    (figure,) = re.findall(r"!\[.*\]\((.*)\)", page)
    assert figure.startswith("00_one/figure") and (run_dir / figure).read_bytes().startswith(b"\x89PNG")
    assert "<td>53.2</td>" in page and "<style" not in page
    assert page.count("    0.125\n") == 1  # what is printed
    assert not any(word in page for word in ("import", "it/s", "0/3", "warned"))


def write_run(folder, metrics):
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)


def test_two_runs_are_compared(tmp_path, capsys):
    first = {"miou": 50.0, "deep": {"auc": 20.0, "seconds": 1.0}, "only": 1, "verdict": "holds", "none": 0.0}
    second = {"miou": 50.4, "deep": {"auc": 25.0, "seconds": 9.0}, "verdict": "does not hold", "none": 1e-9, "new": 2}
    a, b = write_run(tmp_path / "a", {"06": first}), write_run(tmp_path / "b", {"06": second})
    assert main(["compare", a, b]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "06.deep.auc: 20.0 and 25.0, 20.00% apart (tolerance 1.00%)",
        "06.only: 1 and nothing",
        "06.verdict: 'holds' and 'does not hold'",
        "06.new: nothing and 2",
        "4 of 7 metrics differ by more than their tolerance",
    ]
    assert main(["compare", a, a]) == 0
    assert main(["compare", a, b, "-t", "auc=0.3", "-t", "miou=0.001"]) == 1
    out = capsys.readouterr().out
    assert "deep.auc" not in out and "06.miou: 50.0 and 50.4, 0.79% apart (tolerance 0.10%)" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "nowhere"], "nowhere"),
        (["a", "a", "-t", "auc"], "PATTERN=NUMBER"),
        (["a", "a", "-t", "(=0.1"], "PATTERN=NUMBER"),
        (["a", "a", "-t", "auc=-1"], "0 or more"),
        (["a"], "second"),
    ],
)
def test_a_wrong_comparison(tmp_path, monkeypatch, capsys, arguments, message):
    write_run(tmp_path / "a", {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.split("error:")[1]


def test_the_shortest_of_some_runs_is_timed(monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 1.2, 2.0, 2.9])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []
    assert timing.milliseconds(lambda: calls.append(1)) == pytest.approx(200)
    assert len(calls) == 3
