"""Settings of stage 2: writing the codes, and training the prior on them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, get_args

from annotated_types import Ge, Le, Lt

from configs import Section, TrainingConfig, unknown_key
from configs.problems import one_line
from configs.sections import (
    LAUNCHED_WITH,
    MOST_PICTURES,
    BatchSize,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)
from configs.values import read_value
from stage1_vqgan import AugmentationConfig, DataConfig
from stage2_prior.training.condition_config import ConditionConfig, name_problem
from stage2_prior.training.contrastive_config import ContrastiveConfig, contrastive_problems

# Arguments of Trainer that would break complete checkpoints, exact resume or reproducible batches, or that have no
# effect here.
REFUSED_ARGUMENTS = {
    "auto_find_batch_size",
    "data_seed",
    "dataloader_drop_last",
    "deepspeed",
    "do_eval",
    "do_predict",
    "do_train",
    "enable_jit_checkpoint",
    "eval_on_start",
    "greater_is_better",
    "ignore_data_skip",
    "label_names",
    "load_best_model_at_end",
    "local_rank",
    "metric_for_best_model",
    "num_train_epochs",
    "restore_callback_states_from_checkpoint",
    "save_on_each_node",
    "save_only_model",
    "save_strategy",
    "train_sampling_strategy",
}

# Types of arguments for which TrainingArguments states a wider type, and fails later.
LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
NARROWER_TYPES = {
    "activation_checkpointing_kwargs": dict[str, Any] | None,
    "adam_epsilon": PositiveFloat,
    "ddp_bucket_cap_mb": Positive | None,
    "ddp_timeout": Positive,
    "eval_accumulation_steps": Positive | None,
    "eval_delay": NonNegativeFloat,
    "gradient_checkpointing_kwargs": dict[str, Any] | None,
    "label_smoothing_factor": Annotated[float, Ge(0), Lt(1)],
    "log_level": LogLevel,
    "log_level_replica": LogLevel,
    "lr_scheduler_kwargs": dict[str, Any] | None,
    "neftune_noise_alpha": NonNegativeFloat | None,
    "torch_compile_mode": Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None,
    "torch_empty_cache_steps": Positive | None,
}

# Fields that the code store determines.
DERIVED_KEYS = {
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
    "bos_token_id",
    "cls_token_id",
    "eos_token_id",
    "mask_token_id",
    "pad_token_id",
    "sep_token_id",
}

# Sizes of a language model. An architecture with other names for them lists these names in its `attribute_map`.
# A size is at most the number beside it, far above any model: a configuration class makes a list of all layers.
SIZES = {
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
}


NO_PEFT = "peft is not installed: pip install 'tessella[lora]'"


@dataclass(kw_only=True)
class LoraConfig(Section):
    """LoRA: trains and saves a low-rank adapter instead of all weights.

    r: rank of the adapter, 8 is usual; 0 trains all weights
    alpha: scale of the adapter's output, which is alpha / r
    dropout: dropout probability of the adapter's input
    target_modules: modules with an adapter: "all-linear", a list of names, or a regular expression, as in peft
    """

    r: Annotated[int, Ge(0), Le(8192)] = 0
    alpha: Positive = 16
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | list[str] = "all-linear"

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.r and find_spec("peft") is None:
            yield "r", self.r, NO_PEFT
        if isinstance(self.target_modules, str) and not _is_pattern(self.target_modules):
            yield "target_modules", self.target_modules, "this is no regular expression"
        if not self.r and self != LoraConfig():
            yield "r", self.r, "no adapter is trained; set it (8 is usual), or leave the other keys of lora out"


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


# The usual architectures of each family, for messages.
USUAL = {"causal": "llama or gpt2, for instance", "masked": "modernbert or bert, for instance"}


@dataclass(kw_only=True)
class Stage2Config(TrainingConfig):
    """Stage 2: writes the codes of all images, and trains a prior on them.

    tokenizer: folder or Hub id of a trained tokenizer
    image_size: side in pixels of the images that become codes, or [height, width]; by default that of the tokenizer.
        The prior then learns a grid of another size, and the pipeline generates images of this size
    code_store: folder of the codes
    num_views: number of views of each training image in the code store: the image itself and augmented views, or the
        ten views of data.augmentation.ten_crop
    tokenize_batch_size: images on one device in one forward pass of the tokenizer
    model_name_or_path: fine-tunes the prior in this folder (an output_dir of stage 2) or Hub repository; classes with
        new names get new embeddings. Or starts from a causal language model of transformers, whose tokenizer must be
        that of a text in conditions
    prior: "causal", which predicts each code from the codes before it, or "masked", which predicts hidden codes from
        all others (MaskGIT) and samples an image in a few steps
    model: `model_type` of a causal or masked language model in transformers, such as llama or modernbert, and fields of
        its configuration, such as hidden_size, intermediate_size, num_hidden_layers, num_attention_heads and
        attention_dropout
    lora: trains an adapter of the prior in model_name_or_path; see lora.r
    cca: fine-tunes the prior in model_name_or_path to sample without guidance; see cca.beta
    condition_dropout: fraction of training sequences in which null tokens replace the class and all conditions, for
        guidance
    token_dropout: dropout probability of the token embeddings, of conditions and codes, in training; LlamaGen has 0.1.
        The embedding dropout of GPT-2 (embd_pdrop) and of BERT (hidden_dropout_prob) in model comes on top
    conditions: conditions beside the class, by name: {text: {column: caption, kind: text}}; see conditions.NAME
    keep_best: save the weights of the evaluation with the lowest loss; false saves the last weights
    early_stopping_patience: training ends after this many evaluations in a row without a lower loss; 0 turns this off
    num_sample_images: number of images that every evaluation samples for a grid; 0 samples none, and needs no tokenizer
    training_arguments: any other field of transformers.TrainingArguments

    stage2_prior.tokenize reads the first five of these keys, conditions, data, seed and dataloader_num_workers.
    """

    preset: ClassVar[str] = "stage2"
    fields_of: ClassVar[dict[str, type]] = {"conditions.NAME": ConditionConfig}

    tokenizer: str
    data: DataConfig
    image_size: Positive | list[Positive] | None = None
    code_store: str
    num_views: Annotated[int, Ge(1), Le(10_000)] = 1
    tokenize_batch_size: BatchSize = 128
    model_name_or_path: str | None = None
    prior: Literal["causal", "masked"] = "causal"
    model: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)
    cca: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    condition_dropout: Fraction = 0.1
    token_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    conditions: dict[str, ConditionConfig] = field(default_factory=dict)
    keep_best: bool = True
    early_stopping_patience: NonNegative = 0
    num_sample_images: Annotated[int, Ge(0), MOST_PICTURES] = 40
    training_arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def image_shape(self) -> list[int] | None:
        """[H, W] of `image_size`; None if it is that of the tokenizer."""
        size = self.image_size
        return [size, size] if isinstance(size, int) else size

    @property
    def mixed_precision(self) -> str:
        """The value for `accelerate launch --mixed_precision`."""
        return "fp16" if self.training_arguments.get("fp16") is True else super().mixed_precision

    @property
    def segment_dropout(self) -> dict[str, float]:
        """The dropout of each condition that has one of its own."""
        return {name: condition.dropout for name, condition in self.conditions.items() if condition.dropout}

    def settle(self) -> None:
        super().settle()
        for condition in self.conditions.values():
            condition.settle()

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from super().problems()
        yield from ((f"conditions.{n}", None, problem) for n in self.conditions if (problem := name_problem(n)))
        for name, condition in self.conditions.items() if self.data.dataset == "digits" else ():
            if condition.column is not None:
                yield f"conditions.{name}.column", condition.column, "'digits' has no columns; use a transform"
        if LAUNCHED_WITH["USE_DEEPSPEED"] == "true":
            reason = "its checkpoints are pickles that can run code when a run resumes"
            allowed = (
                f"stage 2 was launched with DEEPSPEED, but {reason}; shard with FSDP 2 (configs/accelerate/fsdp.yaml)"
            )
            yield "", None, allowed
        if self.num_views > 1 and self.data.augmentation == AugmentationConfig():
            yield "num_views", self.num_views, "without data.augmentation all views are the same; turn one on, or set 1"
        if self.data.augmentation.ten_crop and self.num_views != 10:
            yield "num_views", self.num_views, "data.augmentation.ten_crop makes 10 views; set it to 10"
        if self.lora.r and self.model_name_or_path is None:
            yield "lora.r", self.lora.r, "needs model_name_or_path, the trained prior to adapt"
        yield from contrastive_problems(self)
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            yield "image_size", self.image_size, "must be the side of a square, or [height, width]"
        if self.bf16 and self.training_arguments.get("fp16") is True:
            yield "training_arguments.fp16", True, "but bf16 is true as well; turn one of them off"

    def library_problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from super().library_problems()
        yield from self._model_problems()
        if self.training_arguments:
            yield from self._argument_problems()

    def _argument_problems(self) -> Iterable[tuple[str, Any, str]]:
        from transformers import TrainingArguments

        own = set(TrainingConfig.__dataclass_fields__)
        types = {field.name: field.type for field in fields(TrainingArguments) if field.name not in own}
        for name, value in self.training_arguments.items():
            key = f"training_arguments.{name}"
            if name in own:
                yield key, value, f"it is not part of training_arguments; write {name} at the top level"
            elif name in REFUSED_ARGUMENTS:
                yield key, value, "it would break saving or resuming, or has no effect; leave it out"
            elif name not in types:
                yield key, None, unknown_key(name, types)
            else:
                yield from wrong_value(key, NARROWER_TYPES.get(name, types[name]), value)

    def _model_problems(self) -> Iterable[tuple[str, Any, str]]:
        from huggingface_hub.errors import StrictDataclassFieldValidationError
        from transformers import AutoConfig, PreTrainedConfig

        if self.model_name_or_path is not None:  # The saved prior has its own architecture.
            return
        model_type: Any = self.model.get("model_type")
        if known := _other_model_types(model_type, self.prior):
            kind = f"{self.prior} language model of transformers"
            advice = f"with prior {self.prior}, choose {USUAL[self.prior]}"
            yield (
                "model.model_type",
                model_type,
                f"{unknown_key(str(model_type), known).replace('key', kind)}; {advice}",
            )
            return
        config_class = type(AutoConfig.for_model(model_type))
        types = {field.name: field.type for field in fields(config_class)}
        aliases = {alias: name for alias, name in config_class.attribute_map.items() if name in types}
        problems: list[tuple[str, Any, str]] = []
        settings = {}
        for key, value in self.model.items():
            name = aliases.get(key, key)
            settings[name] = key, value
            if key in DERIVED_KEYS:
                problems.append((f"model.{key}", value, "the code store determines it; leave it out"))
            elif name in types:
                problems += wrong_value(f"model.{key}", types[name], value)
            elif key != "model_type":
                common = {field.name for field in fields(PreTrainedConfig)}
                problems.append((f"model.{key}", None, unknown_key(key, {*types, *aliases} - common - DERIVED_KEYS)))
        problems = problems or list(self._shape_problems(config_class, settings))
        if not problems:
            try:
                AutoConfig.for_model(**self.model)
            except StrictDataclassFieldValidationError as error:
                name = re.sub(r".*for field '(\w+)'.*", r"\1", str(error), flags=re.DOTALL)
                key, value = settings.get(name, (name, None))
                problems.append((f"model.{key}", value, f"not a value that {model_type} takes here"))
            except Exception as error:  # Each configuration class raises its own kind of error.
                reason = one_line(error.__cause__ or error, 180)
                problems.append(("model", None, f"{model_type} cannot have these settings: {reason}"))
        yield from problems

    @staticmethod
    def _shape_problems(config_class: type, settings: dict[str, tuple[str, Any]]) -> Iterable[tuple[str, Any, str]]:
        """Problems of sizes in any architecture; `settings` is `{field: (key in the configuration, value)}`."""
        from transformers.activations import ACT2FN

        names = {name: config_class.attribute_map.get(name, name) for name in SIZES}  # type: ignore[attr-defined]
        defaults = {field.name: field.default for field in fields(config_class)}  # type: ignore[arg-type]
        given = {name: settings[field] for name, field in names.items() if field in settings}
        sizes = {name: given[name][1] if name in given else defaults.get(field) for name, field in names.items()}
        absurd = [
            (key, value, SIZES[name])
            for name, (key, value) in given.items()
            if isinstance(value, int) and not 1 <= value <= SIZES[name]
        ]
        for key, value, most in absurd:
            yield f"model.{key}", value, f"must be from 1 to {most}"
        for name in settings.keys() & {"hidden_act", "activation_function"}:
            key, value = settings[name]
            if value not in ACT2FN:
                yield f"model.{key}", value, unknown_key(value, ACT2FN).replace("key", "activation")
        if absurd:
            return
        width, heads, groups = (sizes[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        if isinstance(width, int) and isinstance(heads, int) and sizes["head_dim"] is None and width % heads:
            key = given.get("hidden_size", ("hidden_size",))[0]
            yield f"model.{key}", width, f"must be a multiple of the {heads} attention heads (num_attention_heads)"
        if isinstance(heads, int) and isinstance(groups, int) and "num_key_value_heads" in given and heads % groups:
            yield f"model.{given['num_key_value_heads'][0]}", groups, f"must divide num_attention_heads ({heads})"


def _other_model_types(model_type: Any, family: str) -> list[str]:
    """The architectures of a family, if `model_type` is none of them; else nothing."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
    from transformers.models.auto import modeling_auto

    names = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    if model_type in list(names[family]):
        return []
    # with those that the caller has registered; this imports every architecture, which takes seconds
    mapping = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING, "masked": MODEL_FOR_MASKED_LM_MAPPING}[family]
    known = sorted(config.model_type for config in mapping)
    return [] if model_type in known else known


def wrong_value(key: str, hint: Any, value: Any) -> Iterable[tuple[str, Any, str]]:
    """The problem of a value that does not fit a type of transformers. Skips types that pydantic cannot check."""
    from pydantic import PydanticUserError

    enums = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    if enums:  # Their hints also allow `str`, but only the values of the Enum work.
        hint = Literal[tuple(member.value for kind in enums for member in kind)]
    try:
        read_value(hint, value, strict=True)
    except ValueError as error:
        yield key, None, str(error)
    except (NameError, PydanticUserError):
        return
