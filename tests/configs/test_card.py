"""Cards: commands replace their own parts, and the author's words stay."""

import json

import pytest
from huggingface_hub import ModelCard

from configs.card import (
    card_metadata,
    cell,
    comment,
    front_matter,
    measured,
    merged,
    part,
    with_front_matter,
    write_card,
)
from configs.loss_curves import Panel, draw_curves, ticks
from configs.versions import origin_address


def card(use: str, license: str = "unknown", **metadata) -> str:
    return with_front_matter({"license": license, **metadata}, f"# Title\n\n{part('use', use)}\n\n## Limits\n")


def test_a_part_is_replaced_and_nothing_else():
    old = card("old use", tags=["a"]).replace("# Title", "# My cats\n\nI like them.") + "\nThe end\n"
    new = merged(old, card("new use", "mit", tags=["b"], **{"model-index": [1]}))
    expected = old.replace("old use", "new use").replace("license: unknown\ntags:\n- a\n", "")
    assert new == expected.replace("---\n---", "---\nlicense: mit\ntags:\n- a\nmodel-index:\n- 1\n---")


def test_a_part_without_markers_was_removed_by_the_author():
    old = with_front_matter({}, part("training", "old"))
    assert merged(old, card("new use")).count("<!--") == 2
    assert "new use" not in merged(old, card("new use"))


@pytest.mark.parametrize("text", ["# By hand\n", "---\nlicense: mit\n---\nBy hand\n"])
def test_a_card_without_markers_is_left_alone(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    write_card(tmp_path, lambda license: card("new", license), "apache-2.0")
    assert (tmp_path / "README.md").read_text() == text


def test_a_license_stays_until_another_is_given(tmp_path):
    def license_after(given):
        write_card(tmp_path, lambda license: card("use", license), given)
        return front_matter((tmp_path / "README.md").read_text())["license"]

    assert [license_after(given) for given in (None, "mit", None, "cc0-1.0")] == ["unknown", "mit", "mit", "cc0-1.0"]


def test_metadata_are_those_of_the_library():
    results = measured("unconditional-image-generation", "digits", None, {"psnr": 16.5, "ssim": 0.75})
    values = card_metadata("mit", ["a/b"], ["vqgan"], model_name="digits", eval_results=results)
    data = ModelCard(with_front_matter(values, "# Title")).data
    assert (data.license, data.datasets, data.tags) == ("mit", ["a/b"], ["vqgan", "tessella"])
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"psnr": 16.5, "ssim": 0.75}
    assert data.eval_results[0].dataset_type == "other"


def test_names_of_strangers_break_nothing():
    name = "a|b\n<!-- end of use --> <script>`x`"
    assert cell(name) == "a\\|b &lt;!-- end of use --&gt; &lt;script&gt;\\`x\\`"
    assert comment("``` <!-- 猫\n") == "??? ??-- 猫"


@pytest.mark.parametrize(
    ("recorded", "address"),
    [
        ({"url": "https://me:x@host/t.git", "vcs_info": {"vcs": "git", "commit_id": "c"}}, "git+https://host/t.git@c"),
        ({"url": "ssh://git@host/t.git", "vcs_info": {"vcs": "git", "commit_id": "c"}}, None),
        ({"url": "file:///home/me/tessella", "dir_info": {}}, None),
    ],
)
def test_the_address_is_public_or_left_out(monkeypatch, recorded, address):
    class Distribution:
        def read_text(self, name):
            return json.dumps(recorded)

    monkeypatch.setattr("configs.versions.metadata.distribution", lambda name: Distribution())
    assert origin_address() == address


# ---------------------------------------------------------------------- curves


def test_curves_go_where_the_values_are(tmp_path):
    """A falling loss: its line starts at the top left and ends at the bottom right."""
    log = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 10 - step, "other": 1} for step in range(11)] + [{"step": 11, "loss": float("nan")}]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 12, "lo')
    picture = draw_curves(log, [Panel("Loss", {"loss": "training"}), Panel("Absent", {"nothing": "validation"})])
    assert picture.size == (420, 300)
    blue = [(x, y) for x in range(56, 407) for y in range(48, 267) if is_blue(picture.getpixel((x, y)))]
    assert min(blue)[1] < 60 and max(blue)[1] > 255 and min(blue)[0] < 60 and max(blue)[0] > 400
    assert draw_curves(log, [Panel("Absent", {"nothing": "validation"})]) is None


def is_blue(pixel) -> bool:
    return pixel[2] - pixel[0] > 60


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 250_000), (1.5, 1.5), (1e-9, 3e-9)])
def test_ticks_are_round_and_few(low, high):
    found = list(ticks(low, high))
    assert 1 <= len(found) <= 6 and found == sorted(found) and found[-1] <= high * (1 + 1e-9)
