"""What a run leaves for people to read: kept checkpoints, the table of classes."""
import pytest

import main
from models import build_model
from util import recipes
from util.errors import InputError


@pytest.mark.parametrize("flags, epochs", [
    (("--imagenet_path", "x"), 20), (("--coco_path", "x"), 100), (("--voc_path", "x"), 100),
    (("--coco_path", "x", "--model", "deformable_detr"), 5), (("--dataset", "imagenet"), 5),
    (("--dataset", "imagenet", "--model", "detr"), 5)])
def test_checkpoints_are_kept_as_often_as_by_the_published_programs(flags, epochs):
    args = recipes.resolve(main.get_args_parser().parse_args(["--device", "cpu", *flags]))
    assert main.keep_every(args) == epochs


def test_the_table_of_classes_has_twenty_and_counts_the_rest(capsys):
    main._print_per_class({"dog": (0.123, 0.5), "giraffe": (-1.0, -1.0)}, "bbox")
    assert capsys.readouterr().out == "dog      bbox AP  12.3  AP50  50.0\ngiraffe  bbox AP     -  AP50     -\n"
    main._print_per_class({f"class {number:02}": (0.5, 1.0) for number in range(23)}, "segm")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21 and lines[-1] == "… and 3 more classes"
    assert lines[19] == "class 19  segm AP  50.0  AP50 100.0"


def test_a_model_is_evaluated_with_its_number_of_classes(tiny_args):
    """As UP-DETR's official VOC model, of 20 classes where the annotations need 21."""
    args = tiny_args(num_classes=20, eval=True, resume="voc.pth")
    checkpoint = {"model": build_model(args)[0].state_dict()}
    main._check_classes(args, checkpoint, 20)
    args.num_classes = 21
    with pytest.raises(InputError, match="^--num_classes 21 contradicts --resume voc.pth, whose model has 20$"):
        main._check_classes(args, checkpoint, 21)
    with pytest.raises(InputError, match="^--resume voc.pth has a model of 20 classes but the annotations need 21; to "
                                         "evaluate it as it is, give --num_classes 20$"):
        main._check_classes(args, checkpoint, None)
