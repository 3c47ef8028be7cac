# two nodes' worth of answers on one
NPROC_PER_NODE=8 \
swift rlhf \
    --rlhf_type grpo \
    --model some/model \
    --dataset some/data#1000 \
    --train_type full \
    --torch_dtype bfloat16 \
    --beta 0.0 \
    --epsilon 3e-4 \
    --epsilon_high 4e-4 \
    --importance_sampling_level sequence \
    --steps_per_generation 4 \
    --gradient_accumulation_steps 1 \
    --per_device_train_batch_size 2 \
    --num_generations 16 \
    --max_completion_length 8192 \
    --learning_rate 1e-6 \
    --warmup_ratio 0.05 \
    --reward_funcs accuracy format \
    --use_vllm true \
    --vllm_gpu_memory_utilization 0.6 \
    --dynamic_sample \
    --deepspeed zero3
