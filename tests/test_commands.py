"""The commands as a user meets them: the demo, bad input, help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_tiny_model, write_rows

import evaluate
import grouprank

ROOT = Path(__file__).resolve().parent.parent


def run_main(monkeypatch, capsys, *arguments):
    """Run the command in this process as the shell would; returns (status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["grouprank.py", *map(str, arguments)])
    status = 0
    try:
        evaluate.run_cli(grouprank.main)
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def good_row(id="r1", **changes):
    """A training row that is right."""
    row = {
        "id": id,
        "query": "q",
        "docs": [{"id": "a", "text": "A"}, {"id": "b", "text": "B"}],
        "scores": [3, 0],
        "response": '<reason>r</reason><answer>{"[1]": 3, "[2]": 0}</answer>',
    }
    return {k: v for k, v in (row | changes).items() if v is not None}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a collection and a run."""
    root = tmp_path_factory.mktemp("commands")
    save_tiny_model(root / "model", vocab_size=300, context=512)
    save_tiny_model(root / "roomy", vocab_size=300, context=4096)
    evaluate.write_collection(root / "beir", {"a": "A", "b": "B"}, {"q": "Q"}, {"q": {"a": 1}})
    evaluate.write_run(root / "first.run", {"q": [("b", 2.0), ("a", 1.0)]})
    evaluate.write_run(root / "unknown.run", {"q": [("b", 2.0), ("zebra", 1.0)]})
    evaluate.write_run(root / "foreign.run", {"other": [("b", 2.0)]})
    write_rows(root / "rows.jsonl", [good_row()])
    write_rows(root / "sft.jsonl", [good_row(scores=None)])
    write_rows(root / "grpo.jsonl", [good_row(response=None)])
    (root / "empty.txt").write_text("")
    (root / "some.txt").write_text("some")
    return root


BAD_ROWS = [
    (good_row(scores=[1]), '"scores" of length 1'),
    (good_row(scores=[1, 11]), "scores are numbers from 0 to 10"),
    (good_row(scores=[1, "2"]), "scores are numbers from 0 to 10"),
    (good_row(docs=[]), 'no "docs" list'),
    (good_row(docs=[{"id": "a", "text": "A"}, {"id": "a", "text": "B"}]), "'a' twice"),
    (good_row(docs=[{"id": "a", "text": "A"}, {"id": "b", "text": " "}]), "'b' is empty"),
    (good_row(query=" "), 'no "query" text'),
    (good_row(response=""), 'empty "response"'),
    ({"query": "q"}, 'text "id"'),
    (["not", "an", "object"], 'text "id"'),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_wrong_row_is_named_by_file_and_line(place, tmp_path, monkeypatch, capsys, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [good_row("fine"), row])
    status, _, err = run_main(
        monkeypatch, capsys, "--train", "--model", place / "model", "--data", path,
        "--out", tmp_path / "out", "--max-new-tokens", 50,
    )  # fmt: skip
    assert status == 2 and message in err and f"{path}:2" in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_tokenizer_without_end_token_is_refused(place, tmp_path):
    tokenizer = grouprank.load_tokenizer(str(place / "model"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end token"):
        grouprank.load_tokenizer(str(tmp_path))


def test_repeated_row_ids_are_named_with_both_lines(place, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [good_row("x"), good_row("y"), good_row("x")])
    with pytest.raises(ValueError, match="rows.jsonl:3: id 'x' stands on line 1 already"):
        grouprank.read_rows(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train --model nowhere --data {p}/rows.jsonl", "nowhere: no such folder"),
        ("--train --model {p}/beir --data {p}/rows.jsonl", "no tokenizer could be loaded"),
        ("--train --model {p}/model --data {p}/missing.jsonl", "missing.jsonl: No such file"),
        ("--train --model {p}/model", "needs --data"),
        ("--train --data {p}/rows.jsonl", "--data needs --model: the demo's model knows only"),
        ("--train --model {p}/model --data {p}/rows.jsonl --ablation", "--ablation is for"),
        ("--train --model {p}/model --data {p}/rows.jsonl --max-new-tokens 600", "no room for"),
        ("--train --model {p}/model --data {p}/rows.jsonl --max-new-tokens 500", "no room for 2"),
        ("--train --model {p}/model --data {p}/rows.jsonl --rollouts-per-prompt 1", "at least 2"),
        ("--train --model {p}/model --data {p}/rows.jsonl --lora-rank -1", "--lora-rank must not be"),
        ("--rerank --model {p}/model --retries -1 --query x --docs {p}/some.txt", "--retries must not"),
        ("--train --model {p}/roomy --data {p}/sft.jsonl --max-new-tokens 99 --out {o}", 'no row has "scores"'),
        ("--train --model {p}/roomy --data {p}/grpo.jsonl --max-new-tokens 99 --out {o}", 'no row has a "resp'),
        ("--train --model {p}/roomy --data {p}/rows.jsonl --eval-data {p}/sft.jsonl --max-new-tokens 99"
         " --out {o}", "row 'r1' has no \"scores\""),
        ("--train --model {p}/model --data {p}/rows.jsonl --device tpu", "not a device"),
        ("--rerank --data {p}/beir --run {p}/first.run --out {o}", "needs --model"),
        ("--rerank --model {p}/model", "needs --data and --run, or --query and --docs"),
        ("--rerank --model {p}/model --query x", "go together"),
        ("--rerank --model {p}/model --data {p}/beir --run {p}/no.run --out {o}", "no.run"),
        ("--rerank --model {p}/model --data {p}/nobeir --run {p}/first.run --out {o}", "nobeir"),
        ("--rerank --model {p}/model --data {p}/beir --run {p}/first.run", "needs --out"),
        ("--rerank --model {p}/model --data {p}/beir --run {p}/unknown.run --out {o}", "'zebra'"),
        ("--rerank --model {p}/model --data {p}/beir --run {p}/foreign.run --out {o}", "share no query"),
        ("--rerank --model {p}/model --query x --docs {p}/some.txt {p}/empty.txt", "empty.txt is empty"),
        ("--rerank --model {p}/model --query x --docs {p}/none.txt", "none.txt: No such file"),
        ("--rerank --model m --endpoint ftp://x --query x --docs {p}/some.txt", "http or https"),
        ("--rerank --model {p}/model --docs-stride 30 --query x --docs {p}/some.txt", "--docs-stride"),
        ("--rerank --model {p}/model --fusion-weight 2 --query x --docs {p}/some.txt", "--fusion-weight"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence_and_status_2(place, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    text = arguments.format(p=place, o=tmp_path / "o.run")
    status, _, err = run_main(monkeypatch, capsys, *text.split())
    assert status == 2 and message in err, err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "o.run").exists()


def test_nothing_that_exists_is_overwritten(place, tmp_path, monkeypatch, capsys):
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "thesis.txt").write_text("years of work")
    train = ["--train", "--model", place / "model", "--data", place / "rows.jsonl", "--out", keep]
    status, _, err = run_main(monkeypatch, capsys, *train)
    assert status == 2 and f"{keep} exists" in err
    status, _, err = run_main(monkeypatch, capsys, *train, "--overwrite")
    assert status == 2 and "not written by --train" in err
    status, _, err = run_main(monkeypatch, capsys, *train, "--resume")
    assert status == 2 and "no training run to continue" in err
    (tmp_path / "o.run").write_text("old")
    status, _, err = run_main(
        monkeypatch, capsys, "--rerank", "--model", place / "model", "--data", place / "beir",
        "--run", place / "first.run", "--out", tmp_path / "o.run",
    )  # fmt: skip
    assert status == 2 and "exists" in err
    assert (tmp_path / "o.run").read_text() == "old"
    assert (keep / "thesis.txt").read_text() == "years of work"


def test_bad_input_never_costs_an_old_run(place, tmp_path, monkeypatch, capsys):
    old = tmp_path / "old"
    old.mkdir()
    (old / "run.json").write_text("{}")
    (old / "model.safetensors").write_text("weights")
    train = ["--train", "--model", place / "roomy", "--max-new-tokens", 99, "--out", old, "--overwrite"]
    for data, message in ((place / "sft.jsonl", "no row has"), (place / "none", "none")):
        status, _, err = run_main(monkeypatch, capsys, *train, "--data", data)
        assert status == 2 and message in err
    (old / "rows.jsonl").write_text((place / "rows.jsonl").read_text())
    status, _, err = run_main(monkeypatch, capsys, *train, "--data", old / "rows.jsonl")
    assert status == 2 and "--overwrite would delete" in err
    demo = ["--train", "--out", old, "--overwrite"]
    for wrong in (["--prompt-file", "none.txt"], ["--device", "tpu"]):
        status, _, err = run_main(monkeypatch, capsys, *demo, *wrong)
        assert status == 2
    assert (old / "model.safetensors").read_text() == "weights"


def test_a_failed_run_leaves_no_output(place, tmp_path, monkeypatch, capsys):
    """The folder would make the same command fail a second time for another reason."""
    arguments = ["--train", "--model", place / "model", "--data", place / "none.jsonl", "--out"]
    for _ in range(2):
        status, _, err = run_main(monkeypatch, capsys, *arguments, tmp_path / "out")
        assert status == 2 and "none.jsonl" in err
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_an_old_run_and_the_demo_survives_its_own_overwriting(tmp_path):
    for arguments in ([], ["--overwrite"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grouprank, "DEMO_ROWS", {"sft": 16, "grpo": 8, "dev": 2})
            patch.setattr(grouprank, "DEMO_QUERIES", 1)
            grouprank.main(["--train", "--out", str(tmp_path / "run"), "--device", "cpu", *arguments])
        assert (tmp_path / "run" / "results.json").exists()
        (tmp_path / "run" / "results.json").unlink()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's whole command with a tenth of its training: the same path, minutes less."""
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouprank, "DEMO_ROWS", {"sft": 1600, "grpo": 32, "dev": 8})
        patch.setattr(grouprank, "DEMO_QUERIES", 10)
        grouprank.main(["--train", "--out", str(out), "--device", "cpu"])
    return out


