"""Training by several processes (gloo on CPU) gives what one process gives.

This file is also the program that they run: `torchrun ... tests/test_processes.py FOLDER CASE ...`
trains the named cases and leaves FOLDER/CASE-N, where N is the number of processes.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import byte_tokenizer, save_tiny_model, tiny_model, write_rows  # noqa: E402

import grouprank  # noqa: E402

PROMPT = grouprank.Prompt("rate {n}", "{query}\n{documents}")
COMMON = {"device": "cpu", "max_new_tokens": 12, "max_prompt_tokens": 400, "max_doc_tokens": 100,
          "lora_rank": 4, "sft_lr": 1e-3, "grpo_lr": 1e-3, "rollouts_per_prompt": 4, "keep": 9,
          "max_tokens_per_pass": 300, "kl_coef": 0.1, "eval_every": 0, "save_every": 1}  # fmt: skip
GRPO = {"stage": "grpo", "prompts_per_step": 3, "grpo_epochs": 2.5}  # 6 rows: five steps of three
SFT = {"stage": "sft", "sft_batch": 3, "sft_epochs": 2.5}
FULL, ROWS = {"lora_rank": 0}, {"shared_prompt": False}
FORCED = {  # in float64, with forced completions
    "grpo-lora": GRPO, "grpo-lora-rows": GRPO | ROWS, "grpo-full": GRPO | FULL,
    "grpo-full-rows": GRPO | FULL | ROWS | {"grad_checkpointing": "on"},
    "sft-lora": SFT, "sft-full": SFT | FULL | {"grad_checkpointing": "on"},
    "two-updates": GRPO | {"updates_per_batch": 2}, "no-memory": GRPO}  # fmt: skip
REAL = {name: options | {"stage": "both", "sft_epochs": 1.0, "grpo_epochs": 1.5, "sft_lr": 1e-4}
        for name, options in {"real-lora": GRPO | SFT, "real-full": GRPO | SFT | FULL}.items()}
CASES = FORCED | REAL
HALF = {"half": GRPO | FULL | {"precision": "bf16", "grpo_epochs": 1.0, "grad_checkpointing": "on"}}
RESUMED = {"resumed": GRPO | FULL | {"resume": True}}
FAILING = {"stopped": GRPO | {"save_every": 100}, "broken": GRPO}
ALL = CASES | HALF | RESUMED | FAILING


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


@contextlib.contextmanager
def replaced(owner, **values):
    """Some attributes of a module or class, for a while."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def forced_answers(job, items, seeds, temperature, share=1.0, again=False):
    """Random ids instead of decoded ones: functions of the seeds, as decoding is."""
    def ids(seed):
        uniforms = grouprank.random_stream(seed, 13)
        return [int(3 + 250 * u) for u in uniforms[: 1 + int(12 * uniforms[-1])]]

    return [[ids(seed) for seed in own] for own in seeds]


def no_memory_for_row_4(policy, blocks, *args, run=grouprank.completion_logprobs, **options):
    """What computes log-probabilities, but for the prompt whose query has five words."""
    tokenizer = byte_tokenizer()
    if torch.is_grad_enabled() and any(
            tokenizer.decode(prompt).count("which") == 5 for prompt, _ in blocks):
        raise torch.OutOfMemoryError("simulated")
    return run(policy, blocks, *args, **options)


def train_case(folder, name, n_processes, **more):
    """Train one case, in float64 if it is a forced one; returns the drawn completions."""
    out, drawn = folder / f"{name}-{n_processes}", []
    load, set_up = grouprank.load_model, grouprank.set_up_training
    collect = grouprank.collect_rollouts
    cfg = grouprank.Config(model=str(folder / "model"), data=str(folder / "rows.jsonl"),
                           out=str(out), **(COMMON | ALL[name] | more))  # fmt: skip
    if name in REAL:
        cfg = dataclasses.replace(cfg, eval_data=cfg.data)

    def recorded(*args):
        batch = collect(*args)
        drawn.append(batch.completions)
        if grouprank.processes()[0] == 1 and len(drawn) == 2:
            if name == "broken":
                raise RuntimeError("broken on purpose")
            if name == "stopped":
                os.kill(os.getpid(), signal.SIGTERM)
        return batch

    def set_up_in_float64(model, *args):
        set_up(model, *args)
        if cfg.lora_rank:  # the adapters were made just now
            model.double()

    in_float64 = {"load_model": lambda *args, **options: load(*args, **options).double(),
                  "set_up_training": set_up_in_float64}
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(replaced(grouprank, score_completion=reward_of_text, collect_rollouts=recorded))
        if name == "no-memory":
            enter(replaced(grouprank, completion_logprobs=no_memory_for_row_4))
        if name not in REAL | HALF:
            enter(replaced(grouprank, **in_float64))
            enter(replaced(grouprank.Job, decode=forced_answers))
        enter(contextlib.redirect_stdout(io.StringIO()))
        grouprank.train(cfg, PROMPT, grouprank.on_first(grouprank.claim_output, cfg, ""))
    if grouprank.is_first():
        (out / "drawn.json").write_text(json.dumps(drawn))


def run_processes(n_processes, *args, torchrun=False):
    """Run this file in several processes: by torchrun, or forked, which imports torch only once."""
    start = [*"-m torch.distributed.run --standalone --nproc-per-node".split(), str(n_processes)]
    command = [sys.executable, *(start if torchrun else []), __file__, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "FORKS": str(n_processes)})  # fmt: skip


def weights_after(out):
    """The trained weights of every checkpoint, in the order of the steps."""
    paths = sorted((out / "checkpoints").glob("*.pt"))
    return {path.name: torch.load(path, weights_only=True)["weights"] for path in paths}


