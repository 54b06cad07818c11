"""Write tests/golden_trl.json: losses, gradients and advantages of TRL's GRPOTrainer.

    pip install -r requirements-bench.txt && python tests/make_golden_trl.py

Each loss case feeds log-probabilities of our choice to GRPOTrainer._compute_loss in place of a
model's and records the loss and its gradient. Each advantage case lets the trainer normalise given
rewards. The settings are those that make TRL's loss the paper's (Eq. 7).
"""

import json
import tempfile
from pathlib import Path

import torch
import trl
from conftest import byte_tokenizer, tiny_model
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

FILE = Path(__file__).with_name("golden_trl.json")
LENGTHS = [[3, 5, 1, 4], [2, 2, 6, 1]]  # tokens of each answer; the longest is the padded width
ADVANTAGES = [[1.2, -0.7, 0.0, -0.5], [-1.5, 0.9, 0.4, 0.2]]
REWARDS = [[0.1, 0.9, 0.4, 1.3], [1.0, 1.0, 1.0, 1.0], [-0.5, -0.5, -0.1, 1.2999],
           [0.7, 0.7, 0.7, 0.70001]]


def make_trainer(kl_coef: float, clip_eps: float, rewards=None, n_answers: int = 4):
    """A GRPOTrainer around a tiny model that is never asked."""
    tokenizer = byte_tokenizer(["a b c"])
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type="grpo", beta=0.0, epsilon=clip_eps,
        num_iterations=1, scale_rewards="group", importance_sampling_level="token",
        use_bias_correction_kl=False, temperature=1.0, top_p=1.0, top_k=0,
        num_generations=n_answers, per_device_train_batch_size=n_answers,
        gradient_accumulation_steps=1, mask_truncated_completions=False, disable_dropout=True,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)

    def forced(prompts, trainer):
        ids = [[5, 6, 7]] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": ids, "logprobs": None}

    trainer = GRPOTrainer(
        model=tiny_model(), args=config, processing_class=tokenizer, rollout_func=forced,
        reward_funcs=lambda completions, **_: rewards,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4))
    trainer.beta = kl_coef  # set here, because TRL would load a reference model for it
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def padded(rows):
    """Lists of numbers as a rectangle, padded on the right with zeros, and its mask."""
    width = max(map(len, rows))
    values = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])
    return values, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def loss_case(seed: int, spread: float, kl_coef: float, clip_eps: float, on_policy: bool) -> dict:
    """One case: ratios as far apart as `spread` says, on or off the policy."""
    random = torch.Generator().manual_seed(seed)
    lengths, advantages = LENGTHS[seed % 2], ADVANTAGES[seed % 2]

    def draw(scale, around=None):
        rows = [(scale * torch.randn(n, generator=random)) for n in lengths]
        return rows if around is None else [a + r for a, r in zip(around, rows, strict=True)]

    logp = [-row.abs() - 0.05 for row in draw(1.0)]
    old = logp if on_policy else draw(spread, logp)
    ref = draw(0.5, logp)
    leaf, mask = padded([row.tolist() for row in logp])
    leaf.requires_grad_(True)
    trainer = make_trainer(kl_coef, clip_eps)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (leaf, leaf.detach().abs(), None)
    ids = torch.ones_like(mask)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
              "completion_mask": mask, "advantages": torch.tensor(advantages),
              "ref_per_token_logps": padded([row.tolist() for row in ref])[0]}
    if not on_policy:
        inputs["old_per_token_logps"] = padded([row.tolist() for row in old])[0]
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metric = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return {"kl_coef": kl_coef, "clip_eps": clip_eps, "on_policy": on_policy,
            "advantages": advantages, "logp": [row.tolist() for row in logp],
            "old_logp": [row.tolist() for row in old], "ref_logp": [row.tolist() for row in ref],
            "loss": loss.item(), "clip_share": metric["clip_ratio/region_mean"],
            "gradient": [g[:n].tolist() for g, n in zip(leaf.grad, lengths, strict=True)]}


def advantage_case(rewards: list[float]) -> dict:
    """The advantages that TRL computes for the rewards of one prompt."""
    trainer = make_trainer(0.0, 0.2, rewards, len(rewards))
    batch = trainer._generate_and_score_completions([{"prompt": "a"}] * len(rewards))
    return {"rewards": rewards, "advantages": batch["advantages"].tolist()}


def main():
    """Write the file."""
    losses = [loss_case(seed, spread, kl_coef, 0.2, on_policy)
              for seed, (spread, kl_coef, on_policy) in enumerate(
                  [(0.0, 0.0, True), (0.0, 0.001, True), (0.0, 0.5, True), (0.05, 0.0, False),
                   (0.5, 0.0, False), (0.5, 0.001, False), (0.5, 0.5, False), (1.5, 0.04, False)])]
    golden = {"losses": losses,
              "advantages": [advantage_case(rewards) for rewards in REWARDS]}
    parts = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, golden[name])) + "\n]"
                       for name in ("losses", "advantages"))
    FILE.write_text(f'{{"trl": "{trl.__version__}",\n{parts}}}\n', encoding="utf-8")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
