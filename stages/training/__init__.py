"""Ray Train and DeepSpeed under TRL's trainers: launch, feed, progress, export."""
