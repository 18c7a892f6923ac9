"""Files that survive a crash, mapped memory, and what this machine has. Nothing here knows a model."""
