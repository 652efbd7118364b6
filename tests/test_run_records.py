"""Run folders are read whatever state they are in: what is readable counts, what is not is told."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_guide.analysis import report
from scale_guide.analysis.figures import pictures
from scale_guide.analysis.groups import group
from scale_guide.analysis.records import Line, Record, _line, _read_lines, find_runs, read_runs
from scale_guide.analysis.table import compare

MAPS = ("target_layers", "guide_layers", "before", "after")
NUMBERS = st.floats(allow_nan=True) | st.integers()
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["step", "task_loss", "validation", "pairs", "seconds", "epoch", "rows_per_s"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folders.quickstart(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def record(whole: Path) -> Record:
    """A guided run."""
    (found,), _ = read_runs([whole / "guided"])
    return found


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A folder of two whole runs, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "runs"))


def test_whole_runs_are_read_whole(whole: Path) -> None:
    records, problems = read_runs([whole])
    assert problems == []
    assert [record.path.name for record in records] == ["guided", "unguided"]
    guided = records[0]
    written = [json.loads(text) for text in (whole / "guided/metrics.jsonl").read_text().splitlines()]
    assert [line.step for line in guided.lines] == [line["step"] for line in written]
    assert [line.numbers["task_loss"] for line in guided.lines if not line.validation] == [
        line["task_loss"] for line in written if "task_loss" in line
    ]
    assert guided.lines[0].pairs == written[0]["pairs"]
    assert guided.scores == written[-1]["validation"]
    assert (guided.state, guided.progress, guided.headline, guided.seconds) == ("finished", "100", "accuracy", 10)


def test_runs_are_found_below_a_folder_and_not_inside_each_other(copy: Path) -> None:
    tracker = copy / "guided/wandb/run-1/files"
    tracker.mkdir(parents=True)
    (tracker / "config.yaml").write_text("wandb_version: 1")
    wanted = [copy / "guided", copy / "unguided"]
    assert find_runs([copy]) == wanted
    assert find_runs([copy.parent, copy / "guided"]) == wanted, "each once"
    with pytest.raises(ValueError, match=r"guidde' holds no run .*did you mean '.*guided'\?"):
        find_runs([copy / "guidde"])


def told(run: Path) -> list[str]:
    """What is wrong with a run, without its folder."""
    return [problem.removeprefix(f"{run}: ") for problem in read_runs([run])[1]]


def test_a_run_without_a_summary_is_running_or_stopped(copy: Path) -> None:
    run = copy / "guided"
    (run / "summary.json").unlink()
    (record,), problems = read_runs([run])
    assert record.progress == "100 of 500, running"
    assert "not finished: step 100 of 500, running, last written" in problems[0]
    assert record.scores["accuracy"] > 0, "those measured last"
    hours_ago = time.time() - 3 * 3600
    os.utime(run / "metrics.jsonl", (hours_ago, hours_ago))
    assert told(run) == ["not finished: step 100 of 500, stopped, last written 3 h ago."]
    (run / "metrics.jsonl").write_text("")
    assert told(run)[0].startswith("not finished: step 0, running"), "epochs of unknown length"
    (run / "metrics.jsonl").unlink()
    assert [sentence.split()[0] for sentence in told(run)] == ["metrics.jsonl", "not"]


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("summary.json", '{"step": 1', "summary.json cannot be read (Expecting"),
        ("summary.json", "[]", "summary.json holds no mapping"),
        ("environment.json", "\x00", "environment.json cannot be read"),
        ("config.yaml", "training: 3", "left out, for config.yaml is not a recipe's ("),
        ("config.yaml", "name: quickstart\ntraining:\n", "left out, for config.yaml is not a recipe's ("),
        ("config.yaml", "a: [", "left out, for config.yaml is not a recipe's ("),
        ("config.yaml", "", "left out, for config.yaml is not a recipe's ("),
        ("maps.json", "{}", "maps.json holds no maps ('target_layers')"),
        ("maps.json", json.dumps({key: [1] for key in MAPS}), "(1,)"),
    ],
)
def test_a_damaged_file_is_told(copy: Path, file: str, content: str, sentence: str) -> None:
    (copy / "guided" / file).write_text(content)
    problems = told(copy / "guided")
    assert sentence in problems[0]
    assert all(len(problem) < 250 for problem in problems)
    assert len(read_runs([copy])[0]) == (1 if file == "config.yaml" else 2)
    assert "| unguided |" in str(report.read([copy]))


def test_lines_that_are_cut_or_foreign_are_left_out_and_told(copy: Path) -> None:
    path = copy / "unguided/metrics.jsonl"
    texts = path.read_text().splitlines()
    path.write_text("\n".join([*texts[:3], "nonsense", "[1]", *texts[3:-1], texts[-1][:20]]))
    (record,), problems = read_runs([path.parent])
    assert len(record.lines) == len(texts) - 1
    assert problems == [
        f"{path.parent}: metrics.jsonl: the last line is cut short and left out.",
        f"{path.parent}: metrics.jsonl: line 4 and 1 more are unreadable and left out.",
    ]
    path.write_bytes(b"\xff\xfe" + "\n".join(texts).encode())
    assert told(path.parent) == ["metrics.jsonl: line 1 is unreadable and left out."]


def test_losses_and_scores_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    made = run_folders.recipe("unguided")
    metrics = run_folders.lines(40, guided=False)
    metrics[1]["task_loss"] = metrics[3]["task_loss"] = float("nan")
    run = run_folders.make(tmp_path / "run", made, metrics=metrics, validation={"loss": float("inf"), "accuracy": 0.1})
    assert told(run) == [
        "task_loss is nan at step 20.",
        "validation loss (inf) is not finite and has no part in the means.",
    ]
    text = str(report.read([run]))
    assert "| unguided | 40    | 0.1 " in text, "the column of the loss is empty and left out"


@given(st.dictionaries(NAMES | st.text(max_size=5), ANYTHING, max_size=6) | ANYTHING, st.booleans())
def test_any_line_is_read_or_refused(found: Any, cut: bool) -> None:
    text = json.dumps(found)
    line = _line(text[: len(text) // 2] if cut else text)
    if line is not None:
        assert all(isinstance(value, float) for value in [*line.numbers.values(), *line.validation.values()])
        assert all(isinstance(value, float) for pair in line.pairs.values() for value in pair.values())
        assert cut or line.step == int(float(found["step"]))


def lines_of(text: bytes) -> tuple[list[Line], list[str]]:
    """The lines read from a file, and what is told of it."""
    problems: list[str] = []
    with tempfile.NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        return _read_lines(Path(file.name), problems)[0], problems


METRICS = st.fixed_dictionaries({"step": st.integers(0)}, optional={"task_loss": NUMBERS, "pairs": ANYTHING})


@given(st.lists(st.text() | METRICS.map(json.dumps), max_size=4), st.binary())
def test_whole_lines_among_rubbish_all_count(record: Record, texts: list[str], end: bytes) -> None:
    good = (record.path / "metrics.jsonl").read_bytes().splitlines()
    found, problems = lines_of(b"\n".join([*(text.encode(errors="replace") for text in texts), *good, end]))
    assert record.lines in [found[start : start + len(good)] for start in range(len(found) - len(good) + 1)]
    assert len(problems) <= 2
    groups, _ = group([replace(record, lines=found, summary=None)])
    assert "guided" in str(compare(groups))


SCORES = st.dictionaries(st.sampled_from(["loss", "accuracy"]), NUMBERS)
PAIR = st.dictionaries(st.sampled_from(["similarity", "debiased", "floor"]), NUMBERS)
LINES = st.fixed_dictionaries(
    {"step": st.integers(0, 10**6)},
    optional={
        **dict.fromkeys(["task_loss", "rows_per_s", "gradient_norm_at_activations", "epoch"], NUMBERS),
        "validation": SCORES,
        "pairs": st.dictionaries(st.text(max_size=3), PAIR, max_size=3),
    },
)


@given(st.lists(LINES, max_size=4))
@settings(max_examples=8, deadline=None)
def test_any_numbers_can_be_drawn(record: Record, written: list[dict[str, Any]]) -> None:
    found, _ = lines_of("\n".join(map(json.dumps, written)).encode())
    groups, _ = group([replace(record, lines=found)])
    for picture in pictures(groups):
        picture.figure.draw_without_rendering()
