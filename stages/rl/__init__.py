"""Reinforcement learning from answers that a policy gives itself: what PPO is made of, and what GRPO and RLOO share with it."""
