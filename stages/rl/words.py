"""What other tools call what these stages are told, and what to write here. (TRL's PPOConfig to 1.12 and PPOTrainer before it,
its GRPOConfig, and this project's own first page.)"""

from __future__ import annotations

REFERENCE = "the reference is the model that the stage was given"
MINI_BATCH = "a step is per_device_train_batch_size x gradient_accumulation_steps x workers answers"

COMMON = {
    "reward_model": "write `rewards: [stages.reward]`",
    "reward_models": "write `rewards: [stages.reward]`",
    "reward_model_path": "write `rewards: [stages.reward]` beside `train`",
    "reward_funcs": "write `rewards: [module:name]`",
    "reward_functions": "write `rewards: [module:name]`",
    "reward": "write `rewards: [stages.reward]`",
    "response_length": "write `max_new_tokens: 53` beside `train`",
    "max_new_tokens": "write it beside `train`",
    "max_prompt_length": "a prompt leaves room for `max_new_tokens` in the model's positions; one that does not is dropped",
    "max_length": "prompts have the model's positions, less `max_new_tokens`, which stands beside `train`",
    "sft_model_path": "write `model: stages.sft` beside `train`",
    "model_name": "write `model: stages.sft` beside `train`",
    "ref_model": REFERENCE,
    "ref_model_path": REFERENCE,
    "reference": REFERENCE,
    "reference_model": REFERENCE,
    "num_sample_generations": "write `samples: {every: 10, prompts: 8}` beside `train`",
    "stop_token": "an answer ends with a stop token of the model's generation config",
    "stop_token_id": "an answer ends with a stop token of the model's generation config",
    "local_rollout_forward_batch_size": "what has been answered is scored per_device_train_batch_size answers at a time",
    "batch_size": MINI_BATCH,
    "mini_batch_size": MINI_BATCH,
    "local_batch_size": MINI_BATCH,
    "local_mini_batch_size": MINI_BATCH,
    "ds3_gather_for_generation": "under ZeRO-3 weights are gathered while answers are sampled",
    "prompts": "write `data: [{path: prompts.jsonl}]`",
}
PPO = {
    "num_generations": "a prompt is answered once; kind: grpo compares several answers to it",
    "num_iterations": "write num_ppo_epochs",
    "steps_per_generation": "write num_mini_batches",
    "ppo_epochs": "write num_ppo_epochs",
    "epsilon": "write cliprange",
    "beta": "write kl_coef",
    "init_kl_coef": "write kl_coef",
    "target": "write kl_target",
    "adap_kl_ctrl": "write kl_target, which kl_coef is adapted to",
    "horizon": "write kl_horizon",
    "kl_penalty": "write kl_coef, and kl_estimator",
    "early_stopping": "write target_kl to leave out the rest of an iteration",
    "value_model_path": "write `value_model: stages.reward` beside `train`",
    "num_total_batches": "write total_episodes, which are answers",
    "learning_rate_value": "write value_learning_rate",
}
