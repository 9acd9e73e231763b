"""Prompts of several conditions: their tokens, dropout, batches, guidance by condition, and codes that are given."""

import dataclasses

import numpy as np
import pytest
import torch

from stage2_prior import SamplingOptions, TokenLayout, sample
from stage2_prior.code_store import Rows
from stage2_prior.conditions import Segment
from stage2_prior.data import IGNORED, CodeDataset
from stage2_prior.prior import build_prior, shared_tokens
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.sampling.decoders import make_decoder
from tests import tiny

STYLE = Segment("style", "class", 3, class_names=("flat", "drawn", "shaded"))
TEXT = Segment("text", "text", 20, length=5, fingerprint="words")
SMALL = Segment("small", "image", 16, 4, grids=((2, 2, 1),), image_shape=(8, 8), fingerprint="other")
K, C, L = 40, 6, 16


def layout_of(*segments, **fields):
    names = tuple(f"class {number}" for number in range(C))
    return TokenLayout(K, fields.pop("class_names", names), (4, 4), 4, "fingerprint", segments=segments, **fields)


ALL = layout_of(STYLE, TEXT, SMALL)


def test_each_condition_has_its_own_tokens_and_its_own_null_token():
    assert ALL.first_tokens == {"class": 40, "style": 47, "text": 51, "small": 72}
    assert [ALL.null_of(name) for name in ("class", "style", "text", "small")] == [46, 50, 71, 88]
    assert ALL.used_tokens == 89 and ALL.vocab_size == 128
    assert ALL.places == {"class": slice(0, 1), "style": slice(1, 2), "text": slice(2, 7), "small": slice(7, 11)}
    assert (ALL.prompt_length, ALL.sequence_length, ALL.num_positions) == (11, 27, 26)
    assert ALL.null_prompt().tolist() == [46, 50, *[71] * 5, *[88] * 4]
    assert ALL.null_prompt(["style"]).tolist() == [-1, 50, *[-1] * 9]
    assert ALL.offsets.tolist() == [40, 47, *[51] * 5, *[72] * 4]


def test_a_masked_prior_has_one_more_token():
    masked = dataclasses.replace(ALL, family="masked")
    assert masked.mask_token == 89 and masked.num_positions == 27
    with pytest.raises(AttributeError, match="no mask token"):
        _ = ALL.mask_token


def test_without_classes_other_conditions_are_the_whole_prompt():
    layout = layout_of(TEXT, class_names=())
    assert [segment.name for segment in layout.conditions] == ["text"] and layout.prompt_length == 5
    alone = layout_of(class_names=())
    assert alone.null_prompt().tolist() == [alone.null_token] and alone.prompt_length == 1


