"""Layers over int4 weights: linear with and without LoRA, embedding, head, and the loss over the head."""
