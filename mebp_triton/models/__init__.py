"""From a config and a store to a transformers model, and its adapter in PEFT's files."""
