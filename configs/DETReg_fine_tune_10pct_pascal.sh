#!/usr/bin/env bash
# DETReg (Bar et al., 2022, https://arxiv.org/abs/2106.04550): fine-tuning of Deformable DETR on 10 % of VOC
# trainval07+12, 200 epochs, rates drop after 150; evaluated on test2007.
#
# Expected: see the paper, sec. 4.
#   We have not trained it to the end ourselves, so there is no hardware and time to state.
# Run:      GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/DETReg_fine_tune_10pct_pascal.sh --batch_size 4
# Evaluate: ./configs/DETReg_fine_tune_10pct_pascal.sh --eval --resume exps/DETReg_fine_tune_10pct_pascal/checkpoint.pth
# Before:   ./configs/DETReg_top30_in.sh, or give --pretrain FILE_OR_URL.
# Flags that are given win. The data lies in $DATA_ROOT/pascal/VOCdevkit (DATA_ROOT is data unless set), or in
# --voc_path.
exec "${PYTHON:-python}" -u "$(dirname "$0")/../main.py" \
    --model deformable_detr --pretrain exps/DETReg_top30_in/checkpoint.pth \
    --filter_pct 0.1 --epochs 200 --lr_drop 150 --eval_every 10 --save_every 10 \
    --voc_path "${DATA_ROOT:-data}/pascal/VOCdevkit" --output_dir exps/DETReg_fine_tune_10pct_pascal "$@"
