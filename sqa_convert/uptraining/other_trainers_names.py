"""What a setting of other trainers is called in a recipe."""

from __future__ import annotations

_STEPS = "`tokens`: steps × sequence_length × batch_size"

_EPOCHS = "`tokens`: what the text holds, times the passes over it"

_PRECISION = "`precision`: auto, float32 or bfloat16"

_WARMUP = "`warmup`, a share of the steps"

_EVALUATIONS = "`evaluations`, how many there are in the run; each saves a checkpoint"

_MEASURING = "nothing: held-out text is measured in batches of its own"

_OPTIMIZER = "nothing: it is AdamW with betas 0.9 and 0.95, gradients clipped at norm 1"

_OTHERS: dict[str, tuple[str, ...]] = {
    "`learning_rate`": ("lr", "max_lr", "peak_lr", "base_lr", "peak_learning_rate", "step_size"),
    _EPOCHS: ("epoch", "epochs", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs"),
    _STEPS: (
        "steps", "max_steps", "num_steps", "train_steps", "max_train_steps", "total_steps", "max_iters", "iterations",
    ),
    "`tokens`": ("max_tokens", "num_tokens", "train_tokens", "n_tokens", "total_tokens"),
    _PRECISION: ("bf16", "fp16", "fp32", "tf32", "half", "amp", "autocast", "mixed_precision", "dtype", "torch_dtype"),
    "`sequence_length`": (
        "seq_len", "seq_length", "max_len", "max_length", "max_seq_len", "max_seq_length", "model_max_length",
        "block_size", "context_length", "max_source_length", "max_target_length", "max_input_length",
    ),
    "`batch_size`, of a step over all devices": ("batch", "bs", "global_batch_size", "total_batch_size"),
    "`micro_batch`; `batch_size` is that of a step over all devices": (
        "per_device_train_batch_size", "per_device_batch_size", "train_batch_size", "micro_batch_size",
    ),
    "`micro_batch`: gradients are accumulated until `batch_size` is reached": (
        "gradient_accumulation_steps", "gradient_accumulation", "grad_accum", "accumulate_grad_batches",
    ),
    _MEASURING: ("per_device_eval_batch_size", "eval_batch_size"),
    _WARMUP: ("warmup_steps", "warmup_ratio", "num_warmup_steps", "warmup_iters"),
    "`schedule`": ("lr_scheduler_type", "lr_scheduler", "lr_schedule", "scheduler", "decay"),
    _EVALUATIONS: (
        "eval_steps", "save_steps", "eval_interval", "save_interval", "eval_strategy", "evaluation_strategy",
        "save_strategy", "save_total_limit",
    ),
    "`patience`": ("early_stopping_patience", "early_stopping"),
    "nothing: the best measurement is kept": ("load_best_model_at_end", "metric_for_best_model"),
    _OPTIMIZER: (
        "optim", "optimizer", "betas", "beta1", "beta2", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "grad_clip", "clip_grad_norm", "gradient_clipping",
    ),
    "`weight_decay`": ("wd", "l2"),
    "`data`: a file, a folder, or ID[:CONFIG] of a data set on the hub": (
        "dataset", "datasets", "dataset_name", "dataset_config", "dataset_config_name", "dataset_path", "data_path",
        "data_dir", "train_file", "train_data", "train_dataset", "corpus", "text",
    ),
    "`text_column`": ("text_field", "text_key", "text_column_name", "dataset_text_field"),
    "`source_column`": ("input_column", "prompt_column", "question_column", "text_source"),
    "`target_column`": ("label_column", "output_column", "answer_column", "summary_column", "completion_column"),
    "`prefix`": ("source_prefix", "prompt_prefix"),
    "`lora_rank`": ("lora", "lora_r", "rank", "peft"),
    "nothing: it is twice `lora_rank`": ("lora_alpha",),
    "`compile`": ("torch_compile",),
    "`gradient_checkpointing`": ("activation_checkpointing",),
    "`loss` (kl, ce, mix) and `ce_weight`": (
        "alpha", "kd_weight", "kd_alpha", "distill_weight", "objective", "loss_type",
    ),
    "nothing: the divergence is taken at temperature 1": ("temperature", "kd_temperature"),
    "nothing: dropout is off": ("dropout", "attention_dropout"),
    "`report_to`": ("wandb", "tensorboard", "trackers", "logger", "logging_dir", "run_name", "log_with"),
    "the flag --device": ("device", "use_cpu", "no_cuda"),
    "the flag --source": ("teacher", "teacher_model", "source"),
    "the flag --output": ("output", "output_dir", "out", "save_dir"),
    "the flag --resume": ("resume", "resume_from_checkpoint"),
    "the flag --push-to-hub": ("push_to_hub", "hub_model_id"),
    "the argument FOLDER": ("model", "model_name", "model_name_or_path", "model_path"),
    "the flags --q-groups and --kv-groups of sqa-convert": ("q_groups", "kv_groups", "num_key_value_heads"),
}  # fmt: skip

HINTS = {name: hint for hint, names in _OTHERS.items() for name in names}
"""by the other's name"""