def test_a_layout_survives_json_and_a_class_only_one_is_as_before():
    assert TokenLayout.from_dict(ALL.to_dict()) == ALL
    assert ALL.to_dict()["tokens"] == {
        "codes": 40, "classes": 6, "null": 1, "style": 4, "text": 21, "small": 17, "padding": 39,
    }  # fmt: skip
    assert list(layout_of().to_dict()) == [
        "tokens", "num_codes", "class_names", "grid", "downsampling_factor", "tokenizer_fingerprint", "has_null",
        "class_counts",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "class"}, "segments: received the name 'class'; must be a new identifier"),
        ({"name": "../x"}, "must be a new identifier"),
        ({"kind": "sound"}, "segments.kind: received 'sound'"),
        ({"num_tokens": 4}, "segments.style: received 4 tokens and length 1; its class_names say 3 and 1"),
        ({"length": 0}, "segments.length: received 0"),
    ],
)
def test_a_wrong_segment_is_refused(change, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        layout_of(dataclasses.replace(STYLE, **change))
    values = layout_of(STYLE).to_dict()
    values["segments"][0] |= change
    with pytest.raises(ValueError, match="token_layout"):
        TokenLayout.from_dict(values)


def test_a_segment_with_an_unknown_key_is_refused():
    values = layout_of(STYLE).to_dict()
    values["segments"][0]["colour"] = "red"
    with pytest.raises(ValueError, match=r"token_layout\.segments\.0\.colour"):
        TokenLayout.from_dict(values)


class Split:
    """Random rows in memory, with the interface of `CodeSplit`."""

    def __init__(self, layout, rows=4000):
        rng = np.random.default_rng(0)
        widths = [np.full((rows, segment.length), segment.num_tokens) for segment in layout.segments]
        conditions = rng.integers(np.concatenate(widths, 1) + 1).astype(np.uint32)
        codes = rng.integers(K, size=(rows, L)).astype(np.uint16)
        self.rows = Rows(codes, rng.integers(C, size=rows), conditions)

    def __len__(self):
        return len(self.rows.codes)

    def read(self, rows):
        return Rows(*(table[rows] for table in self.rows))


@pytest.fixture(scope="module")
def split():
    return Split(ALL)


def test_a_batch_is_the_prompt_and_the_codes(split):
    batch = CodeDataset(split, ALL).__getitems__([3, -1])
    found = split.read(np.array([3]))
    ids = np.concatenate([found.labels[:, None], found.conditions], 1)[0]
    expected = [*(ALL.offsets.numpy() + ids), *found.codes[0, :-1]]
    assert batch["input_ids"].shape == (2, 26) and batch["input_ids"][0].tolist() == expected
    assert batch["labels"][0].tolist() == [IGNORED] * 10 + found.codes[0].tolist()
    assert set(batch["shift_labels"][1].tolist()) == {IGNORED}


def test_conditions_are_dropped_together_and_each_alone(split):
    dataset = CodeDataset(split, ALL, 0.1, 5, {"style": 0.3, "text": 0.5})
    rows = np.arange(len(split))
    prompts = dataset.__getitems__(np.stack([np.zeros_like(rows), rows], 1))["input_ids"][:, : ALL.prompt_length]
    nulls = {name: (prompts[:, places] == ALL.null_of(name)).all(1) for name, places in ALL.places.items()}
    together = nulls["class"]
    assert torch.equal(together, nulls["class"] & nulls["style"] & nulls["text"] & nulls["small"])
    style, text = nulls["style"] & ~together, nulls["text"] & ~together
    # A share p of n independent rows lies within 5·sqrt(p(1-p)/n) of p, and at most 0.04 here.
    assert abs(together.float().mean() - 0.1) < 0.04
    kept = (~together).sum()
    # A quarter of the rows has the null token of the style in the data already.
    assert abs(style.sum() / kept - (0.25 + 0.75 * 0.3)) < 0.04 and abs(text.sum() / kept - 0.5) < 0.04
    assert abs((style & text).sum() / kept - (0.25 + 0.75 * 0.3) * 0.5) < 0.04  # independent of each other


def test_dropout_of_a_class_alone_is_that_of_earlier_versions(split):
    """The rows that lose their class do not depend on the other conditions."""
    plain = CodeDataset(split, ALL, 0.3, 5).__getitems__(range(500))["input_ids"][:, 0]
    more = CodeDataset(split, ALL, 0.3, 5, {"text": 0.5}).__getitems__(range(500))["input_ids"][:, 0]
    assert torch.equal(plain, more)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def prior(request):
    torch.manual_seed(0)
    return build_prior(tiny.RANDOM_PRIORS[request.param], ALL).eval()


def prompts_for(batch):
    ids = torch.randint(3, (batch, ALL.prompt_length), generator=torch.Generator().manual_seed(1))
    return ids + ALL.offsets


def draw(decoder, prompts, groups, seeds, scale, known=None, **options):
    nulls = [ALL.null_prompt(names) for names in groups]
    null_prompts = torch.cat([prompts.where(null < 0, null) for null in nulls])
    options = SamplingOptions(guidance_scale=scale, **options)
    return sample(decoder, prompts, null_prompts, torch.tensor(seeds), L, K, options, None, known)


@torch.no_grad()
def greedy_naively(prior, prompt, groups, scales, known=None):
    """Forwards of whole sequences, one for each group at each position: c + Σ (s - 1)·(c - u)."""
    codes = []
    for position in range(L):
        rows = [prompt] + [prompt.where(ALL.null_prompt(names) < 0, ALL.null_prompt(names)) for names in groups]
        logits = [
            prior(input_ids=torch.cat([row, torch.tensor(codes, dtype=torch.int64)])[None]).logits[0, -1, :K].double()
            for row in rows
        ]
        guided = logits[0] + sum((s - 1) * (logits[0] - u) for s, u in zip(scales, logits[1:], strict=True))
        given = -1 if known is None else int(known[position])
        codes.append(int(guided.argmax()) if given < 0 else given)
    return codes


@pytest.mark.parametrize(
    "groups, scale",
    [
        ([None], 3.0),
        pytest.param([["style"]], 2.5, marks=pytest.mark.slow),
        ([["style"], ["text", "small"]], (3.0, 2.0)),
    ],
)
def test_guidance_acts_on_the_named_conditions(prior, groups, scale):
    prompts = prompts_for(2)
    scales = scale if isinstance(scale, tuple) else (scale,)
    decoder = make_decoder(prior, 2 * (1 + len(scales)), ALL.num_positions, K)
    codes = draw(decoder, prompts, groups, [0, 1], scale, temperature=0.0)
    assert codes.tolist() == [greedy_naively(prior, prompt, groups, scales) for prompt in prompts]


def test_given_codes_are_kept_and_read(prior):
    prompts = prompts_for(3)
    known = torch.full((3, L), -1)
    known[:, 3:6] = torch.tensor([7, 8, 9])
    known[2] = torch.arange(L)
    decoder = EagerDecoder(prior, 6, ALL.num_positions)
    codes = draw(decoder, prompts, [None], [0, 1, 2], 2.0, known, temperature=0.0)
    for row, prompt in enumerate(prompts):
        assert codes[row].tolist() == greedy_naively(prior, prompt, [None], [2.0], known[row])
    free = draw(decoder, prompts, [None], [0, 1, 2], 2.0)
    nothing = draw(decoder, prompts, [None], [0, 1, 2], 2.0, torch.full((3, L), -1))
    assert torch.equal(free, nothing)
    repeated = draw(decoder, prompts, [None], [0, 1, 2], 2.0, free.where(torch.arange(L) < 9, -1))
    assert torch.equal(repeated, free)  # the noise of a code does not depend on what is given before it


@pytest.mark.parametrize(
    "known, message", [(torch.zeros(2, L), "int64"), (torch.zeros(1, L, dtype=torch.int64), "2, 16")]
)
def test_given_codes_of_another_form_are_refused(prior, known, message):
    with pytest.raises(ValueError, match=f"known: .*{message}"):
        draw(EagerDecoder(prior, 2, ALL.num_positions), prompts_for(2), [None], [0, 1], 1.0, known)


def test_fine_tuning_keeps_the_tokens_of_known_conditions():
    new = layout_of(dataclasses.replace(STYLE, num_tokens=2, class_names=("shaded", "new")), TEXT)
    old, now = shared_tokens(ALL, new)
    pairs = dict(zip(old.tolist(), now.tolist(), strict=True))
    assert pairs[ALL.first_tokens["style"] + 2] == new.first_tokens["style"]  # "shaded"
    assert pairs[ALL.null_of("text")] == new.null_of("text") and pairs[ALL.null_token] == new.null_token
    assert len(pairs) == K + C + 1 + (1 + 1) + (20 + 1)
