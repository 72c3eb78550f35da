"""The recipe's sections: model, data, optimiser, sampling, logging."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    # Built at first use: a help page reads the fields alone. No setting means anything as infinity or NaN.
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), defer_build=True, allow_inf_nan=False
    )


Weights = Literal["auto", "fp32", "bf16", "nf4"]


SaveAs = Literal["auto", "fp32", "bf16"]


Checkpointing = bool | Literal["selective", "offload"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint is read from: a folder or a hub id, of which ``revision`` may be named. One that brings Python
    code of its own is loaded with ``trust_remote_code`` alone. ``weights``, ``save_as``: see ``ModelConfig``."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    weights: Weights = "auto"
    save_as: SaveAs = "auto"

    @staticmethod
    def of(place: str | Path | Source) -> Source:
        """A place alone means: no revision, no code."""
        return place if isinstance(place, Source) else Source(str(place))


class LoraConfig(Strict):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="in the losses of sft and reward stages; dpo, ppo and grpo compare models and have 0",
    )
    targets: list[str] | Literal["all-linear"] = "all-linear"
    rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank) instead of alpha / rank, so that high ranks learn as fast"
    )
    dora: bool = Field(False, description="train the length of each output's weights beside their direction (DoRA)")
    merged: bool = Field(
        True,
        description="write the whole model with the adapters merged in, beside STAGE/adapter/; false: that folder "
        "alone, which later stages read together with its base",
    )

    # As `keel.recipe.stage.StageBase.later`.
    later: ClassVar[frozenset[str]] = frozenset({"rslora", "dora", "merged"})

    def whole(self) -> LoraConfig:
        """Without dropout: where log-probabilities of policy, old policy and reference must be of one model."""
        return self.model_copy(update={"dropout": 0.0})


class ModelConfig(Strict):
    path: str = Field(description="folder or hub id of a transformers causal LM")
    revision: str | None = Field(None, description="of a hub model: a branch, tag or commit")
    chat_template: str | None = Field(
        None,
        description="a Jinja file, one of Keel's built-in names (keel, chatml), or of several that the tokenizer has "
        "one's name; default: the model's own, else keel",
    )
    lora: LoraConfig | None = None
    trust_remote_code: bool = Field(
        False,
        description="run the Python code that the recipe's models and tokenizers bring; read it first",
    )
    weights: Weights = Field(
        "auto",
        description="how matrices that a stage does not train lie in memory (the base below adapters, references, "
        "reward models, models that only sample). auto: in bfloat16 where the checkpoint is, products are, and the "
        "device is a GPU; bf16: wherever products are, whatever the checkpoint is in, experts too (auto leaves "
        "them in float32, in which autocast computes them); fp32: never; nf4: linear layers in four bits (QLoRA, an "
        "extra), all else as auto, with lora. Trained ones are float32",
    )
    save_as: SaveAs = Field(
        "auto", description="precision of the checkpoints that stages write; auto: that of the one they start from"
    )

    @model_validator(mode="after")
    def _four_bits_fit(self) -> ModelConfig:
        if self.weights == "nf4" and (self.lora is None or self.lora.dora):
            raise ValueError(
                "weights: nf4 holds what lies below plain adapters in four bits, and a model trained whole would begin "
                "as another than its reference; set model.lora, without dora, or leave weights out"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """What results depend on, as JSON has it: settings that came later are left out at their defaults, so that
        runs made before still stand."""
        settings = self.model_dump(mode="json")
        if self.lora is not None:
            fields = LoraConfig.model_fields
            same = {name for name in LoraConfig.later if getattr(self.lora, name) == fields[name].default}
            settings["lora"] = self.lora.model_dump(mode="json", exclude=same)
        return settings

    def source(self, path: str | Path | None = None) -> Source:
        """Where the model is read from, or a checkpoint of another ``path`` that the recipe names, which may be
        ``hub:owner/name``."""
        own = path is None or str(path) == self.path
        return Source(
            self.path if own else str(path).removeprefix("hub:"),
            self.revision if own else None,
            self.trust_remote_code,
            self.weights,
            self.save_as,
        )


class DataConfig(Strict):
    """Files (JSONL, JSON, CSV, Parquet), folders of them, or hub ids (``hub:owner/name:split``,
    ``hub:owner/name:config:split``)."""

    demonstrations: str | None = None
    prompts: str | None = Field(None, description="prompts to sample from and to run PPO or GRPO on")
    preferences: str | None = None
    heldout_prompts: str | None = Field(None, description="evaluation prompts; default: split off by prompt")
    heldout_fraction: float = Field(0.1, gt=0, lt=0.9)
    pretraining: str | None = Field(None, description="plain text rows such as the base model learned from (ptx)")
    base_text: str | None = Field(None, description="plain text rows: what the base model's loss is measured on")
    facts: str | None = Field(None, description="multiple-choice rows prompt+choices+answer: capability kept")
    max_length: int = Field(1024, ge=8, description="tokens of prompt and completion together")
    max_prompt_length: int = Field(
        512, ge=4, description="longer prompts are an error, or left out with over_length: skip"
    )
    over_length: Literal["error", "skip"] = "error"
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="skip: rows that cannot be read are left out, counted, and listed in bad_rows.jsonl"
    )


class OptimConfig(Strict):
    kind: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: moments in 8 bits (an extra)")
    lr: float = Field(1e-5, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(1e-8, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.05, ge=0, description="share of the steps when below 1, else steps")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: float = Field(0.1, ge=0, le=1, description="end of the schedule as a share of lr")
    max_grad_norm: float = Field(1.0, gt=0)
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="the checkpoint is the mean of the weights over this last share of the run; 0: the last weights",
    )


Backend = Literal["auto", "embedded", "transformers", "vllm"]


class SamplingConfig(Strict):
    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="0 is off")
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    max_new_tokens: int = Field(256, ge=1)
    stop: list[str] = Field(default_factory=list, description="stop tokens besides the model's end tokens")
    batch_size: int = Field(128, ge=1, description="sequences decoded together")
    backend: Backend = "auto"

    def at_one(self) -> SamplingConfig:
        """The same from the model itself: temperature 1, no token left out."""
        return self.model_copy(update={"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})


class LoggingConfig(Strict):
    tensorboard: bool = True
    wandb_project: str | None = Field(None, description="of Weights & Biases (an extra)")
    trackio_project: str | None = Field(None, description="of trackio (an extra), in a file on this machine")
    mlflow_experiment: str | None = Field(
        None, description="of MLflow (an extra), on the server that MLFLOW_TRACKING_URI names"
    )
