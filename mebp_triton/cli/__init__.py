"""The command ``mebp``. Importing this imports neither torch nor transformers."""
