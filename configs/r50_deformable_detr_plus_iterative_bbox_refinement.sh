#!/usr/bin/env bash
# Deformable DETR, ResNet-50, four feature levels, iterative bounding box refinement
# (Zhu et al., 2021, https://arxiv.org/abs/2010.04159): COCO train2017, 50 epochs, rates drop after 40.
#
# Expected: for the same model MMDetection reports AP 46.2 with a total batch of 32 images
#   (https://github.com/open-mmlab/mmdetection, configs/deformable_detr).
#   We have not trained it to the end ourselves, so there is no hardware and time to state.
# Run:      GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/r50_deformable_detr_plus_iterative_bbox_refinement.sh --batch_size 4
# Evaluate: ./configs/r50_deformable_detr_plus_iterative_bbox_refinement.sh --eval --resume FILE_OR_URL
# Flags that are given win. The data lies in $DATA_ROOT/MSCoco (DATA_ROOT is data unless set), or in --coco_path.
exec "${PYTHON:-python}" -u "$(dirname "$0")/../main.py" \
    --model deformable_detr --with_box_refine \
    --coco_path "${DATA_ROOT:-data}/MSCoco" --output_dir exps/r50_deformable_detr_plus_iterative_bbox_refinement "$@"
