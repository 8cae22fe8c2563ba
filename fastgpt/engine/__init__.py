"""What turns a model and batches into updates: one process, or DeepSpeed ZeRO."""
