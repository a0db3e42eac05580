"""What Q-VLM says, or refuses, of samples and pairs that have nothing to tell."""

from pathlib import Path

import pytest

from recon.errors import ConfigError
from recon.methods import dependency_survey
from tests.engine.tiny_run import trainer_for
from tests.methods.q_vlm_run import QuestionData, Questions, fit, method
from tests.models.tiny_pictures import tiny_question, write_tiny_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pictures(tmp_path_factory.mktemp("pictures"))


def test_refuses_to_weigh_the_pictures_of_texts_alone(pictures: Path, tmp_path: Path) -> None:
    data = QuestionData()
    texts = [tiny_question(seed) for seed in (3, 7)]
    data.calibration_set_ = Questions(texts, [tiny_question(0)])  # type: ignore[assignment]
    module = method(pictures, image_weight="mbq", rounding="none", audited=0)
    with pytest.raises(ConfigError, match=r"image_weight is mbq, .* 0 calibration samples have"):
        trainer_for(tmp_path, every=1000).fit(module, data)


def test_one_pair_has_no_correlation(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(dependency_survey, "rank_zero_info", said.append)
    module = method(pictures, audited=1, rounding="none")
    fit(tmp_path, module)
    assert module.findings["dependency"]["spearman"] is None
    assert said == [
        "Spearman's correlation of entropy and the true dependency over 1 pair of layers: none, "
        "one pair has no correlation."
    ]
