"""Questions about pictures: the calibration set of a run, and what it is evaluated on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Subset

from recon.calibration import ranks
from recon.calibration.artefact import Fingerprint
from recon.calibration.selection import SalientSelection
from recon.datamodules.chat import Chat, check_lengths
from recon.datamodules.conversations import check_rule, write_conversations
from recon.datamodules.kept import KeptCalibration
from recon.datamodules.prompts import text_hash
from recon.datamodules.questions import (
    Columns,
    Different,
    Example,
    dataset_examples,
    world_examples,
)
from recon.engine.data import Sampling
from recon.errors import ConfigError
from recon.models.adapter import ModelAdapter
from recon.models.answering import AnsweringPipeline
from recon.models.vlm import VisionLanguageAdapter


class QuestionAnswering(KeptCalibration):
    """Image-text pairs in the checkpoint's chat template, answers teacher-forced.

    Nothing is generated to calibrate: a sample is a prompt with its right answer. Conversations
    are not padded; each has its own length, so that no filling enters a statistic. Texts without a
    picture are welcome. Evaluation asks for greedy answers.

    Args:
        dataset: Local `datasets` folder that calibration draws from; null: the embedded world.
        split: Its split, where it has several.
        test_dataset: As dataset, for evaluation; null: dataset, or the embedded world.
        test_split: Split of test_dataset, where it has several.
        columns: Which columns hold what.
        num_samples: Calibration samples. Source: 64 image-text pairs, Q-VLM.
        held_out_samples: Further ones that nothing is trained on.
        select: `given`: as drawn (Q-VLM); `salient`: those of the pool that the rule `sds` ranks
            highest by the tokens entering the language model (see `write_conversations`).
        pool: Candidates of `salient`; null: four times num_samples.
        sds: The rule of `salient`; its top_k is num_samples.
        seed: Draws calibration and held-out samples.
        num_test_questions: Questions of validation, test and prediction, from the first on; null:
            all of test_dataset (200 of the embedded world).
        test_seed: Draws the embedded world's.
        test_batch_size: Questions handed over at a time; each is asked alone.
        max_new_tokens: Tokens after which an answer is cut.
        folder: Where the set is kept; null: `calibration` in the run folder. Runs that share a
            folder share the set.
        stale: What to do with a set in that folder that was made for another configuration or
            teacher, or is damaged: refuse it, or build a new one in its place.
        baselines: Folder that keeps what the teacher and round-to-nearest answer in an evaluation,
            for other runs to compare with; null: asked anew every time.

    Raises:
        ConfigError: A number is out of range, or the rule cannot select.
    """

    def __init__(
        self,
        dataset: str | None = None,
        split: str = "train",
        test_dataset: str | None = None,
        test_split: str = "test",
        columns: Columns = Columns(),  # noqa: B008 - frozen, so safe to share
        num_samples: int = 64,
        held_out_samples: int = 16,
        select: Literal["given", "salient"] = "given",
        pool: int | None = None,
        sds: SalientSelection = SalientSelection(),  # noqa: B008 - frozen, so safe to share
        seed: int = 0,
        num_test_questions: int | None = 200,
        test_seed: int = 0,
        test_batch_size: int = 8,
        max_new_tokens: int = 16,
        folder: str | None = None,
        stale: Literal["refuse", "rebuild"] = "refuse",
        baselines: str | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.split = dataset, split
        self.test_dataset, self.test_split = test_dataset, test_split
        self.columns, self.select, self.sds, self.seed = columns, select, sds, seed
        self.num_samples, self.held_out_samples = num_samples, held_out_samples
        self.pool = 4 * num_samples if pool is None else pool
        self.num_test_questions, self.test_seed = num_test_questions, test_seed
        self.test_batch_size, self.max_new_tokens = test_batch_size, max_new_tokens
        self.folder, self.stale, self.baselines = folder, stale, baselines
        self._refuse_small()
        if select == "salient":
            check_rule(sds, num_samples, self.pool)

    # Before anything heavy

    def check(self, adapter: ModelAdapter) -> None:
        """Refuse data and folders that the run would stumble over later.

        Raises:
            ConfigError: A dataset is missing or too small, lacks a mapped column, or shares a
                question with the evaluation; the processor or its template is missing; the first
                samples do not fit the network.
        """
        chat = self._chat_of(adapter)
        pool, held_out = self.calibration_examples
        trained = {example.content for example in (*pool, *held_out)}
        contents = self.test_examples.contents
        shared = [index for index, content in enumerate(contents) if content in trained]
        if shared:
            raise ConfigError(
                f"{len(shared)} questions serve both calibration and evaluation, with the same "
                f"pictures, such as {self.test_examples[shared[0]].question!r}. Evaluate on "
                "questions that were not calibrated on: change dataset, test_dataset or their "
                "splits."
            )
        for example in (pool[0], held_out[0]):
            chat.forced(example)
        check_lengths(self._chat_of(adapter, asks=True), self.test_examples[:1], "test_dataset")

    @cached_property
    def calibration_examples(self) -> tuple[list[Example], list[Example]]:
        """Candidates of calibration, and held-out examples, all of different content.

        Raises:
            ConfigError: As `check`.
        """
        candidates = self.num_samples if self.select == "given" else self.pool
        count = candidates + self.held_out_samples
        if self.dataset is None:
            world = list(world_examples("train", count, self.seed))
            found = Different(world, count, "the embedded world")
        else:
            drawn = dataset_examples(self.dataset, self.split, self.columns, self.seed, "dataset")
            found = Different(drawn, count, f"dataset {self.dataset!r}")
        return found[:candidates], found[candidates:]

    @cached_property
    def test_examples(self) -> Different:
        """What is asked in validation, test and prediction, in order; pictures are not kept.

        Raises:
            ConfigError: As `check`.
        """
        count, place = self.num_test_questions, self.test_dataset or self.dataset
        if place is None:
            world = list(world_examples("evaluation", count or 200, self.test_seed))
            return Different(world, count or 200, "the embedded world")
        drawn = dataset_examples(place, self.test_split, self.columns, None, "test_dataset")
        return Different(drawn, count, f"test_dataset {place!r}")

    def evaluation_settings(self) -> dict[str, Any]:
        """What an evaluation's numbers depend on, for its report."""
        return {
            "questions": len(self.test_examples),
            "questions_sha256": text_hash(self.test_examples.asked),
            "test_dataset": self.test_dataset or self.dataset or "embedded world",
            "test_seed": self.test_seed,
            "max_new_tokens": self.max_new_tokens,
            "decoding": "greedy",
        }

    # The calibration set

    @property
    def sample_counts(self) -> tuple[int, int, int]:
        """Calibration samples, held-out samples, and the one conversation of each."""
        return self.num_samples, self.held_out_samples, 1

    @property
    def sampling(self) -> Sampling:
        """No call of the network: candidates are scored by what enters it."""
        return Sampling(scored=self.pool if self.select == "salient" else 0)

    def sample_bytes(self, adapter: ModelAdapter, dtype: torch.dtype) -> int:
        """Bytes of the first candidate's tensors, its picture included."""
        pool, _ = self.calibration_examples
        return sum(tensor.nbytes for tensor in self._chat_of(adapter).forced(pool[0]).values())

    def fingerprint_of(self, adapter: ModelAdapter, device: torch.device) -> Fingerprint:
        """Examples, how they are chosen and worded, teacher and its floating type."""
        pool, held_out = self.calibration_examples
        rule = asdict(self.sds) if self.select == "salient" else {}
        return {
            "select": self.select,
            "num_samples": self.num_samples,
            "held_out_samples": self.held_out_samples,
            "seed": self.seed,
            "examples": text_hash([e.content + e.answer for e in (*pool, *held_out)]),
            "processor": _processor_hash(adapter.folder),
            "dtype": str(adapter.compute_dtype(device)),
            **{f"sds.{name}": value for name, value in rule.items()},
            **{f"teacher.{name}": value for name, value in adapter.identity().items()},
        }

    def build_set(
        self, folder: Path, adapter: ModelAdapter, fingerprint: Fingerprint, device: torch.device
    ) -> None:
        """See `KeptCalibration.build_set`.

        Raises:
            ConfigError: A sample does not fit the network.
            NumericsError: The tokens of a candidate hold NaN or Inf.
        """
        pool, held_out = self.calibration_examples
        write_conversations(
            folder,
            self._chat_of(adapter),
            pool,
            held_out,
            count=self.num_samples,
            rule=self.sds if self.select == "salient" else None,
            seed=self.seed,
            fingerprint=fingerprint,
            device=device,
        )

    # Evaluation

    def outputs(self, pipeline: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """For each question what the network answers, and how likely it finds the right answer.

        `text`: the greedy answer; `log_probabilities` [answer tokens, vocabulary] and `tokens`
        [answer tokens] of the right one.
        """
        assert isinstance(pipeline, AnsweringPipeline)
        chat = self._chat
        made = []
        for prompt, forced in zip(batch["inputs"], batch["forced"], strict=True):
            said = pipeline.answer(prompt, self.max_new_tokens, chat.end_tokens)
            likely, tokens = pipeline.log_probabilities(forced)
            text = chat.text(said)
            made.append({"text": text, "log_probabilities": likely, "tokens": tokens})
        return made

    def sampling_settings(self) -> dict[str, Any]:
        """See `CalibrationData.sampling_settings`."""
        return {"max_new_tokens": self.max_new_tokens, "end_tokens": list(self._chat.end_tokens)}

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """As `test_dataloader`; none within fit, where nothing is asked."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            return []
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of questions with their inputs, this rank's share.

        Raises:
            ConfigError: A question, of any rank's, does not fit the network.
        """
        # Here and not in `check`: it takes minutes for thousands, which calibration need not wait.
        check_lengths(self._chat, self.test_examples, "test_dataset")
        # The engine runs without Lightning's distributed sampler, so the shares are dealt here.
        share = range(ranks.rank(), len(self.test_examples), ranks.world())
        return DataLoader(
            Subset(self.test_examples, share),  # type: ignore[arg-type] # it has length and items
            batch_size=self.test_batch_size,
            shuffle=False,
            collate_fn=self._collate,
        )

    def predict_dataloader(self) -> DataLoader[Any]:
        """As `test_dataloader`."""
        return self.test_dataloader()

    # Inner parts

    def _collate(self, examples: Sequence[Example]) -> dict[str, list[Any]]:
        fields = ("question", "answer", "kind", "choices")
        batch = {name: [getattr(example, name) for example in examples] for name in fields}
        batch["inputs"] = [self._chat.prompt(example) for example in examples]
        batch["forced"] = [self._chat.forced(example) for example in examples]
        return batch

    @cached_property
    def _chat(self) -> Chat:
        assert self.trainer is not None
        return self._chat_of(cast(ModelAdapter, self.trainer.lightning_module.adapter), asks=True)

    def _chat_of(self, adapter: ModelAdapter, *, asks: bool = False) -> Chat:
        if not isinstance(adapter, VisionLanguageAdapter):
            raise ConfigError(
                f"QuestionAnswering shows pictures, which {type(adapter).__name__} does not see. "
                "Use the adapter of a vision-language model, or the data module of the adapter's "
                "family."
            )
        return Chat(adapter, asks=asks)

    def _refuse_small(self) -> None:
        refuse = partial("QuestionAnswering.{} must be at least {}, got {}.".format)
        least = {"num_samples": 1, "held_out_samples": 1, "pool": 1, "seed": 0, "test_seed": 0}
        least |= {"num_test_questions": 1, "test_batch_size": 1, "max_new_tokens": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(refuse(name, low, value))


def _processor_hash(folder: Path) -> str:
    """Of the files that turn conversations into inputs."""
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.model"))):
        if file.name not in ("config.json", "model.safetensors.index.json"):
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()
