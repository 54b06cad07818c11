"""Seconds and memory of a GRPO update and of a full step: ours, ours without sharing, and TRL.

    python tests/bench_grpo.py                     # CPU shapes, 3 rounds, a table
    python tests/bench_grpo.py --device cuda       # a random-weight Qwen2.5-7B shape, bf16
    python tests/bench_grpo.py --json bench.json --rounds 5 --shapes 1024,64 2048,128
    python tests/bench_grpo.py --no-trl --shapes 1024,64 2048,128     # ours alone
    python tests/bench_grpo.py --many              # many short prompts in a row, two attentions
    python tests/bench_grpo.py --answer direct     # a step of direct scoring with G 8 and 64
    python tests/bench_grpo.py --small             # seconds

`update` is the reference pass, forward, backward and optimizer step on forced answers; `rollout`
first samples the answers (none ends early), others for ours than for TRL; `full` is 8 prompts with
rollouts, packed only.
One prompt of P tokens, G = 8 answers of C tokens each, the same random weights, LoRA rank 32 on all
linear layers, KL to the model without adapters. Contenders run in processes of their own, in turn,
each with one untimed step before the timed one.

    packed          ours, the prompt run once
    rows            ours, one row an answer, as for models that cannot share prompts
    trl             TRL's GRPOTrainer, the 8 answers as one batch
    trl-checkpoint  the same with its gradient checkpointing
    trl-accumulate  the same, one answer a micro-batch, 8 accumulated

The norm of the update's gradient is shown: it must agree, or the contenders did different work.

--many: forward and backward of one row of 32 prompts of 256 tokens with 10 completions of 40 each,
where a layer attends to all prompts at once ("batched", ours) or to one after another with indices
that it makes itself ("looped", as ours did before). --answer direct: a whole step on such rows as
groups of ten documents; drawing, rewarding and comparing 64 score vectors a prompt instead of 8 is
all that may add to it. The 19M-parameter model on the CPU, the shape of SmolLM2-135M on CUDA.

Measured at commit c0a8f3e or before on 2 cores of an AMD EPYC: a 19M-parameter Qwen2 (6 layers,
width 384, vocabulary 8,192), float32, torch 2.13, TRL 1.16, one timed step each (--rounds 1; what is
empty was not run), peak resident memory of the whole process; the norms were the same to five digits
for all. Rows were decoded by code of ours then, now by the library's generate():

| P, C | step | packed | rows | TRL | TRL, checkpointing | TRL, one answer a micro-batch |
|---|---|---|---|---|---|---|
| 1024, 64 | update | 1.5 s, 1.2 GB | 10.0 s, 3.1 GB | 15.4 s, 4.8 GB | 16.4 s, 2.8 GB | 10.9 s, 1.4 GB |
| 2048, 128 | update | 4.2 s, 1.8 GB | 42.4 s, 5.8 GB | 39.5 s, 7.7 GB | 42.2 s, 4.2 GB | 35.8 s, 2.5 GB |
| 2048, 512 | update | 10.6 s, 2.8 GB | 31.6 s, 6.9 GB | 47.7 s, 8.6 GB | | |
| 1024, 64 | rollout | 2.9 s, 1.2 GB | 12.9 s, 3.3 GB | 26.2 s, 4.9 GB | 23.0 s, 2.8 GB | 18.6 s, 1.6 GB |
| 2048, 128 | rollout | 9.1 s, 1.8 GB | 33.7 s, 5.9 GB | 59.7 s, 8.3 GB | | |

Against TRL's plain batch an update is 10, 9 and 4.5 times as fast in 0.25, 0.23 and 0.32 of its
memory, and rollout and update together 9 and 6.6 times. The machine was shared and times varied:
the last packed step took 6.7, 7.7 and 10.9 s in three more runs.

Measured on an H200 (commit c0a8f3e, torch 2.11, transformers 5.17, TRL 1.16; the 7B shape, bf16,
checkpointing): an update of P 8,192 and C 512 takes 2.02 s and 22.7 GB packed, 9.26 s in rows, and
10.26 s and 57.4 GB by TRL with checkpointing (5.1 times as long; 0.39 of its memory); of P 24,576
and C 1,024 packed 6.80 s and 33.3 GB. That is 49 to 50 % of the measured bf16 rate (781 to 798
TFLOP/s).

--many, one timed pass each: 0.43 s batched and 4.38 s looped on an H100 (torch 2.11, transformers
5.17, 2.26 GB both, gradient norms 0.16415 and 0.16413); 33.1 and 103.4 s on the 2 cores, shared with
another job (9.1 and 8.8 GB, norms 0.10998). --answer direct: G = 8 34.3 s and G = 64 34.1 s on the 2
cores; 0.46 and 0.45 s, 1.9 GB both, on an H200 (torch 2.11, transformers 5.17).
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PHASES = ("update", "rollout", "full")
MANY = (32, 256, 10, 40)  # prompts, their tokens, completions of each, their tokens
CONTENDERS = ("packed", "rows", "trl", "trl-checkpoint", "trl-accumulate")
SHAPES = {"cpu": ("1024,64", "2048,128", "2048,512"), "cuda": ("8192,512", "24576,1024")}
MODELS = {
    "cpu": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1536,
            "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2},
    "cuda-many": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                  "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "cuda": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
             "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
}
G, RANK, SEED = 8, 32, 0


def build_model(device: str, many: bool = False):
    """A Qwen2 with random weights: 19M parameters on the CPU, the 7B shape in bf16 on CUDA, or with
    `many` that of SmolLM2-135M."""
    import torch
    import transformers

    config = transformers.Qwen2Config(
        **MODELS["cuda-many" if many and device == "cuda" else device], max_position_embeddings=32768, tie_word_embeddings=False,
        attn_implementation="sdpa", eos_token_id=0, pad_token_id=0)
    torch.manual_seed(SEED)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def forced_ids(n_vocab: int, n_prompt: int, n_answer: int):
    """The prompt and its G answers, without special tokens."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    draw = lambda n: rng.integers(3, min(n_vocab, 8192), n).tolist()  # noqa: E731
    return draw(n_prompt), [draw(n_answer) for _ in range(G)]


