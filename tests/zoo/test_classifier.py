import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recon import zoo
from recon.zoo import classifier_network, classifier_training, measure, train
from recon.zoo.image_scenes import CLASSES, pictures, random_scenes, scenes_of
from recon.zoo.world import BACKDROP, RADIUS


def images(seed: int, labels: list[int]) -> torch.Tensor:
    return pictures(scenes_of(labels, seed)) / 2 + 0.5


def test_the_shipped_classifier_names_drawn_pictures_and_finds_the_shape() -> None:
    classifier = classifier_network.load()
    labels = list(range(24)) * 4
    scenes = scenes_of(labels, seed=77)
    logits, estimates = classifier.answers(pictures(scenes) / 2 + 0.5)
    assert float((logits.argmax(dim=1) == torch.tensor(labels)).double().mean()) >= 0.99
    known = classifier_training.facts(scenes)
    errors = (estimates[:, :2] - known[:, :2]).square().mean().sqrt()
    assert float(errors) < 0.1  # of half a picture's side


def test_its_features_have_about_unit_variance_and_tell_faults() -> None:
    classifier = classifier_network.load()
    clean = images(5, list(range(24)) * 4)
    features = classifier(clean)
    assert features.shape == (96, classifier_network.FEATURES)
    assert 0.5 < float(features.std(dim=0).mean()) < 1.5
    for fault in range(3):
        shares = torch.zeros(96, 3)
        shares[:, fault] = 1.0
        faulty = classifier_training.faulty(clean, shares, torch.Generator().manual_seed(0))
        _, seen = classifier.answers(faulty)
        _, before = classifier.answers(clean)
        column = classifier_network.ESTIMATES.index(("noise", "blur", "blocks")[fault])
        assert float((seen - before)[:, column].mean()) > 0.2


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[1, 3, 32, 32\].*takes \[batch, 3, 64, 64\]"):
        classifier_network.Classifier()(torch.zeros(1, 3, 32, 32))


def test_faults_are_shares_and_none_leaves_the_picture_as_it_is() -> None:
    clean = images(5, [0, 9])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(classifier_training.faulty(clean, torch.zeros(2, 3), generator), clean)
    errors = []
    for share in (0.3, 0.9):
        shares = torch.tensor([[0.0, 0.0, 0.0], [share] * 3])
        made = classifier_training.faulty(clean, shares, generator)
        torch.testing.assert_close(made[0], clean[0], atol=1e-6, rtol=0)
        assert made.min() >= 0
        assert made.max() <= 1
        errors.append(float((made[1] - clean[1]).square().mean()))
    assert 0 < errors[0] < errors[1]


def test_facts_are_centred_on_what_the_world_draws() -> None:
    scene = random_scenes(seed=0, count=1)[0]
    scene = replace(scene, x=48.0, y=0.0, radius=RADIUS[1], backdrop=BACKDROP[0])
    assert classifier_training.facts([scene]).tolist() == [[0.5, -1.0, 1.0, -1.0]]


def test_the_recipe_gives_the_same_bytes_again_and_its_file_loads(tmp_path: Path) -> None:
    options = ["--scenes", "24", "--steps", "2", "--batch", "8"]
    for name in ("one", "two"):
        train.main(["classifier", "--out", str(tmp_path / name), *options])
    files = [tmp_path / name / classifier_network.FILE for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [classifier_network.FILE]
    loaded = classifier_network.load(tmp_path / "one")
    assert not loaded.training
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}


def test_the_shipped_file_is_small() -> None:
    files = [path for path in zoo.folder("classifier").iterdir() if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) <= 300_000


def test_the_measurement_reports_accuracy_and_distance(
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure.main(["classifier", "--rounds", "2", "--share", "1.0"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["accuracy"]["clean"] >= 0.95
    assert set(numbers["fid"]) == {"clean", "noise", "blur", "blocks"}
    assert all(numbers["fid"][name] > numbers["fid"]["clean"] for name in ("noise", "blur"))
    assert len(CLASSES) * 2 > classifier_network.FEATURES
