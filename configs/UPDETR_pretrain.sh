#!/usr/bin/env bash
# UP-DETR, ResNet-50: pre-training on ImageNet's images without their labels
# (Dai et al., 2021, https://arxiv.org/abs/2011.09094): 60 epochs, rates drop after 40.
#
# Expected: AP 42.8 on COCO and 57.2 on Pascal VOC after fine-tuning for 300 epochs (the paper).
#   We have not trained it to the end ourselves, so there is no hardware and time to state.
# Run:      GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/UPDETR_pretrain.sh
# Then:     ./configs/UPDETR_fine_tune_{coco,voc}_{150,300}ep.sh
# Flags that are given win. The images lie in $DATA_ROOT/ilsvrc/train (DATA_ROOT is data unless set), or in any folder
# tree, --imagenet_path. The backbone starts from SwAV's weights (--load_backbone).
exec "${PYTHON:-python}" -u "$(dirname "$0")/../main.py" \
    --pre_norm --num_patches 10 --feature_recon --fre_cnn --batch_size 32 --epochs 60 --lr_drop 40 \
    --imagenet_path "${DATA_ROOT:-data}/ilsvrc/train" --output_dir exps/UPDETR_pretrain "$@"
