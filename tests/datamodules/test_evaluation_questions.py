"""Questions of an evaluation: how long they may be, and that their pictures fill no memory."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
from PIL import Image

from recon.datamodules.question_answering import QuestionAnswering
from recon.datamodules.questions import Columns, Different
from recon.errors import ConfigError
from recon.models.llava import Llava
from tests.datamodules.tiny_chat import examples, picture, write_tiny_chat

WORDS = Columns(image=None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("chat"))


def asked(folder: Path, *lengths: int) -> QuestionAnswering:
    """Six short questions to calibrate on, and test questions of so many words."""
    from datasets import Dataset, DatasetDict

    texts = [f"which colour {'is ' * index}?" for index in range(6)]
    tests = [f"what {'it ' * (words - 1)}".strip() for words in lengths]
    DatasetDict(
        train=Dataset.from_dict({"question": texts, "answer": ["red"] * 6}),
        test=Dataset.from_dict({"question": tests, "answer": ["red"] * len(tests)}),
    ).save_to_disk(folder)
    return QuestionAnswering(
        dataset=str(folder), columns=WORDS, num_samples=4, held_out_samples=1,
        num_test_questions=None,
    )  # fmt: skip


def batches(module: QuestionAnswering, adapter: Llava) -> list[Any]:
    """What an evaluation is handed."""
    trainer: Any = SimpleNamespace(lightning_module=SimpleNamespace(adapter=adapter))
    module.trainer = trainer
    return list(module.test_dataloader())


def test_every_question_is_measured_before_the_first_is_asked(
    teacher: Path, tmp_path: Path
) -> None:
    module, adapter = asked(tmp_path, 3, 4, 90), Llava(str(teacher))
    module.check(adapter)  # calibration does not wait for it
    with pytest.raises(ConfigError, match=r"Question 2 of test_dataset, .* has 94 tokens with its"):
        batches(module, adapter)


def test_max_tokens_is_no_limit_of_questions_that_are_only_asked(
    teacher: Path, tmp_path: Path
) -> None:
    module, adapter = asked(tmp_path, 40, 50), Llava(str(teacher), max_tokens=16)
    module.check(adapter)
    (batch,) = batches(module, adapter)
    assert [sample["input_ids"].shape[1] for sample in batch["forced"]] == [44, 54]


def test_pictures_of_an_evaluation_are_read_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as Pictures

    read: list[ref[Image.Image]] = []
    convert = Image.Image.convert

    def watched(shown: Image.Image, *given: Any) -> Image.Image:
        made = convert(shown, *given)
        read.append(ref(made))
        return made

    monkeypatch.setattr(Image.Image, "convert", watched)
    rows = {"image": [picture((9 * i, 0, 0)) for i in range(8)], "question": ["what ?"] * 8}
    features = Features(image=Pictures(), question=Value("string"), answer=Value("string"))
    Dataset.from_dict({**rows, "answer": ["red"] * 8}, features=features).save_to_disk(tmp_path)
    found = QuestionAnswering(dataset=str(tmp_path), num_test_questions=None).test_examples
    gc.collect()
    assert len(found) == 8 <= len(read)
    assert all(each() is None for each in read)
    third = found[2]
    assert third.pictures[0].getpixel((0, 0)) == (18, 0, 0)
    assert third.content == found.contents[2]


def test_different_examples_are_the_first_of_their_content() -> None:
    one, two, three = examples(3)
    found = Different([one, two, one, three], None, "these")
    assert list(found) == found[:] == [one, two, three]
    assert found.asked == [example.content + example.answer for example in (one, two, three)]
    assert list(Different([one, one, two, three], 2, "these")) == [one, two]
    with pytest.raises(ConfigError, match="3 different examples are asked of these, which has 2"):
        Different([one, one, two], 3, "these")
