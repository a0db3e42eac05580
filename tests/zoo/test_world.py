import random

import pytest
import torch

from recon.zoo import world


def test_every_prompt_says_what_it_was_written_from() -> None:
    rng = random.Random(0)
    for attributes in world.every_attributes():
        for split in ("train", "evaluation"):
            for _ in range(6):
                assert world.parse_prompt(world.write_prompt(attributes, rng, split)) == attributes


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red circle",
        "a red blue circle moving left",
        "a red circle moving left to the right",
        "a purple circle moving left",
        "a red circle moving left quickly",
    ],
)
def test_a_prompt_that_is_not_one_scene_parses_to_none(prompt: str) -> None:
    assert world.parse_prompt(prompt) is None


def test_the_splits_share_combinations_and_words_but_no_prompt() -> None:
    train, evaluation = world.every_prompt("train"), world.every_prompt("evaluation")
    assert not world.shared_prompts(train, evaluation)
    assert {world.parse_prompt(p) for p in train} == {world.parse_prompt(p) for p in evaluation}
    assert set(" ".join(evaluation).split()) <= set(" ".join(train).split())
    assert world.shared_prompts(world.train_prompts(0, 50), train)


def test_prompts_repeat_for_a_seed_and_go_through_all_combinations() -> None:
    written = world.prompts(seed=5, count=120)
    assert written == world.prompts(seed=5, count=120)
    assert written != world.prompts(seed=6, count=120)
    assert len({world.parse_prompt(p) for p in written}) == 120


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_has_the_area_of_its_circle(shape: str) -> None:
    centre, radius = torch.tensor([30.0]), torch.tensor([8.0])
    area = float(world.coverage(shape, centre, centre, radius, 60, 60).sum())
    assert area == pytest.approx(torch.pi * 64, rel=0.03)


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_shapes_move_as_told_and_stay_in_the_picture(motion: str) -> None:
    step_x, step_y = world.MOTIONS[motion]
    for seed in range(20):
        scene = world.random_scene(world.Attributes("red", "bar", motion), random.Random(seed))
        video = world.draw(scene)
        red = (video[:, 0] - video[:, 1]) > 0.3
        assert not red[:, [0, -1]].any()
        assert not red[:, :, [0, -1]].any()
        rows, columns = (
            torch.stack([frame.nonzero().float().mean(0) for frame in red]).diff(dim=0).mean(0)
        )
        assert float(columns) == pytest.approx(step_x * scene.speed, abs=0.15)
        assert float(rows) == pytest.approx(step_y * scene.speed, abs=0.15)


def test_a_still_scene_equals_its_frame() -> None:
    scene = world.random_scene(world.Attributes("blue", "ring", "still"), random.Random(1))
    video = world.draw(scene, frames=3)
    assert video.shape == (3, 3, world.HEIGHT, world.WIDTH)
    assert float(video.min()) >= 0
    assert float(video.max()) <= 1
    assert torch.equal(video[0], video[2])
    assert torch.equal(video[1], world.draw_frame(scene))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Attributes.colour is 'purple'.*Choose one of red"):
        world.Attributes("purple", "circle", "left")


def test_a_picture_too_small_for_the_path_is_refused() -> None:
    attributes = world.Attributes("red", "circle", "left")
    with pytest.raises(ValueError, match=r"side of 24 pixels.*Enlarge the picture"):
        world.random_scene(attributes, random.Random(0), width=24)
