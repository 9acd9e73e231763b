"""Settings of stage 2: making the codes, and training the prior over them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from configs import TrainingConfig, unknown_key
from configs.sections import Fraction, Positive
from stage1_vqgan import DataConfig

# Decided by the code store, not by the user.
DERIVED_KEYS = {"vocab_size", "max_position_embeddings", "n_positions", "bos_token_id", "eos_token_id", "pad_token_id"}


@dataclass(kw_only=True)
class Stage2Config(TrainingConfig):
    """Stage 2: makes codes (stage2_prior.tokenize) and trains a prior over them (stage2_prior.train).

    tokenizer: folder or Hub id of a trained tokenizer
    code_store: folder of the codes
    num_views: versions of every training image in the store: the image itself, the others augmented
    tokenize_batch_size: images on one device in one forward of the tokenizer
    output_dir: folder of the run: checkpoints, logs, and at the end the trained prior itself
    model_name_or_path: fine-tunes the prior in this folder (an output_dir of stage 2) or Hub repository; classes that
        it does not know by name are learnt anew
    model: `model_type` of a causal language model in transformers, and fields of its configuration
    condition_dropout: share of training sequences with the null token in place of the class, for guidance
    training_arguments: any other field of transformers.TrainingArguments

    The other keys are those of transformers.TrainingArguments.
    """

    tokenizer: str
    data: DataConfig
    code_store: str
    num_views: Positive = 1
    tokenize_batch_size: Positive = 128
    model_name_or_path: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    condition_dropout: Fraction = 0.1
    training_arguments: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from super().problems()
        yield from self._model_problems()
        from transformers import TrainingArguments

        own = set(TrainingConfig.__dataclass_fields__)
        allowed = set(TrainingArguments.__dataclass_fields__) - own
        for key, value in self.training_arguments.items():
            if key in own:
                yield f"training_arguments.{key}", value, f"is a key of its own; write {key} at the top level"
            elif key not in allowed:
                yield f"training_arguments.{key}", value, unknown_key(key, allowed)

    def _model_problems(self) -> Iterable[tuple[str, Any, str]]:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        if self.model_name_or_path is not None:  # the prior has an architecture, and is asked for it
            return
        known = sorted(config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING)
        model_type = self.model.get("model_type")
        if model_type not in known:
            yield "model.model_type", model_type, unknown_key(str(model_type), known).replace("key", "model type")
            return
        config_class = type(AutoConfig.for_model(model_type))
        allowed = {*config_class.__dataclass_fields__, *config_class.attribute_map, "model_type"} - DERIVED_KEYS
        for key, value in self.model.items():
            if key in DERIVED_KEYS:
                yield f"model.{key}", value, "is decided by the code store; leave it out"
            elif key not in allowed:
                yield f"model.{key}", value, unknown_key(key, allowed)
        if self.model.keys() <= allowed:
            try:
                AutoConfig.for_model(**self.model)
            except Exception as error:  # each configuration class checks in its own way
                yield "model", None, " ".join(str(error.__cause__ or error).split())
