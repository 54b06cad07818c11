"""What a GRPO step and a million queries take as models grow: computed, and checked against runs.

    python tests/bench_growing.py                    # the tables (no model is run), then the check
    python tests/bench_growing.py --device cuda      # the check on a random-weight Qwen3-1.7B shape
    python tests/bench_growing.py --small            # the tables, and one small check; seconds

Computed, not run, by `estimate_memory` and `estimate_seconds`, which take any Llama-like shape;
these are Qwen3's. A GRPO step of 64 prompts x 8 answers, P 8,192, C 1,024, bf16, checkpointing, KL,
by 1, 8 and 64 H200 (141 GB): GB on each (of what the weights leave free, 40 % may be cache),
seconds, and in brackets the seconds if the prompt were run 8 times. `!`: above 80 % of the memory;
`no`: does not fit (GB that it would take). A device is taken to sustain 40 % of 989 TFLOP/s (dense
bf16; tests/bench_grpo.py measured about as much) and 60 % of 4.8 TB/s. Every device holds a copy of
the model. Not counted: communication, the wait for the longest answer, what Python adds.

| GB, s | LoRA, 1 | LoRA, 8 | LoRA, 64 | full, 1 | full, 8 |
|---|---|---|---|---|---|
| 0.6B | 57, 62 (304) | 17, 8 (40) | 5, 1 (5) | 62, 69 (328) | 24, 9 (43) |
| 1.7B | 59, 89 (437) | 19, 12 (61) | 10, 3 (8) | 70, 102 (484) | 48, 13 (67) |
| 4B | 60, 187 (908) | 28, 25 (125) | 18, 6 (16) | 99, 220 (1120) | 99, 29 (140) |
| 8B | 66, 278 (1378) | 42, 37 (194) | 30, 9 (24) | no (184) | no (184) |
| 14B | 75, 469 (2343) | 63, 64 (333) | 47, 17 (42) | no (315) | no (325) |
| 32B | 116!, 1230 (6071) | 116!, 168 (759) | 93, 38 (95) | no (662) | no (721) |

A million queries of 100 candidates, 300 tokens each, by groups of c in t rounds: the real prompts,
four characters counted as a token; an answer has 100 tokens and 20 for each document. Hours are
those of one H200, its memory full of calls, without retries:

| c | t | calls | prompt tokens | answer tokens | H200 hours, 8B |
|---|---|---|---|---|---|
| 1 | 1 | 100 M | 59.9 G | 12.0 G | 722 |
| 1 | 4 | 400 M | 239.4 G | 48.0 G | 2,886 |
| 10 | 1 | 10 M | 33.1 G | 3.0 G | 515 |
| 10 | 4 | 40 M | 132.5 G | 12.0 G | 2,059 |
| 20 | 1 | 5 M | 31.7 G | 2.5 G | 618 |
| 20 | 4 | 20 M | 126.6 G | 10.0 G | 2,471 |

Measured: the peak memory of GRPO updates of a 34-million-parameter Qwen3 with random weights (8
layers, width 512, vocabulary 16,384; G = 8), each setting in a process of its own, 2 cores of an
AMD EPYC, torch 2.13, transformers 5.24: growth of the resident set (allocations from 64 KiB on go
back to the system when freed); on CUDA it is the allocator's own count:

| check on cpu | predicted GB | measured GB | predicted / measured |
|---|---|---|---|
| LoRA, fp32, P 1024, C 64 | 1.03 | 1.08 | 0.95 |
| LoRA, fp32, P 2048, C 128 | 1.88 | 1.96 | 0.96 |
| LoRA, fp32, checkpointing, P 1024, C 64 | 0.37 | 0.41 | 0.91 |
| LoRA, fp32, checkpointing, P 2048, C 128 | 0.57 | 0.61 | 0.94 |
| full, fp32, P 1024, C 64 | 1.61 | 1.54 | 1.05 |
| full, fp32, P 2048, C 128 | 2.55 | 2.50 | 1.02 |
| full, fp32, checkpointing, P 1024, C 64 | 0.89 | 0.83 | 1.08 |
| full, fp32, checkpointing, P 2048, C 128 | 1.11 | 0.98 | 1.13 |
| LoRA, bf16, P 1024, C 64 | 0.64 | 0.73 | 0.88 |
| LoRA, bf16, checkpointing, P 1024, C 64 | 0.27 | 0.34 | 0.79 |

In bf16 with LoRA, rank-wide products, casts of small tensors and what the CPU's bf16 kernels
allocate are left out. On an H200 an update of a Qwen2.5-7B shape took 22.7 GB and 2.02 s for P
8,192 and C 512, and 33.3 GB and 6.80 s for P 24,576 and C 1,024 (tests/bench_grpo.py, commit
c0a8f3e, torch 2.11); these functions give 25.0 GB and 1.94 s, 39.3 GB and 6.47 s.
"""

