#!/usr/bin/env bash
# UP-DETR's ablation with a single query patch (M = 1), otherwise as configs/UPDETR_pretrain.sh
# (Dai et al., 2021, https://arxiv.org/abs/2011.09094): 60 epochs, rates drop after 40.
#
# Expected: see the paper's ablations.
#   We have not trained it to the end ourselves, so there is no hardware and time to state.
# Run:      GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/UPDETR_pretrain_1patch.sh
# Then:     ./configs/UPDETR_fine_tune_voc_150ep.sh --pretrain exps/UPDETR_pretrain_1patch/checkpoint.pth \
#               --output_dir exps/UPDETR_pretrain_1patch_voc
# Flags that are given win. The images lie in $DATA_ROOT/ilsvrc/train (DATA_ROOT is data unless set), or in any folder
# tree, --imagenet_path. The backbone starts from SwAV's weights (--load_backbone).
exec "${PYTHON:-python}" -u "$(dirname "$0")/../main.py" \
    --pre_norm --num_patches 1 --feature_recon --fre_cnn --batch_size 32 --epochs 60 --lr_drop 40 \
    --imagenet_path "${DATA_ROOT:-data}/ilsvrc/train" --output_dir exps/UPDETR_pretrain_1patch "$@"
