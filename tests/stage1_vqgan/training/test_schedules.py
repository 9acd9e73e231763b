"""Weights that change during a run, compared with the weight written down for every step."""

import pytest

from configs import ConfigError, check, load_config
from stage1_vqgan import Stage1Config
from tests.stage1_vqgan.training.test_step import make_config

GROUP = {"discriminator.norm_type": "group"}


def weights(term, max_steps, **changes):
    config = make_config(max_steps=max_steps, **changes)
    return [config.loss.weights(step)[term] for step in range(max_steps)]


def schedule(term, **values):
    return {"loss.schedules": {term: values}}


def test_without_a_schedule_a_weight_is_its_key():
    config = make_config(
        **{"loss.discriminator_start_step": 2, "loss.adversarial_start_step": 3, "loss.r1_weight": 5, **GROUP}
    )
    constant = {"l1": 0.7, "l2": 0.4, "codebook": 0.6}
    constant |= dict.fromkeys(("perceptual", "features", "logits", "alignment", "gradient_penalty", "lecam"), 0)
    assert config.loss.weights(1) == {**constant, "adversarial": 0, "r1": 0}
    assert config.loss.weights(2) == {**constant, "adversarial": 0, "r1": 5}
    assert config.loss.weights(3) == {**constant, "adversarial": 0.3, "r1": 5}


def test_ramp():
    assert weights("l2", 6, **schedule("l2", start=1, ramp=4)) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert weights("l2", 6, **schedule("l2", start=3)) == [0, 0, 0, 0.4, 0.4, 0.4]
    shares = {"loss.adversarial_start_step": 0.5, **schedule("adversarial", ramp=0.25)}
    assert weights("adversarial", 8, **shares) == pytest.approx([0, 0, 0, 0, 0.15, 0.3, 0.3, 0.3])


def test_anneal():
    rest_of_the_run = schedule("l2", end_weight=0.0)
    assert weights("l2", 4, **rest_of_the_run) == pytest.approx([0.3, 0.2, 0.1, 0])
    assert weights("l2", 4, **schedule("l2", end_weight=1, anneal=2)) == pytest.approx([0.7, 1, 1, 1])
    both = schedule("l2", ramp=2, end_weight=0.1, anneal=0.375)  # of 8 steps: 3
    assert weights("l2", 8, **both) == pytest.approx([0.2, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])


def test_a_term_of_weight_0_stays_off():
    assert weights("r1", 3, **schedule("r1", ramp=2, end_weight=1)) == [0, 0, 0]


def test_the_resolved_configuration_is_the_same_configuration():
    changes = {"loss.adversarial_start_step": 0.2, **schedule("adversarial", ramp=0.1, end_weight=0.1)}
    config = make_config(**changes)
    assert check(config) == config
    assert config.loss.schedules["adversarial"] == {"ramp": 10, "end_weight": 0.1, "anneal": 70}
    assert make_config(**schedule("l1", ramp=3, end_weight=None)).loss.schedules == {"l1": {"ramp": 3}}


@pytest.mark.parametrize(
    ("schedules", "key", "message"),
    [
        ({"perceptul": {}}, "loss.schedules.perceptul", "did you mean 'perceptual'"),
        ({"l1": {"rampe": 3}}, "loss.schedules.l1.rampe", "did you mean 'ramp'"),
        ({"l1": {"ramp": -1}}, "loss.schedules.l1.ramp", "received -1; must be a whole number from 0"),
        ({"l1": {"ramp": 2.5}}, "loss.schedules.l1.ramp", "received 2.5"),
        ({"l1": {"end_weight": "low"}}, "loss.schedules.l1.end_weight", "must be a number from 0 up or null"),
        ({"l1": {"ramp": "3"}}, "loss.schedules.l1.ramp", "received '3'; must be a whole number"),
        ({"l1": {"anneal": 0}}, "loss.schedules.l1.anneal", "received 0"),
        ({"l1": {"anneal": 3}}, "loss.schedules.l1.anneal", "received 3; it leads to end_weight"),
        ({"l1": 3}, "loss.schedules", "a section of keys"),
        ({"adversarial": {"start": 3}}, "loss.schedules.adversarial.start", "write loss.adversarial_start_step"),
        ({"l1": {"start": 3}, "l2": {"end_weight": 0}}, "loss.schedules", "are all 0; leave one of them without start"),
    ],
)
def test_mistakes(schedules, key, message):
    with pytest.raises(ConfigError) as caught:
        make_config(**{"loss.schedules": schedules})
    found = {problem.key: problem.message for problem in caught.value.problems}
    assert list(found) == [key] and message in found[key]


def test_a_schedule_on_the_command_line():
    config = load_config(Stage1Config, "digits/stage1", {"loss.schedules.l1.end_weight": 0.5})
    assert config.loss.weights(config.max_steps - 1)["l1"] == 0.5
