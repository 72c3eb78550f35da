"""PPO in one file, on Keel's own pieces: from arguments to optimizer, top to bottom.

    python examples/ppo_in_one_file.py
    python examples/ppo_in_one_file.py --model runs/mine/sft --prompts prompts.jsonl --reward my_reward.py:reward

Without arguments it trains the base model of the built-in world to give short, finished answers: about a minute on two
CPU cores. It prints a line a rollout and writes nothing. `keel ppo` computes the same, and adds resuming, metrics,
checks, micro-batches, adapters and bfloat16. docs/algorithms.md numbers the details that both share.

With seeds 0, 1 and 2 the mean reward rises from -0.38, -0.49 and -0.43 to 0.70, 0.48 and 0.77, at a KL of 3 to 5 nats a
reply. What the model learns is what this reward measures: short sentences with an end, most of them beside the point.

Shapes: N completions with C tokens in all, laid end to end. There is no padding, so there are no masks either.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from keel.data.chat import Chat
from keel.data.collate import epoch_order, pack_by_prompt
from keel.data.sources import read_prompts
from keel.harbor.build import SHIPPED
from keel.harbor.facts import World
from keel.harbor.prompts import TRAINING_MIX, make_prompts
from keel.model.checkpoint import frozen, load_policy, load_scalar
from keel.model.logprobs import token_logprobs
from keel.objective.kl import k1
from keel.objective.masked import whiten
from keel.objective.policy import clipped_policy_loss, clipped_value_loss, episode_scores, gae, token_rewards
from keel.recipe.sections import SamplingConfig
from keel.reward.python_ref import grades_of, load_python
from keel.rollout.sampler import make_sampler
from keel.types import Encoded, Prompt, UserError


def short_and_finished(prompt: Prompt, text: str) -> float:
    """The default reward, from -1 to 1: about eight words, and a full stop at the end."""
    words = len(text.split())
    return max(-1.0, 0.5 - abs(words - 8) / 8) + (0.5 if text.rstrip().endswith(".") else 0.0)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="folder or hub id; default: the built-in base model")
    parser.add_argument("--prompts", help="file of prompts; default: prompts of the built-in world")
    parser.add_argument("--reward", help="function (prompt, text) -> number, as file.py:name or module:name")
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--batch", type=int, default=64, help="completions per rollout")
    parser.add_argument("--minibatches", type=int, default=2, help="optimizer steps per epoch over a rollout")
    parser.add_argument("--epochs", type=int, default=1, help="passes over each rollout")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--missing-eos-penalty", type=float, default=1.0)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--lam", type=float, default=0.95)
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--value-clip", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--critic-lr", type=float, default=1e-3)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    if not 1 <= args.minibatches <= args.batch:
        parser.error("every minibatch needs a completion: raise --batch or lower --minibatches")
    return args


def main(args: argparse.Namespace) -> nn.Module:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # Three models begin at one checkpoint. The policy is trained. The reference stays what the policy was, and the KL
    # penalty measures the way from it. The critic predicts the reward that is still to come, with a new head.
    policy, tokenizer = load_policy(args.model, device=device)
    reference = frozen(load_policy(args.model, device=device)[0])
    critic = load_scalar(args.model, device=device, new_head_seed=args.seed)

    # One optimizer steps both, but each has a learning rate and, below, a gradient norm of its own.
    optimizer = torch.optim.AdamW(
        [
            {"params": list(policy.parameters()), "lr": args.lr},
            {"params": list(critic.model.parameters()), "lr": args.critic_lr},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )

    # A chat turns messages into token ids, and knows where a reply ends. A base model has no template: it is asked the
    # bare question. The sampler reads the policy's weights anew at every call.
    chat = Chat(tokenizer)
    sampling = SamplingConfig(max_new_tokens=args.max_new_tokens)
    sampler = make_sampler(policy, sampling.backend, chat.stop_ids)
    reward = load_python(args.reward) if args.reward else short_and_finished
    world = make_prompts(World(), 2000, args.seed, "train", TRAINING_MIX)
    prompts = read_prompts(args.prompts) if args.prompts else world
    prompt_ids = chat.encode_prompts([prompt.messages for prompt in prompts])
    order = [i for epoch in range(-(-args.rollouts * args.batch // len(prompts)))
             for i in epoch_order(len(prompts), args.seed, epoch)]  # fmt: skip

    for rollout in range(args.rollouts):
        # ------------------------------------------------------------------------------------------- the rollout
        # The policy as it is now answers the next prompts, and the reward function reads the answers.
        chosen = order[rollout * args.batch : (rollout + 1) * args.batch]
        replies = sampler.generate([prompt_ids[i] for i in chosen], sampling, args.seed * 1_000_003 + rollout)
        replies = [replace(r, text=chat.decode(r.ids[:-1] if r.finished else r.ids)) for r in replies]
        score_N = torch.tensor([grade.score for grade in grades_of(reward, [prompts[i] for i in chosen], replies)])

        # Prompt and reply become one sequence each. The mask marks the reply's tokens: what was chosen, and is learned.
        rows = [
            Encoded((*prompt_ids[i], *reply.ids), (False,) * len(prompt_ids[i]) + (True,) * len(reply.ids))
            for i, reply in zip(chosen, replies, strict=True)
        ]
        lengths = [len(reply.ids) for reply in replies]
        offsets = torch.tensor([0, *lengths]).cumsum(0)  # where each reply begins among all C tokens

        # All of them are measured before any step: by the policy that sampled them, the reference and the critic.
        with torch.no_grad():
            batch = pack_by_prompt(rows, device)
            old = token_logprobs(policy, batch, sampling.temperature, entropy=True)
            ref_logp_C = token_logprobs(reference, batch, sampling.temperature).logp_C.cpu()
            old_value_C = critic.values_packed(batch).cpu()
        old_logp_C = old.logp_C.cpu()

        # A token's reward is minus its share of the KL. The last token also has the score, less a penalty where the
        # reply was cut. Advantages say how much better a token was than the critic expected.
        finished_N = torch.tensor([reply.finished for reply in replies])
        kl_C = k1(old_logp_C, ref_logp_C)
        shaped_N = episode_scores(score_N, finished_N, args.missing_eos_penalty)
        reward_C = token_rewards(kl_C, shaped_N, offsets, args.kl_coef)
        advantage_C, return_C = gae(reward_C, old_value_C, offsets, args.gamma, args.lam)
        advantage_C = whiten(advantage_C)

        # ------------------------------------------------------------------------------------------- the updates
        columns = [column.split(lengths) for column in (old_logp_C, old_value_C, advantage_C, return_C)]
        for epoch in range(args.epochs):
            shuffled = epoch_order(len(rows), args.seed, rollout * args.epochs + epoch)
            for m in range(args.minibatches):
                part = shuffled[len(rows) * m // args.minibatches : len(rows) * (m + 1) // args.minibatches]
                old_logp, old_value, advantage, returns = (
                    torch.cat([column[i] for i in part]).to(device) for column in columns
                )
                batch = pack_by_prompt([rows[i] for i in part], device)

                # The policy: more of what turned out better, as long as it is near the policy that sampled it.
                logp_C = token_logprobs(policy, batch, sampling.temperature).logp_C
                policy_loss_C, _ = clipped_policy_loss(logp_C, old_logp, advantage, args.clip)
                # The critic: towards what came of it, by small steps.
                value_C = critic.values_packed(batch)
                value_loss_C, _ = clipped_value_loss(value_C, old_value, returns, args.value_clip)

                # A mean over tokens: a long reply counts for more than a short one.
                optimizer.zero_grad()
                (policy_loss_C.mean() + 0.5 * value_loss_C.mean()).backward()
                nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                nn.utils.clip_grad_norm_(critic.model.parameters(), args.max_grad_norm)
                optimizer.step()

        print(
            f"rollout {rollout:3d}   reward {score_N.mean():7.3f}   KL {kl_C.sum() / len(rows):7.3f} nats a reply   "
            f"entropy {old.entropy_C.mean():6.3f} nats a token   length {sum(lengths) / len(rows):5.1f}",
            flush=True,
        )
    return policy


if __name__ == "__main__":
    try:
        main(arguments())
    except UserError as error:
        raise SystemExit(f"{error}") from None
