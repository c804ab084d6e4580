"""The report for a machine with a GPU: that whatever fails in it, the rest runs and is told."""

import json
import sys
import time

from gpu_report import Stage, run, stages, write


def python(name, code, limit=60.0):
    return Stage(name, [sys.executable, "-c", code], limit)


def test_every_end_is_told(tmp_path):
    listed = [
        python("machine", "print('a GPU')"),
        python("build", "pass"),
        python("tests", "print('== 3 failed, 4 passed in 5s =='); print('a warning'); exit(1)"),
        python("train, convext", "import time; print('begun', flush=True); time.sleep(99)", 1),
        Stage("sanitizer, memcheck", ["/no/such/program"], 60),
    ]
    start = time.monotonic()
    assert not run(listed, tmp_path, seconds=60)
    assert time.monotonic() - start < 40
    assert [stage.result for stage in listed] == [
        "passed",
        "passed",
        "failed (1)",
        "no end in 1 s",
        "did not start",
    ]
    report = (tmp_path / "report.md").read_text()
    assert "| tests | failed (1) | 0 | 3 failed, 4 passed in 5s |" in report
    assert "begun" in report
    content = json.loads((tmp_path / "report.json").read_text())
    assert [stage["status"] for stage in content["stages"]] == [0, 0, 1, None, None]
    assert "===== train, convext" in (tmp_path / "log.txt").read_text()


def test_without_a_build_there_is_nothing_to_test(tmp_path):
    listed = [python("build", "exit(2)"), python("tests", "open('ran', 'w')")]
    assert not run(listed, tmp_path, seconds=60)
    assert listed[1].output == "not run: there is no build"


def test_the_time_is_kept(tmp_path):
    listed = [python("machine", "pass"), python("build", "pass")]
    assert not run(listed, tmp_path, seconds=1)
    assert listed[0].output == "not run: the time is over"


def test_an_interrupted_stage_may_tidy_up(tmp_path):
    code = "import time\ntry: time.sleep(99)\nexcept KeyboardInterrupt: print('what there is')"
    stage = python("bench, float32", code, 1)
    stage.run(1)
    assert (stage.status, stage.summary) == (None, "what there is")


def test_measurements_are_taken_in(tmp_path):
    (tmp_path / "tf32").mkdir()
    (tmp_path / "tf32" / "report.md").write_text("# convext bench\n\n## Times\n")
    (tmp_path / "tf32" / "report.json").write_text('{"rows": []}')
    write([], tmp_path)
    assert "## bench, tf32\n\n# convext bench\n\n### Times" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["bench"] == {"tf32": {"rows": []}}


def test_the_stages_are_commands_that_exist(tmp_path):
    names = [stage.name for stage in stages(tmp_path, None)]
    assert names[:3] == ["machine", "build", "tests"]
    assert {"train, convext", "train, torch", "bench, float32"} <= set(names)
