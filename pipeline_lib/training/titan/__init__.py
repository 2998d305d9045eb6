"""The adapter to torchtitan 0.2.2; nothing outside this folder imports it."""
