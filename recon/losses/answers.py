"""What the tuning of a visual encoder minimises, beside an entropy: answers and distances."""

from torch import Tensor
from torch.nn import functional

from recon.errors import ConfigError


def answer_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens of an answer, in nats, each predicted from those before it.

    Args:
        logits: [1, tokens, vocabulary], as the network gives them.
        labels: [1, tokens]: tokens of the answer in their places, -100 elsewhere.

    Raises:
        ConfigError: There is no token of an answer behind the first place.

    Source: L_reg of Q-VLM (arXiv 2410.08119), eq. 10; the shift is that of transformers.
    """
    expected = labels[0, 1:].to(logits.device)
    answer = expected >= 0
    if not answer.any():
        raise ConfigError(
            "labels name no token of an answer: all are -100 or stand in the first place. Tuning "
            "the visual encoder needs teacher-forced answers; use the data module "
            "QuestionAnswering, or switch model.veo off."
        )
    return functional.cross_entropy(logits[0, :-1][answer].float(), expected[answer])


def relative_distance(found: Tensor, expected: Tensor) -> Tensor:
    """‖found - expected‖ / ‖expected‖, Frobenius, a scalar; its gradient reaches `found`.

    Source: L_err of Q-VLM, eq. 9. Deviates: relative, so that its weights have no units.
    """
    target = expected.detach().float()
    return (found.float() - target).norm() / target.norm()
