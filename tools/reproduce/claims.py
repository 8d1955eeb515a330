"""What the papers claim, as differences between trainings, and what a reproduction says about it."""
import statistics
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from tools.reproduce.results import Figures

# A quantity whose sign is claimed: of one seed, or None if that seed lacks a training.
Quantity = Callable[[Figures, int], Optional[float]]


class Claim(NamedTuple):
    """`quantity` is claimed to be above zero.

    Attributes:
        published: the papers' figures, if they are known to us.
        unit: of the quantity.
    """

    text: str
    source: str
    quantity: Quantity
    published: str = ""
    unit: str = "AP"


def gain(row: str, over: str, run: str, figure: str = "AP") -> Quantity:
    """How much higher a figure of one row is than another's."""
    def quantity(figures: Figures, seed: int) -> Optional[float]:
        mine, theirs = figures.of(seed, row, run, figure), figures.of(seed, over, run, figure)
        return None if mine is None or theirs is None else mine - theirs
    return quantity


def minus(first: Quantity, second: Quantity) -> Quantity:
    """The difference of two quantities."""
    def quantity(figures: Figures, seed: int) -> Optional[float]:
        mine, theirs = first(figures, seed), second(figures, seed)
        return None if mine is None or theirs is None else mine - theirs
    return quantity


def own_gain(figure: str, over: str, row: str) -> Quantity:
    """How much higher a figure of a pre-training is than another of the same."""
    def quantity(figures: Figures, seed: int) -> Optional[float]:
        mine, theirs = figures.of(seed, row, "pretrain", figure), figures.of(seed, row, "pretrain", over)
        return None if mine is None or theirs is None else mine - theirs
    return quantity


UPDETR, DETREG = "UP-DETR", "DETReg"
CLAIMS: List[Claim] = [
    Claim("UP-DETR starts better than scratch, short schedule", f"{UPDETR}, tables 1 and 3, figures 1 and 4",
          gain("updetr", "scratch", "short"), "VOC 49.9 → 56.1, COCO 39.7 → 40.5 (150 epochs)"),
    Claim("UP-DETR starts better than scratch, long schedule", f"{UPDETR}, tables 1 and 3, figures 1 and 4",
          gain("updetr", "scratch", "long"), "VOC 54.1 → 57.2, COCO 42.1 → 42.8 (300 epochs)"),
    Claim("the gain is larger in the short schedule", f"{UPDETR}, table 1",
          minus(gain("updetr", "scratch", "short"), gain("updetr", "scratch", "long")), "VOC +6.2 and +3.1"),
    Claim("one patch already helps", f"{UPDETR}, table 4", gain("updetr_1patch", "scratch", "short")),
    Claim("several patches help more than one", f"{UPDETR}, table 4", gain("updetr", "updetr_1patch", "short")),
    Claim("the model finds patches better than another image's", f"{UPDETR}, figure 5",
          own_gain("pretext", "control", "updetr"), unit="IoU"),
    Claim("a frozen CNN is better than a trained one", f"{UPDETR}, ablations",
          gain("updetr", "updetr_unfrozen_cnn", "short")),
    Claim("feature reconstruction helps", f"{UPDETR}, ablations", gain("updetr", "updetr_no_reconstruction", "short")),
    Claim("the attention mask lowers the pretext's loss", f"{UPDETR}, figure 6",
          gain("updetr_no_attention_mask", "updetr", "pretrain", "loss"), unit="loss"),
    Claim("DETReg starts better than scratch on all labels", f"{DETREG}", gain("detreg", "scratch", "short")),
    *(Claim(f"DETReg starts better than scratch on {percent} % of the labels", f"{DETREG}, few labels",
            gain("detreg", "scratch", f"labels_{percent}")) for percent in (10, 5)),
    Claim("DETReg starts Deformable DETR better than scratch on all labels", f"{DETREG}",
          gain("deformable_detreg", "deformable_scratch", "short")),
    *(Claim(f"DETReg starts Deformable DETR better than scratch on {percent} % of the labels", f"{DETREG}, few labels",
            gain("deformable_detreg", "deformable_scratch", f"labels_{percent}")) for percent in (10, 5)),
]
# Asked, but claimed by no paper.
QUESTIONS: List[Claim] = [
    Claim("attention mask, after fine-tuning", "", gain("updetr", "updetr_no_attention_mask", "short")),
    Claim("query shuffle", "", gain("updetr_query_shuffle", "updetr", "short")),
    Claim("matching within groups", "ours", gain("updetr_within_group", "updetr", "short")),
    Claim("matching within groups: IoU of found patches over the control's", "ours",
          minus(own_gain("pretext", "control", "updetr_within_group"), own_gain("pretext", "control", "updetr")),
          unit="IoU"),
    Claim("matched within groups, over scratch", "ours", gain("updetr_within_group", "scratch", "short")),
]


class Finding(NamedTuple):
    """What came of a claim: the quantity of each seed and their mean."""

    claim: Claim
    values: List[float]
    mean: float

    @property
    def verdict(self) -> str:
        """Where the sign holds: "in every seed", "on average" or "no"."""
        return "in every seed" if min(self.values) > 0 else "on average" if self.mean > 0 else "no"


def examine(figures: Figures, claims: List[Claim]) -> List[Finding]:
    """A finding for each claim on which there are trainings; those on none are left out."""
    findings = []
    for claim in claims:
        values = [value for seed in figures.seeds if (value := claim.quantity(figures, seed)) is not None]
        if values:
            findings.append(Finding(claim, values, statistics.mean(values)))
    return findings


def as_data(findings: List[Finding]) -> List[Dict[str, Any]]:
    """For results.json."""
    return [{"claim": finding.claim.text, "source": finding.claim.source, "unit": finding.claim.unit,
             "by_seed": finding.values, "mean": finding.mean, "holds": finding.verdict} for finding in findings]
