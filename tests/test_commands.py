"""The commands as a user meets them: the demo, bad input, help."""

import dataclasses
import json
import random
import re
import shlex
import shutil
import sys

import pytest
from conftest import byte_tokenizer, save_tiny_model, write_rows

import evaluate
import grouprank


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
    """A tiny model, a collection and runs."""
    root = tmp_path_factory.mktemp("commands")
    save_tiny_model(root / "model", vocab_size=300, context=512)
    save_tiny_model(root / "roomy", vocab_size=300, context=4096)
    evaluate.write_collection(root / "beir", {"a": "A", "b": "B"}, {"q": "Q"}, {"q": {"a": 1}}, {"q": {"b"}})
    for name, run in {"first": {"q": [("b", 2.0), ("a", 1.0)]}, "unknown": {"q": [("a", 2.0), ("zebra", 1.0)]},
                      "foreign": {"other": [("b", 2.0)]}, "excluded": {"q": [("b", 1.0)]}}.items():  # fmt: skip
        evaluate.write_run(root / f"{name}.run", run)
    write_rows(root / "rows.jsonl", [good_row()])
    write_rows(root / "sft.jsonl", [good_row(scores=None)])
    write_rows(root / "grpo.jsonl", [good_row(response=None)])
    write_rows(root / "twice.jsonl", [good_row("x"), good_row("y"), good_row("x")])
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    (root / "mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(root / "model" / name, root / "mute")
    (root / "weights").mkdir()
    shutil.copy(root / "model" / "model.safetensors", root / "weights")
    (root / "utf16.jsonl").write_text(json.dumps(good_row()), encoding="utf-16")
    (root / "latin1.txt").write_text("system\n---\nGröße {query} {documents}", encoding="latin-1")
    (root / "empty.txt").write_text("")
    (root / "some.txt").write_text("some")
    return root


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "message"), [
    (good_row(scores=[1]), 'row \'r1\' needs "scores" of 2 numbers from 0 to 10'),
    (good_row(scores=[1, 11]), 'row \'r1\' needs "scores" of 2 numbers from 0 to 10'),
    (good_row(scores=[1, "2"]), 'row \'r1\' needs "scores" of 2 numbers from 0 to 10'),
    (good_row(docs=[]), 'needs a "docs" list'),
    (good_row(docs=[{"id": "a", "text": "A"}, {"id": "a", "text": "B"}]), "needs another id for each document"),
    (good_row(docs=[{"id": "a", "text": "A"}, {"id": "b", "text": " "}]), "needs a text and a text id in document 'b'"),
    (good_row(query=" "), 'needs a "query" text'),
    (good_row(response=""), 'needs a "response" with text'),
    ({"query": "q"}, 'text "id"'),
    (["not", "an", "object"], "not a JSON object"),
])  # fmt: skip
def test_a_wrong_row_is_named_by_file_and_line(place, tmp_path, monkeypatch, capsys, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [good_row("fine"), row])
    status, _, err = run_main(monkeypatch, capsys, "--train", "--model", place / "model", "--data", path,
                              "--out", tmp_path / "out", "--max-new-tokens", 50)  # fmt: skip
    assert status == 2 and message in err and f"{path}, line 2: " in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_tokenizer_without_end_token_is_refused(place, tmp_path):
    folder, tokenizer = tmp_path / "model", byte_tokenizer()
    shutil.copytree(place / "model", folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has no end token"):
        grouprank.load_model(str(folder), grouprank.pick_machine("cpu"))


def test_training_goes_on_with_the_prompt_and_the_limits_of_a_model_that_was_trained_here(place, tmp_path, monkeypatch):
    """As reranking does; what is given wins."""
    folder, started = shutil.copytree(place / "model", tmp_path / "sft"), []
    prompt = grouprank.Prompt("Rate.", "{query} {documents}", "[{i}]{text}")
    meta = {"prompt": dataclasses.asdict(prompt), "prompt_hash": prompt.hash, "method": "groupwise",
            "answer": "reason", "max_doc_tokens": 300, "max_new_tokens": 50}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    monkeypatch.setattr(grouprank, "train", lambda cfg, prompt, out: started.append((cfg, prompt)))
    grouprank.main(["--train", "--stage", "grpo", "--model", str(folder), "--data", str(place / "rows.jsonl"),
                    "--out", str(tmp_path / "out"), "--max-new-tokens", "60"])  # fmt: skip
    ((cfg, used),) = started
    assert (used, cfg.max_doc_tokens, cfg.max_new_tokens, cfg.stage) == (prompt, 300, 60, "grpo")


TRAIN, RERANK = "--train --model {p}/model --data {p}/rows.jsonl", "--rerank --model {p}/model"
ROOMY = "--train --model {p}/roomy --max-new-tokens 99 --out {o} --data {p}/"
RUN, DOCS = RERANK + " --data {p}/beir --out {o} --run {p}/", RERANK + " --query x --docs {p}/some.txt"
BAD_INPUT = [
    ("--train --model nowhere --data {p}/rows.jsonl", "nowhere: no such folder"),
    ("--train --model {p}/nowhere --data {p}/rows.jsonl", "{p}/nowhere: no such folder"),
    ("--train --model {p}/beir --data {p}/rows.jsonl", "no model with a tokenizer could be loaded"),
    ("--train --model {p}/model --data {p}/missing.jsonl", "missing.jsonl: No such file"),
    ("--train --model {p}/model --data {p}/utf16.jsonl", "{p}/utf16.jsonl, line 1: 'utf-8' codec"),
    ("--rerank --model {p}/adapter --query x --docs {p}/some.txt", "{p}/adapter holds a LoRA adapter alone"),
    (ROOMY + "rows.jsonl --max-new-tokens 20", 'no row has a "response" of at most 20 tokens'),
    (TRAIN + " --prompt-file {p}/latin1.txt", "{p}/latin1.txt, line 3: 'utf-8' codec"),
    (TRAIN + " --device xpu", "--device xpu: there are auto, cpu, cuda"),
    (TRAIN + " --device mps", "--device mps: there are auto, cpu, cuda"),
    (TRAIN + " --device meta", "--device meta: there are auto, cpu, cuda"),
    ("--train --model {p}/model", "needs --data"),
    ("--train --data {p}/rows.jsonl", "--data needs --model: the demo's model knows only"),
    ("--train --method listwise", "--method listwise can be trained by --model NAME --stage sft"),
    (TRAIN + " --method pointwise --stage sft", "--method pointwise learns from rows of one document each"),
    (TRAIN + " --method listwise", "--method listwise can be trained by --model NAME --stage sft"),
    (TRAIN + " --max-new-tokens 600", "no room for --max-new-tokens 600"),
    (TRAIN + " --max-new-tokens 500", "have no room for 2 documents"),
    (TRAIN + " --rollouts-per-prompt 1", "at least 2"),
    (TRAIN + " --lora-rank -1", "--lora-rank must be"),
    (TRAIN + " --device tpu", "--device tpu: there are auto, cpu, cuda"),
    (TRAIN + " --resume", "--resume needs --out"),
    (TRAIN + " --resume --overwrite", "--resume continues an output and --overwrite deletes it"),
    (ROOMY + "sft.jsonl", 'no row has "scores"'),
    (ROOMY + "twice.jsonl", "twice.jsonl: the id 'x' stands on 2 lines"),
    (ROOMY + "grpo.jsonl", 'no row has a "response"'),
    (ROOMY + "rows.jsonl --eval-data {p}/sft.jsonl", "row 'r1' has no \"scores\""),
    ("--rerank --data {p}/beir --run {p}/first.run --out {o}", "needs --model"),
    (RERANK, "and --data with --run, or --query with --docs"),
    (RERANK + " --query x", "--query with --docs"),
    (RUN + "no.run", "no.run: No such file"),
    (RUN + "unknown.run", "query 'q' names document 'zebra', which {p}/beir/corpus.jsonl does not have"),
    (RUN + "foreign.run", "share no query: the run has 'other', the collection 'q'"),
    (RUN + "excluded.run", "leaves nothing to rerank"),
    (RUN + "empty.txt", "empty.txt: the run is empty"),
    (RERANK + " --data {p}/nobeir --run {p}/first.run --out {o}", "nobeir"),
    ("--rerank --model {p}/mute --query x --docs {p}/some.txt", "it has no tokenizer's files"),
    ("--rerank --model {p}/weights --data {p}/beir --run {p}/first.run --out {o}", "no model with a tokenizer"),
    (RERANK + " --data {p}/beir --run {p}/first.run", "--rerank needs"),
    (RERANK + " --data {p}/beir --run {p}/first.run --out {p}/beir", "--out FILE"),
    (DOCS + " {p}/empty.txt", "empty.txt is empty"),
    (DOCS + " {p}/none.txt", "none.txt: No such file"),
    (DOCS + " --endpoint ftp://x", "http or https"),
    (DOCS + " --docs-stride 30", "--docs-stride"),
    (DOCS + " --fusion-weight 2", "--fusion-weight"),
    (DOCS + " --retries -1", "--retries must be"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_gets_one_sentence_and_status_2(place, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    text = arguments.format(p=place, o=tmp_path / "o.run")
    status, _, err = run_main(monkeypatch, capsys, *text.split())
    assert status == 2 and message.format(p=place) in err, err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "o.run").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--train", "--lora-rnk", "3"], "unrecognized arguments: --lora-rnk 3"),
    (["--train", "--stage", "rl"], "argument --stage: invalid choice: 'rl'"),
    (["--train", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["--merge"], "one of the arguments --train --rerank is required"),
])  # fmt: skip
def test_a_mistyped_option_costs_one_line_of_usage(monkeypatch, capsys, arguments, message):
    status, _, err = run_main(monkeypatch, capsys, *arguments)
    assert status == 2 and err.count("\n") == 2
    assert err.startswith("usage: grouprank.py (--train | --rerank)") and message in err


# --- Outputs that exist ---------------------------------------------------------------------------


def test_nothing_that_exists_is_overwritten(place, tmp_path, monkeypatch, capsys):
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "thesis.txt").write_text("years of work")
    train = ["--train", "--model", place / "model", "--data", place / "rows.jsonl", "--out", keep]
    for option, message in (([], f"{keep} exists"), (["--overwrite"], "not written by --train"),
                            (["--resume"], "the folder of a run to continue")):  # fmt: skip
        status, _, err = run_main(monkeypatch, capsys, *train, *option)
        assert status == 2 and message in err
    (tmp_path / "o.run").write_text("old")
    status, _, err = run_main(monkeypatch, capsys, "--rerank", "--model", place / "model", "--data", place / "beir",
                              "--run", place / "first.run", "--out", tmp_path / "o.run")  # fmt: skip
    assert status == 2 and "exists" in err
    assert (tmp_path / "o.run").read_text() == "old"
    assert (keep / "thesis.txt").read_text() == "years of work"


def test_bad_input_never_costs_an_old_run(place, tmp_path, monkeypatch, capsys):
    old = tmp_path / "old"
    old.mkdir()
    (old / "run.json").write_text("{}")
    (old / "model.safetensors").write_text("weights")
    (old / "rows.jsonl").write_text((place / "rows.jsonl").read_text())
    train = ["--train", "--model", place / "roomy", "--max-new-tokens", 99, "--out", old, "--overwrite"]
    for data, message in ((place / "sft.jsonl", "no row has"), (place / "none", "none"),
                          (old / "rows.jsonl", "--overwrite would delete")):  # fmt: skip
        status, _, err = run_main(monkeypatch, capsys, *train, "--data", data)
        assert status == 2 and message in err
    for wrong in (["--prompt-file", "none.txt"], ["--device", "tpu"]):
        status, _, err = run_main(monkeypatch, capsys, "--train", "--out", old, "--overwrite", *wrong)
        assert status == 2
    assert (old / "model.safetensors").read_text() == "weights"


def test_a_failed_run_leaves_no_output(place, tmp_path, monkeypatch, capsys):
    """The folder would make the same command fail a second time for another reason."""
    arguments = ["--train", "--model", place / "model", "--data", place / "none.jsonl", "--out"]
    for _ in range(2):
        status, _, err = run_main(monkeypatch, capsys, *arguments, tmp_path / "out")
        assert status == 2 and "none.jsonl" in err
    assert not (tmp_path / "out").exists()


def test_a_run_of_the_first_edition_is_refused_in_one_sentence(place, tmp_path, monkeypatch, capsys):
    before = json.dumps({"config": {"seed": 0, "keep": 2}, "versions": {"grouprank": "1.0"}})
    (tmp_path / "run.json").write_text(before)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    status, _, err = run_main(monkeypatch, capsys, "--train", "--model", place / "roomy", "--data",
                              place / "rows.jsonl", "--out", tmp_path, "--resume", "--max-new-tokens", 99)  # fmt: skip
    assert status == 2 and err.count("\n") == 1
    assert f"{tmp_path} was written by an older edition, whose runs cannot be continued" in err
    assert (tmp_path / "run.json").read_text() == before and len(list(tmp_path.iterdir())) == 2


# --- The demo -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's whole command with a twelfth of its training: the same path, minutes less."""
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch, open(out.parent / "screen", "w") as screen:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(grouprank, "DEMO_ROWS", {"sft": 1280, "grpo": 32, "dev": 8})
        patch.setattr(grouprank, "DEMO_QUERIES", 10)
        patch.setitem(grouprank.DEMO_DIRECT, "sft_epochs", 0.2)
        grouprank.main(["--train", "--out", str(out), "--device", "cpu"])
    return out


def test_the_demo_writes_results_models_and_logs(demo):
    results = json.loads((demo / "results.json").read_text())
    assert list(results["ndcg@10"]) == [
        "random", "bm25", "untrained", "sft", "sft+grpo", "direct-sft", "direct"]  # fmt: skip
    assert abs(results["ndcg@10"]["bm25"] - results["ndcg@10"]["random"]) < 0.1
    assert {"sft", "grpo", "train", "direct sft", "direct grpo", "rerank direct", "rerank sft+grpo",
            "total"} <= results["seconds"].keys()  # fmt: skip
    lines = [json.loads(line) for line in (demo / "metrics.jsonl").open()]
    steps = [(line["stage"], line["step"]) for line in lines if "grad_norm" in line]
    assert steps == [("sft", i) for i in range(1, 81)] + [("grpo", i) for i in range(1, 5)]
    assert {"reward", "reward/ndcg", "reward/recall", "reward/alignment", "format_ok", "kl",
            "entropy", "completion_tokens", "truncated", "zero_spread", "grad_norm", "lr",
            "tokens_per_s"} <= lines[-2].keys()  # fmt: skip
    assert lines[-1].keys() == {"stage", "step", "eval/ndcg@10", "eval/format_ok"}
    sample = json.loads((demo / "samples.jsonl").open().readline())
    assert sample.keys() == {"stage", "step", "id", "text", "reward"}
    meta = json.loads((demo / "meta.json").read_text())
    assert meta["prompt_hash"] == grouprank.DEMO_PROMPT.hash and meta["docs_per_group"] == 6
    assert (demo / "sft" / "model.safetensors").exists() and (demo / "best" / "meta.json").exists()
    assert json.loads((demo / "direct" / "meta.json").read_text())["answer"] == "direct"


def test_the_demo_shows_every_fiftieth_step_and_a_table_from_0_to_100(demo):
    screen = (demo.parent / "screen").read_text()
    steps = re.findall(r"^(sft|grpo) (\d+)/\d+ \| (?!held-out)", screen, re.MULTILINE)
    assert steps == [("sft", "1"), ("sft", "50"), ("sft", "80"), ("grpo", "1"), ("grpo", "4"),
                     ("sft", "1"), ("sft", "33"), ("grpo", "1"), ("grpo", "4")]  # direct scoring
    assert "\nseconds of reranking: untrained " in screen
    lines = screen.partition("held-out NDCG@10 (0-100)")[2].splitlines()
    (shown,) = (line.split()[1:] for line in lines if line.startswith("NDCG@10 "))
    results = json.loads((demo / "results.json").read_text())["ndcg@10"]
    assert any(line.split() == list(results) for line in lines)
    assert list(map(float, shown)) == pytest.approx([100 * x for x in results.values()], abs=0.01)


def test_reranking_the_demo_by_command_reproduces_its_last_column(demo, tmp_path):
    grouprank.main(["--rerank", "--model", str(demo), "--data", str(demo / "demo"), "--run",
                    str(demo / "demo" / "first.run"), "--out", str(tmp_path / "o.run"), "--device", "cpu"])  # fmt: skip
    qrels = evaluate.read_qrels(demo / "demo" / "qrels" / "test.tsv")
    value = grouprank.mean_ndcg(qrels, evaluate.read_run(tmp_path / "o.run"))
    assert round(value, 4) == json.loads((demo / "results.json").read_text())["ndcg@10"]["sft+grpo"]


def test_the_demo_survives_its_own_overwriting(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouprank, "DEMO_ROWS", {"sft": 16, "grpo": 8, "dev": 2})
        patch.setattr(grouprank, "DEMO_QUERIES", 1)
        patch.setattr(grouprank, "write_results", lambda cfg, prompt, out, seconds: (out / "results.json").touch())
        for option in ([], ["--overwrite"]):
            grouprank.main(["--train", "--out", str(tmp_path / "run"), "--device", "cpu", "--retries", "0",
                            "--kl-coef", "0.2", "--answer", "reason", *option])  # fmt: skip
            told = json.loads((tmp_path / "run" / "direct" / "run.json").read_text())["task"]
            assert (told["kl_coef"], told["answer"], told["rollouts_per_prompt"]) == (0.2, "direct", 64)
            (tmp_path / "run" / "results.json").unlink()


def test_a_query_and_files_print_a_ranked_table_with_reasons(demo, capsys):
    files = sorted(map(str, (demo / "demo" / "example").glob("*.txt")))
    query = next(iter(evaluate.read_collection(demo / "demo").queries.values()))
    grouprank.main(["--rerank", "--model", str(demo), "--query", query, "--docs", *files])
    out = capsys.readouterr().out
    assert f"query: {query}" in out and "rank  score  document" in out
    assert out.index("reasoning over [1]") < out.index(f"[6] {query.split()[0]} ")  # a readable one
    assert re.search(r"^\d+ calls, .*\d+ ok", out, re.MULTILINE)
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
    rows = [world.row(random.Random(i), str(i), 6, kind="grpo") for i in range(200)]
    trained = {frozenset(row["query"].split()) for row in rows}
    assert not trained & {frozenset(q.split()) for q in queries.values()}  # held-out queries
    assert all(len(judged) == 24 for judged in qrels.values())
    response = world.row(random.Random(0), "r", 6, kind="sft")["response"]
    answer = grouprank.parse_answer(response, 6)
    assert answer.status == "ok"
    tokenizer = grouprank.demo_tokenizer(world)
    again = tokenizer.decode(tokenizer(response)["input_ids"])
    assert grouprank.parse_answer(again, 6).scores == answer.scores


# --- Help -----------------------------------------------------------------------------------------


def test_help_groups_the_options_by_command_says_where_defaults_come_from_and_ends_with_examples(monkeypatch, capsys):
    status, text, _ = run_main(monkeypatch, capsys, "--help")
    assert status == 0
    titles = ["both commands:", "--train:", "--train: supervised cold start:", "--train: GRPO:", "--rerank:", "examples:"]
    places = [text.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    for f in dataclasses.fields(grouprank.Config):
        start = text.index(f"\n{f.metadata['group']}:\n")
        assert f"\n  {grouprank.flag(f.name)}" in text[start:].partition("\n\n")[0]
    assert text.count("paper Table 10") > 5
    examples = text[places[-1] :].replace("\\\n", " ").strip().splitlines()[1:]
    assert len(examples) == 5
    for line in examples:
        grouprank.build_parser().parse_args(shlex.split(line, comments=True)[2:])
