#!/usr/bin/env bash
# DETReg (Bar et al., 2022, https://arxiv.org/abs/2106.04550): pre-training of DETR on ImageNet's images, 30
# regions of each: 60 epochs, rates drop after 40.
#
# Expected: a detector of regions, to be fine-tuned; see the paper, sec. 4, for what comes of it.
#   We have not trained it to the end ourselves, so there is no hardware and time to state.
# Run:      GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/DETReg_top30_in_detr.sh --batch_size 24
# Before:   python -m tools.cache_proposals --imagenet_path data/ilsvrc/train --cache_path cache/ilsvrc --num_workers 16
#   and add --cache_path cache/ilsvrc; else selective search runs in every epoch anew.
# Fine-tune: python main.py --pre_norm --coco_path data/MSCoco --pretrain exps/DETReg_top30_in_detr/checkpoint.pth
# Flags that are given win. The images lie in $DATA_ROOT/ilsvrc/train (DATA_ROOT is data unless set), or in
# --imagenet_path.
exec "${PYTHON:-python}" -u "$(dirname "$0")/../main.py" \
    --model detr --pre_norm --dataset_file regions --max_prop 30 --object_embedding_loss --lr_backbone 0 \
    --imagenet_path "${DATA_ROOT:-data}/ilsvrc/train" --output_dir exps/DETReg_top30_in_detr "$@"
