"""The shipped vision-language teacher, as it lies in its folder."""

import json

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from recon import zoo
from recon.zoo import vlm_measure, vlm_questions, vlm_teacher

MEGABYTE = 1_000_000


def test_the_folder_loads_with_no_code_of_ours() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(zoo.folder("vlm"))
    processor = AutoProcessor.from_pretrained(zoo.folder("vlm"))
    assert isinstance(processor, LlavaProcessor)
    assert processor.chat_template == vlm_teacher.CHAT_TEMPLATE
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert model.generation_config.max_new_tokens == vlm_teacher.ANSWER_TOKENS


def test_the_network_has_something_to_quantise() -> None:
    config = LlavaForConditionalGeneration.from_pretrained(zoo.folder("vlm")).config
    assert config.text_config.num_hidden_layers >= 8
    assert config.vision_config.model_type == "clip_vision_model"
    assert config.image_seq_length == vlm_teacher.IMAGE_TOKENS


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in zoo.folder("vlm").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".jinja"}


def test_no_config_tells_where_the_folder_was_made() -> None:
    for file in zoo.folder("vlm").rglob("*config.json"):
        assert "_name_or_path" not in json.loads(file.read_text())


@pytest.fixture(scope="module")
def asked() -> list[vlm_questions.Record]:
    return list(vlm_questions.records(11, 1000, "evaluation"))


def accuracy(asked: list[vlm_questions.Record], *bits: int) -> dict[str, float]:
    model, processor = vlm_teacher.load(zoo.folder("vlm"))
    if bits:
        vlm_measure.round_to_nearest(model, *bits)
    return vlm_measure.accuracy(vlm_measure.answers(model, processor, asked), asked)


def test_nine_of_ten_answers_about_held_out_pictures_are_right(
    asked: list[vlm_questions.Record],
) -> None:
    shares = accuracy(asked)
    assert shares["all"] >= 0.9
    assert min(shares[kind] for kind in ("colour", "shape", "count", "position")) >= 0.85
    assert min(shares["short"], shares["with_choices"]) >= 0.85


def test_four_bits_cost_answers(asked: list[vlm_questions.Record]) -> None:
    assert accuracy(asked, 4, 4)["all"] <= accuracy(asked)["all"] - 0.01  # 2,000: 0.018
