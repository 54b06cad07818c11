"""What a GRPO step and a million queries take as models and machines grow: the README's tables.

    python tests/bench_growing.py                    # the tables (no model is run), then the check
    python tests/bench_growing.py --device cuda      # the check on a random-weight Qwen3-1.7B shape

Tables are computed by `estimate_memory` and `estimate_seconds`, of public model shapes. What a
device sustains is an assumption: 40 % of an H200's 989 TFLOP/s (dense bf16), 60 % of its 4.8 TB/s.
The check makes GRPO updates of a random-weight model, each setting in a process of its own, and
compares its peak memory with the estimate: on the CPU the growth of the resident set (allocations
from 64 KiB on go back to the system when freed), on CUDA the allocator's own count.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DEVICE_BYTES, FLOPS, BANDWIDTH = 141e9, 0.4 * 989e12, 0.6 * 4.8e12  # H200; the shares are assumed
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip
QWEN3 = {  # from the models' config.json
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "1.7B": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "4B": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "8B": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "14B": (5120, 17408, 40, 40, 8, 128, 151936, False),
    "32B": (5120, 25600, 64, 64, 8, 128, 151936, False),
}
SMALL = (512, 1536, 8, 8, 4, 64, 16384, True)
STEP = {"prompt_tokens": 8192, "answer_tokens": 1024}
PROMPTS_PER_STEP, DEVICES = 64, (1, 8, 64)


def shape(numbers):
    """A model's numbers under the names that transformers gives them."""
    return SimpleNamespace(**dict(zip(NAMES, numbers, strict=True)))


