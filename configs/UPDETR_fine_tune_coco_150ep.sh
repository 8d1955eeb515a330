#!/usr/bin/env bash
# UP-DETR, ResNet-50: fine-tuning on COCO train2017, 150 epochs, rates drop after 100
# (Dai et al., 2021, https://arxiv.org/abs/2011.09094).
#
# Expected: see the paper, which reports this schedule too.
#   We have not trained it to the end ourselves, so there is no hardware and time to state.
# Run:      GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/UPDETR_fine_tune_coco_150ep.sh
# Evaluate: ./configs/UPDETR_fine_tune_coco_150ep.sh --eval --resume FILE_OR_URL
# Flags that are given win. It starts from what configs/UPDETR_pretrain.sh leaves, or from --pretrain FILE_OR_URL. The
# data lies in $DATA_ROOT/MSCoco (DATA_ROOT is data unless set), or in --coco_path.
exec "${PYTHON:-python}" -u "$(dirname "$0")/../main.py" \
    --pre_norm --lr_backbone 5e-5 --epochs 150 --lr_drop 100 --pretrain exps/UPDETR_pretrain/checkpoint.pth \
    --coco_path "${DATA_ROOT:-data}/MSCoco" --output_dir exps/UPDETR_fine_tune_coco_150ep "$@"
