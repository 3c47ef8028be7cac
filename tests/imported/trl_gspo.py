# The paper's settings, as TRL's users write them.
from trl import GRPOConfig, GRPOTrainer

GROUP = 4
training_args = GRPOConfig(
    output_dir="out",
    importance_sampling_level="sequence",
    loss_type="grpo",
    beta=0.0,
    epsilon=3e-4,
    epsilon_high=4e-4,
    per_device_train_batch_size=2 * GROUP,
    gradient_accumulation_steps=1,
    steps_per_generation=4,
    num_generations=GROUP,
    max_completion_length=6,
    max_steps=10,
    warmup_steps=4,
    learning_rate=1e-3,
    lr_scheduler_type="constant_with_warmup",
    bf16=False,
    gradient_checkpointing=False,
    use_vllm=False,
    vllm_mode="colocate",
    made_up=1,
)
trainer = GRPOTrainer(model="some/model", args=training_args, reward_funcs=len, train_dataset=None)