def keep_three_steps(out, copied):
    """What a run of five steps would have left had it ended after three."""
    shutil.copytree(out, copied)
    for step in (4, 5):
        (copied / f"checkpoints/grpo-{step:07d}.pt").unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All cases, trained by one process here and by two and four others."""
    folder = tmp_path_factory.mktemp("processes")
    prepare(folder)
    for name in CASES:
        train_case(folder, name, 1)
    keep_three_steps(folder / "grpo-full-1", folder / "resumed-4")
    others = (2, [*CASES, *HALF]), (4, ("grpo-lora", "grpo-full", "sft-full", "resumed"))
    for n_processes, names in others:
        done = run_processes(n_processes, folder, *names)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", FORCED)
def test_weights_after_five_steps_do_not_depend_on_the_number_of_processes(folder, name):
    """Four processes share three prompts: one of them has none."""
    expected = weights_after(folder / f"{name}-1")
    assert len(expected) == 5
    others = [out for n in (2, 4) if (out := folder / f"{name}-{n}").exists()]
    assert others
    for out in others:
        found = weights_after(out)
        assert found.keys() == expected.keys()
        for step, weights in expected.items():
            for key, weight in weights.items():
                assert weight.dtype == torch.float64
                assert (found[step][key] - weight).abs().max() < 1e-6
    first, *_, last = expected.values()
    assert any((first[key] - last[key]).abs().max() > 1e-3 for key in first)  # they moved


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
        models = [grouprank.load_model(str(out / part), grouprank.pick_machine("cpu"), trainable=True)
                  for out in (one, two)]
        for weight, other in zip(*(model.parameters() for model in models), strict=True):
            assert (weight - other).abs().max() < 1e-4
    assert (two / "adapter").exists() == (name == "real-lora")


def test_resuming_with_another_number_of_processes(folder):
    """After three of five steps two go on as one, and one as four, to the weights of one alone."""
    for name in ("grpo-lora", "grpo-full"):
        keep_three_steps(folder / f"{name}-2", folder / f"{name}-resumed-1")
        train_case(folder, name, "resumed-1", resume=True)
    for name, out in (("grpo-lora", "grpo-lora-resumed-1"), ("grpo-full", "grpo-full-resumed-1"),
                      ("grpo-full", "resumed-4")):  # fmt: skip
        found = weights_after(folder / out)
        for step, weights in weights_after(folder / f"{name}-1").items():
            for key, weight in weights.items():
                assert (found[step][key] - weight).abs().max() < 1e-6


def test_sharded_weights_are_trained_in_half_precision(folder):
    """Two processes in bfloat16: masters in float32, close to the reference before the first step."""
    first, last = weights_after(folder / "half-2").values()
    assert {weight.dtype for weight in last.values()} == {torch.float32}
    assert any((first[key] != last[key]).any() for key in first)
    rows = [json.loads(line) for line in (folder / "half-2/metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[0]["kl"] < 1e-3 and not any(row["skipped"] for row in rows)


def test_copies_in_half_precision_keep_their_places():
    """Rotary frequencies in bfloat16 would turn late positions by whole turns."""
    model = tiny_model()
    frozen = grouprank.frozen_copy(model, torch.device("cpu"), torch.bfloat16)
    assert {weight.dtype for weight in frozen.parameters()} == {torch.bfloat16}
    assert [b.dtype for b in frozen.buffers()] == [b.dtype for b in model.buffers()] != []
    for copied, own in zip(frozen.buffers(), model.buffers(), strict=True):
        assert copied is not own and copied.equal(own)
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight  # still tied
    assert model.lm_head.weight.dtype == torch.float32 and model.lm_head.weight.requires_grad


def test_a_prompt_without_memory_is_dropped_and_counted_whoever_had_it(folder):
    dropped = [[json.loads(line)["dropped"] for line in
                (folder / f"no-memory-{n}/metrics.jsonl").read_text().splitlines()] for n in (1, 2)]
    assert dropped[0] == dropped[1] and sum(dropped[0]) in (2, 3)  # it comes in 2.5 epochs


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder):
    assert run_processes(2, folder, "stopped").returncode == 143  # 128 + SIGTERM, from both
    assert list(weights_after(folder / "stopped-2")) == ["grpo-0000002.pt"]


def test_one_process_that_fails_ends_all_with_its_message(folder):
    done = run_processes(2, folder, "broken", torchrun=True)
    assert done.returncode != 0 and "RuntimeError: broken on purpose" in done.stderr
    assert not (folder / "broken-2/meta.json").exists()


def test_shares_are_of_like_cost_and_hold_everything():
    assert grouprank.deal([5, 1, 4, 2, 3], 2) == [[0, 1, 3], [2, 4]]  # 5 + 1 + 2, 4 + 3
    assert grouprank.deal([7, 7], 4) == [[0], [1], [], []]
    assert grouprank.deal([], 2) == [[], []]


def main(folder, *names):
    """What each process does."""
    grouprank.join_processes()
    torch.set_num_threads(1)
    for name in names:
        train_case(folder, name, grouprank.processes()[1])
    torch.distributed.destroy_process_group()


def fork(n_processes, work, *args):
    """Do some work in n processes that are started as torchrun starts them; their exit status."""
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
        status = 1
        try:
            work(*args)
            status = 0
        except SystemExit as stop:
            status = stop.code
        except Exception:
            traceback.print_exc()
        os._exit(status)  # without the exit handlers of threads that a fork does not copy
    codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    return codes.pop() if len(codes) == 1 else 1


if __name__ == "__main__":
    arguments = Path(sys.argv[1]), *sys.argv[2:]
    if "WORLD_SIZE" in os.environ:
        main(*arguments)
    else:
        sys.exit(fork(int(os.environ["FORKS"]), main, *arguments))
