#!/usr/bin/env bash
# DETReg (Bar et al., 2022, https://arxiv.org/abs/2106.04550): fine-tuning of Deformable DETR on 10 % of COCO
# train2017, 400 epochs at one rate. The images are the same in every run.
#
# Expected: see the paper, sec. 4.
#   We have not trained it to the end ourselves, so there is no hardware and time to state.
# Run:      GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/DETReg_fine_tune_10pct_coco.sh --batch_size 3
# Evaluate: ./configs/DETReg_fine_tune_10pct_coco.sh --eval --resume exps/DETReg_fine_tune_10pct_coco/checkpoint.pth
# Before:   ./configs/DETReg_top30_coco.sh, or give --pretrain FILE_OR_URL.
# Flags that are given win. The data lies in $DATA_ROOT/MSCoco (DATA_ROOT is data unless set), or in --coco_path.
exec "${PYTHON:-python}" -u "$(dirname "$0")/../main.py" \
    --model deformable_detr --pretrain exps/DETReg_top30_coco/checkpoint.pth \
    --filter_pct 0.1 --epochs 400 --lr_drop 400 --eval_every 10 --save_every 10 \
    --coco_path "${DATA_ROOT:-data}/MSCoco" --output_dir exps/DETReg_fine_tune_10pct_coco "$@"
