"""First-stage retrieval."""

import sys

import pytest

import evaluate
import synth

CORPUS = {"a": "red apples and green pears", "b/c d": "red wine", "e": "the sea"}
QUERIES = {"q1": "red apples", "q2": "wine"}


@pytest.fixture
def folder(tmp_path):
    """A collection in which one document is excluded for one query."""
    folder = tmp_path / "beir"
    evaluate.write_collection(folder, CORPUS, QUERIES, {"q1": {"a": 1}}, {"q2": {"b/c d"}})
    return folder


def command(monkeypatch, *arguments):
    """Run synth.py in this process."""
    monkeypatch.setattr(sys, "argv", ["synth.py", *map(str, arguments)])
    synth.main()


def test_retrieval_ranks_by_bm25_and_honours_exclusions(folder, tmp_path, monkeypatch):
    command(monkeypatch, "--retrieve", "--data", folder, "--out", tmp_path / "x.run", "--top-k", 2)
    run = evaluate.read_run(tmp_path / "x.run")
    assert evaluate.sort_run(run["q1"]) == ["a", "b/c d"]
    assert "b/c d" not in run["q2"] and len(run["q2"]) == 2


def test_rewritten_queries_are_used_when_named(folder, tmp_path, monkeypatch):
    (folder / "queries.long.jsonl").write_text('{"_id": "q1", "text": "sea"}\n')
    command(
        monkeypatch, "--retrieve", "--data", folder, "--queries", "long", "--out", tmp_path / "x.run"
    )
    run = evaluate.read_run(tmp_path / "x.run")
    assert run.keys() == {"q1"} and evaluate.sort_run(run["q1"])[0] == "e"


def test_an_existing_run_is_not_overwritten(folder, tmp_path, monkeypatch):
    (tmp_path / "x.run").write_text("old")
    with pytest.raises(ValueError, match="exists"):
        command(monkeypatch, "--retrieve", "--data", folder, "--out", tmp_path / "x.run")
    assert (tmp_path / "x.run").read_text() == "old"
