"""Training runs: settings become a plan, the plan becomes steps, and the steps fill a run directory."""
