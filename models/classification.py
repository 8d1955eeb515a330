"""How a query says its class: each style supplies its matching cost and its loss, for one matcher and one criterion.

Logits are [L, B, N, C] for L decoder layers, B images and N queries; `classes`, int64 [L, B, N], is what each query
should say, num_classes for "no object".
"""
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss


class SoftmaxClassification:
    """Softmax over the classes and, last, "no object", which has a smaller weight (Carion et al., 2020, sec. 3.1)."""

    def matching_cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Cost of every target with every query of its own image: minus the probability of the target's class.

        Args:
            logits: float32 [L, B, N, C + 1]; image, labels: int64 [T], each target's place in the batch and class.

        Returns:
            [L, T, N].
        """
        return -logits.softmax(-1)[:, image, :, labels].transpose(0, 1)

    def class_weights(self, num_classes: int, eos_coef: Optional[float]) -> Tensor:
        """Weight of each class in the loss, [C + 1]: `eos_coef` for "no object", 1 for others."""
        weights = torch.ones(num_classes + 1)
        weights[-1] = eos_coef
        return weights

    def normaliser(self, classes: Tensor, num_boxes: Tensor, class_weights: Optional[Tensor]) -> Tensor:
        """What a layer's loss is divided by, before processes are put together: [L], the queries' summed weights."""
        return class_weights[classes].sum((1, 2))

    def loss(self, logits: Tensor, classes: Tensor, normaliser: Tensor, class_weights: Optional[Tensor]) -> Tensor:
        """[L]: weighted mean cross-entropy of all queries."""
        weights = class_weights.to(logits.dtype)
        entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weights, reduction="none")
        return entropy.view(len(logits), -1).sum(1) / normaliser

    def finds_object(self, logits: Tensor) -> Tensor:
        """Whether a query's best class isn't "no object", bool [L, B, N]."""
        return logits.argmax(-1) != logits.shape[-1] - 1


class FocalClassification:
    """A sigmoid for each class, trained by the focal loss (Lin et al., 2017, eq. 5); there is no class for "no object".

    Args:
        alpha: weight of a query's own class, against 1 - alpha for the others (`--focal_alpha`).
        gamma: power that plays down what is already right.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        self.alpha, self.gamma = alpha, gamma

    def matching_cost(self, logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """As in `SoftmaxClassification`, from logits [L, B, N, C]: by how much the focal loss of the target's class is higher
        where it is the query's than where it isn't (Zhu et al., 2021, A.4)."""
        logits = logits[:, image, :, labels].transpose(0, 1)
        probability = logits.sigmoid()
        present = -self.alpha * (1 - probability) ** self.gamma * F.logsigmoid(logits)
        absent = -(1 - self.alpha) * probability ** self.gamma * F.logsigmoid(-logits)
        return present - absent

    def class_weights(self, num_classes: int, eos_coef: Optional[float]) -> None:
        """None: all classes weigh the same."""

    def normaliser(self, classes: Tensor, num_boxes: Tensor, class_weights: Optional[Tensor]) -> Tensor:
        """[L]: the number of objects."""
        return num_boxes.expand(len(classes))

    def loss(self, logits: Tensor, classes: Tensor, normaliser: Tensor, class_weights: Optional[Tensor]) -> Tensor:
        """[L]: focal loss of all queries and classes, per object (at least one)."""
        wanted = classes[..., None] == torch.arange(logits.shape[-1], device=logits.device)
        loss = sigmoid_focal_loss(logits, wanted.to(logits.dtype), self.alpha, self.gamma)
        return loss.sum((1, 2, 3)) / normaliser.clamp(min=1)

    def finds_object(self, logits: Tensor) -> Tensor:
        """Whether a class of a query is more probable than not, bool [L, B, N]."""
        return (logits > 0).any(-1)


Classification = Union[SoftmaxClassification, FocalClassification]
