"""Malformed configurations of every command: each ends in a message that a user can act on."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from string import Template

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version

from configs import ConfigError, load_config, parse_arguments, run
from configs.sections import LAUNCHED_WITH
from pipelines.build import BuildConfig, build
from pipelines.evaluate import EvaluationConfig as PipelineEvaluation, evaluate as evaluate_pipeline
from stage1_vqgan import Stage1Config, VQGANConfig, VQGANModel
from stage1_vqgan.evaluate import ReconstructionConfig, evaluate as evaluate_tokenizer
from stage1_vqgan.training.run import train as train_tokenizer
from stage2_prior import Stage2Config
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_prior

COMMANDS = {
    "stage1": (Stage1Config, train_tokenizer, "digits/stage1 --output_dir run"),
    "tokenize": (Stage2Config, tokenize, "digits/stage2 --tokenizer $vqgan --code_store codes --output_dir run"),
    "stage2": (
        Stage2Config,
        train_prior,
        "digits/stage2 --tokenizer $vqgan --code_store $codes --output_dir run --report_to [] --num_views 2 "
        "--data.augmentation='{rotate: 10, translate: 0.06, scale: 0.1}'",
    ),
    "build": (BuildConfig, build, "--tokenizer $vqgan --prior $prior --output_dir out"),
    "evaluate": (PipelineEvaluation, evaluate_pipeline, "--pipeline $pipeline --data.dataset digits --output_dir out"),
    "evaluate1": (ReconstructionConfig, evaluate_tokenizer, "--model $vqgan --data.dataset digits"),
}

# command, arguments, {key: words of its message}. The arguments follow the valid ones, or replace them if the first
# argument is the name of a file.
CASES = {
    # ------------------------------------------------------------------ command line
    "no value": ("stage1", "--max_steps", {"max_steps": "no value given; write --max_steps VALUE"}),
    "no key": ("stage1", "-- 3", {"": "'--' names no key; write --key VALUE"}),
    "no key, with =": ("stage1", "--=3", {"": "'--=3' names no key; write --key VALUE"}),
    "two configs": ("stage1", "--seed 1 digits/stage2", {"": "'digits/stage2' follows no --key"}),
    "one dash": ("stage1", "-max_steps=3", {"": "'-max_steps=3' follows no --key"}),
    "value is not YAML": (
        "stage1",
        "--model.channel_multiplier [1,",
        {"model.channel_multiplier": "before a bracket"},
    ),
    "key of a value": ("stage1", "--max_steps.rate 3", {"max_steps": "received 300; a single value has no key"}),
    "argument and config": (
        "stage1",
        "--max_steps --learning_rate fast --ema_decay 2 --loss.discriminator_start_step 200",
        {
            "max_steps": "no value",
            "learning_rate": "received 'fast'; must be a number above 0",
            "ema_decay": "received 2; must be a number at least 0 and below 1",
            "loss.adversarial_start_step": "received 99; must be at least discriminator_start_step (200)",
        },
    ),
    # ------------------------------------------------------------------ files
    "unknown preset": ("stage1", "digit/stage1", {"": "did you mean the preset 'digits/stage1'?"}),
    "key without dashes": ("stage1", "max_steps=3", {"": "a key begins with two dashes: --max_steps=3"}),
    "no such file": ("stage1", "nowhere.yaml", {"": "no file and no preset is called 'nowhere.yaml'"}),
    "long name": ("stage1", "$folder/" + "x" * 300, {"": "cannot be read: File name too long"}),
    "folder": (
        "stage1",
        "$folder",
        {"": "is a folder; images are a value of --data.dataset (--data of `tessella run`)"},
    ),
    "not text": ("stage1", "$folder/picture.yaml", {"": "not a text file"}),
    "control character": ("stage1", "$folder/control.yaml", {"": "line 2: a control character"}),
    "tab": ("stage1", "$folder/tab.yaml", {"": "line 2, column 1: a tab; YAML is indented by spaces"}),
    "open bracket": ("stage1", "$folder/bracket.yaml", {"": "line 2, column 5: expected ',' or ']'"}),
    "list": ("stage1", "$folder/list.yaml", {"": "holds a list; needed are lines of 'key: value'"}),
    "words": ("stage1", "$folder/words.yaml", {"": "holds 'max_steps 3'"}),
    "deep": ("stage1", "$folder/deep.yaml", {"": "nested too deeply"}),
    "python tag": ("stage1", "$folder/tag.yaml", {"": "line 1, column 7: a tag"}),
    "repeated key": (
        "stage1",
        "$folder/repeated.yaml",
        {"num_layers": "given twice, in line 4 and in line 6", "data.dataset": "required", "max_steps": "'x'"},
    ),
    "config of stage 2": ("stage1", "digits/stage2", {"": "tokenizer, code_store, num_views, condition_dropout"}),
    "config of stage 1": ("stage2", "digits/stage1", {"": "loss, discriminator"}),
    "config of an evaluation": ("tokenize", "digits/evaluate", {"": "This one is Stage 2"}),
    "empty": (
        "stage1",
        "$folder/empty.yaml",
        {"output_dir": "required", "max_steps": "required", "data.dataset": "required"},
    ),
    # ------------------------------------------------------------------ single values
    "typo": ("stage1", "--max_stpes 3", {"max_stpes": "did you mean 'max_steps'?"}),
    "typo in a section": ("stage1", "--data.augmentation.rotat 3", {"data.augmentation.rotat": "'rotate'"}),
    "nothing near": ("stage1", "--codebook.zzz 3", {"codebook.zzz": "allowed: kmeans_init_batches, restart_interval"}),
    "number for a key": ("stage1", "--3 4", {"3": "unknown key; allowed: "}),
    "number for a section": ("stage1", "--data 5", {"data": "received 5; must be a section"}),
    "list for a section": ("stage1", "--loss []", {"loss": "received []; must be a section"}),
    "null for a section": ("stage1", "--codebook null", {"codebook": "received null; must be a section"}),
    "words for the model": ("stage1", "--model hello", {"model": "received 'hello'; must be a section of keys"}),
    "null for a required key": ("stage1", "--max_steps null", {"max_steps": "received null; must be a whole number"}),
    "empty text": ("stage1", "--output_dir=", {"output_dir": "received null; must be text"}),
    "blank text": ("stage1", "--output_dir '\" \"'", {"output_dir": "must be printable text, not blank"}),
    "word for a number": (
        "stage1",
        "--max_steps many",
        {"max_steps": "received 'many'; must be a whole number from 1"},
    ),
    "fraction": ("stage1", "--max_steps 2.5", {"max_steps": "received 2.5; must be a whole number"}),
    "zero": ("stage1", "--per_device_train_batch_size 0", {"per_device_train_batch_size": "received 0"}),
    "negative": ("stage1", "--learning_rate -1e-3", {"learning_rate": "received -0.001; must be a number above 0"}),
    "enormous": ("stage1", "--max_steps 9" + "9" * 30, {"max_steps": "to 2147483647"}),
    "enormous seed": ("stage2", "--seed 4294967296", {"seed": "to 4294967295"}),
    "NaN": ("stage1", "--learning_rate .nan", {"learning_rate": "received nan; must be a finite number above 0"}),
    "infinite": ("stage1", "--weight_decay .inf", {"weight_decay": "received inf; must be a finite number from 0 up"}),
    "beyond floats": ("stage1", "--learning_rate 1e400", {"learning_rate": "must be a finite number above 0"}),
    "true for a number": ("stage1", "--max_steps true", {"max_steps": "received true; must be a whole number"}),
    "true for a rate": ("stage1", "--learning_rate true", {"learning_rate": "received true; must be a number"}),
    "word for a switch": ("stage1", "--bf16 maybe", {"bf16": "received 'maybe'; must be true or false"}),
    "blank after true": ("stage1", "--bf16 '\"true \"'", {"bf16": "received 'true '; must be true or false"}),
    "choice": (
        "stage1",
        "--lr_scheduler_type cosin",
        {"lr_scheduler_type": "'constant_with_warmup', 'linear' or 'cosine'; did you mean 'cosine'?"},
    ),
    "text for a list": ("stage1", "--report_to tensorboard", {"report_to": "write [tensorboard]"}),
    "list of lists": ("stage1", "--report_to [[1]]", {"report_to": "every entry is text"}),
    "tracker": ("stage1", "--report_to [tensorbord]", {"report_to": "no such tracker; installed: tensorboard"}),
    "optional": (
        "stage1",
        "--discriminator.learning_rate low",
        {"discriminator.learning_rate": "must be a number above 0 or null"},
    ),
    "true in a list of numbers": (
        "stage1",
        "--model.channel_multiplier [1,true] --model.attn_resolutions [true]",
        {"model.channel_multiplier": "every entry is a number", "model.attn_resolutions": "every entry is a whole"},
    ),
    "number for text": ("stage1", "--output_dir 2024.10", {"output_dir": "received 2024.1; must be text"}),
    "number as a key of a section": ("stage1", "--model '{1: 2}'", {"model": "the key 1; keys must be words"}),
    "5,000 digits": ("stage1", "--max_steps " + "9" * 5000, {"max_steps": "a number of 5,000 digits"}),
    "alias bomb": ("stage1", "$folder/bomb.yaml", {"": "more than 10,000 values"}),
    "token": ("stage1", "--hub_token hf_x", {"hub_token": "log in with `hf auth login`, or set HF_TOKEN"}),
    "terminal": ("stage1", "--output_dir \x1b[2J", {"output_dir": "a control character"}),
    "absurd sizes": (
        "stage1",
        "--per_device_train_batch_size 2147483647 --num_sample_images 100000000 "
        "--discriminator.base_channels 1000000000 --codebook.kmeans_init_batches 1000000000 "
        "--data.augmentation.max_zoom 1e9 --gradient_accumulation_steps 1000000000",
        {
            "per_device_train_batch_size": "from 1 to 1048576",
            "num_sample_images": "from 1 to 10000",
            "discriminator.base_channels": "from 4 to 4096",
            "codebook.kmeans_init_batches": "from 0 to 10000",
            "data.augmentation.max_zoom": "from 1 to 16",
            "gradient_accumulation_steps": "from 1 to 65536",
        },
    ),
    "absurd image": (
        "stage1",
        "--model.image_size 1000000000",
        {"model.image_size": "TB for their pixels, but this machine has"},
    ),
    "absurd global batch": (
        "stage2",
        "--global_batch_size 2147483647",
        {"global_batch_size": "gives a device more than 1048576 images"},
    ),
    "absurd sizes of stage 2": (
        "stage2",
        "--num_views 2147483647 --tokenize_batch_size 2147483647 --num_sample_images 2147483647 --lora.r 2147483647",
        {
            "num_views": "from 1 to 10000",
            "tokenize_batch_size": "from 1 to 1048576",
            "num_sample_images": "from 0 to 10000",
            "lora.r": "from 0 to 8192",
        },
    ),
    "absurd model": (
        "stage2",
        "--model='{model_type: qwen2, num_hidden_layers: 2147483647}'",  # its configuration lists all layers
        {"model.num_hidden_layers": "received 2147483647; must be from 1 to 10000"},
    ),
    # ------------------------------------------------------------------ stage 1, across keys
    "resolution": ("stage1", "--model.image_size 18", {"model.image_size": "divisible by the downsampling factor 4"}),
    "group norm": (
        "stage1",
        "--model.norm_num_groups 7",
        {"model.norm_num_groups": "it does not divide 32"},
    ),
    "channels": ("stage1", "--model.in_channels 2000", {"model.in_channels": "images have at most 1024 channels"}),
    "levels": ("stage1", "--model.channel_multiplier [1,0]", {"model.channel_multiplier": "positive numbers"}),
    "no levels": ("stage1", "--model.channel_multiplier []", {"model.channel_multiplier": "positive numbers"}),
    "half a channel": ("stage1", "--model.channel_multiplier [1,1.3]", {"model.channel_multiplier": "must be whole"}),
    "text in levels": ("stage1", "--model.channel_multiplier [1,a]", {"model.channel_multiplier": "a list in which"}),
    "no such quantizer": ("stage1", "--model.quantizer vqq", {"model.quantizer": "must be one of vq, ema"}),
    "option of another quantizer": (
        "stage1",
        "--model.quantizer ema --model.quantizer_options.legacy_codebook_loss true",
        {"model.quantizer_options.legacy_codebook_loss": "unknown, ema has commitment_cost"},
    ),
    "typo in an option": (
        "stage1",
        "--model.quantizer_options.l2_normalise true",
        {"model.quantizer_options.l2_normalise": "did you mean 'l2_normalize'?"},
    ),
    "option beside its section": (
        "stage1",
        "--model.l2_normalize true",
        {"model.l2_normalize": "did you mean 'model.quantizer_options.l2_normalize'?"},
    ),
    "text in an option": (
        "stage1",
        "--model.quantizer_options.commitment_cost low",
        {"model.quantizer_options.commitment_cost": "must be a number"},
    ),
    "option below its range": (
        "stage1",
        "--model.quantizer_options.commitment_cost -1",
        {"model.quantizer_options.commitment_cost": "from 0 up"},
    ),
    "decay of 1": (
        "stage1",
        "--model.quantizer ema --model.quantizer_options.decay 1 --model.quantizer_options.l2_normalize 1",
        {"model.quantizer_options.l2_normalize": "true or false"},
    ),
    "temperature 0": (
        "stage1",
        "--model.quantizer gumbel --model.quantizer_options '{temperature_end: 0}'",
        {"model.quantizer_options.temperature_end": "above 0"},
    ),
    "levels without a product": (
        "stage1",
        "--model.quantizer fsq --model.quantizer_options '{levels: [8, 5, 5]}'",
        {"model.embed_dim": "has 3 channels", "model.num_embeddings": "is 200"},
    ),
    "no fsq levels": (
        "stage1",
        "--model.quantizer fsq --model.quantizer_options {}",
        {"model.quantizer_options.levels": "such as [8, 5, 5, 5]"},
    ),
    "attention": (
        "stage1",
        "--model.attn_levels null --model.attn_resolutions [7]",
        {"model.attn_resolutions": "levels, 16, 8, 4"},
    ),
    "attention of no level": (
        "stage1",
        "--model.attn_levels [3]",
        {"model.attn_levels": "levels, 0 (the largest) to 2"},
    ),
    "attention twice": ("stage1", "--model.attn_resolutions [8]", {"model.attn_resolutions": "set one to null"}),
    "sizes": ("stage1", "--model.image_size [16,18]", {"model.image_size": "divisible by the downsampling factor 4"}),
    "weights of networks": (
        "stage1",
        "--loss.features_weight 1 --loss.features_network_weights nowhere.pth --discriminator.type features "
        "--discriminator.network_weights Pretrained",
        {
            "loss.features_network_weights": "received 'nowhere.pth'; there is no such file; allowed are 'pretrained'",
            "discriminator.network_weights": "received 'Pretrained'; there is no such file",
        },
    ),
    "one side": ("stage1", "--model.image_size [16]", {"model.image_size": "of a square, or [height, width]"}),
    "three sides": ("stage1", "--model.image_size [16,16,3]", {"model.image_size": "of a square, or [height, width]"}),
    "model types": (
        "stage1",
        "--model.num_embeddings true --model.embed_dim 4.5 --model.dropout nan --model.image_sise 32",
        {
            "model.num_embeddings": "received true; must be a whole number",
            "model.embed_dim": "received 4.5; must be a whole number",
            "model.dropout": "received 'nan'; must be a number",
            "model.image_sise": "did you mean 'image_size'?",
        },
    ),
    "LPIPS": (
        "stage1",
        "--loss.perceptual_weight 1 --loss.lpips_backbone alex",
        {"model.image_size": "LPIPS with alex needs 32 pixels; set loss.perceptual_weight to 0"},
    ),
    "no reconstruction": ("stage1", "--loss.l1_weight 0", {"loss.l1_weight": "must not all be 0"}),
    "pixel weight of old": ("stage1", "--loss.pixel_weight 1", {"loss.pixel_weight": "unknown key"}),
    "weights": (
        "stage1",
        "--loss.l2_weight -1 --loss.r1_weight .nan --loss.lecam_weight much --loss.gradient_penalty_weight true",
        {
            "loss.l2_weight": "received -1; must be a number from 0 up",
            "loss.r1_weight": "received nan; must be a finite number from 0 up",
            "loss.lecam_weight": "received 'much'; must be a number",
            "loss.gradient_penalty_weight": "received true; must be a number",
        },
    ),
    "game": (
        "stage1",
        "--loss.adversarial_type wasserstain",
        {"loss.adversarial_type": "'non_saturating' or 'wasserstein'; did you mean 'wasserstein'?"},
    ),
    "unbounded game": (
        "stage1",
        "--loss.adversarial_type wasserstein",
        {"loss.adversarial_type": "has no lower bound: set gradient_penalty_weight (10 in the paper)"},
    ),
    "norm": ("stage1", "--discriminator.norm_type instance", {"discriminator.norm_type": "'group' or 'actnorm'"}),
    "gradient penalty": (
        "stage1",
        "--loss.gradient_penalty_weight 10",
        {"discriminator.norm_type": "received 'batch'; loss.gradient_penalty_weight and loss.r1_weight need 'group'"},
    ),
    "R1": ("stage1", "--loss.r1_weight 1", {"discriminator.norm_type": "depends on the other images"}),
    "discriminator": ("stage1", "--discriminator.num_layers 5", {"discriminator.num_layers": "allow at most 2"}),
    "warm-up": ("stage1", "--warmup_steps 400", {"warmup_steps": "must be at most max_steps (300)"}),
    "global batch": (
        "stage1",
        "--global_batch_size 10 --gradient_accumulation_steps 4",
        {"global_batch_size": "multiple of 1 (processes) × 4 (gradient_accumulation_steps) = 4"},
    ),
    "fp16": ("stage1", "--fp16 true", {"fp16": "use bf16: true"}),
    "hub": ("stage1", "--push_to_hub true", {"hub_model_id": "as 'user/name'"}),
    "hub of a pipeline": ("build", "--push_to_hub true", {"hub_model_id": "as 'user/name'"}),
    "types and rules together": (
        "stage1",
        "--seed x --los.l1_weight 1 --model.norm_num_groups 5 --warmup_steps 999 --data.augmentation.rotate 200",
        {
            "seed": "received 'x'",
            "los": "did you mean 'loss'?",
            "model.norm_num_groups": "received 5",
            "warmup_steps": "received 999",
            "data.augmentation.rotate": "received 200; must be a number from 0 to 180",
        },
    ),
    # ------------------------------------------------------------------ stage 2, across keys
    "no augmentation": (
        "tokenize",
        "--data.augmentation {}",
        {"num_views": "received 16; without data.augmentation all views are the same"},
    ),
    "model type": ("stage2", "--model.model_type lama", {"model.model_type": "did you mean 'llama'?"}),
    "model type of no text": (
        "stage2",
        "--model.model_type vit",
        {"model.model_type": "unknown causal"},
    ),
    "heads": ("stage2", "--model.hidden_size 130", {"model.hidden_size": "multiple of the 4 attention heads"}),
    "key-value heads": ("stage2", "--model.num_key_value_heads 3", {"model.num_key_value_heads": "must divide"}),
    "no heads": ("stage2", "--model.num_attention_heads 0", {"model.num_attention_heads": "must be from 1 to 65536"}),
    "activation": ("stage2", "--model.hidden_act relo", {"model.hidden_act": "did you mean 'relu'?"}),
    "gpt2": (
        "stage2",
        "--model='{model_type: gpt2, n_embd: 32, n_head: 4, n_layr: 2}'",
        {"model.n_layr": "did you mean 'n_layer'?"},
    ),
    "gpt2 heads": (
        "stage2",
        "--model='{model_type: gpt2, n_embd: 30, n_head: 4}'",
        {"model.n_embd": "received 30; must be a multiple of the 4 attention heads"},
    ),
    "rope": ("stage2", "--model.rope_parameters x", {"model.rope_parameters": "not a value that llama takes"}),
    "attention of no list": ("stage1", "--model.attn_resolutions 8", {"model.attn_resolutions": "write [8]"}),
    "model values": (
        "stage2",
        "--model.hidden_size wide --model.vocab_size 3 --model.num_hidden_layers 2.5 --model.layers 3",
        {
            "model.hidden_size": "received 'wide'; must be a whole number",
            "model.vocab_size": "the code store determines it",
            "model.num_hidden_layers": "received 2.5; must be a whole number",
            "model.layers": "unknown key",
        },
    ),
    "training arguments": (
        "stage2",
        "--training_arguments.optim adamw --training_arguments.bf16 true --training_arguments.tf23 true "
        "--training_arguments.adam_epsilon small",
        {
            "training_arguments.optim": "received 'adamw'; must be 'adamw_torch', ",
            "training_arguments.bf16": "write bf16 at the top level",
            "training_arguments.tf23": "did you mean 'tf32'?",
            "training_arguments.adam_epsilon": "received 'small'; must be a number",
        },
    ),
    "training arguments of a wrong kind": (
        "stage2",
        "--training_arguments='{eval_accumulation_steps: 0, label_smoothing_factor: 3, log_level: x, label_names: [], "
        'neftune_noise_alpha: -1, lr_scheduler_kwargs: x, torch_compile_mode: x, tf32: "no", adam_epsilon: true}\'',
        {
            "training_arguments.eval_accumulation_steps": "from 1 to",
            "training_arguments.label_smoothing_factor": "below 1",
            "training_arguments.log_level": "'passive'",
            "training_arguments.label_names": "leave it out",
            "training_arguments.neftune_noise_alpha": "from 0 up",
            "training_arguments.lr_scheduler_kwargs": "a section",
            "training_arguments.torch_compile_mode": "'reduce-overhead'",
            "training_arguments.tf32": "true or false",
            "training_arguments.adam_epsilon": "received true",
        },
    ),
    "optimizer arguments": ("stage2", "--training_arguments.optim_args x", {"training_arguments": "refuses these"}),
    "schedule arguments": (
        "stage2",
        "--training_arguments.lr_scheduler_kwargs '{x: 1}'",
        {"training_arguments": "unexpected keyword argument 'x'"},
    ),
    "compiler": (
        "stage2",
        "--training_arguments.torch_compile_backend x",
        {"training_arguments": "'X' is not a valid DynamoBackend"},
    ),
    "missing file of a library": (
        "stage2",
        "--training_arguments.accelerator_config ./no.json",
        {"training_arguments": "No such file or directory: './no.json'"},
    ),
    "adapter": (
        "stage2",
        "--lora.r 8 --model_name_or_path x --lora.target_modules '\"((\"'",
        {"lora.target_modules": "no regular expression"},
    ),
    "two precisions": (
        "stage2",
        "--bf16 true --training_arguments.fp16 true",
        {"training_arguments.fp16": "bf16"},
    ),
    # ------------------------------------------------------------------ what is not there, or not what it should be
    "missing images": ("stage1", "--data.dataset ./nowhere", {"data.dataset": "there is no such file or folder"}),
    "folder without images": (
        "stage1",
        "--data.dataset $folder/nothing",
        {"data.dataset": "this folder holds no images"},
    ),
    "missing tokenizer": (
        "tokenize",
        "--tokenizer ./no",
        {"tokenizer": "there is no such folder"},
    ),
    "tokenizer of a pipeline": (
        "tokenize",
        "--tokenizer $pipeline",
        {"tokenizer": "this folder holds a pipeline; its tokenizer is in vqgan, its prior in prior"},
    ),
    "codes of other data": (
        "stage2",
        "--data.augmentation.rotate 5 --data.use_labels false",
        {
            "data.augmentation.rotate": "was written with 10.0, but the configuration has 5.0",
            "data.use_labels": "was written with true, but the configuration has false",
        },
    ),
    "missing codes": ("stage2", "--code_store ./no", {"code_store": "run stage2_prior.tokenize first"}),
    "codes of another tokenizer": (
        "stage2",
        "--tokenizer $folder/other",
        {"tokenizer": "codes are of another"},
    ),
    "codes of other images": ("stage2", "--num_views 3", {"num_views": "written with 2, but the configuration has 3"}),
    "missing tokenizer of a pipeline": ("build", "--tokenizer ./no", {"tokenizer": "there is no such folder"}),
    "missing prior": ("build", "--prior ./no", {"prior": "this folder holds no trained prior"}),
    "prior of another tokenizer": (
        "build",
        "--tokenizer $folder/other",
        {"tokenizer": "received the tokenizer"},
    ),
    "missing pipeline": ("evaluate", "--pipeline ./no", {"pipeline": "there is no folder './no'"}),
    "run that has not finished": (
        "evaluate",
        "--prior_run ./no",
        {"prior_run": "no'; train_results.json is missing there: the step that writes it has not finished"},
    ),
    "run whose results are damaged": (
        "evaluate",
        "--prior_run $folder/damaged",
        {"": "damaged/train_results.json: train_runtime: received null; must be a number from 0 up"},
    ),
    "too many components": ("evaluate", "--num_components 999 --feature_size 2", {"num_components": "at most 4"}),
    "negative guidance": ("evaluate", "--guidance_scale -1", {"guidance_scale": "received -1"}),
    "no model": ("evaluate1", "--model ./no --split train", {"model": "there is no such folder"}),
    "prior for a tokenizer": (
        "tokenize",
        "--tokenizer $prior",
        {"tokenizer": "not a tokenizer but a model of type"},
    ),
    "folder without a tokenizer": ("build", "--tokenizer $folder", {"tokenizer": "holds no trained tokenizer"}),
    "tokenizer for a prior": ("build", "--prior $vqgan", {"prior": "this folder holds no trained prior"}),
    "prior for a pipeline": ("evaluate", "--pipeline $prior", {"pipeline": "holds no pipeline"}),
    "images for codes": ("stage2", "--code_store $folder", {"code_store": "no finished code store"}),
    "broken tokenizer": ("tokenize", "--tokenizer $folder/broken", {"tokenizer": "this weights file is damaged"}),
    "prior without weights": ("build", "--prior $folder/unfinished", {"prior": "its prior is incomplete"}),
    "unknown split": ("evaluate1", "--split test", {"split": "'train' or 'validation'"}),
    "place that refuses": (
        "stage1",
        "--output_dir /proc/nope",
        {"output_dir": "created or used (No such file"},
    ),
    "codes in a place that refuses": (
        "tokenize",
        "--code_store /proc/nope",
        {"code_store": "cannot be created"},
    ),
    "prior in a place that refuses": ("stage2", "--output_dir /proc/nope", {"output_dir": "cannot be created"}),
    "pipeline in a place that refuses": ("build", "--output_dir /proc/nope", {"output_dir": "cannot be created"}),
    "metrics in a place that refuses": (
        "evaluate",
        "--output_dir /proc/nope",
        {"output_dir": "cannot be created or used"},
    ),
    "file for a folder": ("stage1", "--output_dir $folder/list.yaml", {"output_dir": "there is a file of this name"}),
    "folder in a file": ("evaluate", "--output_dir $folder/list.yaml/out", {"output_dir": "Not a directory"}),
}
if Version(transformers.__version__) >= Version("5.23"):  # this version checks them; 5.17 does not
    CASES |= {
        "odd heads": (
            "stage2",
            "--model.head_dim 7",
            {"model": "llama cannot have these settings: RoPE requires an even"},
        ),
        "initializer": ("stage2", "--model.initializer_range -1.0", {"model.initializer_range": "received -1.0; not"}),
    }

FILES = {
    "control.yaml": b"seed: 1\na\0: 2\n",
    "tab.yaml": b"data:\n\tdataset: digits\n",
    "bracket.yaml": b"report_to: [tensorboard\nseed: 2\n",
    "list.yaml": b"- max_steps\n- 3\n",
    "words.yaml": b"max_steps 3\n",
    "deep.yaml": b"seed: " + b"[" * 3000,
    "tag.yaml": b"seed: !!python/object:os.system {}\n",
    "repeated.yaml": b"output_dir: run\nmax_steps: x\ndiscriminator:\n  num_layers: 1\n  norm_type: batch\n"
    b"  num_layers: 2\n",
    "empty.yaml": b"",
    "bomb.yaml": b"a0: &a0 [x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b"*a%d," % (n - 1) * 9) for n in range(1, 12)),
    "picture.yaml": b"\x89PNG\r\n\x1a\n\xff\xfe",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_runs) -> Path:
    """Writes invalid configuration files, a folder without images, and a tokenizer with other codes."""
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "nothing").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged/train_results.json").write_text('{"global_step": 3}')
    shutil.copytree(tiny_runs.vqgan, folder / "other", ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    other = VQGANModel.from_pretrained(folder / "other")
    other.get_parameter("quant_conv.bias").data += 1
    other.config.fingerprint = None
    other.save_pretrained(folder / "other")
    shutil.copytree(folder / "other", folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(
        tiny_runs.prior, folder / "unfinished", ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors")
    )
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_in_a_message(tiny_runs, folder, tmp_path, monkeypatch, capsys, case):
    command, arguments, expected = CASES[case]
    config_class, main, good = COMMANDS[command]
    if arguments.startswith("-"):
        arguments = f"{good} {arguments}"
    names = {name: getattr(tiny_runs, name) for name in ("vqgan", "codes", "prior", "pipeline")}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        run(config_class, main, "command", shlex.split(Template(arguments).substitute(names, folder=folder)))
    shown = capsys.readouterr().err.replace(str(folder), ".").replace(str(tiny_runs.root), ".")
    assert exited.value.code == 2 and "Traceback" not in shown

    # the output ends with the message, which fits on a screen and has a line for each problem
    lines = shown[shown.index(" problem") :].rstrip().splitlines()
    assert len(lines) == 1 + len(expected) <= 40 and max(map(len, lines)) <= 240
    for line, (key, words) in zip(sorted(lines[1:]), sorted(expected.items()), strict=True):
        assert line.startswith(f"  - {key}: " if key else "  - ") and words in line
    for leak in ("class '", "Input should", "pydantic", "Error", "dataclass", "object at"):
        assert leak not in shown


# environment variables of `accelerate launch`, command, arguments, {key: words}
LAUNCHES = {
    "precision of the launcher": (
        {"MIXED_PRECISION": "bf16"},
        "stage1",
        "",
        {"bf16": "precision bf16; leave it out there, or"},
    ),
    "float16 of the launcher": ({"MIXED_PRECISION": "fp16"}, "stage1", "--bf16 true", {"bf16": "precision fp16"}),
    "float8 of the launcher": ({"MIXED_PRECISION": "fp8"}, "stage2", "--bf16 true", {"bf16": "precision fp8"}),
    "FSDP": ({"USE_FSDP": "true"}, "stage1", "", {"": "a moving average (ema_decay), which cannot be sharded"}),
    "DeepSpeed": ({"USE_DEEPSPEED": "true"}, "stage1", "", {"": "launched with DEEPSPEED"}),
    "FSDP, in other words": ({"USE_FSDP": "1"}, "stage1", "", {"": "launched with FSDP"}),
    "no number of processes": (
        {"WORLD_SIZE": "many"},
        "stage1",
        "",
        {"": "WORLD_SIZE='many'; must be a number from 1"},
    ),
    "zero processes": ({"WORLD_SIZE": "0"}, "stage2", "--global_batch_size 64", {"": "WORLD_SIZE='0'; must be"}),
    "no switch": ({"ACCELERATE_USE_CPU": "maybe"}, "stage2", "", {"": "ACCELERATE_USE_CPU='maybe'; must be true or"}),
    "no port": ({"MASTER_PORT": "x\n"}, "stage1", "", {"": r"MASTER_PORT='x\n'; must be a number"}),
    "accumulation of the launcher": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        "stage1",
        "--gradient_accumulation_steps 2",
        {"gradient_accumulation_steps": "says '4'; leave it out there"},
    ),
    "DeepSpeed's pickles": ({"USE_DEEPSPEED": "true"}, "stage2", "", {"": "shard with FSDP 2"}),
    "processes": (
        {"WORLD_SIZE": "3"},
        "stage2",
        "--global_batch_size 64 --gradient_accumulation_steps 2",
        {"global_batch_size": "multiple of 3 (processes) × 2 (gradient_accumulation_steps) = 6"},
    ),
}


def load(command, arguments=""):
    config_class, _, good = COMMANDS[command]
    words = Template(f"{good} {arguments}").safe_substitute()
    return load_config(config_class, *parse_arguments(shlex.split(words)))


@pytest.fixture
def launched(monkeypatch):
    def launched(MIXED_PRECISION="no", USE_FSDP=None, USE_DEEPSPEED=None, WORLD_SIZE="1", **others):
        values = {"MIXED_PRECISION": MIXED_PRECISION, "USE_FSDP": USE_FSDP, "USE_DEEPSPEED": USE_DEEPSPEED}
        for name, value in values.items():
            monkeypatch.setitem(LAUNCHED_WITH, name, value)
        for name, value in {"WORLD_SIZE": WORLD_SIZE, **others}.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize("case", LAUNCHES)
def test_a_launch_that_disagrees_ends_in_a_message(launched, case):
    environment, command, arguments, expected = LAUNCHES[case]
    launched(**environment)
    with pytest.raises(ConfigError) as caught:
        load(command, arguments)
    ((key, words),) = expected.items()
    (problem,) = caught.value.problems
    assert problem.key == key and words in problem.message and len(str(problem)) <= 240


def test_launches_that_agree(launched):
    launched(MIXED_PRECISION="bf16")
    assert load("stage1", "--bf16 true").bf16
    launched(MIXED_PRECISION="fp16")
    assert load("stage2", "--training_arguments.fp16 true").mixed_precision == "fp16"
    launched(USE_FSDP="true", WORLD_SIZE="4")
    config = load("stage2", "--bf16 true --global_batch_size 64 --gradient_accumulation_steps 2")
    assert config.device_batch_size(4) == 8
    assert load("stage2").device_batch_size(4) == 16  # images on one device


def test_a_configuration_made_in_python_is_checked_as_well(tmp_path):
    good = load("stage1", f"--output_dir {tmp_path}/run")
    wrong = replace(good, max_steps=-1, loss=replace(good.loss, l1_weight=float("nan")), model={"image_size": 17})
    with pytest.raises(ConfigError) as caught:
        train_tokenizer(wrong)
    found = {problem.key for problem in caught.value.problems}
    assert found >= {"max_steps", "loss.l1_weight", "model.image_size"}
    assert not (tmp_path / "run").exists()
    with pytest.raises(StrictDataclassError, match=r"num_embeddings: received 1; .*\nimage_size: received 17"):
        VQGANConfig(image_size=17, num_embeddings=1)
