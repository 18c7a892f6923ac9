"""What each sub-command of ``mebp`` does: a file and a function ``run`` per command."""
