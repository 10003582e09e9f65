#!/bin/sh
# YFCC15M (14.8 million pairs, about 1,480 webdataset shards) on four machines of eight GPUs, ViT-B/16, half of the patch
# tokens merged away. 32 epochs of batches of 8,192 = 32 x 256. Start it on each machine:
#   HEAD=10.0.0.1 NODES=4 recipes/several_nodes.sh
# HEAD is the address of one of the machines. If the machines cannot resolve each other's names, also set ADDRESS to the
# address of this machine, and on the head to that of HEAD. runs/ and the shards are on a disk that all machines share;
# without one, add --save_on_each_node.
# If a machine fails, start the command on it again: the others wait for it, and all continue from the last checkpoint,
# at most RESTARTS times. If HEAD fails, the command ends on the others too: start it again on all of them.
# Estimated cost: docs/training.md.
SHARDS=${SHARDS:-yfcc15m}
HEAD=${HEAD:-localhost}
NODE=
# A surviving head tells a node that joins later its address only if torchrun does not share one store (torch 2.14).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ -n "$ADDRESS" ]; then
    [ "$ADDRESS" = "$HEAD" ] && IS_HEAD=1 || IS_HEAD=0
    NODE="--local_addr $ADDRESS --rdzv_conf is_host=$IS_HEAD"
fi
torchrun --nnodes "${NODES:-4}" --nproc_per_node "${PROCESSES:-8}" --max_restarts "${RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_id yfcc15m --rdzv_endpoint "$HEAD:${PORT:-29500}" $NODE \
    -m modeling_mlip.hub.cli train \
    --config_name vit-b-16 --merge_ratio 0.5 --tokenizer_name openai/clip-vit-base-patch32 \
    --train_file "$SHARDS/*.tar" --streaming --image_column jpg --caption_column txt \
    --dataloader_num_workers 8 --max_steps 57812 \
    --per_device_train_batch_size 256 --mini_batch_size 256 --bf16 \
    --learning_rate 5e-4 --warmup_steps 2000 --weight_decay 0.2 --max_grad_norm 1 \
    --save_steps 1000 --save_total_limit 2 --logging_steps 50 \
    --output_dir runs/yfcc15m-b16 --resume_from_checkpoint true "$@"
