#!/bin/sh
# CC3M (2.9 million pairs as img2dataset writes them, 332 webdataset shards) on one GPU, ViT-B/32, half of the patch
# tokens merged away. 32 epochs of batches of 1,024, of which 256 are in memory at a time.
# The same command starts the run and goes on with it. Estimated cost: docs/training.md.
SHARDS=${SHARDS:-cc3m}
mlip train --config_name vit-b-32 --merge_ratio 0.5 --tokenizer_name openai/clip-vit-base-patch32 \
    --train_file "$SHARDS/*.tar" --streaming --image_column jpg --caption_column txt \
    --dataloader_num_workers 12 --max_steps 90625 \
    --per_device_train_batch_size 1024 --mini_batch_size 256 --bf16 \
    --learning_rate 5e-4 --warmup_steps 2000 --weight_decay 0.2 --max_grad_norm 1 \
    --save_steps 1000 --save_total_limit 2 --logging_steps 50 \
    --output_dir runs/cc3m-b32 --resume_from_checkpoint true "$@"
