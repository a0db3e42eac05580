"""Conversations in the checkpoint's template, the set that is made of them, what is refused."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from recon.calibration.artefact import CalibrationSet
from recon.calibration.selection import SalientSelection, gram_norm
from recon.datamodules import question_answering
from recon.datamodules.chat import Chat
from recon.datamodules.question_answering import QuestionAnswering
from recon.datamodules.questions import Columns, Example, dataset_examples, parts
from recon.errors import CalibrationError, ConfigError
from recon.models.llava import Llava
from recon.types import Sample
from tests.datamodules.tiny_chat import COLOURS, TEMPLATE, examples, picture, write_tiny_chat
from tests.models.tiny_vlm import IMAGE, write_tiny_vlm


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain pictures in place of the embedded world."""

    def drawn(split: str, count: int, seed: int) -> Iterator[Example]:
        return islice(examples(count + 4, seed + (0 if split == "train" else 50)), count)

    monkeypatch.setattr(question_answering, "world_examples", drawn)


def data(**changed: Any) -> QuestionAnswering:
    settings: dict[str, Any] = {"num_samples": 4, "held_out_samples": 2, "num_test_questions": 3}
    return QuestionAnswering(**{**settings, **changed})


def made(teacher: Path, root: Path, **changed: Any) -> CalibrationSet:
    return data(**changed).calibrate(Llava(str(teacher)), root, torch.device("cpu"))


def read(sample: Sample, teacher: Path) -> tuple[str, str]:
    """The whole text and the labelled part of a sample, in words."""
    decode = Chat(Llava(str(teacher))).processor.tokenizer.decode
    labels = sample["labels"][0]
    return decode(sample["input_ids"][0]), decode(labels[labels >= 0])


# What a sample is


def test_a_sample_is_a_prompt_with_its_answer_and_nothing_else(teacher: Path) -> None:
    chat = Chat(Llava(str(teacher)))
    shown = Example((("user", "what colour is it ?"),), "red", (picture((255, 0, 0)),))
    sample = chat.forced(shown)
    assert set(sample) == {"input_ids", "pixel_values", "labels"}
    assert int((sample["input_ids"] == IMAGE).sum()) == 4
    text, answer = read(sample, teacher)
    assert text == f"USER: {'<image> ' * 4}what colour is it ? ASSISTANT: red </s>"
    assert answer == "red </s>"
    assert (sample["labels"] == -100).sum() + 2 == sample["labels"].numel()
    prompt = chat.prompt(shown)["input_ids"]
    assert torch.equal(prompt, sample["input_ids"][:, :-2])
    text_only = chat.forced(Example((("user", "which word ?"),), "blue"))
    assert set(text_only) == {"input_ids", "labels"}


def test_pictures_stand_where_markers_say(teacher: Path) -> None:
    two = (picture((9, 0, 0)), picture((0, 9, 0)))
    turns = (("user", "what <image> is <image> ?"), ("assistant", "red"), ("user", "which ?"))
    (role, content), *_ = parts(Example(turns, "blue", two))
    kinds = [part.get("text", part["type"]) for part in content]
    assert (role, kinds) == ("user", ["what", "image", "is", "image", "?"])
    assert [part["image"] for part in content if "image" in part] == list(two)
    text, answer = read(Chat(Llava(str(teacher))).forced(Example(turns, "blue", two)), teacher)
    picture_tokens = "<image> " * 4
    assert text.startswith(f"USER: what {picture_tokens}is {picture_tokens}? ASSISTANT: red </s>")
    assert answer == "blue </s>"
    with pytest.raises(ConfigError, match="have 1 <image> for 2 pictures"):
        list(parts(Example((("user", "what <image> ?"),), "red", two)))
    with pytest.raises(ConfigError, match="have 1 <image> for 0 pictures"):
        list(parts(Example((("user", "what <image> ?"),), "red")))


