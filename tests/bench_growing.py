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
import math
import os
import subprocess
import sys
from collections.abc import Sequence
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


# --- Bytes and seconds of a GRPO step, on paper --------------------------------------------------


def linear_shapes(config) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers in one block of a Llama-like model (Qwen, Mistral)."""
    width, mlp = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = (head * n for n in (config.num_attention_heads, config.num_key_value_heads))
    return [(width, queries), (width, keys), (width, keys), (queries, width),
            (width, mlp), (width, mlp), (mlp, width)]


def count_parameters(config, lora_rank: int = 0) -> tuple[int, int, int]:
    """Parameters of one block's linear layers, of embeddings and head, and of all adapters.

    Norms and biases are left out: less than one in a thousand.
    """
    shapes = linear_shapes(config)
    n_embedding = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    n_adapter = config.num_hidden_layers * lora_rank * sum(i + o for i, o in shapes)
    return sum(i * o for i, o in shapes), n_embedding, n_adapter


def activation_bytes(config, blocks: Sequence[tuple[int, Sequence[int]]], *, lora: bool,
                     element_bytes: int) -> int:
    """Bytes that one block of layers of a Qwen3 keeps for its backward pass over a packed row.

    blocks: for each prompt its tokens and those of its completions, as PackedRow takes them. Every
    completion keeps a copy of its prompt's keys and values.
    """
    (width, queries), (_, keys), *_, (mlp, _) = linear_shapes(config)
    tokens = sum(prompt + sum(lengths) for prompt, lengths in blocks)
    pairs = sum(len(lengths) * prompt + sum(lengths) for prompt, lengths in blocks)
    in_float32 = (1 if lora else 2) * (2 * width + queries + keys)  # a trained norm keeps two
    in_type = 2 * width + 3 * queries + 2 * keys + 4 * mlp
    return tokens * (4 * in_float32 + element_bytes * in_type) + pairs * 2 * keys * element_bytes


def pass_bytes(config, blocks: Sequence[tuple[int, Sequence[int]]], *, lora: bool,
               element_bytes: int, checkpointing: bool) -> tuple[int, int]:
    """What a forward and backward pass over a packed row keeps, and what it works with on top.

    It works on a chunk of logits first; then on the gradients of one block of layers, and with
    checkpointing on what that block keeps and had to compute again.
    """
    tokens = sum(prompt + sum(lengths) for prompt, lengths in blocks)
    block = activation_bytes(config, blocks, lora=lora, element_bytes=element_bytes)
    inputs = tokens * config.hidden_size * (element_bytes if lora else 4)  # of a block
    n_logits = min(1024, sum(sum(lengths) for _, lengths in blocks)) * config.vocab_size
    kept = config.num_hidden_layers * (inputs if checkpointing else block)
    return kept, max((2 if checkpointing else 1) * block, n_logits * (element_bytes + 16))


def estimate_memory(config, *, prompt_tokens: int, answer_tokens: int, rollouts_per_prompt: int = 8,
                    prompts_per_process: int = 64, n_processes: int = 1, lora_rank: int = 32,
                    element_bytes: int = 2, checkpointing: bool = True, kl: bool = True,
                    tokens_per_pass: int = 32768, cache_bytes: float = 2**30) -> dict[str, float]:
    """Bytes on each device during a GRPO step with shared prompts, by purpose, and their "peak".

    LoRA: every process has the whole frozen base in the compute type (element_bytes: 2 for bf16)
    and float32 adapters. All parameters: float32 weights, gradients and Adam's two moments, 16
    bytes a parameter / n_processes, a frozen reference and, with several processes, a whole copy
    that decodes, both in the compute type. Decoding and updating take turns. Not counted: norms,
    fragmentation, the CUDA context, communication buffers.
    """
    p, c, g, size = prompt_tokens, answer_tokens, rollouts_per_prompt, element_bytes
    n_block, n_embedding, n_adapter = count_parameters(config, lora_rank)
    n_all = config.num_hidden_layers * n_block + n_embedding
    n_trained = n_adapter or n_all / n_processes
    full, sharded = not lora_rank, n_processes > 1 and not lora_rank
    in_row = max(1, min(g, (tokens_per_pass - p) // c))  # answers behind one copy of a prompt
    n_rows = max(1, min(tokens_per_pass // (p + in_row * c), prompts_per_process))
    activations, working = pass_bytes(config, [(p, [c] * in_row)] * n_rows, lora=not full,
                                      element_bytes=size, checkpointing=checkpointing)
    cache = (p + g * c) * 2 * config.num_hidden_layers * linear_shapes(config)[1][1] * size
    wave = max(1, min(prompts_per_process, int(cache_bytes // cache)))  # prompts decoded at once
    use = {
        "weights": 4 * n_trained if full else size * n_all + 4 * n_adapter,
        "moments": 8 * n_trained,
        "reference": size * n_all / n_processes if kl and full else 0,
        "replica": size * n_all if sharded else 0,
        "gradients": 4 * n_trained,
        "gathered": 8 * (n_block + n_embedding) if sharded else 0,  # weights and their gradients
        "casts": size * n_all if size < 4 and full and not checkpointing else 0,  # kept by autograd
        "activations": activations,
        "working": working,
        "cache": wave * cache,
        "sampling": wave * g * config.vocab_size * (size + 24),  # probabilities in float64
    }
    resident = sum(use[name] for name in ("weights", "moments", "reference", "replica"))
    update = sum(use[n] for n in ("gradients", "gathered", "casts", "activations", "working"))
    return use | {"peak": resident + max(update, use["cache"] + use["sampling"])}


def estimate_seconds(config, *, prompt_tokens: int, answer_tokens: int, flops: float,
                     bandwidth: float, rollouts_per_prompt: int = 8, prompts_per_process: int = 64,
                     lora_rank: int = 32, element_bytes: int = 2, checkpointing: bool = True,
                     kl: bool = True, prompts_per_wave: int = 64, shared: bool = True) -> dict:
    """Seconds of one process's share of a GRPO step: prefill, decode, update and their sum.

    flops and bandwidth: operations and bytes a second that the device sustains. A pass forward is
    2 operations a parameter and token, 4 a query-key pair and head dimension. Backward is as much
    again for frozen weights, twice as much for trained ones; checkpointing and the reference are a
    pass forward each. A decoded token reads all weights and the cache, unless computing takes
    longer. Communication, the optimizer and waiting for the longest answer are not counted.
    """
    p, c, g = prompt_tokens, answer_tokens, rollouts_per_prompt
    n_block, _, _ = count_parameters(config)
    (width, queries), (_, keys), *_ = linear_shapes(config)
    n_body, copies = config.num_hidden_layers * n_block, 1 if shared else g  # copies of the prompt
    attention, head = 4 * queries * config.num_hidden_layers, config.vocab_size * width
    prefill = copies * (2 * n_body * p + attention * p * p / 2)
    answers = g * c * (2 * n_body + 2 * head) + attention * g * c * (p + c / 2)
    n_forward = (2 if lora_rank else 3) + checkpointing + kl
    waves = math.ceil(prompts_per_process / prompts_per_wave)
    cache = 2 * config.num_hidden_layers * keys * element_bytes * (copies * p + g * c / 2)
    read = c * (waves * element_bytes * (n_body + head) + prompts_per_process * cache)
    seconds = {"prefill": prompts_per_process * prefill / flops,
               "decode": max(read / bandwidth, prompts_per_process * answers / flops),
               "update": prompts_per_process * n_forward * (prefill + answers) / flops}
    return seconds | {"step": sum(seconds.values())}


# --- The README's tables ---------------------------------------------------------------------------


def plan(config, n_devices, lora_rank):
    """(bytes on a device, seconds of a step, seconds with the prompt run 8 times) on n H200."""

    sizes = STEP | {"prompts_per_process": PROMPTS_PER_STEP // n_devices, "lora_rank": lora_rank}
    first = estimate_memory(config, **sizes, n_processes=n_devices, cache_bytes=1)
    resident = sum(first[name] for name in ("weights", "moments", "reference", "replica"))
    budget = max(1.0, 0.4 * (DEVICE_BYTES - resident))  # what --cache-gib 0 takes
    memory = estimate_memory(config, **sizes, n_processes=n_devices, cache_bytes=budget)
    wave, seconds = round(memory["cache"] / first["cache"]), []  # prompts decoded at once
    for shared in (True, False):
        times = estimate_seconds(
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

    config = shape(QWEN3[model])
    print(f"\n| c | t | calls | prompt tokens | answer tokens | H200 hours, {model} |\n|---|---|---|---|---|---|")
    for c in (1, 10, 20):
        for t in (1, 4):
            calls, prompt, answer = price_queries(c, t)
            sizes = {"prompt_tokens": round(prompt / calls), "answer_tokens": round(answer / calls),
                     "rollouts_per_prompt": 1, "lora_rank": 1}  # fmt: skip
            memory = estimate_memory(config, **sizes, cache_bytes=1)
            at_once = int((0.9 * DEVICE_BYTES - memory["weights"]) / memory["cache"])
            times = estimate_seconds(
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
    estimate = estimate_memory(config, prompts_per_process=1, **sizes)
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