def test_the_demo_writes_results_models_and_logs(demo):
    results = json.loads((demo / "results.json").read_text())
    assert list(results["ndcg@10"]) == ["random", "bm25", "untrained", "sft", "sft+grpo"]
    assert abs(results["ndcg@10"]["bm25"] - results["ndcg@10"]["random"]) < 0.1
    assert results["seconds"].keys() == {"sft", "grpo", "train", "total"}
    lines = [json.loads(line) for line in (demo / "metrics.jsonl").open()]
    steps = [(line["stage"], line["step"]) for line in lines if "grad_norm" in line]
    assert steps == [("sft", i) for i in range(1, 101)] + [("grpo", i) for i in range(1, 5)]
    grpo = lines[-2]
    assert {"reward", "reward/ndcg", "reward/recall", "reward/alignment", "format_ok", "kl",
            "entropy", "completion_tokens", "truncated", "zero_spread", "grad_norm", "lr",
            "tokens_per_s"} <= grpo.keys()  # fmt: skip
    assert lines[-1].keys() == {"stage", "step", "eval/ndcg@10", "eval/format_ok"}
    sample = json.loads((demo / "samples.jsonl").open().readline())
    assert sample.keys() == {"stage", "step", "id", "text", "reward"}
    meta = json.loads((demo / "meta.json").read_text())
    assert meta["prompt_hash"] == grouprank.DEMO_PROMPT.hash and meta["docs_per_group"] == 6
    assert (demo / "sft" / "model.safetensors").exists() and (demo / "best" / "meta.json").exists()


