from trl import GRPOConfig
from unsloth import FastVisionModel

model, tokenizer = FastVisionModel.from_pretrained(model_name="some/vision-model", load_in_4bit=True)
model = FastVisionModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0)
training_args = GRPOConfig(
    learning_rate=5e-6,
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.1,
    warmup_ratio=0.1,
    lr_scheduler_type="cosine",
    optim="adamw_8bit",
    logging_steps=1,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=2,
    num_generations=4,
    max_prompt_length=1024,
    max_completion_length=512,
    max_steps=60,
    save_steps=30,
    max_grad_norm=0.1,
    report_to="none",
    output_dir="out",
    importance_sampling_level="sequence",
    mask_truncated_completions=False,
    loss_type="dr_grpo",
)