def test_refuses_a_template_that_hides_where_the_answer_begins(tmp_path: Path) -> None:
    other = TEMPLATE.replace("'ASSISTANT: ' if add", "'ASSISTANT: what ' if add")
    chat = Chat(Llava(str(write_tiny_chat(tmp_path, other))))
    with pytest.raises(ConfigError, match="writes other tokens before the answer"):
        chat.forced(examples(1)[0])


def test_refuses_a_folder_without_processor_or_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no processor that can be read"):
        Chat(Llava(str(write_tiny_vlm(tmp_path / "bare", "llava"))))
    folder = write_tiny_chat(tmp_path / "chat")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        Chat(Llava(str(folder)))


# The set


def test_given_samples_are_the_ones_drawn_and_are_found_again(
    teacher: Path, tmp_path: Path
) -> None:
    found = made(teacher, tmp_path)
    assert (len(found.samples), len(found.held_out)) == (4, 2)
    facts = found.samples.facts(0)
    assert facts["reason"].startswith("Given")
    assert [facts[name] for name in ("step", "seed", "C_diff", "C_quant", "score")] == [None] * 5
    assert [read(s, teacher)[1].split()[0] for s in found.samples] == ["red", "green", "A", "white"]
    # of their own lengths, a text without pixels among them
    assert ["pixel_values" in s for s in found.samples] == [True, True, False, True]
    assert all(
        s["input_ids"].shape[0] == 1 and not (s["input_ids"] == 0).any() for s in found.samples
    )
    stamp = (tmp_path / "calibration" / "calibration.json").stat().st_mtime_ns
    again = made(teacher, tmp_path)
    assert (tmp_path / "calibration" / "calibration.json").stat().st_mtime_ns == stamp
    assert again.fingerprint == found.fingerprint
    with pytest.raises(CalibrationError, match="made for another configuration: examples was"):
        made(teacher, tmp_path, seed=1)
    assert made(teacher, tmp_path, seed=1, stale="rebuild").fingerprint != found.fingerprint


def test_another_template_makes_another_set(teacher: Path, tmp_path: Path) -> None:
    made(teacher, tmp_path)
    other = write_tiny_chat(tmp_path / "other", TEMPLATE.replace("USER:", "hint"))
    with pytest.raises(CalibrationError, match="made for another configuration: processor was"):
        made(other, tmp_path)


def test_salient_samples_have_the_largest_gram_norm_per_token(
    teacher: Path, tmp_path: Path
) -> None:
    found = made(teacher, tmp_path, select="salient", num_samples=3, pool=8)
    adapter = Llava(str(teacher))
    chat = Chat(adapter)
    expected = []
    for example in examples(8):
        tokens = adapter.embed(chat.forced(example), "cpu")["hidden_states"][0].double()
        expected.append(float((tokens.T @ tokens).norm() / len(tokens)))
    scores = found.details["scores"]
    assert [row["C_quant"] for row in scores] == pytest.approx(expected)
    best = sorted(range(8), key=lambda index: -expected[index])[:3]
    assert [row["chosen"] for row in scores] == [
        best.index(i) + 1 if i in best else None for i in range(8)
    ]
    for sample, index in zip(found.samples, best, strict=True):
        assert torch.equal(sample["input_ids"], chat.forced(examples(8)[index])["input_ids"])
    assert found.samples.facts(0)["C_quant"] == pytest.approx(max(expected))


def test_a_score_does_not_grow_with_the_length() -> None:
    tokens = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([tokens, tokens])
    assert gram_norm(twice) / 10 == pytest.approx(float(gram_norm(tokens) / 5))


