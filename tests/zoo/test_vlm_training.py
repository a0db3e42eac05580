import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from recon.zoo import (
    train,
    vlm_lessons,
    vlm_measure,
    vlm_questions,
    vlm_recipe,
    vlm_scenes,
    vlm_sight,
    vlm_teacher,
    vlm_training,
)
from recon.zoo.vlm_questions import Question, Record
from recon.zoo.vlm_scenes import Arrangement

RECIPE = vlm_recipe.Recipe(pictures=12, sight_batch=4)
ARRANGEMENTS = vlm_scenes.random_arrangements(0, 2, "train")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return vlm_teacher.build_tokenizer()


@pytest.fixture(scope="module")
def lessons() -> vlm_training.Lessons:
    return vlm_training.prepare(RECIPE)


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return vlm_teacher.build_processor()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A network whose every layer does something, unlike at its start."""
    started = vlm_training.start_model(tokenizer, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in started.model.language_model.layers.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return started.eval()


def ask(index: int, count: int) -> list[Question]:
    rng = random.Random(index)
    return list(vlm_lessons.questions(ARRANGEMENTS[index], count, rng, "train", choices=0.5))


# Processor


def test_every_word_of_the_questions_survives_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for split in ("train", "evaluation"):
        for each in vlm_questions.records(0, 60, split):
            ids = tokenizer(each.prompt).input_ids
            assert tokenizer.unk_token_id not in ids
            spaced = each.prompt.replace("?", " ?").replace(":", " :")
            assert tokenizer.decode(ids) == spaced
            assert tokenizer.decode(tokenizer(each.answer).input_ids) == each.answer
    assert tokenizer("what is a zebra ?").input_ids.count(tokenizer.unk_token_id) == 2
    assert tokenizer.decode(tokenizer("<s> USER <image>").input_ids, skip_special_tokens=True) == (
        "USER"
    )


def test_the_processor_gives_the_pixels_that_training_sees(processor: LlavaProcessor) -> None:
    pictures = [vlm_scenes.photograph(each) for each in ARRANGEMENTS]
    inputs = vlm_teacher.ask_processor(processor, ["where is the ring?", "count it"], pictures)
    pixels = torch.stack([vlm_scenes.pixels(each) for each in ARRANGEMENTS])
    torch.testing.assert_close(inputs["pixel_values"], vlm_sight.normalised(pixels))
    counts = (inputs["input_ids"] == processor.image_token_id).sum(dim=1)
    assert counts.tolist() == [vlm_teacher.IMAGE_TOKENS] * 2
    assert inputs["attention_mask"].sum(dim=1).tolist() == [24, 21]  # padded on the left
    assert inputs["input_ids"][1, 0] == processor.tokenizer.pad_token_id


def test_a_chat_of_several_turns_is_words_between_roles(processor: LlavaProcessor) -> None:
    asked = [{"type": "image"}, {"type": "text", "text": "count the bars"}]
    chat = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
        {"role": "user", "content": "what is red?"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<s>USER <image> count the bars ASSISTANT 2 </s>USER what is red? ASSISTANT "


# Lessons


def test_packed_chats_give_what_each_gives_alone(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    asked = [ask(0, 5), ask(1, 3)]
    pixels = torch.stack([vlm_scenes.pixels(each) for each in ARRANGEMENTS])
    packed = vlm_lessons.pack(processor.tokenizer, asked)
    with torch.no_grad():
        logits, targets = vlm_lessons.answer_logits(model, pixels, packed)
    alone: list[Tensor] = []
    right: list[int] = []
    for arrangement, row in zip(ARRANGEMENTS, asked, strict=True):
        for each in row:
            inputs = vlm_teacher.ask_processor(
                processor, [each.prompt], [vlm_scenes.photograph(arrangement)]
            )
            answer = processor.tokenizer(f"{each.answer} </s>").input_ids
            ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
            with torch.no_grad():
                seen = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
            alone.append(seen[-len(answer) - 1 : -1])
            right += answer
    assert targets.tolist() == right
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_words_are_true_of_the_patch_that_holds_the_centre() -> None:
    words, centres = vlm_sight.annotate(ARRANGEMENTS)
    for index, arrangement in enumerate(ARRANGEMENTS):
        places = {}
        for each in arrangement.objects:
            places[int(each.y // 12), int(each.x // 12)] = each
        told = words[index].unflatten(0, (4, 4))
        assert {tuple(place) for place in told.any(-1).nonzero().tolist()} == set(places)
        for (row, column), each in places.items():
            assert int(told[row, column].sum()) == 4
            x, y = (centres[index].unflatten(0, (4, 4))[row, column] + 1) * 24
            assert (float(x), float(y)) == pytest.approx((each.x, each.y), abs=1e-3)


# Training


def test_the_decoder_starts_as_the_identity(tokenizer: PreTrainedTokenizerFast) -> None:
    started = vlm_training.start_model(tokenizer, seed=0)
    layers = started.model.language_model.layers
    assert len(layers) == 8
    ids = torch.tensor([tokenizer("count the red circles").input_ids])
    with torch.no_grad():
        hidden = started.model.language_model(input_ids=ids, output_hidden_states=True)
    embedded = started.get_input_embeddings()(ids)
    torch.testing.assert_close(hidden.hidden_states[-2], embedded, atol=0, rtol=0)


def test_the_first_stage_moves_tower_and_words_and_leaves_the_decoder(
    lessons: vlm_training.Lessons,
) -> None:
    start = vlm_training.start_model(lessons.tokenizer, seed=0)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    trained = vlm_training.train_sight(
        vlm_recipe.Recipe(pictures=12, sight_batch=4, sight_steps=2), lessons, start
    )
    moved = {
        name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])
    }
    assert any("vision_tower" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    assert any("embed_tokens" in name for name in moved)
    assert not any("language_model.layers" in name or "lm_head" in name for name in moved)


def test_the_decoder_learns_while_the_tower_stands_still(
    lessons: vlm_training.Lessons,
) -> None:
    model = vlm_training.start_model(lessons.tokenizer, seed=0)
    tower = {n: p.detach().clone() for n, p in model.model.vision_tower.named_parameters()}
    rng = random.Random(0)

    def asked(arrangement: Arrangement) -> list[Question]:
        return list(vlm_lessons.questions(arrangement, 4, rng, "train", choices=0.5))

    def loss_of(network: LlavaForConditionalGeneration) -> Tensor:
        return lessons.answer_loss(network, 2, asked)

    first = float(loss_of(model).detach())
    trained = vlm_training.train_decoder(
        model, loss_of, RECIPE, name="questions", steps=6, factor=lambda step: 0.25
    )
    assert float(loss_of(trained).detach()) < first
    for name, parameter in trained.model.vision_tower.named_parameters():
        assert torch.equal(parameter, tower[name])


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zoo") / "teacher"
    stages = "--sight-steps 1 --short-steps 1 --steps 1"
    sizes = "--pictures 6 --sight-batch 2 --batch 2 --questions 2 --save-every 1"
    train.main(["vlm", "--out", str(out), *stages.split(), *sizes.split()])
    return out


def test_the_recipe_writes_a_folder_that_public_classes_load(trained_folder: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(trained_folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(trained_folder)
    assert isinstance(processor, LlavaProcessor)
    asked = list(vlm_questions.records(0, 4, "evaluation"))
    said = vlm_measure.answers(model, processor, asked)
    assert len(said) == 4
    assert all(len(answer.split()) <= vlm_teacher.ANSWER_TOKENS for answer in said)
    assert [path.name for path in trained_folder.parent.iterdir()] == ["teacher"]


def test_the_folder_computes_what_was_trained(
    tmp_path: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    vlm_teacher.save(tmp_path, model)
    loaded, reloaded = vlm_teacher.load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    stored = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float16}
    record = next(vlm_questions.records(0, 1, "train"))
    inputs, again = (
        vlm_teacher.ask_processor(each, [record.prompt], [record.picture])
        for each in (processor, reloaded)
    )
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    with torch.no_grad():
        expected = functional.log_softmax(model(**inputs).logits, dim=-1)
        seen = functional.log_softmax(loaded(**again).logits, dim=-1)
    torch.testing.assert_close(seen, expected, atol=0.05, rtol=0)


# Measurement


def test_answers_are_counted_by_kind_and_form_letter_for_letter() -> None:
    asked: list[Record] = list(vlm_questions.records(3, 20, "evaluation"))
    said = [each.answer for each in asked]
    assert set(vlm_measure.accuracy(said, asked).values()) == {1.0}
    wrong = ["red" if each.kind == "count" else each.answer for each in asked]
    shares = vlm_measure.accuracy(wrong, asked)
    assert shares["count"] == 0
    assert shares["colour"] == 1
    assert shares["short"] == shares["with_choices"] == shares["all"] == pytest.approx(0.8)
    assert vlm_measure.accuracy([f"{each} ." for each in said], asked)["all"] == 0


def test_a_layer_is_left_out_and_comes_back(model: LlavaForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, 20, 21, 22]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with vlm_measure.without_layer(model, 3):
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
            assert torch.equal(hidden[3], hidden[4])
            assert not torch.equal(hidden[4], hidden[5])
        assert torch.equal(model(input_ids=ids).logits, before)


def test_rounding_to_nearest_reaches_every_linear_of_the_decoder_and_nothing_else(
    model: LlavaForConditionalGeneration,
) -> None:
    head, projector = model.lm_head, model.model.multi_modal_projector.linear_1
    ids = torch.tensor([[1, 5, 20, 21, 22]])
    weight = model.model.language_model.layers[2].mlp.up_proj.weight.detach().clone()
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        vlm_measure.round_to_nearest(model, 4, 8)
        fine = model(input_ids=ids).logits
    layers = model.model.language_model.layers
    rounded = [
        name for name, each in layers.named_modules() if type(each).__name__ == "QuantLinear"
    ]
    assert len(rounded) == 8 * 7
    assert model.lm_head is head
    assert model.model.multi_modal_projector.linear_1 is projector
    scale = weight.abs().amax(dim=1, keepdim=True) / 7
    torch.testing.assert_close(
        layers[2].mlp.up_proj.quantized_weight(), (weight / scale).round() * scale
    )
    assert 0 < float((fine - exact).norm() / exact.norm()) < 0.5
