#!/usr/bin/env bash
# Deformable DETR, ResNet-50-DC5, the deepest feature map alone (stride 16)
# (Zhu et al., 2021, https://arxiv.org/abs/2010.04159): COCO train2017, 50 epochs, rates drop after 40.
#
# Expected: see the paper.
#   We have not trained it to the end ourselves, so there is no hardware and time to state.
# Run:      GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/r50_deformable_detr_single_scale_dc5.sh --batch_size 4
# Evaluate: ./configs/r50_deformable_detr_single_scale_dc5.sh --eval --resume FILE_OR_URL
# Flags that are given win. The data lies in $DATA_ROOT/MSCoco (DATA_ROOT is data unless set), or in --coco_path.
exec "${PYTHON:-python}" -u "$(dirname "$0")/../main.py" \
    --model deformable_detr --num_feature_levels 1 --dilation \
    --coco_path "${DATA_ROOT:-data}/MSCoco" --output_dir exps/r50_deformable_detr_single_scale_dc5 "$@"