def test_farthest_point_works_on_conversations(teacher: Path, tmp_path: Path) -> None:
    sds = SalientSelection(diversity="farthest_point")
    found = made(teacher, tmp_path, select="salient", num_samples=3, pool=8, sds=sds)
    texts = [sample["input_ids"].tolist() for sample in found.samples]
    pixels = [s["pixel_values"].sum().item() if "pixel_values" in s else 0 for s in found.samples]
    assert len({str(pair) for pair in zip(texts, pixels, strict=True)}) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"held_out_samples": 0}, "held_out_samples must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"select": "salient", "pool": 3}, "num_samples is 4, but the pool has 3 candidates"),
        (
            {"select": "salient", "sds": SalientSelection(metric="stratified")},
            "spread over sampling steps, which conversations do not have",
        ),
    ],
)
def test_refuses_numbers_and_rules_that_cannot_work(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(**changed)


def test_refuses_a_question_of_both_calibration_and_evaluation(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(split: str, count: int, seed: int) -> Iterator[Example]:
        return iter(examples(count))

    monkeypatch.setattr(question_answering, "world_examples", same)
    with pytest.raises(ConfigError, match="3 questions serve both calibration and evaluation"):
        data().check(Llava(str(teacher)))


def test_the_same_picture_and_words_are_the_same_content() -> None:
    one = Example((("user", "What  colour?"),), "red", (picture((1, 2, 3)),))
    assert one.content == Example((("user", "what colour?"),), "blue", one.pictures).content
    assert one.content != Example(one.turns, "red", (picture((1, 2, 4)),)).content
    assert one.content != Example((("user", "what shape?"),), "red", one.pictures).content


def test_refuses_samples_longer_than_the_limit(teacher: Path, tmp_path: Path) -> None:
    adapter = Llava(str(teacher), max_tokens=9)
    with pytest.raises(ConfigError, match="at most 9 tokens"):
        data().calibrate(adapter, tmp_path, torch.device("cpu"))


# Datasets


def science(folder: Path, **columns: Any) -> Path:
    from datasets import Dataset, DatasetDict, Features, Image, List, Value

    rows: dict[str, Any] = {
        "image": [picture((10 * i, 0, 0)) if i % 2 else None for i in range(12)],
        "question": [f"what colour is it {'hint ' * i}?" for i in range(12)],
        "choices": [["red", "blue"]] * 12,
        "answer": [i % 2 for i in range(12)],
        "hint": ["hint" if i == 0 else "" for i in range(12)],
        "subject": ["language" if i % 2 else "nature" for i in range(12)],
    }
    kinds = {
        "image": Image(),
        "choices": List(Value("string")),
        "answer": Value("int64"),
    }
    features = Features({name: kinds.get(name, Value("string")) for name in rows})
    whole = Dataset.from_dict(rows, features=features)
    DatasetDict(train=whole.select(range(9)), test=whole.select(range(9, 12))).save_to_disk(folder)
    return folder


SCIENCE = Columns(choices="choices", hint="hint", kind="subject")


def test_science_questions_are_read_by_their_columns(tmp_path: Path) -> None:
    folder = str(science(tmp_path / "science"))
    first, second, *_ = dataset_examples(folder, "train", SCIENCE, None, "dataset")
    assert first == Example(
        (("user", "hint\nwhat colour is it ?\nA. red\nB. blue"),),
        "A",
        kind="nature",
        choices=("red", "blue"),
    )
    assert (second.answer, second.kind, len(second.pictures)) == ("B", "language", 1)
    assert second.pictures[0].getpixel((0, 0)) == (10, 0, 0)


def test_calibrates_on_a_dataset_and_evaluates_on_its_test_split(
    teacher: Path, tmp_path: Path
) -> None:
    folder = str(science(tmp_path / "science"))
    module = data(dataset=folder, columns=SCIENCE, num_test_questions=None)
    found = module.calibrate(Llava(str(teacher)), tmp_path, torch.device("cpu"))
    assert len(found.samples) == 4
    assert [example.kind for example in module.test_examples] == ["language", "nature", "language"]
    assert module.evaluation_settings()["questions"] == 3
    same = data(dataset=folder, columns=SCIENCE, test_split="train")
    with pytest.raises(ConfigError, match="serve both calibration and evaluation"):
        same.check(Llava(str(teacher)))
    with pytest.raises(ConfigError, match=r"40 different examples are asked of dataset .* has 9"):
        data(dataset=folder, columns=SCIENCE, num_samples=38).check(Llava(str(teacher)))


def test_conversations_are_read_in_both_spellings(tmp_path: Path) -> None:
    from datasets import Dataset

    turns = [
        [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}],
        [{"role": "user", "content": "which ?"}, {"role": "assistant", "content": "blue"}],
    ]
    Dataset.from_dict({"messages": turns}).save_to_disk(tmp_path / "chat")
    columns = Columns(image=None, conversation="messages")
    found = list(dataset_examples(str(tmp_path / "chat"), "train", columns, None, "dataset"))
    assert found[0] == Example((("user", "what ?"),), "red")
    speakers = {"user": "human", "assistant": "gpt"}
    llava = [
        [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in conversation]
        for conversation in turns
    ]
    Dataset.from_dict({"messages": llava}).save_to_disk(tmp_path / "llava")
    assert found == list(
        dataset_examples(str(tmp_path / "llava"), "train", columns, None, "dataset")
    )
    Dataset.from_dict({"messages": [t[:1] for t in turns]}).save_to_disk(tmp_path / "cut")
    with pytest.raises(
        ConfigError, match=r"the speakers are \['user'\]; a conversation alternates"
    ):
        list(dataset_examples(str(tmp_path / "cut"), "train", columns, None, "dataset"))


def test_refuses_datasets_without_what_is_mapped(tmp_path: Path) -> None:
    folder = str(science(tmp_path / "science"))

    def first(**columns: Any) -> None:
        _ = dataset_examples(folder, "train", Columns(**columns), None, "dataset")[0]

    with pytest.raises(ConfigError, match=r"columns.hint is 'context', but dataset .*'choices'"):
        first(hint="context")
    with pytest.raises(ConfigError, match="the image column holds a str"):
        first(image="question", choices="choices")
    with pytest.raises(ConfigError, match="neither a number nor a letter nor a text of the 2"):
        first(answer="subject", choices="choices")
    with pytest.raises(
        ConfigError, match=r"has the splits \['test', 'train'\] and no 'validation'"
    ):
        dataset_examples(folder, "validation", SCIENCE, None, "dataset")
    with pytest.raises(ConfigError, match="is not a folder"):
        dataset_examples(str(tmp_path / "no"), "train", SCIENCE, None, "dataset")
    with pytest.raises(ConfigError, match="neither a conversation nor both question and answer"):
        Columns(question=None)


def _rank(rank: int, world: int, store: str, root: str, teacher: str, rows: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    salient(rows).calibrate(Llava(teacher), Path(root), torch.device("cpu"))
    distributed.destroy_process_group()


def salient(rows: str) -> QuestionAnswering:
    sds = SalientSelection(diversity="farthest_point")
    return data(dataset=rows, columns=SCIENCE, select="salient", num_samples=3, pool=7, sds=sds)


@pytest.mark.distributed
def test_two_ranks_choose_and_write_what_one_does(teacher: Path, tmp_path: Path) -> None:
    rows = str(science(tmp_path / "science"))
    alone = salient(rows).calibrate(Llava(str(teacher)), tmp_path / "one", torch.device("cpu"))
    given = (2, str(tmp_path / "store"), str(tmp_path / "two"), str(teacher), rows)
    multiprocessing.spawn(_rank, given, nprocs=2)  # type: ignore[attr-defined]
    together = CalibrationSet.load(tmp_path / "two" / "calibration")
    assert together.details["scores"] == alone.details["scores"]
    assert together.fingerprint == alone.fingerprint
    for one, other in zip(alone.samples, together.samples, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_colours_are_words_of_the_tokenizer(teacher: Path) -> None:
    tokenizer = Chat(Llava(str(teacher))).processor.tokenizer
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(list(COLOURS))