def test_reranking_the_demo_by_command_reproduces_its_last_column(demo, tmp_path):
    grouprank.main(
        ["--rerank", "--model", str(demo), "--data", str(demo / "demo"), "--run",
         str(demo / "demo" / "first.run"), "--out", str(tmp_path / "o.run"), "--device", "cpu"]
    )  # fmt: skip
    qrels = evaluate.read_qrels(demo / "demo" / "qrels" / "test.tsv")
    value = grouprank.mean_ndcg(qrels, evaluate.read_run(tmp_path / "o.run"))
    assert round(value, 4) == json.loads((demo / "results.json").read_text())["ndcg@10"]["sft+grpo"]


def test_a_query_and_files_print_a_ranked_table_with_reasons(demo, capsys):
    files = sorted(map(str, (demo / "demo" / "example").glob("*.txt")))
    query = next(iter(evaluate.read_collection(demo / "demo").queries.values()))
    grouprank.main(["--rerank", "--model", str(demo), "--query", query, "--docs", *files])
    out = capsys.readouterr().out
    assert f"query: {query}" in out and "rank  score  document" in out
    assert out.index("reasoning over [1]") < out.index(f"[6] {query.split()[0]} ")  # a readable one
    assert "; 0 groups unusable" in out
    assert all(out.count(f"{name}: ") == 1 for name in files)


def test_the_python_interface_ranks_with_the_demo_model(demo):
    ranker = grouprank.GroupRanker.from_pretrained(demo, device="cpu")
    documents = [path.read_text() for path in sorted((demo / "demo" / "example").glob("*.txt"))]
    rows = ranker.rank("heart lung sun", documents, return_documents=True)
    assert sorted(row["corpus_id"] for row in rows) == list(range(6))
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert all(row["text"] == documents[row["corpus_id"]] for row in rows)
    _, counts = ranker.rank_with_reasons("heart lung sun", documents)
    assert counts["ok"] == counts["calls"] == 1


def test_the_demo_world_is_honest():
    world = grouprank.DemoWorld(seed=1)
    corpus, queries, qrels = world.collection(30, 24)
    words = {w for text in corpus.values() for w in text.split()}
    assert not words & {w for text in queries.values() for w in text.split()}  # the lexical gap
    rows = [world.row(grouprank.random.Random(i), str(i), 6, kind="grpo") for i in range(200)]
    trained = {frozenset(row["query"].split()) for row in rows}
    assert not trained & {frozenset(q.split()) for q in queries.values()}  # held-out queries
    assert all(len(judged) == 24 for judged in qrels.values())
    response = world.row(grouprank.random.Random(0), "r", 6, kind="sft")["response"]
    answer = grouprank.parse_answer(response, 6)
    assert answer.status == "ok"
    tokenizer = grouprank.demo_tokenizer(world)
    again = tokenizer.decode(tokenizer(response)["input_ids"])
    assert grouprank.parse_answer(again, 6).scores == answer.scores


def test_help_names_every_option_and_where_its_default_comes_from():
    text = subprocess.run(
        [sys.executable, ROOT / "grouprank.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in grouprank.Config.__dataclass_fields__:
        assert grouprank.flag(name) in text
    assert "paper Table 10" in text