def plan(config, n_devices, lora_rank):
    """(bytes on a device, seconds of a step, seconds with the prompt run 8 times) on n H200."""
    import grouprank

    sizes = STEP | {"prompts_per_process": PROMPTS_PER_STEP // n_devices, "lora_rank": lora_rank}
    first = grouprank.estimate_memory(config, **sizes, n_processes=n_devices, cache_bytes=1)
    resident = sum(first[name] for name in ("weights", "moments", "reference", "replica"))
    budget = max(1.0, 0.4 * (DEVICE_BYTES - resident))  # what --cache-gib 0 takes
    memory = grouprank.estimate_memory(config, **sizes, n_processes=n_devices, cache_bytes=budget)
    wave, seconds = round(memory["cache"] / first["cache"]), []  # prompts decoded at once
    for shared in (True, False):
        times = grouprank.estimate_seconds(
            config, **sizes, flops=FLOPS, bandwidth=BANDWIDTH, shared=shared,
            prompts_per_wave=wave if shared else max(1, wave // 8))  # fmt: skip
        seconds.append(times["step"])
    return memory["peak"], *seconds


def show_steps():
    """Memory and seconds of a GRPO step by model size and number of devices."""
    print("| GB, s | " + " | ".join(f"{kind}, {n}" for kind in ("LoRA", "full") for n in DEVICES) + " |")
    print("|---" * (1 + 2 * len(DEVICES)) + "|")
    for name, numbers in QWEN3.items():
        cells = []
        for rank in (32, 0):
            for n_devices in DEVICES:
                peak, seconds, rows = plan(shape(numbers), n_devices, rank)
                cells.append(f"{peak / 1e9:.0f}{'!' if peak > 0.8 * DEVICE_BYTES else ''}, {seconds:.0f} ({rows:.0f})"
                             if peak <= DEVICE_BYTES else f"no ({peak / 1e9:.0f})")  # fmt: skip
        print(f"| {name} | " + " | ".join(cells) + " |")


def price_queries(docs_per_group, rounds, n_docs=100, doc_tokens=300, query_tokens=30):
    """(calls, prompt tokens, answer tokens) of a query; four characters count as a token.

    The prompt is the real one; an answer has 100 tokens and 20 for each document.
    """
    import numpy as np

    import grouprank

    rng = np.random.default_rng(0)
    plan = grouprank.plan_groups(n_docs, docs_per_group, rounds, 0, rng)
    groups, n_chars = [group for part in plan for group in part], 0
    for group in groups:
        texts = ["x" * 4 * doc_tokens for _ in group]
        messages = grouprank.chat_messages(grouprank.Prompt(), "x" * 4 * query_tokens, texts)
        n_chars += sum(len(message["content"]) for message in messages)
    return len(groups), n_chars / 4, sum(100 + 20 * len(group) for group in groups)


def show_queries(model="8B", n_queries=10**6):
    """Calls, tokens and hours of one H200 for a million queries, its memory full of calls."""
    import grouprank

    config = shape(QWEN3[model])
    print(f"\n| c | t | calls | prompt tokens | answer tokens | H200 hours, {model} |\n|---|---|---|---|---|---|")
    for c in (1, 10, 20):
        for t in (1, 4):
            calls, prompt, answer = price_queries(c, t)
            sizes = {"prompt_tokens": round(prompt / calls), "answer_tokens": round(answer / calls),
                     "rollouts_per_prompt": 1, "lora_rank": 1}  # fmt: skip
            memory = grouprank.estimate_memory(config, **sizes, cache_bytes=1)
            at_once = int((0.9 * DEVICE_BYTES - memory["weights"]) / memory["cache"])
            times = grouprank.estimate_seconds(
                config, **sizes, flops=FLOPS, bandwidth=BANDWIDTH,
                prompts_per_process=at_once, prompts_per_wave=at_once)  # fmt: skip
            hours = (times["prefill"] + times["decode"]) * calls * n_queries / at_once / 3600
            cells = (f"{calls * n_queries / 1e6:.0f} M", f"{prompt * n_queries / 1e9:.1f} G",
                     f"{answer * n_queries / 1e9:.1f} G", f"{hours:,.0f}")  # fmt: skip
            print(f"| {c} | {t} | " + " | ".join(cells) + " |")


def resident_bytes(field):
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(device, setting):
    """Two GRPO updates of a random-weight model: (predicted, measured) bytes at the peak."""
    import torch
    import transformers

    import grouprank

    machine = grouprank.pick_machine(device, setting["precision"])
    cuda, rank, g = machine.device.type == "cuda", setting["lora_rank"], 8
    config = transformers.Qwen3Config(
        **vars(shape(QWEN3["1.7B"] if cuda else SMALL)), max_position_embeddings=32768,
        attn_implementation="sdpa", eos_token_id=0, pad_token_id=0)  # fmt: skip
    n_prompt, n_answer = setting["prompt_tokens"], setting["answer_tokens"]
    torch.manual_seed(0)
    cfg = grouprank.Config(lora_rank=rank, grad_checkpointing="on" if setting["checkpointing"] else "off")
    torch.ones(64, 64, device=machine.device) @ torch.ones(64, 64, device=machine.device)  # libraries load
    before = torch.cuda.memory_allocated() if cuda else resident_bytes("VmRSS")
    with torch.device(machine.device):
        dtype = machine.dtype if rank else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    grouprank.share_prompts(model, True)
    grouprank.set_up_training(model, cfg, machine)
    job = grouprank.Job(cfg, Path("."), machine, model, None, None, None, [], [], True)
    policy = grouprank.Policy(model)
    reference = grouprank.Reference(job, policy)
    optimizer = grouprank.Optimizer(model, machine, grad_clip=1.0, weight_decay=0.0)
    draw = lambda n: torch.randint(3, config.vocab_size, (n,)).tolist()  # noqa: E731
    item = grouprank.Item("p", draw(n_prompt), None, None)
    batch = grouprank.RolloutBatch([item], [[draw(n_answer) for _ in range(g)]], [], [], None)
    advantages = grouprank.relative_advantages([list(range(g))])
    for _ in range(2):  # the moments exist after the first
        passes = grouprank.build_passes(batch, advantages, cfg, True, machine.device)
        grouprank.policy_update(job, policy, reference, passes, optimizer, 1e-6)
    after = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    sizes = {"prompt_tokens": n_prompt, "answer_tokens": n_answer, "lora_rank": rank,
             "checkpointing": setting["checkpointing"], "element_bytes": machine.dtype.itemsize}
    estimate = grouprank.estimate_memory(config, prompts_per_process=1, **sizes)
    return estimate | {"measured": after - before}


def check(device):
    """Predicted and measured peak memory of updates, each setting in its own process."""
    lengths = ((8192, 512), (16384, 1024)) if device == "cuda" else ((1024, 64), (2048, 128))
    precisions = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    print(f"\n| check on {device} | predicted GB | measured GB | predicted / measured |\n|---|---|---|---|")
    for precision in precisions:
        for rank in (32, 0):
            for on in (False, True):
                for n_prompt, n_answer in lengths[: 1 if precision == "bf16" and device == "cpu" else 2]:
                    setting = {"prompt_tokens": n_prompt, "answer_tokens": n_answer, "lora_rank": rank,
                               "checkpointing": on, "precision": precision}  # fmt: skip
                    command = [sys.executable, __file__, "--device", device, "--measure", json.dumps(setting)]
                    done = subprocess.run(command, capture_output=True, text=True, check=False,
                                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})  # fmt: skip
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    use = json.loads(done.stdout.splitlines()[-1])
                    kind = f"{'LoRA' if rank else 'full'}, {precision}{', checkpointing' if on else ''}"
                    print(f"| {kind}, P {n_prompt}, C {n_answer} | {use['peak'] / 1e9:.2f} |"
                          f" {use['measured'] / 1e9:.2f} | {use['peak'] / use['measured']:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tables", action="store_true", help="print the tables alone")
    parser.add_argument("--measure", metavar="JSON", help="one setting of the check, in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.device, json.loads(args.measure))))
        return
    show_steps()
    show_queries()
    if not args.tables:
        check(args.device)


if __name__ == "__main__":
    main()
