"""A small network that looks at pictures of the world, for metrics that compare features.

Fréchet and kernel distances need features in which unlike pictures lie apart. Those of Inception
tell dogs from cars; these tell what the world's pictures differ in: the class, where the shape is
and how large, the backdrop, and how clean the picture is.
"""

from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recon.atomic import whole_file
from recon.zoo.image_scenes import CLASSES, SIDE

FEATURES = 32
"""Fewer than the 96 pictures that an evaluation samples by default: a covariance of more features
than pictures is singular."""
ESTIMATES = ("x", "y", "radius", "backdrop", "noise", "blur", "blocks")
"""What is estimated beside the class, all in about [-1, 1]: position, size and backdrop of the
scene, and the shares of three faults, each in [0, 1]."""
FILE = "model.safetensors"

_WIDTHS = (3, 24, 48, 64, 64)


class Classifier(nn.Module):
    """Four convolutions that halve the picture, and features that the answers are read from.

    A new one is untrained; `load` gives the shipped one.
    """

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(_WIDTHS):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(8, outputs), nn.SiLU()]
        last = SIDE // 2 ** (len(_WIDTHS) - 1)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(_WIDTHS[-1] * last**2, FEATURES))
        # Features of unit variance: no one of them makes the distance by its mere scale.
        self.standardised = nn.BatchNorm1d(FEATURES, affine=False)
        self.classes = nn.Linear(FEATURES, len(CLASSES))
        self.estimates = nn.Linear(FEATURES, len(ESTIMATES))

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [batch, 32] of pictures [batch, 3, 64, 64] in [0, 1].

        Raises:
            ValueError: The pictures have another shape.
        """
        if pictures.shape[1:] != (3, SIDE, SIDE):
            message = (
                f"The pictures have shape {list(pictures.shape)}; the world's classifier takes "
                f"[batch, 3, {SIDE}, {SIDE}]. Give the metrics an extractor for pictures of this "
                "size."
            )
            raise ValueError(message)
        return self.standardised(self.body(pictures * 2 - 1))

    def answers(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classes [batch, 24], and the ESTIMATES [batch, 7]."""
        features = self(pictures)
        return self.classes(features), self.estimates(features)


def save(classifier: Classifier, folder: Path) -> None:
    """Write the classifier's file, in half precision, into a folder that is made if missing."""
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in classifier.state_dict().items()
    }
    with whole_file(folder / FILE) as aside:
        save_file(state, aside)


def load(folder: Path | None = None) -> Classifier:
    """The classifier in a folder, None: the shipped one; in single precision, for evaluation.

    Raises:
        FileNotFoundError: The folder holds none.
    """
    if folder is None:
        from recon.zoo import folder as shipped

        folder = shipped("classifier")
    classifier = Classifier()
    classifier.load_state_dict(load_file(folder / FILE))
    return classifier.eval().requires_grad_(False)