import argparse
import functools
import itertools
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
TINY = (64, 128, 2, 4, 2, 16, 512, True)
STEP = {"prompt_tokens": 8192, "answer_tokens": 1024}
PROMPTS_PER_STEP = 64
COLUMNS = [("LoRA", 32, 1), ("LoRA", 32, 8), ("LoRA", 32, 64), ("full", 0, 1), ("full", 0, 8)]


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

    LoRA: the whole frozen base in the compute type (element_bytes: 2 for bf16) and float32 adapters.
    All parameters: float32 weights, gradients and Adam's two moments, 16 bytes a parameter, and a
    frozen reference in the compute type. Several processes add up their gradients in one tensor.
    Decoding and updating take turns. Not counted: norms, fragmentation, the CUDA context.
    """
    p, c, g, size = prompt_tokens, answer_tokens, rollouts_per_prompt, element_bytes
    n_block, n_embedding, n_adapter = count_parameters(config, lora_rank)
    n_all, full = config.num_hidden_layers * n_block + n_embedding, not lora_rank
    n_trained = n_all if full else n_adapter
    in_row = max(1, min(g, (tokens_per_pass - p) // c))  # answers behind one copy of a prompt
    n_rows = max(1, min(tokens_per_pass // (p + in_row * c), prompts_per_process))
    activations, working = pass_bytes(config, [(p, [c] * in_row)] * n_rows, lora=not full,
                                      element_bytes=size, checkpointing=checkpointing)
    cache = (p + g * c) * 2 * config.num_hidden_layers * linear_shapes(config)[1][1] * size
    wave = max(1, min(prompts_per_process, int(cache_bytes // cache)))  # prompts decoded at once
    use = {
        "weights": 4 * n_all if full else size * n_all + 4 * n_adapter,
        "moments": 8 * n_trained,
        "reference": size * n_all if kl and full else 0,
        "gradients": 4 * n_trained,
        "summed": 4 * n_trained if n_processes > 1 else 0,
        "casts": size * n_all if size < 4 and full and not checkpointing else 0,  # kept by autograd
        "activations": activations,
        "working": working,
        "cache": wave * cache,
        "sampling": wave * g * config.vocab_size * (size + 24),  # probabilities in float64
    }
    resident = use["weights"] + use["moments"] + use["reference"]
    passes = use["casts"] + use["activations"] + use["working"]
    update = use["gradients"] + max(use["summed"], passes)
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


# --- The tables ------------------------------------------------------------------------------------


def plan(config, n_devices, lora_rank):
    """(bytes on a device, seconds of a step, seconds with the prompt run 8 times) on n H200."""

    sizes = STEP | {"prompts_per_process": PROMPTS_PER_STEP // n_devices, "lora_rank": lora_rank}
    first = estimate_memory(config, **sizes, n_processes=n_devices, cache_bytes=1)
    resident = sum(first[name] for name in ("weights", "moments", "reference"))
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
    print("| GB, s | " + " | ".join(f"{kind}, {n}" for kind, _, n in COLUMNS) + " |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name, numbers in QWEN3.items():
        cells = []
        for _, rank, n_devices in COLUMNS:
            peak, seconds, rows = plan(shape(numbers), n_devices, rank)
            full = "!" if peak > 0.8 * DEVICE_BYTES else ""
            cells.append(f"{peak / 1e9:.0f}{full}, {seconds:.0f} ({rows:.0f})"
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
    """Two GRPO steps of a random-weight model on forced answers: bytes, predicted and measured."""
    import torch
    import transformers

    import grouprank

    machine = grouprank.pick_machine(device, setting["precision"])
    cuda, rank, g = machine.device.type == "cuda", setting["lora_rank"], 8
    config = transformers.Qwen3Config(
        **vars(shape(setting["shape"])), max_position_embeddings=32768,
        attn_implementation="sdpa", eos_token_id=0, pad_token_id=0)  # fmt: skip
    n_prompt, n_answer = setting["prompt_tokens"], setting["answer_tokens"]
    torch.manual_seed(0)
    cfg = grouprank.Config(lora_rank=rank, max_tokens_per_pass=32768,
                           grad_checkpointing="on" if setting["checkpointing"] else "off")
    torch.ones(64, 64, device=machine.device) @ torch.ones(64, 64, device=machine.device)  # libraries load
    before = torch.cuda.memory_allocated() if cuda else resident_bytes("VmRSS")
    with torch.device(machine.device):
        dtype = machine.dtype if rank else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    grouprank.share_prompts(model)
    grouprank.set_up_training(model, cfg, machine)
    policy = grouprank.Policy(model, functools.partial(machine.autocast, cache=False))
    reference, optimizer = grouprank.make_reference(policy, machine), grouprank.Optimizer(model, machine)
    draw = lambda n: torch.randint(3, config.vocab_size, (n,)).tolist()  # noqa: E731
    item = grouprank.Item("p", draw(n_prompt), (0.0,), None)
    answers, rewards = [grouprank.Sampled(draw(n_answer)) for _ in range(g)], itertools.cycle(range(g))
    for _ in range(2):  # the moments exist after the first
        grouprank.grpo_step(
            policy, reference, optimizer, lambda *_: [answers],
            lambda *_: grouprank.Reward(next(rewards), "ok"), lambda costs: [0], [item], None, 1e-6, cfg)
    after = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    sizes = {"prompt_tokens": n_prompt, "answer_tokens": n_answer, "lora_rank": rank,
             "checkpointing": setting["checkpointing"], "element_bytes": machine.dtype.itemsize}
    estimate = estimate_memory(config, prompts_per_process=1, **sizes)
    return estimate | {"measured": after - before}


def settings(device, small):
    """What is checked: LoRA and full, with checkpointing and without, two lengths."""
    cuda = device == "cuda"
    lengths = ((8192, 512), (16384, 1024)) if cuda else ((1024, 64), (2048, 128))
    kinds = itertools.product(("bf16",) if cuda else ("fp32", "bf16"), (32, 0), (False, True), lengths)
    chosen = [{"precision": precision, "lora_rank": rank, "checkpointing": on, "prompt_tokens": n_prompt,
               "answer_tokens": n_answer, "shape": QWEN3["1.7B"] if cuda else SMALL}
              for precision, rank, on, (n_prompt, n_answer) in kinds
              if cuda or precision == "fp32" or (n_prompt == 1024 and rank)]  # fmt: skip
    return [chosen[0] | {"shape": TINY, "answer_tokens": 16}] if small else chosen


def measure_apart(device, setting):
    """`measure` in a process of its own, whose peak is that of the setting alone."""
    command = [sys.executable, __file__, "--device", device, "--measure", json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def check(device, small):
    """Predicted and measured peak memory of updates, each in its own process unless it is small."""
    print(f"\n| check on {device} | predicted GB | measured GB | predicted / measured |\n|---|---|---|---|")
    for setting in settings(device, small):
        use = measure(device, setting) if small else measure_apart(device, setting)
        kind = (f"{'LoRA' if setting['lora_rank'] else 'full'}, {setting['precision']}"
                f"{', checkpointing' if setting['checkpointing'] else ''}")
        print(f"| {kind}, P {setting['prompt_tokens']}, C {setting['answer_tokens']}"
              f" | {use['peak'] / 1e9:.2f} | {use['measured'] / 1e9:.2f}"
              f" | {use['peak'] / use['measured']:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help="one check of a tiny model")
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.device, json.loads(args.measure))))
        return
    show_steps()
    show_queries()
    check(args.device, args.small)


if __name__ == "__main__":
    main()
