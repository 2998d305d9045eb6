"""The commands of `python -m pipeline_lib`: one file each."""
