"""Greedy answers and likelihoods, against the public class."""

import json
from pathlib import Path

import pytest
import torch

from recon.models.answering import AnsweringPipeline
from tests.models.tiny_vlm import FAMILIES, tiny_vlm_sample, write_tiny_vlm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pictures", [0, 2])
def test_an_answer_takes_the_likeliest_token_each_time(
    family: str, pictures: int, tmp_path: Path
) -> None:
    adapter = FAMILIES[family][0](str(write_tiny_vlm(tmp_path, family)))
    pipeline = adapter.pipeline("cpu")
    prompt = tiny_vlm_sample(family, pictures)
    del prompt["labels"]
    said = pipeline.answer(prompt, max_new_tokens=4, end_tokens=[])
    whole = dict(prompt)
    for token in said.tolist():
        with torch.no_grad():
            logits = pipeline.network(**adapter.call_arguments(whole, "cpu")).logits
        # Keys and values that are kept round otherwise than a whole forward: ties apart, the same.
        assert float(logits[0, -1].max() - logits[0, -1, token]) < 1e-5
        whole["input_ids"] = torch.cat([whole["input_ids"], torch.tensor([[token]])], dim=1)
    assert 1 <= len(said) <= 4


def test_an_answer_ends_where_it_is_told(tmp_path: Path) -> None:
    adapter = FAMILIES["llava"][0](str(write_tiny_vlm(tmp_path, "llava")))
    pipeline = adapter.pipeline("cpu")
    prompt = tiny_vlm_sample("llava")
    first = int(pipeline.answer(prompt, 3, [])[0])
    assert pipeline.answer(prompt, 3, [first]).tolist() == [first]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    assert adapter.pipeline("cpu").answer(prompt, 3, []).tolist() == [first]


def test_likelihoods_are_those_of_the_public_loss(tmp_path: Path) -> None:
    adapter = FAMILIES["llava"][0](str(write_tiny_vlm(tmp_path, "llava")))
    pipeline: AnsweringPipeline = adapter.pipeline("cpu")
    sample = tiny_vlm_sample("llava")
    likely, tokens = pipeline.log_probabilities(sample)
    assert tokens.tolist() == sample["labels"][0, -2:].tolist()
    given = adapter.call_arguments(sample, "cpu")
    with torch.no_grad():
        expected = pipeline.network(**given, labels=sample["labels"]).loss
    found = -likely.gather(1, tokens[:, None]).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
