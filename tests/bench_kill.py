"""Kill a training with SIGKILL, resume it, and compare its end with an uninterrupted run's.

    python tests/bench_kill.py --kills 50          # some minutes on one core
    python tests/bench_kill.py --kills 0           # the worst moments only
    python tests/bench_kill.py --small             # these and one more, LoRA, short answers; seconds

The demo, made small, is trained once without a stop, with all parameters and with LoRA. Then it is
trained again: first killed at each of the worst moments (half a checkpoint written, a folder gone
and its successor not there yet, ...), then at random ones, several times a run. A kill is survived
when its run ends with the same bytes in every model folder, the same metrics.jsonl but for time fields,
the same samples.jsonl and ndcg block, and nothing left under a temporary name.

Each start is a fork of a process that has imported everything, so that the kills fall into the
training and not into the imports.
"""

import argparse
import hashlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it has threads, which a fork would lose
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import grouprank

TIMED = {"seconds", "tokens_per_s", "rollout_s"}
ARGUMENTS = ("--train --device cpu --seed 3 --sft-batch 8 --save-every 2 --eval-every 3"
             " --max-new-tokens 60 --prompts-per-step 4 --rollouts-per-prompt 4 --retries 0").split()  # fmt: skip


def kill_when(owner, name, matters, also=None):
    """Make owner.name kill the process instead of doing its work, where matters(args) is true."""
    original = getattr(owner, name)

    def wrapper(*args, **options):
        if matters(*args):
            if also is not None:
                also(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, wrapper)


def half_a_state(state, file):
    """Write the first half of what torch.save writes."""
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()


def half_a_line(log, stage, step, *_):
    """Write a line of metrics.jsonl that does not end."""
    with open(log.files[0], "a", encoding="utf-8") as file:
        file.write(f'{{"stage": "{stage}", "step": {step}, "lo')


save = torch.save
WORST = {  # in the order in which a run comes to them
    "half a line of metrics.jsonl": (
        grouprank.Log, "write", lambda log, stage, step, *_: step == 3, half_a_line),
    "half a checkpoint is written, in SFT": (
        torch, "save", lambda state, file: state["step"] == 4, half_a_state),
    "OUT/best is deleted, the new one not yet renamed": (
        Path, "rename", lambda old, new: Path(new).name == "best" and old.name.endswith(".tmp")),
    "between the stages, SFT not saved": (
        grouprank.Run, "save", lambda run, name, *_: name == "sft"),
    "between the stages, SFT saved": (
        grouprank, "run_stage", lambda run, stage, stop: stage == "grpo"),
    "a checkpoint is written, not renamed, in GRPO": (
        os, "replace", lambda old, new: Path(new).name == "grpo.pt"),
    "the final model is half there": (
        Path, "replace", lambda old, new: old.name == "model.safetensors"),
}  # fmt: skip


def start(out, lora_rank, log, worst=None):
    """Start or resume the training in a process of its own; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        grouprank.DEMO_ROWS = {"sft": 40, "grpo": 12, "dev": 2}
        grouprank.DEMO_QUERIES = 2
        if worst:
            kill_when(*WORST[worst])
        again = "--resume" if (out / "run.json").exists() else "--overwrite"
        arguments = [*ARGUMENTS, "--lora-rank", str(lora_rank), "--out", str(out), again]
        grouprank.main(arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(child, log):
    """Wait for a training; returns whether it was killed, and shows why where it failed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        sys.exit(f"the training failed:\n{Path(log).read_text()[-3000:]}")
    return False


def ending(out):
    """What has to be the same at the end of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    weights = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
               for path in out.rglob("*.safetensors")}  # fmt: skip
    left = [str(path) for path in out.rglob("*") if path.name.endswith(".tmp") or path.name == "final"]
    return {"weights": weights, "left over": left,
            "metrics": [{k: v for k, v in line.items() if k not in TIMED} for line in lines],
            "samples": (out / "samples.jsonl").read_text(encoding="utf-8"),
            "results": json.loads((out / "results.json").read_text())["ndcg@10"]}  # fmt: skip


def where(out):
    """The part of the training that a kill hit."""
    if (out / "meta.json").exists():
        return "after training"
    if not (out / "run.json").exists():
        return "before training"
    writing = any(path.name.endswith(".tmp") for path in out.rglob(".*"))
    stage = "GRPO" if (out / "sft" / "meta.json").exists() else "SFT"
    return f"{stage}, while writing" if writing else stage


def torture(out, lora_rank, log, delays):
    """Train with kills, after `delays` seconds or at the WORST moments; returns what they hit."""
    hits = []
    for delay in delays:
        worst = delay if delay in WORST else None
        child = start(out, lora_rank, log, worst)
        if not worst:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        if not finish(child, log):
            assert not worst, f"never came to: {worst}"
            return hits  # it was faster than the kill
        hits.append(worst or where(out))
    assert not finish(start(out, lora_rank, log), log)
    return hits


def main(argv=None):
    """Train, kill, compare; returns {"kills", "survived"}."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs at random moments")
    parser.add_argument("--lora-rank", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--small", action="store_true", help="--kills 1 --lora-rank 4, short answers")
    args = parser.parse_args(argv)
    if args.small:
        args.kills, args.lora_rank = 1, [4]
        ARGUMENTS.extend("--docs-per-group 2 --max-new-tokens 30".split())
    torch.set_num_threads(1)
    rng, moments, survived, n_runs = random.Random(args.seed), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder, log, whole = Path(folder), Path(folder) / "log", {}
        for rank in args.lora_rank:
            began = time.perf_counter()
            assert not finish(start(folder / f"whole-{rank}", rank, log), log)
            seconds = time.perf_counter() - began
            whole[rank] = ending(folder / f"whole-{rank}")
            n_lines = len(whole[rank]["metrics"])
            print(f"LoRA rank {rank}, no kills: {n_lines} log lines, {seconds:.1f} s", flush=True)
        random_kills = 0
        while n_runs < len(args.lora_rank) or random_kills < args.kills:
            rank = args.lora_rank[n_runs % len(args.lora_rank)]
            planned = n_runs < len(args.lora_rank)  # the first run of each kind
            n_left = args.kills - random_kills
            delays = (rng.uniform(0, seconds) for _ in range(n_left))
            hits = torture(folder / f"run-{n_runs}", rank, log, WORST if planned else delays)
            random_kills += 0 if planned else len(hits)
            moments.update(hits)
            end = ending(folder / f"run-{n_runs}")
            wrong = [name for name in end if end[name] != whole[rank][name]]
            survived += 0 if wrong else len(hits)
            print(f"run {n_runs}, LoRA rank {rank}: {len(hits)} kills, "
                  + (f"DIFFERENT: {wrong}" if wrong else "identical"), flush=True)
            n_runs += 1
    for moment, n in moments.items():
        print(f"{n:4} x {moment}")
    print(f"{survived} of {moments.total()} kills survived in {n_runs} runs")
    return {"kills": moments.total(), "survived": survived}


if __name__ == "__main__":
    result = main()
    sys.exit(result["survived"] != result["kills"])
