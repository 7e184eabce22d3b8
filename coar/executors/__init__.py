"""Where work items run."""