def fill_adapters(model) -> None:
    """The same adapters for every contender, not zero, so that the KL term counts."""
    import torch

    random = torch.Generator().manual_seed(SEED)
    for part in ("lora_A", "lora_B"):
        for name, weight in model.named_parameters():
            if part in name:
                weight.data.copy_(0.02 * torch.randn(weight.shape, generator=random))


REWARDS = [0.1, 0.9, 0.4, 1.2, -0.5, 0.7, 0.3, 1.0]


def ours(device: str, n_prompt: int, n_answer: int, phase: str, shared: bool):
    """Two steps of grouprank.py: seconds of each, and the norm of the last gradient."""
    import torch

    import grouprank

    machine = grouprank.pick_machine(device)
    model = build_model(device)
    cfg = grouprank.Config(lora_rank=RANK, max_new_tokens=n_answer, rollouts_per_prompt=G, cache_gib=20.0,
                           max_tokens_per_pass=2**15 if device == "cuda" else 2**20)
    grouprank.set_up_training(model, cfg, machine)
    fill_adapters(model)
    local = grouprank.LocalModel(model, SimpleNamespace(eos_token_id=0, added_tokens_decoder={}), machine, cfg)
    local.end_ids = [model.config.vocab_size]  # no token ends an answer: all are equally long
    if not shared:
        model.get_decoder().config._attn_implementation = "sdpa"
    assert grouprank.shares_prompts(model) == shared
    prompt, forced = forced_ids(model.config.vocab_size, n_prompt, n_answer)
    policy = grouprank.Policy(model, functools.partial(machine.autocast, cache=False))
    reference, optimizer = grouprank.make_reference(policy, machine), grouprank.Optimizer(model, machine)
    rewards = itertools.cycle(REWARDS)
    n_prompts = 8 if phase == "full" else 1
    items = [grouprank.Item(f"p{b}", prompt, (0.0,), None) for b in range(n_prompts)]
    seeds = [[(SEED, b, g) for g in range(G)] for b in range(n_prompts)]

    def answer(prompts, seeds):
        answers = [forced] if phase == "update" else local.sample(prompts, seeds)
        return [[grouprank.Sampled(ids) for ids in row] for row in answers]

    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        done = grouprank.grpo_step(
            policy, reference, optimizer, answer, lambda *_: grouprank.Reward(next(rewards), "ok"),
            lambda costs: list(range(len(costs))), items, seeds, 0.0, cfg)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, done.numbers["grad_norm"]


