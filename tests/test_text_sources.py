"""Text from tables, folders that `datasets` loads, and the hub: the tokens of the text files, or a clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from scale_guide.tasks import language_modeling
from scale_guide.tasks._corpus import Documents, Lines, Table, TextFiles, find_source

WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2"
TRAIN = " the cat sat\n\n on the mat\nthe end\n"
VALID = "the dog sat\non the mat\n"
build = language_modeling.build


def rows_as_on_the_hub(text: str) -> list[dict[str, Any]]:
    """One row a line, with its line end; a blank line is an empty row: how the hub's WikiText comes."""
    lines = text.removesuffix("\n").split("\n")
    return [{"text": line + "\n" if line.strip() else "", "number": i} for i, line in enumerate(lines)]


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def documents(folder: Path, num: int = 30) -> Path:
    """A file of documents of three lines, with no validation split; document i holds the word wi nine times."""
    rows = [{"text": "\n".join([" ".join([f"w{i}"] * 3)] * 3), "url": "x"} for i in range(num)]
    write_table(folder / "documents.jsonl", rows)
    return folder


def error(data: Path | str, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"task.options") as caught:
        build(data=str(data), **options)
    return str(caught.value)


@pytest.mark.parametrize("names", [("train.parquet", "validation.parquet"), ("train.jsonl", "test.jsonl")])
def test_tables_give_the_tokens_of_the_text_files(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "valid.txt").write_text(VALID)
    for name, text in zip(names, (TRAIN, VALID), strict=True):
        write_table(tmp_path / "table" / name, rows_as_on_the_hub(text))
    plain, table = (build(data=str(folder), context_length=4) for folder in (tmp_path, tmp_path / "table"))
    assert table.facts == plain.facts
    assert table.train.tokens.ids.tolist() == plain.train.tokens.ids.tolist()
    assert table.validation.tokens.ids.tolist() == plain.validation.tokens.ids.tolist()


@pytest.mark.skipif(not WIKITEXT.exists(), reason="WikiText-2 is not here")
def test_wikitext_2_as_the_hub_has_it(tmp_path: Path) -> None:
    for name, file in (("train", "valid.txt"), ("validation", "test.txt")):
        write_table(tmp_path / f"{name}.parquet", rows_as_on_the_hub((WIKITEXT / file).read_text()))
    task = build(data=str(tmp_path))
    assert (len(task.train.tokens.ids), len(task.validation.tokens.ids)) == (217_646, 245_569)


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list(rows_as_on_the_hub(TRAIN)) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert len(build(data=str(tmp_path / "saved"), context_length=4).train.tokens.ids) == 12


def test_a_readme_beside_tables_is_no_text(tmp_path: Path) -> None:
    folder = table(tmp_path, rows_as_on_the_hub(TRAIN))
    (folder / "README.txt").write_text("about these tables\n")
    assert isinstance(find_source(str(folder)), Table)
    assert len(build(data=str(folder), context_length=4).train.tokens.ids) == 12
    (folder / "train.txt").write_text(TRAIN)
    assert isinstance(find_source(str(folder)), TextFiles)


def test_first_documents_validate_where_no_split_does(tmp_path: Path) -> None:
    folder = documents(tmp_path)
    for data in (folder, folder / "documents.jsonl"):
        task = build(data=str(data), context_length=4, num_validation_documents=5)
        assert len(task.train.tokens.ids) == 25 * 12  # three words and a line end, three times
        assert len(task.validation.tokens.ids) == 5 * 12
        assert set(task.validation.tokens.ids.tolist()) == {0, 1}  # w0 .. w4 were never read in training
    assert "its training text has 0 tokens" in error(folder)  # all 30 are among the first 1,000


def test_rows_without_text_are_left_out_and_columns_may_be_named(tmp_path: Path) -> None:
    rows = [{"body": "a b"}, {"body": None}, {"body": "c\n\nd\n"}, {"body": ""}]
    for name in ("train", "valid"):
        write_table(tmp_path / f"{name}.jsonl", rows)
    task = build(data=str(tmp_path), context_length=2, text_column="body")
    assert task.train.tokens.ids.tolist() == [2, 3, 0, 4, 0, 0, 5, 0, 0]
    assert "it has no column 'bdy' (did you mean 'body'?), only: body; name the one" in error(
        tmp_path, text_column="bdy"
    )


def test_no_more_is_read_than_max_tokens() -> None:
    num_read = 0

    def endless() -> Iterator[dict[str, str]]:
        nonlocal num_read
        while True:
            num_read += 1
            yield {"text": f"w{num_read} the\nend"}

    rows = datasets.IterableDataset.from_generator(endless)
    lines = iter(Documents("endless", rows.skip(3), "text"))
    assert [next(lines) for _ in range(4)] == ["w4 the", "end", "w5 the", "end"]
    assert num_read < 2_000


