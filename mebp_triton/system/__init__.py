"""Files that survive a crash, mapped memory, and what this machine has: no model is known here."""