def many_prompts(device: str, name: str, sizes: tuple[int, ...]):
    """Two passes over one row of many prompts: seconds of each, and the norm of the gradient."""
    import numpy as np
    import torch

    import grouprank

    class LoopedRow(grouprank.PackedRow):
        """Attention to one prompt after another, with indices made in each layer."""

        def __init__(self, blocks, device):
            self.blocks = blocks

        def attend(self, layer, query, key, value, scaling):
            outputs, start = [], 0
            for n, lengths in self.blocks:
                end = start + n + sum(lengths)
                (q, k, v), answer = zip(*(
                    t[:, :, start:end].split([n, sum(lengths)], dim=2) for t in (query, key, value)),
                    strict=True)
                outputs += [grouprank.causal_attention(q, k, v, scaling),
                            self.completions(*answer, k, v, lengths, scaling)]
                start = end
            return torch.cat(outputs, dim=2)

        def completions(self, query, key, value, prompt_key, prompt_value, lengths, scaling):
            slots = torch.arange(max(lengths), device=query.device)
            ends = torch.tensor(lengths, device=query.device)
            real = slots < ends[:, None]
            index = torch.where(real, (ends.cumsum(0) - ends)[:, None] + slots, 0)
            q, k, v = (t[0][:, index].transpose(0, 1) for t in (query, key, value))
            output = grouprank.attend_completions(q, k, v, prompt_key, prompt_value, None, scaling)
            return output.transpose(1, 2)[real].transpose(0, 1)[None]

    machine, model = grouprank.pick_machine(device), build_model(device, many=True)
    grouprank.set_up_training(model, grouprank.Config(lora_rank=RANK), machine)
    fill_adapters(model)
    assert grouprank.share_prompts(model)
    if name == "looped":
        grouprank.PackedRow = LoopedRow
    n_prompts, n_prompt, n_answers, n_answer = sizes
    draw = np.random.default_rng(SEED).integers
    blocks = [(draw(3, 8000, n_prompt).tolist(), draw(3, 8000, (n_answers, n_answer)).tolist())
              for _ in range(n_prompts)]
    policy, seconds = grouprank.Policy(model.train(), functools.partial(machine.autocast, cache=False)), []
    for _ in range(2):
        model.zero_grad()
        started = time.perf_counter()
        grouprank.completion_logprobs(policy, blocks, packed=True)[0].mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    norm = sum(p.grad.float().norm().item() ** 2 for p in model.parameters() if p.grad is not None)
    return seconds, norm ** 0.5


def direct(device: str, n_rollouts: int, sizes: tuple[int, ...]):
    """Two steps of GRPO with direct scoring: seconds of each, and the norm of the gradient."""
    import numpy as np
    import torch

    import grouprank

    machine, model = grouprank.pick_machine(device), build_model(device, many=True)
    cfg = grouprank.Config(lora_rank=RANK, answer="direct", max_tokens_per_pass=2**15)
    grouprank.set_up_training(model, cfg, machine)
    fill_adapters(model)
    assert grouprank.share_prompts(model)
    policy = grouprank.Policy(model, functools.partial(machine.autocast, cache=False))
    digits = list(range(100, 110))
    reference = grouprank.make_reference(policy, machine, digits)
    n_prompts, n_prompt, n_docs, n_branch = sizes
    draw = np.random.default_rng(SEED).integers
    items = [grouprank.Item(f"p{b}", draw(3, 8000, n_prompt).tolist(), tuple(draw(0, 11, n_docs).tolist()),
                            None, draw(3, 8000, (n_docs, n_branch)).tolist()) for b in range(n_prompts)]
    seeds, seconds = grouprank.rollout_seeds(items, SEED, 0, n_rollouts), []
    for _ in range(2):
        started = time.perf_counter()
        done = grouprank.direct_grpo_step(
            policy, reference, grouprank.Optimizer(model, machine), grouprank.reward_scores,
            lambda costs: list(range(len(costs))), items, seeds, 0.0, digits, cfg)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, done.numbers["grad_norm"]