@pytest.mark.parametrize("tokens", [11, 10_007])
def test_max_tokens_cuts_the_training_text_alone(tmp_path: Path, tokens: int) -> None:
    (tmp_path / "train.txt").write_text("".join(f"w{i} x y\n" for i in range(5_000)))
    (tmp_path / "valid.txt").write_text("x y z\n" * 9_000)
    whole, part = (build(data=str(tmp_path), context_length=4, max_tokens=n) for n in (None, tokens))
    assert (len(part.train.tokens.ids), len(part.validation.tokens.ids)) == (tokens, 36_000)
    assert part.facts["vocab_size"] == 2 + 2 + -(-tokens // 4)  # <eos> <unk>, x y, and the words of the lines read
    assert len(whole.train.tokens.ids) == 20_000


def test_names_of_the_hub_and_their_configurations() -> None:
    assert find_source("Salesforce/wikitext:wikitext-103-raw-v1") == Table(
        "Salesforce/wikitext:wikitext-103-raw-v1", "Salesforce/wikitext", "wikitext-103-raw-v1", "text", None
    )
    source = find_source("Skylion007/openwebtext", "body", 7)
    assert source == Table("Skylion007/openwebtext", "Skylion007/openwebtext", None, "body", 7)
    configurations = ("wikitext-2-v1", "wikitext-2-raw-v1")
    identities = [find_source(f"Salesforce/wikitext:{name}").identity() for name in configurations]
    assert identities[0] != identities[1]


def test_a_configuration_is_handed_to_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository like the hub's, in the current folder: `datasets` reads it by the same name."""
    repository = tmp_path / "owner" / "name"
    for config, text in (("small", TRAIN), ("large", TRAIN * 9)):
        for split in ("train", "validation"):
            write_table(repository / config / f"{split}.parquet", rows_as_on_the_hub(text))
    configs = "".join(f"- config_name: {config}\n  data_dir: {config}\n" for config in ("small", "large"))
    (repository / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)
    sizes = [len(build(data=f"owner/name:{c}", context_length=4).train.tokens.ids) for c in ("small", "large")]
    assert sizes == [12, 108]
    assert "small" in error("owner/name:medium")
    assert "large" in error("owner/name")


def test_a_data_set_of_the_hub_is_streamed_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a machine without a network may train on what another one has tokenised."""
    calls, local = [], table(tmp_path / "local", rows_as_on_the_hub(TRAIN))
    load = datasets.load_dataset

    def hub(path: str, config: str | None, *, streaming: bool) -> Any:
        calls.append((path, config, streaming))
        return load(str(local), streaming=streaming)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", hub)
    tasks = [build(data="some/set:small", context_length=length) for length in (4, 5)]
    assert calls == [("some/set", "small", True)]
    assert tasks[0].train.tokens.folder == tasks[1].train.tokens.folder


def test_the_hub_without_a_network(tmp_path: Path) -> None:
    program = "from scale_guide.tasks.language_modeling import build; build(data='Salesforce/wikitext:wikitext-2-v1')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ValueError: task.options.data is 'Salesforce/wikitext:wikitext-2-v1': no such file or folder"
    )
    assert "the hub did not give a data set of that name (Couldn't reach 'Salesforce/wikitext' on the Hub" in last
    assert last.endswith("or give a local folder")
    assert not list((tmp_path / "scale_guide").glob("*.partial"))


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    folder = documents(tmp_path)
    assert "it has no column 'text', only: number" in error(table(tmp_path / "a", [{"number": 1}]))
    assert "column 'number' holds int, not text" in error(table(tmp_path / "b", [{"number": 1}]), text_column="number")
    assert "num_validation_documents is 0: it must be at least 1" in error(folder, num_validation_documents=0)
    split = table(tmp_path / "c", [{"text": "a"}])
    assert "its split validation validates, and task.options.num_validation_documents is 3" in error(
        split, num_validation_documents=3
    )
    write_table(tmp_path / "d" / "test.parquet", [{"text": "a"}])
    assert "it has no split train, only: test; add that split" in error(tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "train.parquet").write_bytes(b"PAR1 and no more")
    assert "Parquet magic bytes not found" in error(tmp_path / "e")
    assert "datasets cannot load it" in error(tmp_path / "e" / "train.parquet")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "train.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert "utf-8" in error(tmp_path / "f")


def table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for split in ("train", "validation"):
        write_table(folder / f"{split}.parquet", rows)
    return folder


def test_text_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "valid.txt").write_text(VALID)
    assert "text files have no columns; remove task.options.text_column" in error(tmp_path, text_column="text")
    assert "remove task.options.text_column and num_validation_documents" in error(
        tmp_path, num_validation_documents=9
    )
    assert "max_tokens is 75: one context needs 76; set it higher" in error(tmp_path, max_tokens=75)
    (tmp_path / "train.txt").unlink()
    assert "no file is named train; found: valid.txt; rename them" in error(tmp_path)
    (tmp_path / "train.txt").write_text("\n \n")
    assert "its training text has 2 tokens" in error(tmp_path)  # two line ends
    missing = tmp_path / "gone.txt"
    with pytest.raises(ValueError, match=r"gone.txt': it cannot be read"):
        list(Lines([missing]))
