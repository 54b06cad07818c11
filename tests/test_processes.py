"""Training by several processes (gloo on CPU) gives what one process gives.

They are started with the environment that torchrun gives, as forks: torch is imported once.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
import zlib

import numpy as np
import pytest
import torch
from conftest import save_tiny_model, tiny_model, write_rows

import grouprank

PROMPT = grouprank.Prompt("rate {n}", "{query}\n{documents}")
COMMON = {"device": "cpu", "max_new_tokens": 12, "max_prompt_tokens": 400, "max_doc_tokens": 100,
          "lora_rank": 4, "sft_lr": 1e-3, "grpo_lr": 1e-3, "rollouts_per_prompt": 4,
          "max_tokens_per_pass": 300, "kl_coef": 0.1, "eval_every": 0, "save_every": 1}  # fmt: skip
GRPO = {"stage": "grpo", "prompts_per_step": 3, "grpo_epochs": 1.5}  # 6 rows: three steps of three
SFT = {"stage": "sft", "sft_batch": 3, "sft_epochs": 1.5}
FULL, DIRECT = {"lora_rank": 0}, {"answer": "direct"}
FORCED = {  # in float64, with forced completions; names in "-rows" share no prompt
    "grpo-lora": GRPO, "grpo-full": GRPO | FULL, "grpo-full-rows": GRPO | FULL,
    "two-updates": GRPO | {"updates_per_batch": 2},
    "direct-sft": SFT | FULL | DIRECT, "direct-grpo": GRPO | FULL | DIRECT | {"updates_per_batch": 2},
    "sft-lora": SFT, "sft-full": SFT | FULL | {"grad_checkpointing": "on"}}  # fmt: skip
BOTH = GRPO | SFT | {"stage": "both", "sft_epochs": 1.0, "sft_lr": 1e-4}
REAL = {"real-lora": BOTH, "real-full": BOTH | FULL}
FAILING = {"stopped": GRPO | FULL | {"save_every": 100}, "broken": GRPO}
ALL = FORCED | REAL | FAILING


def prepare(folder):
    """A tiny model and six rows with documents, scores and responses of various lengths."""
    save_tiny_model(folder / "model")
    rng, rows = np.random.default_rng(0), []
    for number in range(6):
        docs = [{"id": str(d), "text": "word " * int(rng.integers(1, 20))} for d in range(3)]
        rows.append({"id": f"row {number}", "query": "which " * (number + 1), "docs": docs,
                     "scores": rng.permutation(3).tolist(), "response": "e" * (2 + number)})
    write_rows(folder / "rows.jsonl", rows)


def reward_of_text(text, gold, **_):
    """A reward that differs between any two answers."""
    total = zlib.crc32(text.encode()) % 100 / 100
    return grouprank.Reward(total, "ok", ndcg=total)


def forced_answers(local, prompts, seeds, *_):
    """Random ids instead of decoded ones: functions of the seeds, as decoding is."""
    def ids(seed):
        uniforms = grouprank.random_stream(seed, 13)
        return [int(3 + 250 * u) for u in uniforms[: 1 + int(12 * uniforms[-1])]]

    return [[ids(seed) for seed in own] for own in seeds]


def share_nothing(model):
    """As share_prompts() does with a model that cannot."""
    model.get_decoder().config._attn_implementation = "sdpa"


def train_case(folder, name, n_processes, **more):
    """Train one case, in float64 unless it is a real one; leaves the drawn answers too."""
    out, drawn = folder / f"{name}-{n_processes}", []
    load, set_up, answer = grouprank.load_model, grouprank.set_up_training, grouprank.Run.answer
    data = str(folder / "rows.jsonl")
    cfg = grouprank.Config(**COMMON | ALL[name] | {
        "model": str(folder / "model"), "data": data, "out": str(out),
        "eval_data": data if name in REAL else ""} | more)  # fmt: skip

    def recorded(run, *args, **options):
        found = answer(run, *args, **options)
        drawn.append(found)
        if grouprank.is_first() or len(drawn) != 2 or cfg.resume:
            return found
        if name == "broken":
            raise RuntimeError("broken on purpose")
        if name == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    def load_in_float64(*args, **options):
        model, tokenizer = load(*args, **options)
        return model.double(), tokenizer

    def set_up_in_float64(model, *args):
        set_up(model, *args)
        model.double()  # the adapters were made just now

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(grouprank, "score_completion", reward_of_text)
        patch.setattr(grouprank.Run, "answer", recorded)
        if name not in REAL:
            patch.setattr(grouprank, "load_model", load_in_float64)
            patch.setattr(grouprank, "set_up_training", set_up_in_float64)
            patch.setattr(grouprank.LocalModel, "sample", forced_answers)
        if name.endswith("rows"):
            patch.setattr(grouprank, "share_prompts", share_nothing)
        grouprank.train(cfg, PROMPT, grouprank.on_first(grouprank.claim_output, cfg, ""))
    if grouprank.is_first():
        (out / "drawn.json").write_text(json.dumps(drawn))


def run_processes(n_processes, folder, *names):
    """Run cases in several processes; returns (exit status, what they wrote to stderr)."""
    with tempfile.TemporaryFile("w+") as errors:
        status = fork(n_processes, errors, folder, *names)
        errors.seek(0)
        return status, errors.read()


def state_of(out):
    """The last checkpoint of a run of one stage."""
    (path,) = (out / "checkpoints").glob("*.pt")
    return torch.load(path, weights_only=True)


def same_weights(out, other):
    """Whether two runs ended in the same place."""
    state, expected = state_of(out), state_of(other)
    assert state["weights"].keys() == expected["weights"].keys() and state["step"] == expected["step"]
    pairs = [(weight, expected["weights"][name]) for name, weight in state["weights"].items()]
    return all(a.dtype == b.dtype == torch.float64 and (a - b).abs().max() < 1e-6 for a, b in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All cases, trained by one process here and by two and four others."""
    folder = tmp_path_factory.mktemp("processes")
    prepare(folder)
    for name in FORCED | REAL:
        train_case(folder, name, 1)
    for n_processes, names in (2, [*FORCED, *REAL]), (4, ("grpo-lora", "sft-full", "direct-grpo")):
        status, errors = run_processes(n_processes, folder, *names)
        assert status == 0, errors
    return folder


