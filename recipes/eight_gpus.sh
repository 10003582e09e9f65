#!/bin/sh
# CC12M (10.9 million pairs, about 1,090 webdataset shards) on the eight GPUs of one machine, half of the patch tokens
# merged away. 32 epochs of batches of 4,096 = 8 x 512.
#   recipes/eight_gpus.sh                                   ViT-B/32
#   MODEL=vit-b-16 MINI=256 recipes/eight_gpus.sh           ViT-B/16
# The same command starts the run and goes on with it. Estimated cost: docs/training.md.
SHARDS=${SHARDS:-cc12m}
MODEL=${MODEL:-vit-b-32}
MINI=${MINI:-512}
torchrun --nproc_per_node 8 -m modeling_mlip.hub.cli train \
    --config_name "$MODEL" --merge_ratio 0.5 --tokenizer_name openai/clip-vit-base-patch32 \
    --train_file "$SHARDS/*.tar" --streaming --image_column jpg --caption_column txt \
    --dataloader_num_workers 8 --max_steps 85156 \
    --per_device_train_batch_size 512 --mini_batch_size "$MINI" --bf16 \
    --learning_rate 5e-4 --warmup_steps 2000 --weight_decay 0.2 --max_grad_norm 1 \
    --save_steps 1000 --save_total_limit 2 --logging_steps 50 \
    --output_dir "runs/cc12m-$MODEL" --resume_from_checkpoint true "$@"
