"""Makes transformers models of a config and a store; reads and writes their adapters in PEFT's files."""
