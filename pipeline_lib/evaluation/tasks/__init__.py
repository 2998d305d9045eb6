"""One file a task type; tasks of ours as YAML beside the code."""
