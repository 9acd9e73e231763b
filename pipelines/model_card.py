"""The README.md of a pipeline on the Hub."""

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from stage1_vqgan import VQGANModel
from stage2_prior import TokenLayout

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Generates {{ size }}×{{ size }} {{ colour }} images in two stages: a VQGAN tokenizer turns an image into
{{ length }} codes out of {{ num_codes }}, and a causal language model (`{{ model_type }}`) samples such codes.
Made with tessella.

## Use

```python
from pipelines import VQGANPipeline

pipe = VQGANPipeline.from_pretrained("{{ name }}")
images = pipe.generate({{ example }}).images
```

The prior alone is an ordinary causal language model. transformers loads it without other code:

```python
from transformers import AutoModelForCausalLM

prior = AutoModelForCausalLM.from_pretrained("{{ name }}", subfolder="prior")
```

## Details

| | |
| --- | --- |
| Code grid | {{ grid }} codes, one for {{ factor }}×{{ factor }} pixels |
| Codebook | {{ num_codes }} entries of width {{ embed_dim }} |
| Tokenizer | {{ vqgan_parameters }} parameters, fingerprint `{{ fingerprint }}` |
| Prior | {{ prior_parameters }} parameters |
| Prompt | {{ prompt }} |
{% if class_names %}
Classes: {{ class_names }}
{% endif %}"""


def model_card(vqgan: VQGANModel, prior: PreTrainedModel, layout: TokenLayout, name: str) -> str:
    """The text of the card: facts about a pipeline, and code that loads it by `name`."""
    config = vqgan.config
    classes = layout.num_classes
    shown = ", ".join(" ".join(name.split()) for name in layout.class_names[:50]) + (", …" if classes > 50 else "")
    card = ModelCard.from_template(
        ModelCardData(
            library_name="tessella",
            pipeline_tag="unconditional-image-generation",
            tags=["vqgan", "image-generation", "autoregressive", "tessella"],
        ),
        template_str=TEMPLATE,
        name=name,
        title="Class-conditional image generator" if classes else "Image generator",
        size=config.image_size,
        colour="gray" if config.in_channels == 1 else "colour",
        length=layout.length,
        num_codes=layout.num_codes,
        model_type=prior.config.model_type,
        example="class_labels=[0], num_images_per_label=4, guidance_scale=1.5" if classes else "num_images=4",
        grid=f"{layout.grid[0]}×{layout.grid[1]}",
        factor=layout.downsampling_factor,
        embed_dim=config.embed_dim,
        vqgan_parameters=f"{vqgan.num_parameters():,}",
        prior_parameters=f"{prior.num_parameters():,}",
        fingerprint=layout.tokenizer_fingerprint,
        prompt=(
            f"class c is token {layout.num_codes} + c; no class is token {layout.null_token}"
            if classes
            else f"always token {layout.null_token}"
        ),
        class_names=shown,
    )
    return str(card)
