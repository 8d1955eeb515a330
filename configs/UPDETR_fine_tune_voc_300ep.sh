#!/usr/bin/env bash
# UP-DETR, ResNet-50: fine-tuning on Pascal VOC trainval07+12, 300 epochs, rates drop after 200
# (Dai et al., 2021, https://arxiv.org/abs/2011.09094).
#
# Expected: AP 57.2 on test2007 (the paper).
#   We have not trained it to the end ourselves, so there is no hardware and time to state.
# Run:      GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/UPDETR_fine_tune_voc_300ep.sh
# Evaluate: ./configs/UPDETR_fine_tune_voc_300ep.sh --eval --resume FILE_OR_URL
# Flags that are given win. It starts from what configs/UPDETR_pretrain.sh leaves, or from --pretrain FILE_OR_URL. The
# data lies in $DATA_ROOT/pascal/VOCdevkit (DATA_ROOT is data unless set), or in --voc_path.
exec "${PYTHON:-python}" -u "$(dirname "$0")/../main.py" \
    --pre_norm --lr_backbone 5e-5 --epochs 300 --lr_drop 200 --pretrain exps/UPDETR_pretrain/checkpoint.pth \
    --voc_path "${DATA_ROOT:-data}/pascal/VOCdevkit" --output_dir exps/UPDETR_fine_tune_voc_300ep "$@"
