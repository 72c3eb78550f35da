"""The models of a training stage: the one place where they are made, and where they would be spread over machines."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from keel.model.checkpoint import frozen, has_reward_head, load_policy, load_scalar, load_tokenizer
from keel.model.heads import ScalarModel
from keel.model.packed import compute_alike
from keel.model.shared_base import SharedBase
from keel.model.vocabulary import unreadable
from keel.precision import Precision
from keel.recipe.sections import LoraConfig
from keel.recipe.stage import TrainBase
from keel.train.context import TrainContext
from keel.train.loop import compile_as_asked
from keel.types import UserError

Policy = tuple[nn.Module, PreTrainedTokenizerBase]


def roles_of(config: TrainBase, context: TrainContext) -> Roles:
    """The maker of a stage's models: on one base where the context holds one."""
    return Roles(config, context) if context.shared is None else RolesOnOneBase(config, context, context.shared)


class Roles:
    """Makes a stage's models, each in memory by itself. New adapters are drawn from torch's global generator, so the
    order in which models are made is a part of what a seed determines."""

    def __init__(self, config: TrainBase, context: TrainContext) -> None:
        self.config, self.context = config, context

    # ----------------------------------------------------------------------------------------- what starts a pipeline

    def assistant(self, chat_template: str | None) -> Policy:
        """What SFT trains: the policy with a chat template (None: its own), whose unknown marks adapters learn too."""
        return self._policy(self.context.base_model.lora, chat_template, learn_marks=True)

    def new_reward_model(self, head_seed: int) -> ScalarModel:
        """What a reward stage trains: a reward model to go on with, or a language model under a new head."""
        source = self.context.source()
        return load_scalar(
            source,
            device=self.context.device,
            lora=self.context.base_model.lora,
            gradient_checkpointing=self.config.gradient_checkpointing,
            new_head_seed=None if has_reward_head(source) else head_seed,
            take_over=True,
            products=self._products,
            note=self.context.reporter.note,
        )

    # --------------------------------------------------------------------------- where log-probabilities are compared

    def policy(self) -> Policy:
        """The checkpoint at ``context.model_path``, to be trained; new adapters are without dropout."""
        model, tokenizer = self._new_policy()
        compile_as_asked(model, self.config)
        return model, tokenizer

    def reference(self, path: Path, policy: Policy) -> nn.Module:
        """A frozen model, computed as the policy is. UserError when it does not know the policy's tokens: there is then
        no KL from it."""
        reference = self._new_reference(path, policy[1])
        compute_alike(reference, policy[0])
        return reference

    def reward_model(self, path: Path) -> ScalarModel:
        """A reward model to score with."""
        return load_scalar(self.context.source(path), device=self.context.device, products=self.context.precision)

    def critic(self, path: Path | None, named: bool = False) -> ScalarModel:
        """A model with the policy's vocabulary, to be trained: its head comes along where it has one, else a new one is
        put on. None: the policy under a new head. So it is where a reward model reads other tokens than the policy,
        unless the recipe has ``named`` it: that is a UserError."""
        policy_tokens = load_tokenizer(self.context.source()).get_vocab().items()
        if path is not None and not policy_tokens <= load_tokenizer(self.context.source(path)).get_vocab().items():
            if named:
                raise UserError(
                    f"{self.config.name}: the critic {path} has another tokenizer than the policy, so it cannot value "
                    f"the policy's tokens; leave critic out or set it to {self.config.model}"
                )
            note = f"{self.config.name}: {path} reads other tokens; the critic begins as the policy"
            self.context.reporter.note(note)
            path = None
        return self._new_critic(None if path == self.context.model_path else path)

    # ---------------------------------------------------------------------------------------- each by itself in memory

    def _new_policy(self) -> Policy:
        return self._policy(self._lora)

    def _new_reference(self, path: Path, policy_tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        source = self.context.source(path)
        model, tokenizer = load_policy(source, device=self.context.device, products=self.context.precision)
        problem = unreadable(model, tokenizer, policy_tokenizer)
        if problem is not None:
            raise UserError(
                f"{self.config.name}.reference ({path}): it cannot read what the policy writes: {problem}; leave "
                "reference out, or name a model with the policy's tokens"
            )
        return frozen(model)

    def _new_critic(self, path: Path | None) -> ScalarModel:
        source = self.context.source(path)
        return load_scalar(
            source,
            device=self.context.device,
            lora=self._lora,
            gradient_checkpointing=self.config.gradient_checkpointing,
            new_head_seed=None if has_reward_head(source) else self.context.seed,
            products=self._products,
        )

    def _policy(self, lora: LoraConfig | None, chat_template: str | None = None, learn_marks: bool = False) -> Policy:
        return load_policy(
            self.context.source(),
            device=self.context.device,
            chat_template=chat_template,
            learn_marks=learn_marks,
            lora=lora,
            gradient_checkpointing=self.config.gradient_checkpointing,
            products=self._products,
            note=self.context.reporter.note,
        )

    @property
    def _lora(self) -> LoraConfig | None:
        """The recipe's adapters without dropout, for stages that compare log-probabilities of models."""
        return self.context.base_model.lora and self.context.base_model.lora.whole()

    @property
    def _products(self) -> Precision | None:
        """``products`` of ``load_policy`` for what the stage trains: nothing of the model itself with adapters."""
        return self.context.precision if self.context.base_model.lora else None


class RolesOnOneBase(Roles):
    """Makes a stage's models as adapters and heads on one frozen model. The recipe's rules have seen to it that the
    reference is that model, and that reward models were trained on it."""

    def __init__(self, config: TrainBase, context: TrainContext, base: SharedBase) -> None:
        super().__init__(config, context)
        self.base = base

    def reward_model(self, path: Path) -> ScalarModel:
        return self.base.reward_model(path)

    def _new_policy(self) -> Policy:
        return self.base.policy(self.config.gradient_checkpointing)

    def _new_reference(self, path: Path, policy_tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        return self.base.reference()

    def _new_critic(self, path: Path | None) -> ScalarModel:
        checkpointing = self.config.gradient_checkpointing
        if path is None:
            return self.base.new_critic(self.context.seed, checkpointing)
        return self.base.reward_model(path, checkpointing)