@pytest.mark.parametrize("name", FORCED)
def test_weights_after_three_steps_do_not_depend_on_the_number_of_processes(folder, name):
    """Four processes share three prompts: one of them has none."""
    others = [out for n in (2, 4) if (out := folder / f"{name}-{n}").exists()]
    assert others and all(same_weights(out, folder / f"{name}-1") for out in others)
    lines = [json.loads(line) for line in (folder / f"{name}-1/metrics.jsonl").open()]
    assert len(lines) == 3 and all(line["grad_norm"] > 1e-3 for line in lines)  # they move
    for out in others:
        for line, other in zip(lines, map(json.loads, (out / "metrics.jsonl").open()), strict=True):
            assert other.get("reward") == pytest.approx(line.get("reward"))


@pytest.mark.parametrize("name", REAL)
def test_real_rollouts_are_the_same_and_so_are_logs_and_models(folder, name):
    one, two = folder / f"{name}-1", folder / f"{name}-2"
    assert json.loads((one / "drawn.json").read_text()) == json.loads((two / "drawn.json").read_text())
    metrics = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
               for out in (one, two)]
    for row, other in zip(*metrics, strict=True):
        for key in row.keys() - {"stage", "seconds", "rollout_s", "tokens_per_s"}:
            assert other[key] == pytest.approx(row[key], rel=1e-3, abs=1e-5), key
    for part in (".", "sft", "best"):
        models = [grouprank.load_model(str(out / part), grouprank.pick_machine("cpu"))[0]
                  for out in (one, two)]
        for weight, other in zip(*(model.parameters() for model in models), strict=True):
            assert (weight - other).abs().max() < 1e-4
    assert (two / "adapter").exists() == (name == "real-lora")


