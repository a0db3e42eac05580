import random

import pytest
import torch
from torch.nn import functional

from recon.zoo import oracle, world

SCENES = world.random_scenes(seed=123, count=240)
KEYS = ("colour", "shape", "motion")


def share_right(blur: bool) -> dict[str, float]:
    right = dict.fromkeys(KEYS, 0)
    generator = torch.Generator().manual_seed(0)
    for scene in SCENES:
        video = world.draw(scene)
        if blur:
            padded = functional.pad(video, (1, 1, 1, 1), mode="replicate")
            video = functional.avg_pool2d(padded, 3, stride=1)
            video = video + 0.03 * torch.randn(video.shape, generator=generator)
        seen = oracle.describe(video)
        for key in KEYS:
            right[key] += seen[key] == getattr(scene.attributes, key)
    return {key: count / len(SCENES) for key, count in right.items()}


@pytest.mark.parametrize("blur", [False, True], ids=["drawn", "blurred and noisy"])
def test_the_oracle_reads_rendered_scenes(blur: bool) -> None:
    assert min(share_right(blur).values()) >= 0.995


def test_each_answer_depends_on_its_own_attribute() -> None:
    video = world.draw(
        world.random_scenes(0, 1)[0]
    )  # whatever it shows, the prompt decides what is right
    seen = oracle.describe(video)
    truth = world.Attributes(*(str(seen[key]) for key in KEYS))
    for key in KEYS:
        wrong = {
            "colour": next(c for c in world.COLOURS if c != truth.colour),
            "shape": next(s for s in world.SHAPES if s != truth.shape),
            "motion": next(m for m in world.MOTIONS if m != truth.motion),
        }
        named = {k: wrong[k] if k == key else getattr(truth, k) for k in KEYS}
        prompt = f"a {named['colour']} {named['shape']} moving {named['motion']}"
        assert oracle.judge(video, prompt) == {k: k != key for k in KEYS}


def test_noise_an_empty_picture_and_nan_show_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(9, 3, 56, 64, generator=generator)
    assert oracle.describe(noise)["shape"] is None
    assert oracle.describe(noise)["motion"] in (None, "still")
    nothing = dict.fromkeys(KEYS)
    assert oracle.describe(torch.full((9, 3, 56, 64), 0.3)) == nothing
    assert oracle.describe(torch.full((9, 3, 56, 64), torch.nan)) == nothing


def test_a_shape_that_jumps_or_vanishes_has_no_motion() -> None:
    scene = world.random_scenes(0, 1)[0]
    video = world.draw(scene, frames=9)
    jumping = video.clone()
    jumping[4:] = video[4:].roll(20, dims=-1)
    vanishing = video.clone()
    vanishing[6:] = 0.3
    assert oracle.describe(jumping)["motion"] is None
    assert oracle.describe(vanishing)["motion"] is None


def test_a_prompt_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="'a cat' does not name exactly one colour"):
        oracle.judge(world.draw(world.random_scenes(0, 1)[0]), "a cat")


def test_a_video_of_the_wrong_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[3, 9, 56, 64\].*Permute"):
        oracle.describe(torch.zeros(3, 9, 56, 64))


PICTURES = [
    (scene, world.draw_frame(scene, height=64, width=64))
    for scene in (
        world.random_scene(
            world.Attributes(colour, shape, "still"),
            random.Random(seed),
            frames=1,
            height=64,
            width=64,
        )
        for seed in range(5)
        for colour in world.COLOURS
        for shape in world.SHAPES
    )
]
PICTURE_KEYS = ("colour", "shape")


def softened(picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    padded = functional.pad(picture[None], (1, 1, 1, 1), mode="replicate")
    blurred = functional.avg_pool2d(padded, 3, stride=1)[0]
    return blurred + 0.03 * torch.randn(picture.shape, generator=generator)


@pytest.mark.parametrize("soft", [False, True], ids=["drawn", "blurred and noisy"])
def test_the_oracle_reads_rendered_pictures(soft: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    right = 0
    for scene, picture in PICTURES:
        shown = softened(picture, generator) if soft else picture
        seen = oracle.describe_picture(shown)
        right += all(seen[key] == getattr(scene.attributes, key) for key in PICTURE_KEYS)
    assert right >= 0.995 * len(PICTURES)


def test_a_picture_is_judged_by_each_of_its_attributes() -> None:
    scene, picture = PICTURES[0]
    colour, shape = scene.attributes.colour, scene.attributes.shape
    other_colour = next(c for c in world.COLOURS if c != colour)
    other_shape = next(s for s in world.SHAPES if s != shape)
    assert oracle.judge_picture(picture, colour, shape) == {"colour": True, "shape": True}
    assert oracle.judge_picture(picture, other_colour, shape) == {"colour": False, "shape": True}
    assert oracle.judge_picture(picture, colour, other_shape) == {"colour": True, "shape": False}


def test_a_picture_and_the_clip_of_it_are_measured_alike() -> None:
    for _, picture in PICTURES[:24]:
        clip = oracle.describe(picture.expand(2, -1, -1, -1))
        assert oracle.describe_picture(picture) == {key: clip[key] for key in PICTURE_KEYS}


def test_pictures_of_noise_or_nothing_show_nothing() -> None:
    nothing = dict.fromkeys(PICTURE_KEYS)
    for seed in range(8):
        noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))
        assert oracle.describe_picture(noise) == nothing
    for level in (0.0, 0.3, 1.0, torch.nan):
        assert oracle.describe_picture(torch.full((3, 64, 64), level)) == nothing


def test_a_picture_all_of_one_colour_has_no_shape() -> None:
    red = torch.tensor(world.COLOURS["red"])[:, None, None].expand(3, 64, 64)
    assert oracle.describe_picture(red)["shape"] is None


def test_a_picture_of_the_wrong_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[64, 64, 3\].*Permute"):
        oracle.describe_picture(torch.zeros(64, 64, 3))


def test_a_colour_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'purple'.*Choose one of red"):
        oracle.judge_picture(PICTURES[0][1], "purple", "circle")