def trl(device: str, n_prompt: int, n_answer: int, phase: str, options: dict):
    """The same step by TRL's GRPOTrainer, with the settings that make its loss the paper's."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model = build_model(device)
    vocab = {f"t{i}": i for i in range(min(model.config.vocab_size, 8192))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="t1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t1", eos_token="t0",
                                        pad_token="t0")
    prompt, answers = forced_ids(model.config.vocab_size, n_prompt, n_answer)
    text = " ".join(f"t{i}" for i in prompt)

    def forced(prompts, trainer):
        return {"prompt_ids": [prompt] * G, "completion_ids": answers, "logprobs": None}

    batch = options.get("batch", G)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type="grpo", beta=0.001, epsilon=0.2, num_iterations=1,
        scale_rewards="group", importance_sampling_level="token", use_bias_correction_kl=False,
        temperature=1.0, top_p=1.0, top_k=0, num_generations=G, per_device_train_batch_size=batch,
        gradient_accumulation_steps=G // batch, steps_per_generation=G // batch,
        max_completion_length=n_answer, mask_truncated_completions=False, disable_dropout=True,
        learning_rate=0.0, lr_scheduler_type="constant", report_to=[], logging_strategy="no", dataloader_pin_memory=False,
        gradient_checkpointing=options.get("checkpoint", device == "cuda"),
        gradient_checkpointing_kwargs={"use_reentrant": False}, bf16=device == "cuda",
        use_cpu=device == "cpu", save_strategy="no", max_steps=2, disable_tqdm=True, seed=SEED, max_grad_norm=1.0,
        generation_kwargs={"min_new_tokens": n_answer, "max_new_tokens": n_answer})
    lora = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear",
                      task_type="CAUSAL_LM")
    seconds, norms = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_pre_optimizer_step(self, *_, model, **__):
            norms.append(sum(p.grad.norm().item() ** 2 for p in model.parameters()
                             if p.grad is not None) ** 0.5)

        def on_step_end(self, *_, **__):
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    trainer = GRPOTrainer(
        model=model, args=config, processing_class=tokenizer, peft_config=lora,
        reward_funcs=lambda completions, **_: REWARDS, rollout_func=forced if phase == "update" else None,
        train_dataset=Dataset.from_list([{"prompt": text}] * 4), callbacks=[Clock()])
    fill_adapters(trainer.model)
    trainer.train()
    return seconds, norms[-1]


def run_contender(name: str, device: str, shape: str, phase: str) -> dict:
    """In a process of its own: one untimed step, one timed step, peak memory."""
    import torch

    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    sizes = tuple(map(int, shape.split(",")))
    n_prompt, n_answer = sizes[:2]
    if phase == "many":
        seconds, norm = many_prompts(device, name, sizes)
    elif phase == "direct":
        seconds, norm = direct(device, int(name.removeprefix("G=")), sizes)
    elif name in ("packed", "rows"):
        seconds, norm = ours(device, n_prompt, n_answer, phase, name == "packed")
    else:
        options = {"trl": {}, "trl-checkpoint": {"checkpoint": True}, "trl-accumulate": {"batch": 1}}
        seconds, norm = trl(device, n_prompt, n_answer, phase, options[name])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": seconds[-1], "peak_bytes": peak, "grad_norm": norm}


def matmul_rate(device: str) -> float:
    """Measured bf16 operations a second of an 8192 x 8192 x 8192 product."""
    import torch

    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - started)


def report_rate(rows: list[dict]) -> None:
    """Which share of the measured bf16 rate the packed update reaches, and how it is counted.

    2N a token forward for policy, its recomputation, its backward (frozen weights have no gradient)
    and the reference: 8N. Attention: 4 d a pair and layer forward, twice that backward: 5 forwards.
    """
    import transformers

    config = transformers.Qwen2Config(**MODELS["cuda"])
    d, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    n = config.num_hidden_layers * (2 * d * d + 2 * d * d * kv // heads
                                    + 3 * d * config.intermediate_size)
    rate = matmul_rate("cuda")
    print(f"\nmatrix products: {rate / 1e12:.0f} TFLOP/s measured in bf16; N = {n:,} without embeddings\n"
          "work = 8 N (P + G C) + 20 L d (P^2/2 + G P C + G C^2/2)")
    for row in rows:
        if (row["name"], row["phase"]) == ("packed", "update") and "seconds" in row:
            p, c = map(int, row["shape"].split(","))
            pairs = p * p / 2 + G * p * c + G * c * c / 2
            work = 8 * n * (p + G * c) + 20 * config.num_hidden_layers * d * pairs
            share = work / row["seconds"] / rate
            print(f"P {p}, C {c}: {work:.3g} operations in {row['seconds']:.2f} s, {share:.1%}")


def measure(name: str, device: str, shape: str, phase: str, apart: bool = True) -> dict:
    """One contender in a process of its own; {"error"} when it is not installed or fails.

    Not `apart`, ours run in this one: seconds less, and a peak that is everything's.
    """
    if not apart and not name.startswith("trl"):
        return run_contender(name, device, shape, phase)
    if name.startswith("trl") and not all(map(importlib.util.find_spec, ("trl", "peft", "datasets"))):
        print(f"{name}, {shape}, {phase}: not installed (requirements-bench.txt)", file=sys.stderr)
        return {"error": "not installed"}
    command = [sys.executable, __file__, "--contender", name, device, shape, phase]
    env = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if found:
        return json.loads(found[0].removeprefix("RESULT "))
    why = (done.stderr.strip().splitlines() or ["no result"])[-1][:120]
    print(f"{name}, {shape}, {phase}: {why}", file=sys.stderr)
    return {"error": why}


def show(rows: list[dict]) -> None:
    """A Markdown table: medians, and how many times the first contender's."""
    print("\n| P, C | step | contender | seconds | times the first | peak GB | share | gradient norm |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        best = next(r for r in rows if (r["shape"], r["phase"]) == (row["shape"], row["phase"]))
        cells = [row["shape"].replace(",", ", "), row["phase"], row["name"]]
        if "error" in row:
            cells += [row["error"], "", "", "", ""]
        else:
            cells += [f"{row['seconds']:.2f}", f"{row['seconds'] / best['seconds']:.1f}",
                      f"{row['peak_bytes'] / 1e9:.2f}",
                      f"{best['peak_bytes'] / row['peak_bytes']:.2f}", f"{row['grad_norm']:.5f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def compare(device: str, shape: str, phase: str, names: list[str], n_rounds: int,
            apart: bool = True) -> list[dict]:
    """The contenders in turn, n_rounds times; the medians of each."""
    runs = {name: [] for name in names}
    for _ in range(n_rounds):
        for name in names:
            if not (runs[name] and "error" in runs[name][-1]):
                runs[name].append(measure(name, device, shape, phase, apart))
    rows = []
    for name, results in runs.items():
        good = [r for r in results if "error" not in r]
        row = {"shape": shape, "phase": phase, "name": name}
        for key in ("seconds", "peak_bytes", "grad_norm") if good else ():
            row[key] = statistics.median(r[key] for r in good)
        rows.append(row | ({} if good else results[-1]))
    show(rows)
    return rows


def main() -> None:
    """Run all contenders in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", metavar="P,C")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--many", action="store_true", help="many short prompts in one row")
    parser.add_argument("--answer", choices=("reason", "direct"), default="reason")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="one small rollout, once")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.small:
        args.shapes, args.phases, args.rounds = ["64,8"], ["rollout"], 1
        args.contenders = ["packed", "rows", "trl"]
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: CUDA rows not run")
    rows = []
    if args.many or args.answer == "direct":
        shape = ",".join(map(str, (2, 16, 3, 8) if args.small else MANY))
        phase, names = (("many", ["batched", "looped"]) if args.many else ("direct", ["G=8", "G=64"]))
        compare(args.device, shape, phase, names, args.rounds, not args.small)
        return
    for shape in args.shapes or SHAPES[args.device]:
        for phase in args.phases:
            names = [n for n in args.contenders if not (args.no_trl and n.startswith("trl"))]
            rows += compare(args.device, shape, phase,
                            [n for n in names if phase != "full" or n == "packed"], args.rounds,
                            not args.small)
    if args.device == "cuda":
        report_rate(rows)
    if args.json:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(),
                   "torch": torch.__version__, "rounds": args.rounds}
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        print("RESULT " + json.dumps(run_contender(*sys.argv[2:6])))
    else:
        main()