def test_a_signal_to_one_process_stops_all_and_other_numbers_of_processes_go_on(folder):
    """Stopped after two of three steps; one process and four end where one that was never stopped does."""
    assert run_processes(2, folder, "stopped")[0] == 143  # 128 + SIGTERM, from both
    assert state_of(folder / "stopped-2")["step"] == 2
    for n_processes in (1, 4):
        shutil.copytree(folder / "stopped-2", folder / f"stopped-{n_processes}")
    train_case(folder, "stopped", 1, resume=True)
    status, errors = run_processes(4, folder, "stopped", "resume")
    assert status == 0, errors
    for n_processes in (1, 4):
        assert same_weights(folder / f"stopped-{n_processes}", folder / "grpo-full-1")


def test_one_process_that_fails_ends_all_with_its_message(folder):
    status, errors = run_processes(2, folder, "broken")
    assert status == 1 and "RuntimeError: broken on purpose" in errors
    assert not (folder / "broken-2/meta.json").exists()


def test_two_processes_train_the_demo_of_which_the_first_writes_the_data(folder):
    status, errors = run_processes(2, folder, "demo")
    assert status == 0, errors
    assert (folder / "demo-2/results.json").is_file()


def test_the_frozen_copy_in_half_precision_keeps_its_places():
    """Rotary frequencies in bfloat16 would turn late positions by whole turns: a gap of 0.15 here."""
    policy, random = grouprank.Policy(tiny_model()), torch.Generator().manual_seed(0)
    for name, weight in policy.model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):  # so that places alone decide on attention
            weight.data = 3 * torch.randn(weight.shape, generator=random)
        elif weight.ndim == 2:
            weight.data *= 4
    reference = grouprank.make_reference(policy, grouprank.Machine(torch.device("cpu"), torch.bfloat16))
    ids = np.random.default_rng(0).integers(3, 256, 3000).tolist()
    with torch.no_grad():
        own, _ = grouprank.completion_logprobs(policy, [(ids, [ids[:20]])], packed=False)
    assert 0 < (reference([(ids, [ids[:20]])]) - own).abs().mean() < 0.05


def test_shares_are_of_like_cost_and_hold_everything(monkeypatch):
    def shares(costs, n):
        found = []
        for number in range(n):
            monkeypatch.setattr(grouprank, "processes", lambda number=number: (number, n))
            found.append(grouprank.my_share(costs))
        return found

    assert shares([5, 1, 4, 2, 3], 2) == [[0, 1, 3], [2, 4]]  # 5 + 2 + 1, 4 + 3
    assert shares([7, 7], 4) == [[0], [1], [], []]
    assert shares([], 2) == [[], []]


def main(folder, *names):
    """What each process does."""
    if names == ("demo",):
        grouprank.DEMO_ROWS, grouprank.DEMO_QUERIES = {"sft": 16, "grpo": 8, "dev": 2}, 1
        grouprank.main(["--train", "--out", str(folder / "demo-2"), "--device", "cpu", "--retries", "0"])
        return
    grouprank.join_processes()
    torch.set_num_threads(1)
    for name in (name for name in names if name != "resume"):
        train_case(folder, name, grouprank.processes()[1], resume="resume" in names)
    torch.distributed.destroy_process_group()


def fork(n_processes, errors, *args):
    """Run main in n processes that are started as torchrun starts them; their exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(n_processes):
        children.append(os.fork())
        if children[-1]:
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "WORLD_SIZE": str(n_processes), "MASTER_PORT": str(port)}
        os.dup2(errors.fileno(), 2)
        status = 1
        try:
            main(*args)
            status = 0
        except SystemExit as stop:
            status = stop.code
        except Exception:
            traceback.print_exc(file=sys.__stderr__)
        os._exit(status)  # without the exit handlers of threads that a fork does not copy
    codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    return codes.pop() if len(codes) == 1 else 1
